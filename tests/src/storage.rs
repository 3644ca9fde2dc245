//! `runx storage` with a store of the test's own, and images for it.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::command::{Done, run};
use crate::{dist, leftovers};

/// A directory with a store.
#[derive(Debug)]
pub struct Storage {
    directory: TempDir,
}

impl Default for Storage {
    fn default() -> Self {
        Self::new()
    }
}

impl Storage {
    /// An empty one.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn new() -> Self {
        // Not in /tmp, which may be a filesystem that overlay cannot write to.
        Self { directory: TempDir::with_prefix_in("runx-test-", "/var/tmp").expect("make a directory") }
    }

    /// Room for other files of the test.
    pub fn scratch(&self) -> &Path {
        self.directory.path()
    }

    /// The storage root.
    pub fn root(&self) -> PathBuf {
        self.scratch().join("storage-root")
    }

    /// `runx storage …`, below another storage root.
    pub fn command_in(&self, root: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(dist().join("runx"));
        command
            .arg("--root")
            .arg(self.scratch().join("state"))
            .arg("--storage-root")
            .arg(root)
            .arg("storage")
            .args(args);
        // Neither the machine's settings nor its user's credentials are the tests'.
        command.env("HOME", self.scratch()).env("XDG_RUNTIME_DIR", self.scratch());
        for variable in ["DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_CONFIG_HOME", "SOURCE_DATE_EPOCH"] {
            command.env_remove(variable);
        }
        command
    }

    /// `runx storage …`.
    pub fn command(&self, args: &[&str]) -> Command {
        self.command_in(&self.root(), args)
    }

    /// Runs it.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> Done {
        run(&mut self.command(args))
    }

    /// `runx storage ls` as JSON.
    #[track_caller]
    pub fn images(&self) -> Vec<Value> {
        let list = self.run(&["ls", "--format", "json"]).ok().stdout;
        serde_json::from_str(&list).expect("the list is JSON")
    }

    /// What an image's files look like.
    #[track_caller]
    pub fn listing(&self, image: &str) -> Vec<String> {
        let mounted = self.run(&["mount", image]).ok().stdout;
        let list = listing(Path::new(mounted.trim()));
        self.run(&["umount", mounted.trim()]).ok();
        list
    }

    /// All that is in the store, but for what only its being there means.
    pub fn content(&self) -> Vec<String> {
        content(&self.root())
    }

    /// Fails the test if anything is left beside what the store has: mounts, processes, files of what was under way.
    ///
    /// # Panics
    /// With what is left.
    #[track_caller]
    pub fn assert_clean(&self) {
        let name = self.scratch().file_name().expect("it has a name").to_string_lossy().into_owned();
        let left = leftovers::find(&name, &[self.root().join("storage/ingest"), self.scratch().join("state")]);
        assert!(left.is_empty(), "{left:#?}");
    }
}

/// All paths below a storage root with their lengths, but for the locks and the list's own bytes.
pub fn content(root: &Path) -> Vec<String> {
    let mut list = Vec::new();
    walk(root, &mut |path, m| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !matches!(&*name, "lock" | "activity" | "images.json") {
            list.push(format!("{} {}", path.display(), if m.is_dir() { 0 } else { m.len() }));
        }
    });
    list.sort();
    // Before the first command there is nothing at all.
    list.retain(|line| {
        !["storage", "blobs", "sha256", "layers", "ingest", "leases", "mounts", "rootfs"]
            .iter()
            .any(|dir| line.ends_with(&format!("/{dir} 0")))
    });
    list
}

fn walk(dir: &Path, each: &mut impl FnMut(&Path, &fs::Metadata)) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(m) = fs::symlink_metadata(entry.path()) else { continue };
        each(&entry.path(), &m);
        if m.is_dir() {
            walk(&entry.path(), each);
        }
    }
}

/// A line for each file below a directory, with all that an image keeps of it.
///
/// # Panics
/// When a file cannot be read.
pub fn listing(root: &Path) -> Vec<String> {
    let mut list = Vec::new();
    walk(root, &mut |path, m| {
        let content = if m.is_file() {
            format!("{:x}", Sha256::digest(fs::read(path).expect("read a file")))
        } else {
            fs::read_link(path).map(|to| to.display().to_string()).unwrap_or_default()
        };
        let links = if m.is_dir() { 0 } else { m.nlink() };
        list.push(format!(
            "{:?} {:o} {}:{} {} {links} {} {} {content}",
            path.strip_prefix(root).expect("it is below"),
            m.mode(),
            m.uid(),
            m.gid(),
            m.rdev(),
            m.mtime(),
            xattrs(path),
        ));
    });
    list.sort();
    list
}

/// An image's extended attributes, but for those that are the place's.
fn xattrs(path: &Path) -> String {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).expect("a path has no zeros");
    let mut names = vec![0_u8; 1 << 16];
    // SAFETY: the path ends with a zero, and the buffer is as long as is said.
    let length = unsafe { libc::llistxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    names.truncate(usize::try_from(length).unwrap_or_default());
    let mut all = Vec::new();
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let text = String::from_utf8_lossy(name).into_owned();
        if text.starts_with("trusted.") || text.starts_with("security.selinux") {
            continue;
        }
        let name = std::ffi::CString::new(name).expect("a name has no zeros");
        let mut value = vec![0_u8; 1 << 16];
        // SAFETY: both texts end with a zero, and the buffer is as long as is said.
        let length = unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        value.truncate(usize::try_from(length).unwrap_or_default());
        all.push(format!("{text}={value:?}"));
    }
    all.sort();
    all.join(",")
}

/// An OCI layout with an image of several layers, that umoci has made: with all kinds of files, and some that are changed
/// and removed by higher layers.
#[derive(Debug)]
pub struct Layout {
    path: PathBuf,
}

impl Layout {
    /// Makes it in a directory.
    ///
    /// # Panics
    /// When umoci fails.
    pub fn make(dir: &Path) -> Self {
        let this = Self { path: dir.join("layout") };
        let bundle = dir.join("bundle");
        this.umoci(&["init", "--layout"], None);
        this.umoci(&["new"], Some(&[]));
        this.umoci(&["unpack"], Some(&[&bundle]));
        for script in [
            "cp /bin/busybox bin/; ln -s busybox bin/sh; ln -s busybox bin/true; head -c 300000 /dev/urandom >data
             echo x >etc/removed; echo y >etc/changed; echo z >below/hidden; mkdir -m 2750 setgid; chown 12:34 setgid
             install -m 4755 /bin/busybox bin/suid; setcap cap_net_raw=ep bin/suid 2>/dev/null || true
             ln data again; mkfifo pipe; mknod -m 620 null c 1 3; touch -d '2001-02-03 04:05:06' old
             echo long >$(printf 'n%.0s' $(seq 150)); truncate -s 3M sparse; chown 3000000:3000001 old
             chown -h 7:8 bin/true; setfattr -n user.note -v value etc/changed 2>/dev/null || true",
            "rm etc/removed; echo changed >etc/changed; chmod 600 etc/changed; rm -r below; mkdir below; echo new >below/new
             rm again; mkdir deep; echo d >deep/file; head -c 200000 /dev/urandom >more; chmod 711 etc",
            "rm -r deep; ln -s /etc/passwd deep; rm sparse; echo file >sparse; rm pipe; mkdir pipe; echo p >pipe/p",
        ] {
            let script = format!("set -e; mkdir -p bin etc below; {script}");
            let rootfs = bundle.join("rootfs");
            run(Command::new("sh").args(["-c", &script]).current_dir(&rootfs)).ok();
            this.umoci(&["repack"], Some(&[&bundle]));
            // Each repack is of what changed since the last unpack.
            fs::remove_dir_all(&bundle).expect("remove the bundle");
            this.umoci(&["unpack"], Some(&[&bundle]));
        }
        fs::remove_dir_all(&bundle).expect("remove the bundle");
        this.umoci(&["config", "--config.cmd", "sh", "--config.label", "made=by umoci"], Some(&[]));
        this
    }

    fn umoci(&self, words: &[&str], image: Option<&[&Path]>) -> Done {
        let mut command = Command::new("umoci");
        command.args(words);
        match image {
            None => command.arg(&self.path),
            Some(rest) => {
                let mut name = self.path.as_os_str().to_owned();
                name.push(":v1");
                command.arg("--image").arg(name).args(rest)
            }
        };
        run(&mut command).ok()
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its image in skopeo's words.
    pub fn name(&self) -> String {
        format!("oci:{}:v1", self.path.display())
    }

    /// What umoci makes of it.
    ///
    /// # Panics
    /// When that fails.
    pub fn listing(&self) -> Vec<String> {
        let bundle = self.path.with_extension("unpacked");
        self.umoci(&["unpack"], Some(&[&bundle]));
        let list = listing(&bundle.join("rootfs"));
        fs::remove_dir_all(&bundle).expect("remove the bundle");
        list
    }
}
