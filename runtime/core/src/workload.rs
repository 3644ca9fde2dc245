//! Kinds of workload: a native program, or a WASM module, for which the runner and the module's
//! compiled artifact are found.
//!
//! The engine is not in this library: the artifact is made by a short-lived `runx-wasm-compiler`
//! without privileges, and executed by the runner inside the container. What is here is the cache
//! between them. An artifact is kept under the digest of its module and that of the runner, so an
//! upgraded engine never meets an artifact of the old one; digests are remembered by inode and times,
//! so the second start reads neither file.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest, Sha256};

use crate::error::{Context, Error, Result};
use crate::sys::{self, mount};

/// The first bytes of every binary module and component.
pub const MAGIC: &[u8] = b"\0asm";

/// The runner's file name.
pub const RUNNER: &str = "runx-wasm-runner";

/// The compiler's file name.
pub const COMPILER: &str = "runx-wasm-compiler";

/// The largest module that is accepted, in bytes.
const MODULE_LIMIT: u64 = 512 << 20;

/// A process with less address space than this many bytes gets a module that was compiled to reserve
/// little of it.
pub const RESERVED_ADDRESS_SPACE: u64 = 16 << 30;

/// The most of a compiler's complaint that is passed on, in bytes.
const COMPLAINT_LIMIT: u64 = 4096;

/// Whether a path is named like a module: `.wasm`, or `.wat` for the text format.
pub fn has_module_name(path: &Path) -> bool {
    matches!(path.extension().and_then(|extension| extension.to_str()), Some("wasm" | "wat"))
}

/// Where the parts for running modules are.
#[derive(Clone, Debug)]
pub struct WasmConfig {
    /// The runner.
    pub runner: PathBuf,
    /// The compiler.
    pub compiler: PathBuf,
    /// The cache, for root only.
    pub cache: PathBuf,
}

impl WasmConfig {
    /// The programs beside the one at `executable`, and the node's cache.
    pub fn beside(executable: &Path) -> Self {
        let directory = executable.parent().unwrap_or(Path::new("/"));
        Self {
            runner: directory.join(RUNNER),
            compiler: directory.join(COMPILER),
            cache: PathBuf::from("/var/lib/runx/wasm"),
        }
    }

    /// The runner and the compiled artifact of `module`, which is compiled if the cache lacks it.
    /// `address_space` is the limit in bytes that the process will have.
    pub fn prepare(&self, name: &str, module: File, address_space: Option<u64>) -> Result<(OwnedFd, OwnedFd)> {
        let compact = address_space.is_some_and(|limit| limit < RESERVED_ADDRESS_SPACE);
        let wasm = |reason: String| Error::Wasm { module: name.to_owned(), reason };
        let size = module.metadata().with_context(|| format!("look at module {name}"))?.len();
        if size == 0 {
            return Err(wasm("the file is empty".into()));
        }
        if size > MODULE_LIMIT {
            return Err(wasm(format!("it has {size} bytes, more than the limit of {MODULE_LIMIT}")));
        }
        let runner =
            File::open(&self.runner).map_err(|e| wasm(format!("open the runner {}: {e}", self.runner.display())))?;
        let engine = self.digest(&runner).on("read", &self.runner)?;
        let key = self.digest(&module).with_context(|| format!("read module {name}"))?;
        let directory = self.cache.join(&engine[..16]);
        let entry = directory.join(entry_name(&key, compact));
        let artifact = match open_trusted(&entry) {
            Some(artifact) => artifact,
            None => self.compile(name, &module, &directory, compact)?,
        };
        let runner = mount::read_only_clone(runner.as_fd()).on("clone the runner", &self.runner)?;
        let artifact = mount::read_only_clone(artifact.as_fd())
            .and_then(|tree| sys::open(format!("/proc/self/fd/{}", tree.as_raw_fd()), libc::O_RDONLY))
            .on("clone the artifact", &entry)?;
        Ok((runner, artifact))
    }

    /// The SHA-256 of a file, computed once for as long as its inode, size and times stay the same.
    fn digest(&self, file: &File) -> io::Result<String> {
        let meta = file.metadata()?;
        let identity =
            format!("{} {}.{} {}.{}", meta.len(), meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec());
        let memo = self.cache.join("digests").join(format!("{:x}-{:x}", meta.dev(), meta.ino()));
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
    fn compile(&self, name: &str, module: &File, directory: &Path, compact: bool) -> Result<File> {
        let wasm = |reason: String| Error::Wasm { module: name.to_owned(), reason };
        // A copy that cannot change: else a container could have one module hashed and another one
        // compiled, and so put code of its choice under the digest of somebody else's module.
        let (key, copy) = sealed_copy(module).with_context(|| format!("read module {name}"))?;
        let entry = directory.join(entry_name(&key, compact));
        log::info!("compiling module {name} to {}", entry.display());
        make_private(directory).on("create", directory)?;
        let temporary = temporary_name(&entry);
        let output = create(&temporary).on("create", &temporary)?;
        let mut input = File::from(copy);
        io::Seek::rewind(&mut input).with_context(|| format!("read module {name}"))?;
        let mut command = Command::new(&self.compiler);
        // SAFETY: between fork and exec only system calls are made.
        unsafe { command.pre_exec(sys::process::restore_open_files) };
        let compiled = command
            .args(["--confined", "--name", name])
            .args(compact.then_some("--compact"))
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(output))
            .stderr(Stdio::piped())
            .spawn()
            .and_then(|mut child| {
                let mut complaint = Vec::new();
                if let Some(stderr) = child.stderr.take() {
                    stderr.take(COMPLAINT_LIMIT).read_to_end(&mut complaint)?;
                }
                Ok((child.wait()?, complaint))
            });
        let result = match compiled {
            Err(e) => Err(wasm(format!("run the compiler {}: {e}", self.compiler.display()))),
            Ok((status, _)) if status.success() => {
                fs::rename(&temporary, &entry).with_context(|| format!("put {} into the cache", entry.display()))
            }
            Ok((status, complaint)) => {
                let complaint = String::from_utf8_lossy(&complaint);
                let complaint = complaint.trim().trim_start_matches("runx: ").to_owned();
                Err(wasm(if complaint.is_empty() { format!("the compiler ended with {status}") } else { complaint }))
            }
        };
        if result.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        result?;
        open_trusted(&entry).ok_or_else(|| wasm(format!("the artifact {} has vanished", entry.display())))
    }
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
        // It may have grown since its size was looked at.
        if at > MODULE_LIMIT {
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

fn entry_name(key: &str, compact: bool) -> String {
    format!("{key}{}.cwasm", if compact { "-compact" } else { "" })
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

    fn config(name: &str) -> WasmConfig {
        let base = std::env::temp_dir().join(format!("runx-workload-{name}-{}", std::process::id()));
        WasmConfig { runner: base.join(RUNNER), compiler: base.join(COMPILER), cache: base.join("cache") }
    }

    #[test]
    fn names_tell_modules() {
        for name in ["/app.wasm", "hello.wat"] {
            assert!(has_module_name(Path::new(name)), "{name}");
        }
        for name in ["/bin/sh", "wasm", "/x.wasm/run"] {
            assert!(!has_module_name(Path::new(name)), "{name}");
        }
    }

    #[test]
    fn a_digest_is_remembered_until_the_file_changes() {
        let config = config("digest");
        fs::create_dir_all(&config.cache).unwrap();
        let path = config.cache.join("module");
        fs::write(&path, "one").unwrap();
        let first = config.digest(&File::open(&path).unwrap()).unwrap();
        let memo = fs::read_dir(config.cache.join("digests")).unwrap().next().unwrap().unwrap().path();
        // What is remembered is what is used: a marked memo shows that the file was not read again.
        let marked = fs::read_to_string(&memo).unwrap().replace(&first, &"0".repeat(64));
        fs::write(&memo, marked).unwrap();
        let second = config.digest(&File::open(&path).unwrap()).unwrap();
        fs::write(&path, "three").unwrap();
        let third = config.digest(&File::open(&path).unwrap()).unwrap();
        fs::remove_dir_all(config.cache.parent().unwrap()).unwrap();
        assert_eq!(second, "0".repeat(64));
        assert_ne!(third, first);
        assert_eq!(third.len(), 64);
    }

    #[test]
    fn a_missing_runner_is_named() {
        let config = config("runner");
        fs::create_dir_all(&config.cache).unwrap();
        let path = config.cache.join("m.wasm");
        fs::write(&path, MAGIC).unwrap();
        let error = config.prepare("/m.wasm", File::open(&path).unwrap(), None).unwrap_err().to_string();
        fs::remove_dir_all(config.cache.parent().unwrap()).unwrap();
        assert!(error.contains("/m.wasm") && error.contains(RUNNER), "{error}");
    }
}
