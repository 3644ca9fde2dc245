//! Stopping all that the daemon has started, and letting it go on: for a pause that those who run do not notice.
//!
//! What is stopped are the daemon's descendants, orphans among them: it inherits those. Parents are stopped before their
//! children and go on after them, so that no shell sees a child that is stopped.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::reaper;

/// How often is looked for those that were started meanwhile.
const ROUNDS: usize = 16;

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// How many there were.
    pub visited: usize,
    /// How many were stopped before.
    pub before: usize,
    /// How many were told to stop.
    pub requested: usize,
    /// How many of those have stopped.
    pub frozen: usize,
    /// How many could not be told.
    pub failed: usize,
    /// How long it took to tell them.
    pub sweep: Duration,
    /// How long it was waited for them.
    pub wait: Duration,
}

/// A process that was stopped: its pid and when it was started.
type Stopped = (i32, u64);

/// Those that are stopped now, in the order in which they were.
#[derive(Debug, Default)]
pub struct Freezer(Mutex<Vec<Stopped>>);

#[derive(Clone, Copy, Debug)]
struct Seen {
    pid: i32,
    parent: i32,
    state: char,
    start: u64,
}

fn look(pid: i32) -> Option<Seen> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything; its closing bracket is the last one.
    let fields: Vec<&str> = text.rsplit_once(") ")?.1.split(' ').collect();
    let state = fields.first()?.chars().next()?;
    Some(Seen { pid, parent: fields.get(1)?.parse().ok()?, state, start: fields.get(19)?.parse().ok()? })
}

/// The daemon's descendants, each after its parent.
fn descendants() -> Vec<Seen> {
    let mut children: HashMap<i32, Vec<Seen>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(seen) = pid.and_then(look).filter(|seen| !matches!(seen.state, 'Z' | 'X')) {
            children.entry(seen.parent).or_default().push(seen);
        }
    }
    let mut out = children.remove(&std::process::id().cast_signed()).unwrap_or_default();
    let mut at = 0;
    while let Some(seen) = out.get(at) {
        out.extend(children.remove(&seen.pid).unwrap_or_default());
        at += 1;
    }
    out
}

/// Sends a signal to a process if it is still the one that was seen.
fn tell((pid, start): Stopped, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: takes numbers; the descriptor is new and nobody else's.
    let fd = unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd as libc::c_int)
    };
    if look(pid).is_none_or(|seen| seen.start != start) {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // SAFETY: takes numbers and a null pointer.
    let code = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, fd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0)
    };
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Stops those that are not known yet. Returns how many they were.
fn sweep(stopped: &mut Vec<Stopped>, known: &mut HashSet<Stopped>, report: &mut Report) -> usize {
    let new: Vec<Seen> = descendants().into_iter().filter(|seen| known.insert((seen.pid, seen.start))).collect();
    for seen in &new {
        report.visited += 1;
        if matches!(seen.state, 'T' | 't') {
            report.before += 1;
            continue;
        }
        match tell((seen.pid, seen.start), libc::SIGSTOP) {
            Ok(()) => stopped.push((seen.pid, seen.start)),
            // It has ended: nobody needs to stop it.
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => continue,
            Err(_) => report.failed += 1,
        }
        report.requested += 1;
    }
    new.len()
}

impl Freezer {
    fn stopped(&self) -> MutexGuard<'_, Vec<Stopped>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops all, and waits so long at most until they have. Blocks.
    pub fn freeze(&self, longest: Duration) -> Report {
        let mut stopped = self.stopped();
        let begun = Instant::now();
        let mut report = Report::default();
        let mut known: HashSet<Stopped> = stopped.iter().copied().collect();
        // Whoever is told last may have started another one before. One who is stopped between fork and exec would hold up the
        // one who starts him, and with him the daemon.
        for _ in 0..ROUNDS {
            if reaper::exclusively(|| sweep(&mut stopped, &mut known, &mut report)) == 0 {
                break;
            }
        }
        report.sweep = begun.elapsed();
        let waited = Instant::now();
        loop {
            let runs = |(pid, start): &&Stopped| {
                look(*pid).is_some_and(|seen| seen.start == *start && !matches!(seen.state, 'T' | 't' | 'Z' | 'X'))
            };
            let running = stopped.iter().filter(runs).count();
            report.frozen = stopped.len() - running;
            if running == 0 || waited.elapsed() >= longest {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        report.wait = waited.elapsed();
        report
    }

    /// Lets those go on that were stopped here.
    pub fn thaw(&self) {
        for one in std::mem::take(&mut *self.stopped()).into_iter().rev() {
            let _ = tell(one, libc::SIGCONT);
        }
    }
}
