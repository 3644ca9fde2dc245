//! Compiled modules, kept on the node.
//!
//! An artifact is kept under the digest of its module and that of the program that runs it, so an upgraded engine never
//! meets an artifact of the old one; digests are remembered by inode and times, so the second start reads neither file.
//! Who wants what is being compiled waits for it. What has not been used for longest goes when there is too much.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Instant, SystemTime};

use sha2::{Digest, Sha256};

use super::MODULE_LIMIT;
use super::compiler_group::Group;
use super::counters::Counters;
use crate::error::{Context, Error, Result};
use crate::sys;

/// The most of a compiler's complaint that is passed on, in bytes.
const COMPLAINT_LIMIT: u64 = 4096;

/// How much the cache holds before the oldest goes, in bytes.
pub const LIMIT: u64 = 4 << 30;

/// The directory of remembered digests.
const DIGESTS: &str = "digests";

/// The extension of the file with an artifact's digest.
const SUM: &str = "sum";

/// How a module is to be compiled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Form {
    /// For a process with a small limit on its address space.
    pub compact: bool,
    /// Count what is executed.
    pub fuel: bool,
    /// For the interpreter.
    pub pulley: bool,
}

impl Form {
    fn entry(self, key: &str) -> String {
        let compact = if self.compact { "-compact" } else { "" };
        let fuel = if self.fuel { "-fuel" } else { "" };
        let pulley = if self.pulley { "-pulley" } else { "" };
        format!("{key}{compact}{fuel}{pulley}.cwasm")
    }
}

/// Why an entry is not used.
enum Unfit {
    /// There is none, or half of one.
    Absent,
    /// It is not what was compiled.
    Changed,
}

/// A compiled module in the cache.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The artifact.
    pub path: PathBuf,
    /// The SHA-256 of its module.
    pub module: String,
    /// The beginning of the SHA-256 of the program that it is for.
    pub engine: String,
    /// How it was compiled.
    pub form: Form,
    /// Its size in bytes.
    pub size: u64,
    /// When it was used last.
    pub used: SystemTime,
}

/// The compiled modules below one directory.
#[derive(Debug)]
pub struct Cache<'a> {
    directory: &'a Path,
}

impl<'a> Cache<'a> {
    /// The cache in `directory`. Nothing is read or made yet.
    pub fn new(directory: &'a Path) -> Self {
        Self { directory }
    }

    /// The artifact of the module with the digest `key` for the program with the digest `engine`, if it is there.
    pub(super) fn find(&self, key: &str, engine: &str, form: Form) -> Option<File> {
        let artifact = self.open(&self.of_engine(engine).join(form.entry(key))).ok()?;
        self.count(Counters { hits: 1, ..Counters::default() });
        // Not at every start, which would write to the disk every time.
        let now = SystemTime::now();
        let age = artifact.metadata().and_then(|meta| meta.modified()).map(|used| now.duration_since(used));
        if age.is_ok_and(|age| age.is_ok_and(|age| age.as_secs() > 3600)) {
            let _ = artifact.set_modified(now);
        }
        Some(artifact)
    }

    fn count(&self, counters: Counters) {
        counters.add(self.directory);
    }

    fn of_engine(&self, engine: &str) -> PathBuf {
        self.directory.join(&engine[..16])
    }

    /// Opens an artifact that only this user could have written, and that is what was compiled: its digest is looked at
    /// once, and again when the file has changed.
    fn open(&self, entry: &Path) -> std::result::Result<File, Unfit> {
        let artifact = open_trusted(entry).ok_or(Unfit::Absent)?;
        let mut sum = String::new();
        let read = open_trusted(&entry.with_extension(SUM)).map(|mut file| file.read_to_string(&mut sum));
        if !matches!(read, Some(Ok(_))) {
            return Err(Unfit::Absent);
        }
        match self.digest(&artifact) {
            Ok(digest) if digest == sum => Ok(artifact),
            Ok(_) => Err(Unfit::Changed),
            Err(_) => Err(Unfit::Absent),
        }
    }

    /// All that is in it, what was used last first.
    ///
    /// # Errors
    /// When the directory cannot be read. One that is not there is empty.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        let mut out = Vec::new();
        let engines = match fs::read_dir(self.directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(out),
            other => other.on("list", self.directory)?,
        };
        for engine in engines.flatten().filter(|engine| engine.file_name() != DIGESTS) {
            let Ok(files) = fs::read_dir(engine.path()) else { continue };
            for file in files.flatten() {
                let (name, engine) = (file.file_name().into_string(), engine.file_name().into_string());
                let (Ok(name), Ok(engine), Ok(meta)) = (name, engine, file.metadata()) else { continue };
                let Some(rest) = name.strip_suffix(".cwasm").filter(|rest| rest.len() >= 64) else { continue };
                let (module, form) = rest.split_at(64);
                out.push(Entry {
                    path: file.path(),
                    module: module.to_owned(),
                    engine,
                    form: Form {
                        compact: form.contains("-compact"),
                        fuel: form.contains("-fuel"),
                        pulley: form.contains("-pulley"),
                    },
                    size: meta.len(),
                    used: meta.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                });
            }
        }
        out.sort_by_key(|entry| std::cmp::Reverse(entry.used));
        Ok(out)
    }

    /// Removes what was not used for longest until no more than `limit` bytes are left. Returns what went. What is in use
    /// stays in its users' memory.
    ///
    /// # Errors
    /// As for [`Self::entries`], and when a file cannot be removed.
    pub fn prune(&self, limit: u64) -> Result<Vec<Entry>> {
        let mut kept = 0u64;
        let mut gone = Vec::new();
        for entry in self.entries()? {
            kept = kept.saturating_add(entry.size);
            if kept <= limit {
                continue;
            }
            match fs::remove_file(&entry.path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).on("remove", &entry.path),
                _ => {}
            }
            let _ = fs::remove_file(entry.path.with_extension(SUM));
            if let Some(engine) = entry.path.parent() {
                // Only the last one's removal empties it.
                let _ = fs::remove_dir(engine);
            }
            gone.push(entry);
        }
        Ok(gone)
    }

    /// Puts a compiled module in its place, with its digest.
    fn put(&self, temporary: &Path, entry: &Path) -> io::Result<()> {
        let sum = read_through(&File::open(temporary)?, |_| Ok(()))?;
        // One without the other counts as neither.
        write_atomically(&entry.with_extension(SUM), sum.as_bytes())?;
        fs::rename(temporary, entry)
    }

    /// Removes what compilers that were killed have left, and digests that nobody asked for in a month.
    fn sweep(&self) {
        let old = |entry: &fs::DirEntry, seconds: u64| {
            let modified = entry.metadata().and_then(|meta| meta.modified());
            modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age.as_secs() > seconds))
        };
        let list = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
        for engine in list(self.directory).filter(|engine| engine.file_name() != DIGESTS) {
            let left = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().contains(".cwasm.");
            list(&engine.path()).filter(|entry| left(entry) && old(entry, 3600)).for_each(|entry| {
                let _ = fs::remove_file(entry.path());
            });
        }
        list(&self.directory.join(DIGESTS)).filter(|entry| old(entry, 30 * 24 * 3600)).for_each(|entry| {
            let _ = fs::remove_file(entry.path());
        });
    }

    /// Keeps the cache within its limit after `new` came to it.
    fn make_room(&self, limit: u64, new: &Path) {
        self.sweep();
        match self.prune(limit) {
            Ok(gone) if !gone.is_empty() => {
                log::info!("{} compiled modules went for {}", gone.len(), new.display());
                self.count(Counters { evicted: gone.len() as u64, ..Counters::default() });
            }
            Ok(_) => {}
            Err(e) => log::warn!("make room for compiled modules: {e}"),
        }
    }

    /// The SHA-256 of a file, computed once for as long as its inode, size and times stay the same.
    pub(super) fn digest(&self, file: &File) -> io::Result<String> {
        let meta = file.metadata()?;
        let identity =
            format!("{} {}.{} {}.{}", meta.len(), meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec());
        let memo = self.directory.join(DIGESTS).join(format!("{:x}-{:x}", meta.dev(), meta.ino()));
        if !is_local(file) {
            return read_through(file, |_| Ok(()));
        }
        if let Some(mut known) = open_trusted(&memo) {
            let mut text = String::new();
            known.read_to_string(&mut text)?;
            if let Some((of, digest)) = text.split_once('\n')
                && of == identity
                && digest.len() == 64
            {
                return Ok(digest.to_owned());
            }
        }
        let digest = read_through(file, |_| Ok(()))?;
        // A file that changed while it was read has other times by now.
        if file.metadata()?.ctime_nsec() == meta.ctime_nsec()
            && let Err(e) = write_atomically(&memo, format!("{identity}\n{digest}").as_bytes())
        {
            log::debug!("remember a digest in {}: {e}", memo.display());
        }
        Ok(digest)
    }

    /// Compiles a module into the cache and opens the artifact.
    pub(super) fn compile(&self, name: &str, module: &File, engine: &str, form: Form, compiler: &Path) -> Result<File> {
        let wasm = |reason: String| Error::Wasm { module: name.to_owned(), reason };
        // A copy that cannot change: else a container could have one module hashed and another one
        // compiled, and so put code of its choice under the digest of somebody else's module.
        let (key, copy) = sealed_copy(module).with_context(|| format!("read module {name}"))?;
        let directory = self.of_engine(engine);
        let entry = directory.join(form.entry(&key));
        make_private(&directory).on("create", &directory)?;
        // Others that want it wait, and find it then.
        let _lock = Lock::take(&entry).on("lock", &entry)?;
        match self.open(&entry) {
            Ok(artifact) => {
                self.count(Counters { hits: 1, ..Counters::default() });
                return Ok(artifact);
            }
            Err(Unfit::Changed) => {
                log::warn!("{} is not what was compiled: compiling it again", entry.display());
                self.count(Counters { rejected: 1, ..Counters::default() });
            }
            Err(Unfit::Absent) => {}
        }
        log::info!("compiling module {name} to {}", entry.display());
        let begun = Instant::now();
        let temporary = temporary_name(&entry);
        let output = create(&temporary).on("create", &temporary)?;
        let mut input = File::from(copy);
        io::Seek::rewind(&mut input).with_context(|| format!("read module {name}"))?;
        let mut command = Command::new(compiler);
        // SAFETY: between fork and exec only system calls are made.
        unsafe { command.pre_exec(sys::process::restore_open_files) };
        let compiled = command
            .args(["--confined", "--name", name])
            .args(form.compact.then_some("--compact"))
            .args(form.fuel.then_some("--fuel"))
            .args(form.pulley.then_some("--pulley"))
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(output))
            .stderr(Stdio::piped())
            .spawn()
            .and_then(|mut child| {
                let group = Group::hold(child.id() as i32);
                let mut complaint = Vec::new();
                if let Some(stderr) = child.stderr.take() {
                    stderr.take(COMPLAINT_LIMIT).read_to_end(&mut complaint)?;
                }
                let status = child.wait()?;
                drop(group);
                Ok((status, complaint))
            });
        let result = match compiled {
            Err(e) => Err(wasm(format!("run the compiler {}: {e}", compiler.display()))),
            Ok((status, _)) if status.success() => {
                self.put(&temporary, &entry).with_context(|| format!("put {} into the cache", entry.display()))
            }
            Ok((status, complaint)) => {
                let complaint = String::from_utf8_lossy(&complaint);
                let complaint = complaint.trim().trim_start_matches("runx: ").to_owned();
                Err(wasm(if complaint.is_empty() { format!("the compiler ended with {status}") } else { complaint }))
            }
        };
        let microseconds = begun.elapsed().as_micros() as u64;
        if let Err(e) = result {
            let _ = fs::remove_file(&temporary);
            self.count(Counters { failures: 1, microseconds, ..Counters::default() });
            return Err(e);
        }
        self.count(Counters { compiles: 1, microseconds, ..Counters::default() });
        self.make_room(LIMIT, &entry);
        self.open(&entry).map_err(|_| wasm(format!("the artifact {} has vanished", entry.display())))
    }
}

/// Held by the one who compiles an entry. It ends with its holder, however that ends.
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    fn take(entry: &Path) -> io::Result<Self> {
        let path = entry.with_extension("lock");
        loop {
            let file = fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path)?;
            // SAFETY: flock takes a descriptor and flags.
            match sys::check(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) }.into()) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            // Who had it before has removed it, perhaps, and another one made it anew.
            let same = |there: fs::Metadata| file.metadata().is_ok_and(|ours| ours.ino() == there.ino());
            if fs::metadata(&path).is_ok_and(same) {
                return Ok(Self { path, _file: file });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Whether a file's times are this kernel's word. Elsewhere somebody else says them, and could have the digest of one file
/// remembered for another.
#[allow(clippy::unnecessary_cast, reason = "the type differs between architectures and libraries")]
fn is_local(file: &File) -> bool {
    use nix::sys::statfs;
    const F2FS: i64 = 0xf2f5_2010;
    let local = [
        statfs::EXT4_SUPER_MAGIC.0 as i64,
        statfs::XFS_SUPER_MAGIC.0 as i64,
        statfs::BTRFS_SUPER_MAGIC.0 as i64,
        statfs::OVERLAYFS_SUPER_MAGIC.0 as i64,
        statfs::TMPFS_MAGIC.0 as i64,
        F2FS,
    ];
    statfs::fstatfs(file).is_ok_and(|found| local.contains(&(found.filesystem_type().0 as i64)))
}

/// Reads a file from its beginning, a piece at a time, and returns its SHA-256.
fn read_through(file: &File, mut each: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0u8; 128 << 10];
    let mut at = 0u64;
    loop {
        let n = std::os::unix::fs::FileExt::read_at(file, &mut buffer, at)?;
        if n == 0 {
            return Ok(format!("{:x}", hash.finalize()));
        }
        hash.update(&buffer[..n]);
        each(&buffer[..n])?;
        at += n as u64;
        // It may have grown since its size was looked at. What was compiled is some times larger.
        if at > 8 * MODULE_LIMIT {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it grows while it is read"));
        }
    }
}

/// The SHA-256 of a module, and a copy of it that cannot change.
fn sealed_copy(module: &File) -> io::Result<(String, OwnedFd)> {
    let mut copy = sys::memfd(c"runx-module")?;
    let digest = read_through(module, |piece| copy.write_all(piece))?;
    Ok((digest, sys::seal(copy)?))
}

/// Opens a file that only this user could have written.
fn open_trusted(path: &Path) -> Option<File> {
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path).ok()?;
    let meta = file.metadata().ok()?;
    // SAFETY: geteuid cannot fail and touches no memory.
    let us = unsafe { libc::geteuid() };
    (meta.is_file() && meta.uid() == us && meta.mode() & 0o022 == 0 && meta.len() > 0).then_some(file)
}

fn make_private(directory: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

fn create(path: &Path) -> io::Result<File> {
    fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

fn temporary_name(path: &Path) -> PathBuf {
    static COUNTER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let count = COUNTER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.{count}", std::process::id()));
    name.into()
}

fn write_atomically(path: &Path, data: &[u8]) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        make_private(directory)?;
    }
    let temporary = temporary_name(path);
    let written =
        create(&temporary).and_then(|mut file| file.write_all(data)).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let base = std::env::temp_dir().join(format!("runx-cache-{name}-{}", std::process::id()));
        fs::create_dir_all(&base).unwrap();
        base
    }

    #[test]
    fn a_digest_is_remembered_until_the_file_changes() {
        let base = scratch("digest");
        let cache = Cache::new(&base);
        let path = base.join("module");
        fs::write(&path, "one").unwrap();
        let first = cache.digest(&File::open(&path).unwrap()).unwrap();
        let memo = fs::read_dir(base.join(DIGESTS)).unwrap().next().unwrap().unwrap().path();
        // What is remembered is what is used: a marked memo shows that the file was not read again.
        let marked = fs::read_to_string(&memo).unwrap().replace(&first, &"0".repeat(64));
        fs::write(&memo, marked).unwrap();
        let second = cache.digest(&File::open(&path).unwrap()).unwrap();
        fs::write(&path, "three").unwrap();
        let third = cache.digest(&File::open(&path).unwrap()).unwrap();
        fs::remove_dir_all(base).unwrap();
        assert_eq!(second, "0".repeat(64));
        assert_ne!(third, first);
        assert_eq!(third.len(), 64);
    }

    #[test]
    fn what_was_used_last_stays() {
        let base = scratch("prune");
        let cache = Cache::new(&base);
        fs::create_dir(base.join("0123456789abcdef")).unwrap();
        for (n, name) in ["a", "b", "c"].iter().enumerate() {
            let path = base.join("0123456789abcdef").join(format!("{}-fuel.cwasm", name.repeat(64)));
            fs::write(&path, vec![0; 100]).unwrap();
            let at = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1000 + n as u64);
            File::options().write(true).open(&path).unwrap().set_modified(at).unwrap();
        }
        let names = |entries: Vec<Entry>| entries.iter().map(|entry| entry.module[..1].to_owned()).collect::<String>();
        assert_eq!(names(cache.entries().unwrap()), "cba");
        assert!(cache.entries().unwrap()[0].form.fuel);
        assert_eq!(names(cache.prune(250).unwrap()), "a");
        assert_eq!(names(cache.prune(0).unwrap()), "cb");
        assert!(!base.join("0123456789abcdef").exists());
        assert!(cache.entries().unwrap().is_empty());
        fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn what_killed_compilers_left_goes() {
        let base = scratch("sweep");
        let engine = base.join("0123456789abcdef");
        fs::create_dir(&engine).unwrap();
        let (old, new) = (engine.join("x.cwasm.1.0"), engine.join("y.cwasm.2.0"));
        for path in [&old, &new] {
            fs::write(path, "half").unwrap();
        }
        File::options().write(true).open(&old).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        Cache::new(&base).sweep();
        assert!(!old.exists() && new.exists());
        fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn only_one_at_a_time_holds_an_entrys_lock() {
        let base = scratch("lock");
        let entry = base.join("x.cwasm");
        let lock = Lock::take(&entry).unwrap();
        let other = std::thread::spawn({
            let entry = entry.clone();
            move || drop(Lock::take(&entry).unwrap())
        });
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!other.is_finished());
        drop(lock);
        other.join().unwrap();
        fs::remove_dir_all(base).unwrap();
    }
}
