//! How often the cache had what was asked for, on this node since it was made. Every shim and command adds to one small
//! file, which is what a node's metrics are read from.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

/// The file's name in the cache.
const FILE: &str = "counters";

/// The most that is read of it, in bytes.
const LIMIT: u64 = 4096;

/// How often its lock is tried, 0.2 ms apart.
const PATIENCE: u32 = 250;

/// What is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Artifacts that were there.
    pub hits: u64,
    /// Modules that were compiled.
    pub compiles: u64,
    /// Modules that could not be compiled.
    pub failures: u64,
    /// How long compiling took in all, in microseconds.
    pub microseconds: u64,
    /// Artifacts that were not what was compiled, and were made again.
    pub rejected: u64,
    /// Artifacts that went to make room.
    pub evicted: u64,
}

impl Counters {
    fn fields(&mut self) -> [(&'static str, &mut u64); 6] {
        [
            ("hits", &mut self.hits),
            ("compiles", &mut self.compiles),
            ("failures", &mut self.failures),
            ("microseconds", &mut self.microseconds),
            ("rejected", &mut self.rejected),
            ("evicted", &mut self.evicted),
        ]
    }

    fn parse(text: &str) -> Self {
        let mut out = Self::default();
        for (name, value) in text.lines().filter_map(|line| line.split_once(' ')) {
            if let Some((_, field)) = out.fields().into_iter().find(|(known, _)| *known == name) {
                *field = value.parse().unwrap_or(0);
            }
        }
        out
    }

    /// What has been counted in the cache at `directory`.
    ///
    /// # Errors
    /// Those of reading. A cache that is not there has counted nothing.
    pub fn read(directory: &Path) -> io::Result<Self> {
        match File::open(directory.join(FILE)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            file => {
                let file = lock(file?, FlockArg::LockSharedNonblock)?;
                Ok(Self::parse(&contents(&file)?))
            }
        }
    }

    /// Adds to what has been counted. That nobody could count it stops nothing.
    pub(super) fn add(mut self, directory: &Path) {
        if let Err(e) = self.try_add(directory) {
            log::debug!("count in {}: {e}", directory.join(FILE).display());
        }
    }

    fn try_add(&mut self, directory: &Path) -> io::Result<()> {
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = options.open(directory.join(FILE))?;
        if file.metadata()?.uid() != nix::unistd::geteuid().as_raw() {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it is somebody else's"));
        }
        let mut file = lock(file, FlockArg::LockExclusiveNonblock)?;
        let mut sum = Self::parse(&contents(&file)?);
        let mut out = String::new();
        for ((name, total), (_, more)) in sum.fields().into_iter().zip(self.fields()) {
            // Writing to a string does not fail.
            let _ = writeln!(out, "{name} {:020}", total.saturating_add(*more));
        }
        file.rewind()?;
        // Of one length always: nobody finds half of it, whenever this process ends.
        file.write_all(out.as_bytes())?;
        file.set_len(out.len() as u64)
    }

    /// In Prometheus' text form.
    pub fn prometheus(&self) -> String {
        let mut out = String::new();
        let mut line = |name: &str, help: &str, value: &dyn std::fmt::Display| {
            // As above.
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} counter\n{name} {value}");
        };
        line("runx_wasm_cache_hits_total", "Compiled modules that were in the cache.", &self.hits);
        line("runx_wasm_compiles_total", "Modules that were compiled.", &self.compiles);
        line("runx_wasm_compile_failures_total", "Modules that could not be compiled.", &self.failures);
        let seconds = self.microseconds as f64 / 1e6;
        line("runx_wasm_compile_seconds_total", "Time that compiling took.", &seconds);
        line("runx_wasm_cache_rejected_total", "Compiled modules that were not what was compiled.", &self.rejected);
        line("runx_wasm_cache_evicted_total", "Compiled modules that were removed to make room.", &self.evicted);
        out
    }
}

/// Locks the file, for which nobody waits long: whoever has it may have been stopped.
fn lock(file: File, how: FlockArg) -> io::Result<Flock<File>> {
    let mut file = file;
    for _ in 0..PATIENCE {
        match Flock::lock(file, how) {
            Ok(locked) => return Ok(locked),
            Err((back, nix::Error::EWOULDBLOCK | nix::Error::EINTR)) => {
                file = back;
                std::thread::sleep(Duration::from_micros(200));
            }
            Err((_, e)) => return Err(e.into()),
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

fn contents(file: &File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.take(LIMIT).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_at_once_lose_nothing() {
        let directory = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        Counters { hits: 1, microseconds: 2, ..Counters::default() }.add(directory.path());
                    }
                });
            }
        });
        let read = Counters::read(directory.path()).unwrap();
        assert_eq!(read, Counters { hits: 200, microseconds: 400, ..Counters::default() });
        assert!(read.prometheus().contains("\nrunx_wasm_cache_hits_total 200\n"), "{}", read.prometheus());
        assert_eq!(fs::metadata(directory.path().join(FILE)).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn what_is_not_there_or_broken_counts_as_nothing() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(Counters::read(directory.path()).unwrap(), Counters::default());
        fs::write(directory.path().join(FILE), "hits many\nother 3\ncompiles 7\n").unwrap();
        assert_eq!(Counters::read(directory.path()).unwrap(), Counters { compiles: 7, ..Counters::default() });
    }
}
