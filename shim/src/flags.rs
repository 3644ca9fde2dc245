//! The command line, in the syntax of Go's `flag` package: one dash or two, `-x v` or `-x=v`.

use std::path::PathBuf;

use anyhow::{Result, bail};

/// What this call is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Action {
    /// Serve the Task API on the socket that is descriptor 3.
    #[default]
    Serve,
    /// Find or start the daemon for a container and print its address.
    Start,
    /// Remove what a dead daemon left of a container.
    Delete,
    /// Describe the runtime.
    Info,
    /// Print the version.
    Version,
}

/// What containerd gives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Flags {
    pub(crate) action: Action,
    /// containerd's namespace of the container.
    pub(crate) namespace: String,
    /// containerd's gRPC address.
    pub(crate) address: String,
    /// The containerd program.
    pub(crate) publish_binary: String,
    /// The container.
    pub(crate) id: String,
    /// The bundle, for `delete`.
    pub(crate) bundle: PathBuf,
    /// Where the shim's program is, for the daemon, which runs from a clone of it.
    pub(crate) program: PathBuf,
    /// Log more.
    pub(crate) debug: bool,
}

impl Flags {
    /// Parses the arguments after the program's name.
    ///
    /// # Errors
    /// Unknown flags, missing values, and a missing namespace or id.
    pub(crate) fn parse(mut args: impl Iterator<Item = String>) -> Result<Self> {
        let mut flags = Self::default();
        let mut info = None;
        let mut action = None;
        while let Some(arg) = args.next() {
            let Some(name) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')).filter(|name| !name.is_empty())
            else {
                action = Some(arg);
                break;
            };
            let (name, value) = match name.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (name, None),
            };
            match name {
                "debug" => flags.debug = is_true(name, value)?,
                "v" | "version" if is_true(name, value.clone())? => info = Some(Action::Version),
                "info" if is_true(name, value.clone())? => info = info.or(Some(Action::Info)),
                "v" | "version" | "info" => {}
                _ => {
                    let target = match name {
                        "namespace" => &mut flags.namespace,
                        "address" => &mut flags.address,
                        "publish-binary" => &mut flags.publish_binary,
                        "id" => &mut flags.id,
                        "bundle" | "program" => {
                            let path = take(name, value, &mut args)?.into();
                            *if name == "bundle" { &mut flags.bundle } else { &mut flags.program } = path;
                            continue;
                        }
                        _ => bail!("flag provided but not defined: -{name}"),
                    };
                    *target = take(name, value, &mut args)?;
                }
            }
        }
        flags.action = match (info, action.as_deref()) {
            (Some(info), _) => info,
            (None, Some("start")) => Action::Start,
            (None, Some("delete")) => Action::Delete,
            (None, None) => Action::Serve,
            (None, Some(other)) => bail!("unknown command {other:?}"),
        };
        if info.is_none() {
            if flags.namespace.is_empty() {
                bail!("shim namespace cannot be empty");
            }
            if flags.id.is_empty() {
                bail!("shim id cannot be empty");
            }
            // Both become names of directories.
            for (what, text) in [("namespace", &flags.namespace), ("id", &flags.id)] {
                if text.contains('/') || text == "." || text == ".." {
                    bail!("shim {what} {text:?} is not a plain name");
                }
            }
        }
        Ok(flags)
    }

    /// Where the state of this namespace's containers is.
    pub(crate) fn state_root(&self) -> PathBuf {
        PathBuf::from("/run/containerd/runx").join(&self.namespace)
    }
}

fn take(name: &str, value: Option<String>, args: &mut impl Iterator<Item = String>) -> Result<String> {
    match value.or_else(|| args.next()) {
        Some(value) => Ok(value),
        None => bail!("flag needs an argument: -{name}"),
    }
}

fn is_true(name: &str, value: Option<String>) -> Result<bool> {
    match value.as_deref() {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some(other) => bail!("invalid boolean value {other:?} for -{name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Flags> {
        Flags::parse(line.split(' ').map(str::to_owned))
    }

    #[test]
    fn containerds_calls_are_understood() {
        let flags =
            parse("-namespace k8s.io --address=/run/c.sock -publish-binary /usr/bin/containerd -id a -debug start");
        let flags = flags.unwrap();
        assert_eq!((flags.action, flags.debug), (Action::Start, true));
        assert_eq!((flags.namespace.as_str(), flags.address.as_str()), ("k8s.io", "/run/c.sock"));
        let flags = parse("-namespace n -id a -bundle /b delete").unwrap();
        assert_eq!((flags.action, flags.bundle.as_path()), (Action::Delete, std::path::Path::new("/b")));
        assert_eq!(parse("-info").unwrap().action, Action::Info);
        assert_eq!(parse("-v").unwrap().action, Action::Version);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, word) in [
            ("-nope -id a start", "nope"),
            ("-id a start", "namespace"),
            ("-namespace n start", "id"),
            ("-namespace n -id", "needs an argument"),
            ("-namespace n -id a stop", "stop"),
            ("-namespace n -id ../a start", "plain name"),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains(word), "{line}: {error}");
        }
    }
}
