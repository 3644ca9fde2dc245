//! An execution, as the pool's process sees it: a message, a wait with a deadline, a message.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use runx_core::sys::pidfd;

use super::sandbox::Sandbox;
use super::stop::Stop;
use super::streams::{self, Capture, Flow, Null};
use super::watch::{Watch, poll};
use crate::command::{Command, DEFAULT_PATH, Limits};
use crate::error::{Error, Result};
use crate::outcome::{Outcome, Status};
use crate::sys;
use crate::template::{Filter, Template};
use crate::wire::channel::LIMIT;
use crate::wire::messages::{Ended, Execute, FromInit, MAX_FDS, ToInit};

/// How long an init may take to end a program before it is ended itself.
const GRACE: Duration = Duration::from_secs(2);

/// How long to wait before the init is told again to end a program. It forgets the word if it comes before the program.
const AGAIN: Duration = Duration::from_millis(10);

impl Sandbox {
    /// Runs a program to its end, or until `stop` says that it is to end.
    pub(super) fn run(&mut self, mut command: Command, template: &Template, stop: Option<&Stop>) -> Result<Outcome> {
        if stop.is_some_and(Stop::take) {
            return Ok(Outcome { signal: Some(libc::SIGKILL), ..unstarted(Status::Signalled) });
        }
        let memory = command.limits.memory.or(template.memory);
        let processes = command.limits.processes.or(template.processes);
        let (limits_memory, limits_processes) = match self.limit(memory, processes) {
            // What is there already, in a tmpfs, is more.
            Err(e) if e.errno() == Some(libc::EBUSY) => return Ok(unstarted(Status::MemoryLimitExceeded)),
            limited => limited?,
        };
        let limits = rlimits(
            &command.limits,
            self.cpu().is_some(),
            memory.filter(|_| !limits_memory),
            processes.filter(|_| !limits_processes),
        );
        let mut null = Null::default();
        let stdin = std::mem::take(&mut command.stdin);
        let streams = streams::input(stdin, self, &mut null).and_then(|stdin| {
            let (stdout, captured) = streams::output(std::mem::take(&mut command.stdout), self, &mut null)?;
            let (stderr, errors) = streams::output(std::mem::take(&mut command.stderr), self, &mut null)?;
            Ok(([stdin, stdout, stderr], [captured, errors]))
        });
        let (fds, captures) = match streams {
            Ok(streams) => streams,
            Err(e @ Error::File { .. }) => return Ok(failed(Status::FileError, e.to_string())),
            Err(e) => return Err(e),
        };
        let execute = Execute {
            programs: programs(&command),
            args: command.args.iter().map(|arg| arg.as_bytes().to_vec()).collect(),
            env: command.env.iter().map(|variable| variable.as_bytes().to_vec()).collect(),
            directory: command
                .directory
                .as_deref()
                .unwrap_or(template.directory_of_work())
                .as_os_str()
                .as_bytes()
                .to_vec(),
            limits,
            targets: [0, 1, 2].into_iter().chain(command.more.iter().map(|(number, _)| *number)).collect(),
        };
        check(&execute)?;
        let message = ToInit::Execute(Box::new(execute)).encode();
        if message.len() > LIMIT {
            let size = message.len();
            return Err(Error::Command(format!(
                "arguments and environment take {size} bytes; at most {LIMIT} go through"
            )));
        }
        let more = command.more.iter().map(|(_, fd)| fd.as_fd());
        let all: Vec<BorrowedFd<'_>> =
            fds.iter().map(AsFd::as_fd).chain(more).chain(command.program.iter().map(AsFd::as_fd)).collect();
        let start = Instant::now();
        self.counts.executions += 1;
        self.channel.send(&message, &all).map_err(|e| Error::Gone(format!("it cannot be reached: {e}")))?;
        // Only the program's copies are left, so their end is the program's.
        drop((fds, command.more, command.program, null));
        let mut watch = Watch::new(&command.limits, start, processes);
        let (answer, captures) = self.watch(&mut watch, captures, stop);
        let known = Known { limits: &command.limits, memory, filter: template.filter, reason: watch.reason };
        self.judge(answer, captures, &known, start)
    }

    /// Sets the group's limits where they are not what they have to be, and begins its peaks anew. Returns which of memory
    /// and processes a group limits.
    fn limit(&mut self, memory: Option<u64>, processes: Option<u64>) -> Result<(bool, bool)> {
        let Some(group) = &self.group else { return Ok((false, false)) };
        if self.limits.0 != memory {
            let limit = |memory: Option<u64>| group.limit_memory(memory.unwrap_or(u64::MAX >> 1));
            if let Err(e) = limit(memory) {
                // One of two files may have been written.
                let _ = limit(self.limits.0);
                return Err(e);
            }
            self.limits.0 = memory;
        }
        if self.limits.1 != processes {
            group.limit_processes(processes.unwrap_or(1 << 20))?;
            self.limits.1 = processes;
        }
        let limited = (group.limits_memory(), group.limits_processes());
        if self.counts.executions > 0 {
            let reset = group.reset_memory_peak();
            self.note();
            if reset {
                self.counts.memory_peak = 0;
            }
        }
        Ok(limited)
    }

    /// Waits for the answer, reads output, and ends the program when it has had enough.
    fn watch(
        &mut self,
        watch: &mut Watch,
        mut captures: [Capture; 2],
        stop: Option<&Stop>,
    ) -> (Result<FromInit>, [Capture; 2]) {
        let mut chunk = [0u8; 16 * 1024];
        loop {
            let stopped = stop.map_or(-1, |stop| stop.as_fd().as_raw_fd());
            let mut fds = [self.channel.as_fd().as_raw_fd(), -1, -1, stopped].map(|fd| libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            });
            for (poll, capture) in fds.iter_mut().skip(1).zip(&captures) {
                poll.fd = capture.waiting().map_or(-1, |fd| fd.as_raw_fd());
            }
            let until = watch.next(|| self.cpu());
            match poll(&mut fds, until) {
                // A signal for this process, or no memory: later again.
                Err(_) | Ok(0) => {}
                Ok(_) => {
                    for (poll, capture) in fds.iter().skip(1).zip(captures.iter_mut()) {
                        if poll.revents != 0 && capture.read(&mut chunk) == Flow::Over {
                            self.end(watch, Status::OutputLimitExceeded);
                        }
                    }
                    if fds[3].revents != 0 && stop.is_some_and(Stop::take) {
                        self.end(watch, Status::Signalled);
                    }
                    if fds[0].revents != 0 {
                        let answer = self.read().map(|(answer, _)| answer);
                        // All processes are gone, and what they wrote is in the pipes.
                        for capture in &mut captures {
                            if capture.read(&mut chunk) == Flow::Over {
                                watch.reason.get_or_insert(Status::OutputLimitExceeded);
                            }
                        }
                        return (answer, captures);
                    }
                }
            }
            // A program that writes without a pause does not put it off.
            if until.is_some_and(|until| Instant::now() >= until) {
                self.late(watch);
            }
        }
    }

    /// The processor time of this execution until now, where a group counts it.
    fn cpu(&self) -> Option<Duration> {
        let used = self.group.as_ref()?.cpu_ns()?;
        Some(Duration::from_nanos(used.saturating_sub(self.counts.cpu_ns)))
    }

    /// A deadline has passed.
    fn late(&self, watch: &mut Watch) {
        if let Some(at) = watch.kill_at {
            if Instant::now() >= at {
                self.kill();
                watch.kill_at = None;
            } else {
                self.tell_end(watch);
            }
        } else if watch.is_over(self.cpu()) {
            self.end(watch, Status::TimeLimitExceeded);
        }
    }

    /// Has the init end all; later it is ended itself.
    fn end(&self, watch: &mut Watch, reason: Status) {
        if watch.reason.is_some() {
            return;
        }
        watch.reason = Some(reason);
        watch.kill_at = Some(Instant::now() + GRACE);
        self.tell_end(watch);
    }

    fn tell_end(&self, watch: &mut Watch) {
        watch.again = Instant::now() + AGAIN;
        // The init may be gone, which ends the wait as well.
        let _ = pidfd::send_signal(self.pidfd.as_fd(), libc::SIGTERM);
    }

    /// The verdict.
    fn judge(
        &self,
        answer: Result<FromInit>,
        captures: [Capture; 2],
        known: &Known<'_>,
        start: Instant,
    ) -> Result<Outcome> {
        let [stdout, stderr] = captures.map(Capture::into_data);
        let group = self.group.as_ref();
        let cpu = self.cpu();
        let oom = group.map_or(0, |group| group.oom_kills()) > self.counts.oom_kills;
        let (ended, gone) = match answer {
            Ok(FromInit::Ended(ended)) => (ended, None),
            Ok(FromInit::NotStarted { step, errno }) if !oom => {
                let why = std::io::Error::from_raw_os_error(errno as i32);
                return Ok(failed(Status::InternalError, format!("{step}: {why}")));
            }
            // What it was is told by the group.
            Ok(_) | Err(_) if oom || known.reason.is_some() => {
                let ended = Ended {
                    signal: libc::SIGKILL as u32,
                    wall_ns: start.elapsed().as_nanos() as u64,
                    ..Ended::default()
                };
                (ended, Some(()))
            }
            Ok(_) => return Err(Error::Gone("it answered something else to an execution".into())),
            Err(e) => return Err(e),
        };
        if gone.is_some() {
            self.kill();
        }
        let counted = Duration::from_micros(ended.user_us + ended.system_us);
        let cpu = cpu.unwrap_or(counted);
        let wall = Duration::from_nanos(ended.wall_ns);
        let peak = group.and_then(|group| group.memory_peak()).filter(|peak| *peak > self.counts.memory_peak);
        let memory = peak.unwrap_or(ended.resident);
        let peak = group.and_then(|group| group.processes_peak());
        let processes = peak.filter(|peak| self.counts.executions == 1 || *peak > self.counts.processes_peak);
        let status = known.status(&ended, oom, cpu, wall, memory, group.is_some_and(|group| group.limits_memory()));
        Ok(Outcome {
            status,
            exit_code: ended.code as i32,
            signal: (ended.signal != 0).then_some(ended.signal as i32),
            cpu,
            wall,
            memory,
            processes,
            stdout,
            stderr,
            error: None,
        })
    }
}

/// What a verdict depends on beside the program's end.
struct Known<'a> {
    limits: &'a Limits,
    memory: Option<u64>,
    filter: Filter,
    /// Why the program was ended.
    reason: Option<Status>,
}

impl Known<'_> {
    fn status(&self, ended: &Ended, oom: bool, cpu: Duration, wall: Duration, memory: u64, counted: bool) -> Status {
        let past = |limit: Option<Duration>, used: Duration| limit.is_some_and(|limit| used > limit);
        if oom || (!counted && self.memory.is_some_and(|limit| memory > limit)) {
            return Status::MemoryLimitExceeded;
        }
        // One that ended by itself before a killer's word came did so.
        if let Some(reason) = self.reason.filter(|reason| *reason != Status::Signalled) {
            return reason;
        }
        if past(self.limits.cpu, cpu) || past(self.limits.wall, wall) {
            return Status::TimeLimitExceeded;
        }
        match (ended.signal as i32, ended.code) {
            (0, 0) => Status::Accepted,
            (0, _) => Status::NonZeroExitStatus,
            (libc::SIGXFSZ, _) => Status::OutputLimitExceeded,
            (libc::SIGXCPU, _) => Status::TimeLimitExceeded,
            (libc::SIGSYS, _) if self.filter == Filter::Kill => Status::DangerousSyscall,
            _ => Status::Signalled,
        }
    }
}

fn failed(status: Status, error: String) -> Outcome {
    Outcome { error: Some(error), ..unstarted(status) }
}

/// Of a program that did not begin.
fn unstarted(status: Status) -> Outcome {
    Outcome {
        status,
        exit_code: 0,
        signal: None,
        cpu: Duration::ZERO,
        wall: Duration::ZERO,
        memory: 0,
        processes: None,
        stdout: Vec::new(),
        stderr: Vec::new(),
        error: None,
    }
}

/// Where the program may be.
fn programs(command: &Command) -> Vec<Vec<u8>> {
    if command.program.is_some() {
        return Vec::new();
    }
    let name = command.args.first().map(|name| name.as_bytes()).unwrap_or_default();
    if name.contains(&b'/') || name.is_empty() {
        return vec![name.to_vec()];
    }
    let own = command.env.iter().rev().find_map(|variable| variable.as_bytes().strip_prefix(b"PATH="));
    let path = own.unwrap_or(DEFAULT_PATH.as_bytes());
    path.split(|byte| *byte == b':')
        .map(|directory| if directory.is_empty() { b".".as_slice() } else { directory })
        .map(|directory| [directory, b"/", name].concat())
        .collect()
}

/// The limits of each process.
fn rlimits(limits: &Limits, counted: bool, memory: Option<u64>, processes: Option<u64>) -> Vec<(u32, u64, u64)> {
    let same = |kind, value: u64| (kind, value, value);
    let mut list = vec![same(libc::RLIMIT_FSIZE, limits.file_size), same(libc::RLIMIT_NOFILE, limits.open_files)];
    // Whole seconds, counted by ticks: where a group counts better, this is the last resort, and must not come first. The
    // kernel multiplies them.
    list.extend(limits.cpu.map(|cpu| {
        let more = u64::from(cpu.subsec_nanos() > 0) + u64::from(counted);
        let seconds = cpu.as_secs().saturating_add(more).min(u32::MAX.into());
        (libc::RLIMIT_CPU, seconds, seconds + 1)
    }));
    list.extend(limits.stack.map(|bytes| same(libc::RLIMIT_STACK, bytes)));
    list.extend(limits.address_space.map(|bytes| same(libc::RLIMIT_AS, bytes)));
    let data = memory.into_iter().chain(limits.data).min();
    list.extend(data.map(|bytes| same(libc::RLIMIT_DATA, bytes)));
    list.extend(processes.map(|count| same(libc::RLIMIT_NPROC, count)));
    // More than this process may have, the kernel refuses.
    for (kind, soft, hard) in &mut list {
        let most = sys::most(*kind);
        (*soft, *hard) = ((*soft).min(most), (*hard).min(most));
    }
    list
}

fn check(execute: &Execute) -> Result<()> {
    let strings = execute.args.iter().chain(&execute.env).chain(&execute.programs).chain([&execute.directory]);
    if strings.into_iter().any(|text| text.contains(&0)) {
        return Err(Error::Command("a string holds a NUL byte".into()));
    }
    if execute.args.first().is_none_or(|name| name.is_empty()) {
        return Err(Error::Command("it has no program".into()));
    }
    let more = execute.targets.get(3..).unwrap_or_default();
    let twice =
        more.iter().enumerate().any(|(at, number)| more.get(at + 1..).is_some_and(|rest| rest.contains(number)));
    if more.iter().any(|number| *number < 3 || *number as usize >= MAX_FDS) || twice {
        return Err(Error::Command("descriptors have each a number of its own, from 3 to 63".into()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_any_size_are_limits() {
        let all = Some(u64::MAX);
        let limits = Limits { cpu: Some(Duration::MAX), open_files: u64::MAX, stack: all, ..Limits::default() };
        for (kind, soft, hard) in rlimits(&limits, true, all, all) {
            assert!(soft <= hard && hard <= sys::most(kind), "{kind}: {soft} {hard}");
        }
        let cpu = |time| rlimits(&Limits { cpu: Some(time), ..Limits::default() }, false, None, None)[2];
        assert_eq!(cpu(Duration::from_millis(1500)), (libc::RLIMIT_CPU, 2, 3));
    }
}
