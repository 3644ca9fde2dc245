//! The options of a mount, as fstab(5) writes them and the runtime-spec's table of Linux mount options
//! sorts them.

mod bind;

use crate::error::{Error, Result};
use crate::sys::mount::attr;
pub use bind::BindAttributes;

/// Options, sorted by the call that sets them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// A bind mount: `Some(true)` with everything below it.
    pub bind: Option<bool>,
    /// `MOUNT_ATTR_*` to set on the mount.
    pub set: u64,
    /// `MOUNT_ATTR_*` to clear on the mount.
    pub clear: u64,
    /// Access times are asked for, and not only some not to be.
    pub times: bool,
    /// `MOUNT_ATTR_*` to set on the mount and all below it.
    pub recursive_set: u64,
    /// `MOUNT_ATTR_*` to clear on the mount and all below it.
    pub recursive_clear: u64,
    /// Id-mapped: `Some(true)` with everything below it.
    pub id_map: Option<bool>,
    /// A new tmpfs is filled with what lies below it.
    pub copy_up: bool,
    /// `MS_*` propagation flags in the order given.
    pub propagation: Vec<u64>,
    /// What is left for the filesystem itself.
    pub data: Vec<(String, Option<String>)>,
}

/// Attribute options: name, whether it sets or clears, and the attribute.
const ATTRIBUTES: &[(&str, bool, u64)] = &[
    ("ro", true, attr::RDONLY),
    ("rw", false, attr::RDONLY),
    ("nosuid", true, attr::NOSUID),
    ("suid", false, attr::NOSUID),
    ("nodev", true, attr::NODEV),
    ("dev", false, attr::NODEV),
    ("noexec", true, attr::NOEXEC),
    ("exec", false, attr::NOEXEC),
    ("nodiratime", true, attr::NODIRATIME),
    ("diratime", false, attr::NODIRATIME),
    ("nosymfollow", true, attr::NOSYMFOLLOW),
    ("symfollow", false, attr::NOSYMFOLLOW),
];

/// Access time options share one field: name, whether it asks for a value or not to have it, and the value.
const ACCESS_TIMES: &[(&str, bool, u64)] = &[
    ("noatime", true, attr::NOATIME),
    ("atime", false, attr::NOATIME),
    ("relatime", true, 0),
    ("norelatime", false, 0),
    ("strictatime", true, attr::STRICTATIME),
    ("nostrictatime", false, attr::STRICTATIME),
];

const PROPAGATION: &[(&str, u64)] = &[
    ("private", libc::MS_PRIVATE),
    ("rprivate", libc::MS_PRIVATE | libc::MS_REC),
    ("slave", libc::MS_SLAVE),
    ("rslave", libc::MS_SLAVE | libc::MS_REC),
    ("shared", libc::MS_SHARED),
    ("rshared", libc::MS_SHARED | libc::MS_REC),
    ("unbindable", libc::MS_UNBINDABLE),
    ("runbindable", libc::MS_UNBINDABLE | libc::MS_REC),
];

/// Options of the runtime-spec that this version refuses, with the reason.
const REFUSED: &[(&str, &str)] = &[("remount", "a container's mounts are new, so there is nothing to remount")];

/// What is known besides attributes and propagation. Those from `sync` on are the filesystem's.
const OTHERS: &[&str] = &[
    "bind",
    "rbind",
    "defaults",
    "idmap",
    "ridmap",
    "tmpcopyup",
    "async",
    "silent",
    "loud",
    "nomand",
    "nolazytime",
    "noiversion",
    "sync",
    "dirsync",
    "lazytime",
    "mand",
    "iversion",
];

/// The `MS_*` propagation that a word such as `rslave` stands for.
pub fn propagation(word: &str) -> Option<u64> {
    PROPAGATION.iter().find(|(name, _)| *name == word).map(|(_, flags)| *flags)
}

/// Every option that is not left to the filesystem, sorted.
pub fn known() -> Vec<String> {
    let attributes = ATTRIBUTES.iter().map(|(name, ..)| *name).chain(ACCESS_TIMES.iter().map(|(name, ..)| *name));
    let mut all: Vec<String> = attributes
        .flat_map(|name| [name.to_owned(), format!("r{name}")])
        .chain(PROPAGATION.iter().map(|(name, _)| (*name).to_owned()))
        .chain(OTHERS.iter().map(|name| (*name).to_owned()))
        .collect();
    all.sort_unstable();
    all
}

impl MountOptions {
    /// Sorts the options of the mount at `destination`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an option of the runtime-spec without effect here.
    pub fn parse<S: AsRef<str>>(options: &[S], destination: &str) -> Result<Self> {
        let mut sorted = Self::default();
        for option in options {
            sorted.add(option.as_ref(), destination)?;
        }
        Ok(sorted)
    }

    /// What a bind mount makes of its source's attributes.
    pub fn of_bind(&self) -> BindAttributes {
        BindAttributes { set: self.set, clear: self.clear, times: self.times || self.set & attr::NODIRATIME != 0 }
    }

    fn add(&mut self, option: &str, destination: &str) -> Result<()> {
        if let Some((name, why)) = REFUSED.iter().find(|(name, _)| *name == option.split('=').next().unwrap_or(option))
        {
            return Err(Error::unsupported(format!("mount option {name:?} of {destination}"), *why));
        }
        match option {
            "" | "defaults" => {}
            "bind" => self.bind = Some(self.bind.unwrap_or(false)),
            "rbind" => self.bind = Some(true),
            "idmap" => self.id_map = Some(self.id_map.unwrap_or(false)),
            "ridmap" => self.id_map = Some(true),
            "tmpcopyup" => self.copy_up = true,
            // What every mount is unless another option says otherwise.
            "async" | "silent" | "loud" | "nomand" | "nolazytime" | "noiversion" => {}
            _ => {
                if let Some(flags) = propagation(option) {
                    self.propagation.push(flags);
                } else if !self.add_attribute(option, false) {
                    let recursive = option.strip_prefix('r').is_some_and(|rest| self.add_attribute(rest, true));
                    if !recursive {
                        let (key, value) = match option.split_once('=') {
                            Some((key, value)) => (key, Some(value.to_owned())),
                            None => (option, None),
                        };
                        self.data.push((key.to_owned(), value));
                    }
                }
            }
        }
        Ok(())
    }

    fn add_attribute(&mut self, option: &str, recursive: bool) -> bool {
        let (set, clear) = if recursive {
            (&mut self.recursive_set, &mut self.recursive_clear)
        } else {
            (&mut self.set, &mut self.clear)
        };
        if let Some((_, sets, attribute)) = ATTRIBUTES.iter().find(|(name, ..)| *name == option) {
            // The last word wins, as for mount(8).
            if *sets {
                *set |= attribute;
                *clear &= !attribute;
            } else {
                *clear |= attribute;
                *set &= !attribute;
            }
            return true;
        }
        if let Some((_, asks, value)) = ACCESS_TIMES.iter().find(|(name, ..)| *name == option) {
            *clear |= attr::ATIME_MASK;
            if *asks || *set & attr::ATIME_MASK == *value {
                *set = (*set & !attr::ATIME_MASK) | if *asks { *value } else { 0 };
                self.times = if recursive { self.times } else { *asks };
            }
            return true;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> MountOptions {
        MountOptions::parse(words, "/x").unwrap()
    }

    #[test]
    fn the_last_of_two_contrary_options_wins() {
        assert_eq!(parse(&["ro", "rw"]).set & attr::RDONLY, 0);
        let options = parse(&["rw", "ro"]);
        assert_eq!((options.set & attr::RDONLY, options.clear & attr::RDONLY), (attr::RDONLY, 0));
    }

    #[test]
    fn not_to_have_one_kind_of_access_times_takes_no_other_away() {
        let options = parse(&["noatime", "norelatime", "nostrictatime"]);
        assert_eq!((options.set & attr::ATIME_MASK, options.times), (attr::NOATIME, true));
        for words in [&["noatime", "atime"], &["relatime", "norelatime"], &["strictatime", "nostrictatime"]] {
            let options = parse(words);
            assert_eq!((options.set & attr::ATIME_MASK, options.times), (0, false), "{words:?}");
        }
    }

    #[test]
    fn recursive_attributes_are_kept_apart() {
        let options = parse(&["rbind", "rro", "nosuid"]);
        assert_eq!(options.bind, Some(true));
        assert_eq!(options.recursive_set, attr::RDONLY);
        assert_eq!(options.set, attr::NOSUID);
    }

    #[test]
    fn what_is_not_an_attribute_goes_to_the_filesystem() {
        let options = parse(&["mode=755", "newinstance", "size=65536k"]);
        let expected = [("mode", Some("755")), ("newinstance", None), ("size", Some("65536k"))];
        let got: Vec<_> = options.data.iter().map(|(k, v)| (k.as_str(), v.as_deref())).collect();
        assert_eq!(got, expected);
    }

    #[test]
    fn options_without_effect_are_refused_by_name() {
        let error = MountOptions::parse(&["remount"], "/tmp").unwrap_err().to_string();
        assert!(error.contains("remount") && error.contains("/tmp"), "{error}");
    }
}
