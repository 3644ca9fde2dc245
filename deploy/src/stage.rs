//! The programs on the node: each set of them in a directory named after its digest, and a link that leads to one.
//!
//! A shim is executed anew for each pod, so the link is all that an upgrade changes; containerd knows nothing of it. Shims
//! that run hold a lock on a file beside them (`shim/src/daemon.rs`), and find the programs there: a set stays as long
//! as one of its shims does. That file is never replaced, the programs are if they are damaged.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

use crate::root::Root;

/// The program that containerd starts.
pub(crate) const SHIM: &str = "containerd-shim-runx-v1";

/// This program's file name.
const INSTALLER: &str = "runx-node";

/// The link to the set that new pods get.
pub(crate) const CURRENT: &str = "current";

/// Beside the programs: see [`Stage::options`].
const OPTIONS: &str = "systemd-cgroup.toml";

/// Beside the programs: what shims that run have a lock on.
const LOCK: &str = ".runx-lock";

const VERSIONS: &str = "versions";

/// A set that is being copied.
const NEW: &str = ".new";

/// A shim takes its lock this long after it was executed, at the latest: the link may have changed in between.
const GRACE: Duration = Duration::from_secs(60);

/// A set of programs as it came, and its digest.
#[derive(Debug)]
pub(crate) struct Programs {
    directory: PathBuf,
    files: BTreeMap<String, String>,
    /// The SHA-256 of the names and digests of all files.
    pub(crate) digest: String,
}

/// A set on the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Version {
    /// Its digest, which is its name.
    pub(crate) digest: String,
    /// Whether new pods get it.
    pub(crate) current: bool,
    /// Whether a shim of it runs.
    pub(crate) in_use: bool,
}

/// The SHA-256 of bytes, in hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn digest_of(mut file: File) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hexadecimal(&hash.finalize())),
            count => hash.update(&buffer[..count]),
        }
    }
}

impl Programs {
    /// Looks at the programs in a directory of ours.
    ///
    /// # Errors
    /// When the shim is not among them, or they are not what their SHA256SUMS says.
    pub(crate) fn read(directory: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        let entries = fs::read_dir(directory)
            .with_context(|| format!("look for the programs in {} (--programs)", directory.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("read {}", directory.display()))?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if name == "SHA256SUMS" || !entry.path().is_file() {
                continue;
            }
            let digest = File::open(entry.path()).and_then(digest_of);
            files.insert(name, digest.with_context(|| format!("read {}", entry.path().display()))?);
        }
        if !files.contains_key(SHIM) {
            bail!("{} has no {SHIM}: --programs names the directory of runx's programs", directory.display());
        }
        check_sums(directory, &files)?;
        let list: String = files.iter().map(|(name, digest)| format!("{digest}  {name}\n")).collect();
        Ok(Self { directory: directory.to_owned(), digest: sha256(list.as_bytes()), files })
    }
}

/// As sha256sum(1) writes them, if they are there. This program is named there, too, and need not lie among the others.
fn check_sums(directory: &Path, files: &BTreeMap<String, String>) -> Result<()> {
    let path = directory.join("SHA256SUMS");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e).with_context(|| format!("read {}", path.display())),
    };
    let mut said = BTreeMap::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        let Some((digest, name)) = line.split_once("  ") else {
            bail!("{}: {line:?} is no line of sha256sum", path.display());
        };
        said.insert(name.trim_start_matches("./").to_owned(), digest.to_owned());
    }
    for (name, digest) in files {
        if said.get(name) != Some(digest) {
            bail!("{} is not what {} says: the image is damaged", directory.join(name).display(), path.display());
        }
    }
    match said.keys().find(|name| !files.contains_key(*name) && *name != INSTALLER) {
        Some(name) => bail!("{} names {name}, which is missing: the image is damaged", path.display()),
        None => Ok(()),
    }
}

/// The sets of a node.
#[derive(Debug)]
pub(crate) struct Stage<'a> {
    root: &'a Root,
    directory: &'a Path,
}

impl<'a> Stage<'a> {
    /// Those below a directory of the node.
    pub(crate) fn new(root: &'a Root, directory: &'a Path) -> Self {
        Self { root, directory }
    }

    fn version(&self, digest: &str) -> PathBuf {
        self.directory.join(VERSIONS).join(digest)
    }

    /// The digest of the set that new pods get.
    ///
    /// # Errors
    /// When the link is no link.
    pub(crate) fn current(&self) -> Result<Option<String>> {
        let link = self.directory.join(CURRENT);
        let target = self.root.link_target(&link).with_context(|| format!("read the link {}", link.display()))?;
        Ok(target.and_then(|target| Some(target.strip_prefix(VERSIONS).ok()?.to_str()?.to_owned())))
    }

    /// Whether a set is on the node, with all of its files.
    fn has(&self, programs: &Programs, directory: &Path) -> Result<bool> {
        if !self.root.exists(&directory.join(OPTIONS)) {
            return Ok(false);
        }
        for (name, digest) in &programs.files {
            let path = directory.join(name);
            let Some(file) = self.root.open_file(&path).with_context(|| format!("open {}", path.display()))? else {
                return Ok(false);
            };
            if digest_of(file).with_context(|| format!("read {}", path.display()))? != *digest {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Brings a set onto the node, unless it is there. Nothing uses it yet.
    ///
    /// # Errors
    /// When it cannot be copied, or cannot be executed there.
    pub(crate) fn bring(&self, programs: &Programs) -> Result<()> {
        let place = self.version(&programs.digest);
        if !self.has(programs, &place)? {
            if self.root.is_directory(&place) {
                // Somebody has damaged it, and shims may run from it: their lock has to stay where it is.
                self.copy(programs, &place)?;
            } else {
                let new = self.directory.join(VERSIONS).join(NEW);
                self.root.remove_tree(&new).with_context(|| format!("remove {}", new.display()))?;
                self.root.make_directories(&new).with_context(|| format!("make {} (--install-dir)", new.display()))?;
                self.copy(programs, &new)?;
                self.root
                    .rename(&new, &place)
                    .with_context(|| format!("rename {} to {}", new.display(), place.display()))?;
            }
        }
        // Sets of before have none.
        let lock = place.join(LOCK);
        self.root.open_or_make(&lock).with_context(|| format!("make {}", lock.display()))?;
        self.probe(&place.join(SHIM))
    }

    /// Copies a set into a directory. Files there are replaced; who has them open keeps what he has.
    fn copy(&self, programs: &Programs, directory: &Path) -> Result<()> {
        for name in programs.files.keys() {
            let bytes = fs::read(programs.directory.join(name)).with_context(|| format!("read {name}"))?;
            let path = directory.join(name);
            self.root.write(&path, &bytes, 0o755, None).with_context(|| format!("write {}", path.display()))?;
        }
        let path = directory.join(OPTIONS);
        let text = b"SystemdCgroup = true\n";
        self.root.write(&path, text, 0o644, None).with_context(|| format!("write {}", path.display()))?;
        let lock = directory.join(LOCK);
        self.root.open_or_make(&lock).with_context(|| format!("make {}", lock.display()))?;
        if !self.has(programs, directory)? {
            bail!("the programs in {} are not what was copied: look at the node's disk", directory.display());
        }
        Ok(())
    }

    /// Executes the shim from its place: the file system may have been mounted without that right.
    fn probe(&self, shim: &Path) -> Result<()> {
        let what =
            || format!("execute {} (--install-dir has to be on a file system that lets programs run)", shim.display());
        let path = self.root.outside(shim).with_context(what)?;
        let output = Command::new(path).arg("-v").stdin(Stdio::null()).output().with_context(what)?;
        if !output.status.success() || !String::from_utf8_lossy(&output.stdout).contains(SHIM) {
            bail!("{} -v: {}, and prints {:?}", shim.display(), output.status, String::from_utf8_lossy(&output.stdout));
        }
        Ok(())
    }

    /// Lets new pods get a set. Tells whether they got another before.
    ///
    /// # Errors
    /// When the link cannot be changed.
    pub(crate) fn flip(&self, digest: &str) -> Result<bool> {
        if self.current()?.as_deref() == Some(digest) {
            return Ok(false);
        }
        let link = self.directory.join(CURRENT);
        let target = Path::new(VERSIONS).join(digest);
        self.root
            .link(&link, &target)
            .with_context(|| format!("let {} lead to {}", link.display(), target.display()))?;
        Ok(true)
    }

    /// All sets on the node.
    ///
    /// # Errors
    /// When they cannot be looked at.
    pub(crate) fn versions(&self) -> Result<Vec<Version>> {
        let directory = self.directory.join(VERSIONS);
        let names = self.root.names(&directory).with_context(|| format!("read {}", directory.display()))?;
        let current = self.current()?;
        let mut out = Vec::new();
        for name in names.iter().filter_map(|name| name.to_str()).filter(|name| !name.starts_with('.')) {
            let is_current = current.as_deref() == Some(name);
            out.push(Version { digest: name.to_owned(), current: is_current, in_use: self.in_use(name)? });
        }
        Ok(out)
    }

    fn in_use(&self, digest: &str) -> Result<bool> {
        // Shims of before have a lock on their own file.
        for name in [LOCK, SHIM] {
            let path = self.version(digest).join(name);
            let Some(file) = self.root.open_file(&path).with_context(|| format!("open {}", path.display()))? else {
                continue;
            };
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(_) => {}
                Err((_, Errno::EWOULDBLOCK)) => return Ok(true),
                Err((_, e)) => return Err(e).with_context(|| format!("look who holds a lock on {}", path.display())),
            }
        }
        Ok(false)
    }

    /// Removes the sets that nobody uses and that new pods do not get. Tells what stays for its shims' sake.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub(crate) fn collect(&self) -> Result<Vec<Version>> {
        let link = self.directory.join(CURRENT);
        let flipped = self.root.link_time(&link).with_context(|| format!("look at {}", link.display()))?;
        let age = flipped.and_then(|at| SystemTime::now().duration_since(at).ok());
        if age.is_some_and(|age| age < GRACE) {
            return self.versions();
        }
        self.remove_unused(true)
    }

    fn remove_unused(&self, keep_current: bool) -> Result<Vec<Version>> {
        let new = self.directory.join(VERSIONS).join(NEW);
        self.root.remove_tree(&new).with_context(|| format!("remove {}", new.display()))?;
        let mut left = Vec::new();
        for version in self.versions()? {
            if version.in_use || (keep_current && version.current) {
                left.push(version);
                continue;
            }
            let path = self.version(&version.digest);
            self.root.remove_tree(&path).with_context(|| format!("remove {}", path.display()))?;
        }
        Ok(left)
    }

    /// Removes everything that no shim uses. Tells what stays.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub(crate) fn remove_all(&self) -> Result<Vec<Version>> {
        let versions = self.versions()?;
        let used = || versions.iter().filter(|version| version.in_use);
        if !used().any(|version| version.current)
            && let Some(version) = used().next()
        {
            // containerd, when it is started again, drops the pods whose shim is not where it was started from.
            self.flip(&version.digest)?;
        }
        let left = self.remove_unused(false)?;
        let remove = |name: &str| self.directory.join(name);
        if left.is_empty() {
            self.root.remove(&remove(CURRENT)).with_context(|| format!("remove {}", remove(CURRENT).display()))?;
            for directory in [remove(VERSIONS), self.directory.to_owned()] {
                self.root.remove_empty(&directory).with_context(|| format!("remove {}", directory.display()))?;
            }
        }
        Ok(left)
    }

    /// A file with the options of a shim whose cgroups are made by systemd, for containerds that pass nothing else.
    pub(crate) fn options(&self) -> PathBuf {
        self.directory.join(CURRENT).join(OPTIONS)
    }

    /// The shim, by the path that stays the same.
    pub(crate) fn shim(&self) -> PathBuf {
        self.directory.join(CURRENT).join(OsStr::new(SHIM))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn programs(text: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in [(SHIM, format!("#!/bin/sh\n# {text}\necho {SHIM}: test\n")), ("runx", text.to_owned())] {
            let path = directory.path().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        directory
    }

    fn age(directory: &Path) {
        let times = [nix::sys::time::TimeSpec::new(1, 0); 2];
        let flags = nix::sys::stat::UtimensatFlags::NoFollowSymlink;
        nix::sys::stat::utimensat(
            nix::fcntl::AT_FDCWD,
            &directory.join("opt/runx/current"),
            &times[0],
            &times[1],
            flags,
        )
        .unwrap();
    }

    #[test]
    fn a_set_stays_as_long_as_a_shim_of_it_holds_its_lock() {
        let node = tempfile::tempdir().unwrap();
        let root = Root::open(node.path()).unwrap();
        let stage = Stage::new(&root, Path::new("/opt/runx"));
        let sets = ["one", "two"].map(|text| {
            let directory = programs(text);
            let read = Programs::read(directory.path()).unwrap();
            stage.bring(&read).unwrap();
            (directory, read)
        });
        let [one, two] = [&sets[0].1.digest, &sets[1].1.digest];
        assert!(stage.flip(one).unwrap() && !stage.flip(one).unwrap());
        assert!(root.exists(&stage.shim()));
        let shim = File::open(node.path().join("opt/runx/current").join(SHIM)).unwrap();
        let lock = Flock::lock(shim, FlockArg::LockShared).unwrap();
        assert!(stage.flip(two).unwrap());
        // Just after the change nothing goes; later only what nobody uses.
        assert_eq!(stage.collect().unwrap().len(), 2);
        age(node.path());
        let mut expected = vec![
            Version { digest: one.clone(), current: false, in_use: true },
            Version { digest: two.clone(), current: true, in_use: false },
        ];
        expected.sort_by(|a, b| a.digest.cmp(&b.digest));
        assert_eq!(stage.collect().unwrap(), expected);
        // The shim's path leads to one that is there still.
        assert_eq!(stage.remove_all().unwrap().len(), 1);
        assert_eq!(stage.current().unwrap().as_ref(), Some(one));
        assert!(root.exists(&stage.shim()));
        drop(lock);
        assert!(stage.remove_all().unwrap().is_empty());
        assert!(!root.exists(Path::new("/opt/runx")));
    }

    #[test]
    fn damage_is_found_and_repaired() {
        let node = tempfile::tempdir().unwrap();
        let root = Root::open(node.path()).unwrap();
        let stage = Stage::new(&root, Path::new("/opt/runx"));
        let directory = programs("one");
        let read = Programs::read(directory.path()).unwrap();
        stage.bring(&read).unwrap();
        let file = node.path().join("opt/runx/versions").join(&read.digest).join("runx");
        fs::write(&file, "other").unwrap();
        stage.bring(&read).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "one");
        fs::write(directory.path().join("SHA256SUMS"), format!("{}  ./{SHIM}\n", read.files[SHIM])).unwrap();
        let error = Programs::read(directory.path()).unwrap_err().to_string();
        assert!(error.contains("runx") && error.contains("damaged"), "{error}");
    }

    #[test]
    fn a_set_that_is_repaired_is_in_use_still() {
        let node = tempfile::tempdir().unwrap();
        let root = Root::open(node.path()).unwrap();
        let stage = Stage::new(&root, Path::new("/opt/runx"));
        let directory = programs("one");
        let read = Programs::read(directory.path()).unwrap();
        stage.bring(&read).unwrap();
        stage.flip(&read.digest).unwrap();
        let current = node.path().join("opt/runx/current");
        let lock = Flock::lock(File::open(current.join(LOCK)).unwrap(), FlockArg::LockShared).unwrap();
        fs::write(current.join(SHIM), "other").unwrap();
        stage.bring(&read).unwrap();
        assert_eq!(fs::read(current.join(SHIM)).unwrap(), fs::read(directory.path().join(SHIM)).unwrap());
        assert!(stage.versions().unwrap()[0].in_use);
        drop(lock);
        assert!(!stage.versions().unwrap()[0].in_use);
    }

    #[test]
    fn programs_that_do_not_run_are_refused() {
        let node = tempfile::tempdir().unwrap();
        let root = Root::open(node.path()).unwrap();
        let stage = Stage::new(&root, Path::new("/opt/runx"));
        let directory = programs("one");
        fs::write(directory.path().join(SHIM), "#!/bin/sh\nexit 3\n").unwrap();
        let error = stage.bring(&Programs::read(directory.path()).unwrap()).unwrap_err().to_string();
        assert!(error.contains("exit status: 3"), "{error}");
        let empty = tempfile::tempdir().unwrap();
        assert!(Programs::read(empty.path()).unwrap_err().to_string().contains(SHIM));
    }
}
