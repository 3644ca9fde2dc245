//! An OCI bundle: a directory with a config.json and, usually, a root filesystem.
//!
//! What config.json asks for takes effect or is refused here, before anything is made.

use std::any::Any;
use std::fs;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{Linux, LinuxNamespaceType, LinuxResources, Process, Spec};

use crate::container::{net_devices, users};
use crate::error::{Context, Error, Result};
use crate::{mount_options, tolerance};

/// No honest config.json comes near this size in bytes; a hostile one shall not fill the memory.
const SIZE_LIMIT: u64 = 64 << 20;

/// A bundle whose config.json has been read and checked.
#[derive(Debug)]
pub struct Bundle {
    path: PathBuf,
    spec: Spec,
}

impl Bundle {
    /// Reads `config.json` below `path` and checks it.
    ///
    /// # Errors
    /// [`Error::InvalidSpec`] and [`Error::Unsupported`] name the field; system errors the file.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = fs::canonicalize(path.as_ref()).on("find bundle", path.as_ref())?;
        let spec = parse_file(&path.join("config.json"))?;
        Self::new(path, spec)
    }

    /// Checks a configuration that is at hand; `path` is the absolute one of its bundle.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn new(path: PathBuf, spec: Spec) -> Result<Self> {
        let bundle = Self { path, spec };
        bundle.check()?;
        Ok(bundle)
    }

    /// The bundle's absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The configuration.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The container's first process.
    ///
    /// # Errors
    /// When config.json has none.
    pub fn process(&self) -> Result<&Process> {
        self.spec.process().as_ref().ok_or_else(|| Error::spec("process is missing"))
    }

    /// The Linux part.
    ///
    /// # Errors
    /// When config.json has none.
    pub fn linux(&self) -> Result<&Linux> {
        self.spec.linux().as_ref().ok_or_else(|| Error::spec("linux is missing"))
    }

    /// The absolute path of the root filesystem.
    ///
    /// # Errors
    /// When config.json has none.
    pub fn rootfs(&self) -> Result<PathBuf> {
        let root = self.spec.root().as_ref().ok_or_else(|| Error::spec("root is missing"))?;
        if root.path().as_os_str().is_empty() {
            return Err(Error::spec("root.path is empty"));
        }
        Ok(self.path.join(root.path()))
    }

    /// Whether a namespace of this kind is in the configuration.
    pub fn has_namespace(&self, kind: LinuxNamespaceType) -> bool {
        self.spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.namespaces().as_ref())
            .is_some_and(|list| list.iter().any(|namespace| namespace.typ() == kind))
    }

    /// Whether the container gets a new namespace of this kind.
    pub fn has_new_namespace(&self, kind: LinuxNamespaceType) -> bool {
        self.spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref()).is_some_and(|list| {
            list.iter().any(|namespace| namespace.typ() == kind && empty_path(namespace.path().as_deref()))
        })
    }

    fn check(&self) -> Result<()> {
        check_version(self.spec.version())?;
        let process = self.process()?;
        check_process(process)?;
        let rootfs = self.rootfs()?;
        if !fs::metadata(&rootfs).on("find root.path", &rootfs)?.is_dir() {
            return Err(Error::spec(format!("root.path {} is not a directory", rootfs.display())));
        }
        self.check_namespaces()?;
        self.check_mounts()?;
        self.check_sysctl()?;
        net_devices::check(self)
    }

    fn check_namespaces(&self) -> Result<()> {
        let mut seen = Vec::new();
        for namespace in self.linux()?.namespaces().iter().flatten() {
            let kind = namespace.typ();
            if seen.contains(&kind) {
                return Err(Error::spec(format!("linux.namespaces names {kind} twice")));
            }
            seen.push(kind);
        }
        if !self.has_namespace(LinuxNamespaceType::Mount) {
            return Err(Error::unsupported(
                "a container without a mount namespace",
                "its mounts would appear on the host: add {\"type\": \"mount\"} to linux.namespaces",
            ));
        }
        self.check_user_namespace()?;
        self.check_time_namespace()?;
        let private_uts = self.has_namespace(LinuxNamespaceType::Uts);
        for (field, value) in [("hostname", self.spec.hostname()), ("domainname", self.spec.domainname())] {
            if value.as_deref().is_some_and(|name| !name.is_empty()) && !private_uts {
                return Err(Error::spec(format!("{field} is set without a private UTS namespace")));
            }
        }
        Ok(())
    }

    fn check_user_namespace(&self) -> Result<()> {
        let linux = self.linux()?;
        for (field, mappings) in
            [("linux.uidMappings", linux.uid_mappings()), ("linux.gidMappings", linux.gid_mappings())]
        {
            let mappings = mappings.as_deref().unwrap_or_default();
            users::check(field, mappings)?;
            if mappings.is_empty() && self.has_new_namespace(LinuxNamespaceType::User) {
                return Err(Error::spec(format!("a new user namespace is asked for and {field} is empty")));
            }
            if !mappings.is_empty() && !self.has_namespace(LinuxNamespaceType::User) {
                return Err(Error::spec(format!("{field} is set without a user namespace")));
            }
        }
        Ok(())
    }

    fn check_time_namespace(&self) -> Result<()> {
        for (clock, offset) in self.linux()?.time_offsets().iter().flatten() {
            if !self.has_new_namespace(LinuxNamespaceType::Time) {
                return Err(Error::spec("linux.timeOffsets is set without a new time namespace"));
            }
            if !matches!(clock.as_str(), "monotonic" | "boottime") {
                return Err(Error::spec(format!("linux.timeOffsets: {clock:?} is neither monotonic nor boottime")));
            }
            if offset.nanosecs().is_some_and(|nanosecs| nanosecs >= 1_000_000_000) {
                return Err(Error::spec(format!("linux.timeOffsets: nanosecs of {clock} are a second or more")));
            }
        }
        Ok(())
    }

    fn check_mounts(&self) -> Result<()> {
        for mount in self.spec.mounts().iter().flatten() {
            let destination = mount.destination();
            if destination.as_os_str().is_empty() {
                return Err(Error::spec("a mount has no destination"));
            }
            if destination.components().any(|part| part == Component::ParentDir) {
                return Err(Error::spec(format!("mount destination {} contains \"..\"", destination.display())));
            }
            for (name, list) in [("uidMappings", mount.uid_mappings()), ("gidMappings", mount.gid_mappings())] {
                let list = list.as_deref().unwrap_or_default();
                users::check(&format!("{name} of mount {}", destination.display()), list)?;
            }
            let options = mount.options().as_deref().unwrap_or_default();
            let bound = options.iter().any(|option| option == "bind" || option == "rbind");
            check_mount_in_proc(destination, mount.typ().as_deref(), bound)?;
        }
        if let Some(word) = self.linux()?.rootfs_propagation().as_deref()
            && !word.is_empty()
            && mount_options::propagation(word).is_none()
        {
            return Err(Error::spec(format!("linux.rootfsPropagation {word:?} is not a propagation")));
        }
        Ok(())
    }

    /// A parameter that belongs to no namespace of the container would change the host.
    fn check_sysctl(&self) -> Result<()> {
        const IPC: &[&str] = &[
            "kernel.msgmax",
            "kernel.msgmnb",
            "kernel.msgmni",
            "kernel.sem",
            "kernel.shmall",
            "kernel.shmmax",
            "kernel.shmmni",
            "kernel.shm_rmid_forced",
        ];
        for (key, value) in self.linux()?.sysctl().iter().flatten() {
            let key = sysctl_path(key)?.join(".");
            let needed = if IPC.contains(&key.as_str()) || key.starts_with("fs.mqueue.") {
                LinuxNamespaceType::Ipc
            } else if key.starts_with("net.") {
                LinuxNamespaceType::Network
            } else if key.starts_with("user.") {
                LinuxNamespaceType::User
            } else if key == "kernel.domainname" || key == "kernel.hostname" {
                LinuxNamespaceType::Uts
            } else {
                return Err(Error::spec(format!("sysctl {key:?} is not in a separate kernel namespace")));
            };
            if !self.has_namespace(needed) {
                return Err(Error::spec(format!("sysctl {key:?} is not allowed without a private {needed} namespace")));
            }
            let named = match key.as_str() {
                "kernel.hostname" => ("hostname", self.spec.hostname()),
                "kernel.domainname" => ("domainname", self.spec.domainname()),
                _ => continue,
            };
            // The one that is set last would win without a word.
            if let (field, Some(name)) = named
                && !name.is_empty()
                && name != value
            {
                return Err(Error::spec(format!("sysctl {key:?} is {value:?} and {field} is {name:?}: leave one out")));
            }
        }
        Ok(())
    }
}

/// The names of the directories and the file of a kernel parameter, below /proc/sys. As sysctl(8) has it, the
/// separator that comes first separates, and in a key with dots a slash stands for a dot within a name:
/// `net.ipv4.conf.eth0/1.forwarding`.
///
/// # Errors
/// For a name that is empty or would lead elsewhere.
pub(crate) fn sysctl_path(key: &str) -> Result<Vec<String>> {
    let slashes = key.find('/').is_some_and(|slash| key.find('.').is_none_or(|dot| slash < dot));
    let names: Vec<String> = if slashes {
        key.split('/').map(str::to_owned).collect()
    } else {
        key.split('.').map(|name| name.replace('/', ".")).collect()
    };
    if names.iter().any(|name| matches!(name.as_str(), "" | "." | "..")) {
        return Err(Error::spec(format!("sysctl {key:?} is not the name of a kernel parameter")));
    }
    Ok(names)
}

/// Whether a namespace's path says "a new one".
pub(crate) fn empty_path(path: Option<&Path>) -> bool {
    path.is_none_or(|path| path.as_os_str().is_empty())
}

/// Reads a JSON document of the runtime-spec. Properties that nobody knows are ignored, as the
/// specification asks, with a word in the log.
pub fn parse_file<T: serde::de::DeserializeOwned + 'static>(path: &Path) -> Result<T> {
    let file = fs::File::open(path).on("open", path)?;
    let mut text = Vec::new();
    file.take(SIZE_LIMIT + 1).read_to_end(&mut text).on("read", path)?;
    if text.len() as u64 > SIZE_LIMIT {
        return Err(Error::InvalidSpec {
            document: path.display().to_string(),
            reason: format!("it is larger than {} MiB", SIZE_LIMIT >> 20),
        });
    }
    parse(&text, &path.display().to_string())
}

/// As [`parse_file`], for a document that is at hand; `name` appears in errors.
pub fn parse<T: serde::de::DeserializeOwned + 'static>(text: &[u8], name: &str) -> Result<T> {
    refuse_nul(text, name)?;
    let mut reader = serde_json::Deserializer::from_slice(text);
    let parsed = typed(&mut reader, name).and_then(|value| reader.end().map(|()| value));
    let mut value: T = parsed.or_else(|error| {
        let invalid = |e: serde_json::Error| Error::InvalidSpec { document: name.to_owned(), reason: e.to_string() };
        let Ok(mut document) = serde_json::from_slice(text) else { return Err(invalid(error)) };
        if !tolerance::correct(&mut document) {
            return Err(invalid(error));
        }
        typed(document, name).map_err(invalid)
    })?;
    let any: &mut dyn Any = &mut value;
    if let Some(resources) = any.downcast_mut::<LinuxResources>() {
        forget_absent_pids(resources, text, "/pids/limit");
    } else if let Some(spec) = any.downcast_mut::<Spec>()
        && let Some(resources) = spec.linux_mut().as_mut().and_then(|linux| linux.resources_mut().as_mut())
    {
        forget_absent_pids(resources, text, "/linux/resources/pids/limit");
    }
    Ok(value)
}

/// The kernel's calls end at a NUL, and what was checked before would not be what they get.
fn refuse_nul(text: &[u8], name: &str) -> Result<()> {
    const ESCAPED: &[u8] = b"\\u0000";
    if !text.windows(ESCAPED.len()).any(|window| window == ESCAPED) {
        return Ok(());
    }
    // It may be a backslash before ordinary letters. What is no document is reported by those who read it.
    let Ok(document) = serde_json::from_slice::<serde_json::Value>(text) else { return Ok(()) };
    match place_of_nul(&document) {
        Some(place) => {
            Err(Error::InvalidSpec { document: name.to_owned(), reason: format!("{place} holds a NUL byte") })
        }
        None => Ok(()),
    }
}

/// Where a text with a NUL byte is, as a path of names.
fn place_of_nul(value: &serde_json::Value) -> Option<String> {
    use serde_json::Value;
    let below = |name: String, value: &Value| {
        place_of_nul(value).map(|place| if place.is_empty() { name.clone() } else { format!("{name}.{place}") })
    };
    match value {
        Value::String(text) => text.contains('\0').then(String::new),
        Value::Array(list) => list.iter().enumerate().find_map(|(n, value)| below(n.to_string(), value)),
        Value::Object(fields) => fields.iter().find_map(|(name, value)| {
            if name.contains('\0') { Some(format!("{name:?}")) } else { below(name.clone(), value) }
        }),
        _ => None,
    }
}

fn typed<'de, T, D>(document: D, name: &str) -> std::result::Result<T, D::Error>
where
    T: serde::de::DeserializeOwned,
    D: serde::Deserializer<'de>,
{
    serde_ignored::deserialize(document, |property| {
        log::debug!("{name}: unknown property {property} is ignored");
    })
}

/// `pids` without a limit says nothing, while a limit of 0 is one. The parsed form has 0 for both.
fn forget_absent_pids(resources: &mut LinuxResources, text: &[u8], limit: &str) {
    if resources.pids().is_some_and(|pids| pids.limit() == 0)
        && let Ok(whole) = serde_json::from_slice::<serde_json::Value>(text)
        && whole.pointer(limit).is_none_or(serde_json::Value::is_null)
    {
        resources.set_pids(None);
    }
}

fn check_version(version: &str) -> Result<()> {
    let mut numbers = version.split(['.', '-', '+']);
    let number = |text: Option<&str>| text.and_then(|text| text.parse::<u32>().ok());
    match (number(numbers.next()), number(numbers.next()), number(numbers.next())) {
        (Some(1), Some(_), Some(_)) => Ok(()),
        (Some(_), Some(_), Some(_)) => {
            Err(Error::unsupported(format!("ociVersion {version:?}"), "only version 1 of the runtime-spec is known"))
        }
        _ => Err(Error::spec(format!("ociVersion {version:?} is not a version"))),
    }
}

/// Checks a process description, of config.json or of an exec.
pub fn check_process(process: &Process) -> Result<()> {
    let args = process.args().as_deref().unwrap_or_default();
    if args.first().is_none_or(String::is_empty) {
        return Err(Error::spec("process.args is empty"));
    }
    if !process.cwd().is_absolute() {
        return Err(Error::spec(format!("process.cwd {:?} is not an absolute path", process.cwd())));
    }
    if let Some(adjustment) = process.oom_score_adj()
        && !(-1000..=1000).contains(&adjustment)
    {
        return Err(Error::spec(format!("process.oomScoreAdj {adjustment} is not between -1000 and 1000")));
    }
    let mut limits = Vec::new();
    for limit in process.rlimits().iter().flatten() {
        if limits.contains(&limit.typ()) {
            return Err(Error::spec(format!("process.rlimits names {} twice", limit.typ())));
        }
        limits.push(limit.typ());
    }
    Ok(())
}

/// Mounts inside /proc could fake what runtimes and programs read there (CVE-2019-16884); those that
/// tools such as lxcfs need are let through.
fn check_mount_in_proc(destination: &Path, kind: Option<&str>, bound: bool) -> Result<()> {
    const ALLOWED: &[&str] = &[
        "/proc/cpuinfo",
        "/proc/diskstats",
        "/proc/meminfo",
        "/proc/stat",
        "/proc/swaps",
        "/proc/uptime",
        "/proc/loadavg",
        "/proc/slabinfo",
        "/proc/net/dev",
        "/proc/sys/kernel/ns_last_pid",
        "/proc/sys/crypto/fips_enabled",
    ];
    // Destinations may be written without the leading slash.
    let clean: PathBuf = Path::new("/").join(destination).components().collect();
    if !clean.starts_with("/proc") || ALLOWED.iter().any(|path| clean == Path::new(path)) {
        return Ok(());
    }
    // A bind mount's option makes it one, whatever its type is called: engines that share the host's processes with a
    // container say "none".
    if clean == Path::new("/proc") && (bound || matches!(kind, None | Some("" | "proc" | "bind"))) {
        return Ok(());
    }
    Err(Error::spec(format!("{} cannot be mounted because it is inside /proc", clean.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_the_first_major_are_accepted() {
        for good in ["1.0.0", "1.0.2-dev", "1.2.1", "1.3.0+dev"] {
            assert!(check_version(good).is_ok(), "{good}");
        }
        for bad in ["", "1", "2.0.0", "x.y.z"] {
            assert!(check_version(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn mounts_over_parts_of_proc_are_refused() {
        assert!(check_mount_in_proc(Path::new("/proc"), Some("proc"), false).is_ok());
        assert!(check_mount_in_proc(Path::new("/proc/meminfo"), Some("bind"), false).is_ok());
        assert!(check_mount_in_proc(Path::new("/process"), Some("bind"), false).is_ok());
        for bad in ["/proc/self/attr", "/proc/sys", "proc/1", "/proc//sys"] {
            assert!(check_mount_in_proc(Path::new(bad), Some("tmpfs"), false).is_err(), "{bad}");
        }
        assert!(check_mount_in_proc(Path::new("/proc"), Some("tmpfs"), false).is_err());
        assert!(check_mount_in_proc(Path::new("/proc"), Some("none"), false).is_err());
        assert!(check_mount_in_proc(Path::new("/proc"), Some("none"), true).is_ok());
        assert!(check_mount_in_proc(Path::new("/proc/sys"), Some("none"), true).is_err());
    }

    #[test]
    fn kernel_parameters_are_named_with_either_separator_and_lead_nowhere_else() {
        assert_eq!(sysctl_path("net.core.somaxconn").unwrap(), ["net", "core", "somaxconn"]);
        assert_eq!(sysctl_path("net/ipv4/conf/eth0.1/x").unwrap(), ["net", "ipv4", "conf", "eth0.1", "x"]);
        assert_eq!(sysctl_path("net.ipv4.conf.eth0/1.x").unwrap(), ["net", "ipv4", "conf", "eth0.1", "x"]);
        for bad in ["net/../kernel/core_pattern", "net.//.x", "", "net..x", "../kernel", "net...kernel"] {
            assert!(sysctl_path(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn no_limit_on_processes_is_told_from_a_limit_of_none() {
        let limit =
            |text: &str| parse::<LinuxResources>(text.as_bytes(), "update").unwrap().pids().map(|pids| pids.limit());
        assert_eq!(limit(r#"{"pids": {}}"#), None);
        assert_eq!(limit(r#"{"pids": {"limit": 0}}"#), Some(0));
        assert_eq!(limit(r#"{"pids": {"limit": -1}}"#), Some(-1));
        assert_eq!(limit("{}"), None);
    }

    #[test]
    fn a_malformed_document_is_named_with_the_place_of_the_mistake() {
        let error = parse::<Spec>(b"{\"ociVersion\": \"1.0.0\",", "config.json").unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains("line 1"), "{error}");
        assert!(parse::<Spec>("[".repeat(100_000).as_bytes(), "config.json").is_err());
    }
}
