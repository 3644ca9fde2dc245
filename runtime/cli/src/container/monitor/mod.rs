//! A container's monitor: the parent of its first process, from before its program starts until all of it is cleared up.
//!
//! A small process of one thread, forked by the command that starts the container, which may end at any moment. The
//! monitor holds the container's streams, writes its log, serves those who are attached, writes down its end, starts it
//! again where that is asked for, and takes away what was made for it. When it is killed, the container goes on without
//! its streams, and the next command finds out.

pub(super) mod agent;
mod clients;
mod serve;
mod streams;
mod title;
mod trim;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use runx_core::Error;
use runx_core::agent::Wish;
use runx_core::bundle::Bundle;
use runx_core::cgroup::Refuge;
use runx_core::container::{Container, CreateOptions, Process, Runtime};
use runx_core::spawn::refuse_threads;
use runx_core::sys::{self, pidfd::Exit, process};

use super::frames::{self, Kind};
use super::options::{Options, Restart};
use super::record::{Containers, Identity, Lock, Phase, Record, is_there, now};
use super::{log, remove, rootless, socket, stop};
use crate::oci::foreground::Signals;
use crate::{Context, message};
use agent::Agent;
use clients::Clients;
use streams::Streams;

/// The wait before the first start again, doubled each time, docker's.
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(60);
/// Who ran that long has recovered.
const RECOVERED: Duration = Duration::from_secs(10);

/// Starts a container's monitor, which then starts the container. Returns the connection to it, as of one who is attached:
/// it says whether the container could be started. `before` is what the monitor is told before anything.
///
/// The lock is the monitor's from here on: it lets go once the container runs.
pub(crate) fn launch(
    context: &Context,
    containers: &Containers,
    record: Record,
    lock: Lock,
    bundle: Bundle,
    before: &[u8],
) -> Result<UnixStream> {
    let (mut ours, theirs) = UnixStream::pair().context("make a socket pair")?;
    std::io::Write::write_all(&mut ours, before).context("speak to the monitor")?;
    refuse_threads()?;
    let runtime = context.runtime();
    let systemd_cgroup = context.global.systemd_cgroup;
    let lenient = context.global.rootless;
    let stop_signal = stop::stop_signal(&record)?;
    let agent = Wish::of(bundle.spec())?.map(|wish| Agent::new(wish, &context.executable));
    let (mut refuge, mut birthplace) = Refuge::prepare();
    // SAFETY: refuse_threads made sure that there is no other thread.
    let mut cloned = unsafe { process::clone(0, birthplace.as_ref().map(AsFd::as_fd)) };
    if cloned.is_err() && birthplace.take().is_some() {
        std::mem::take(&mut refuge).abandon();
        // SAFETY: as above.
        cloned = unsafe { process::clone(0, None) };
    }
    match cloned.context("clone the container's monitor")? {
        process::Cloned::Parent { .. } => Ok(ours),
        process::Cloned::Child => {
            drop(birthplace);
            // SAFETY: this process never returns to what owned the others, and ends without running destructors of the
            // caller's copies.
            unsafe { leave_caller(&[lock.as_fd().as_raw_fd(), theirs.as_raw_fd()]) };
            std::mem::forget(ours);
            let directory = containers.directory(&record.id);
            let monitor = Monitor {
                runtime,
                containers: containers.clone(),
                id: record.id.clone(),
                directory,
                options: record.options.clone(),
                stop_signal,
                systemd_cgroup,
                lenient,
                clients: Clients::new(theirs),
                signals: match Signals::hold() {
                    Ok(signals) => signals,
                    // SAFETY: as above.
                    Err(_) => unsafe { libc::_exit(1) },
                },
                stopping: false,
                refuge,
                agent,
            };
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| monitor.run(record, lock, bundle)));
            // SAFETY: as above.
            unsafe { libc::_exit(i32::from(!matches!(done, Ok(Ok(()))))) }
        }
    }
}

/// Leaves what the process was cloned from: its session, directory, streams, descriptors and command line.
///
/// # Safety
/// As for [`sys::close_all_but`].
unsafe fn leave_caller(keep: &[i32]) {
    ::log::set_max_level(::log::LevelFilter::Off);
    let _ = nix::unistd::setsid();
    let _ = std::env::set_current_dir("/");
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        for number in 0..3 {
            // SAFETY: dup2 takes two numbers; nobody in this process uses the standard streams any more.
            unsafe { libc::dup2(null.as_raw_fd(), number) };
        }
    }
    // SAFETY: the caller's promise.
    unsafe { sys::close_all_but(3, keep.to_vec()) };
    // SAFETY: umask takes a number and cannot fail.
    unsafe { libc::umask(0o022) };
}

/// The monitor.
struct Monitor {
    runtime: Runtime,
    containers: Containers,
    id: String,
    directory: PathBuf,
    options: Options,
    /// What asks the container to stop.
    stop_signal: i32,
    systemd_cgroup: bool,
    lenient: Option<bool>,
    clients: Clients,
    signals: Signals,
    /// It was asked to stop.
    stopping: bool,
    /// Out of the cgroups of whoever started the container.
    refuge: Refuge,
    agent: Option<Agent>,
}

/// A container that runs.
struct Running {
    container: Container,
    process: Process,
    streams: Streams,
    listener: UnixListener,
    since: Instant,
}

impl Monitor {
    fn run(mut self, record: Record, lock: Lock, bundle: Bundle) -> Result<()> {
        let done = self.live(record, lock, bundle);
        self.refuge.leave();
        done
    }

    fn live(&mut self, mut record: Record, lock: Lock, bundle: Bundle) -> Result<()> {
        title::set(&format!("runx: monitor of {}", self.id));
        process::set_name(c"runx-monitor");
        // What the client said before, and nothing later: its window's size is the terminal's from the first moment.
        self.clients.read_now();
        let running = match self.start(&mut record, &bundle) {
            Ok(running) => running,
            Err(e) => {
                self.give_up(record, lock, &e);
                return Err(e);
            }
        };
        drop((record, bundle));
        lock.release();
        // Before anybody knows: with the end of the command that starts a container its service may be ended.
        self.refuge.enter();
        // Who is told of a start finds the log.
        let log = self.open_log();
        self.clients.tell(Kind::Started, &[]);
        self.look_after(running, log)
    }

    fn open_log(&self) -> Option<log::Writer> {
        log::Writer::open(&self.directory, self.options.log).ok()
    }

    /// Serves the container and starts it again, until it has ended for good.
    fn look_after(&mut self, mut running: Running, mut log: Option<log::Writer>) -> Result<()> {
        let mut delay = FIRST_DELAY;
        loop {
            trim::trim();
            let served = serve::serve(self, &mut running, &mut log);
            drop(log.take());
            let exit = served?;
            let ran = running.since.elapsed();
            if ran >= RECOVERED {
                delay = FIRST_DELAY;
            }
            if !self.ended(running, exit)? {
                break self.farewell(exit);
            }
            self.wait(delay);
            delay = (delay * 2).min(LONGEST_DELAY);
            match self.start_again()? {
                Some(again) => (running, log) = (again, self.open_log()),
                None => break self.farewell(exit),
            }
        }
        Ok(())
    }

    /// Starts the program in a new container of the core. For the holder of the lock.
    fn start(&mut self, record: &mut Record, bundle: &Bundle) -> Result<Running> {
        let (streams, stdio) = Streams::make(&self.options)?;
        let options = CreateOptions {
            stdio,
            systemd_cgroup: self.systemd_cgroup,
            lenient: self.lenient,
            entered: rootless::has_entered(),
            config: Some(bundle.path().join("config.json")),
            ..CreateOptions::default()
        };
        let (container, mut process) = self.runtime.create(&self.id, bundle, options)?;
        let mut streams = streams;
        let mut begin = |process: &mut Process| -> Result<UnixListener> {
            if let Some(master) = process.take_terminal() {
                streams.connect_terminal(master)?;
                if let Some((rows, columns)) = self.clients.window() {
                    streams.resize(rows, columns);
                }
            }
            let listener = socket::listen(&self.runtime.root().join(&self.id))?;
            record.phase = Phase::Running;
            record.started = Some(now());
            record.finished = None;
            record.exit_code = None;
            record.oom_killed = false;
            record.error = None;
            record.monitor = Some(Identity::own());
            record.write(&self.directory)?;
            process.start()?;
            container.set_started()?;
            Ok(listener)
        };
        match begin(&mut process) {
            Ok(listener) => Ok(Running { container, process, streams, listener, since: Instant::now() }),
            Err(e) => {
                process.discard();
                let _ = container.delete(true);
                Err(e)
            }
        }
    }

    /// A container that could not be started: says why, and takes away what was made for the start.
    fn give_up(&mut self, mut record: Record, lock: Lock, error: &anyhow::Error) {
        let code = exit_code(error);
        record.phase =
            if record.started.is_some() && record.finished.is_some() { Phase::Exited } else { Phase::Created };
        record.exit_code = Some(code.into());
        record.error = Some(message(error));
        record.monitor = None;
        let _ = record.write(&self.directory);
        let _ = remove::take_down(self.runtime.root(), &self.directory, &record);
        lock.release();
        let mut data = vec![code];
        data.extend(message(error).bytes().take(frames::LIMIT - 1));
        self.clients.tell(Kind::Failed, &data);
        self.clients.finish();
    }

    /// Writes down the end and takes away what was made. Returns whether it is to be started again.
    fn ended(&mut self, running: Running, exit: Exit) -> Result<bool> {
        let Running { container, listener, .. } = running;
        let oom = exit.signal == Some(libc::SIGKILL) && was_out_of_memory(&container);
        let Ok(lock) = self.containers.lock(&self.id) else {
            // The record was removed by hand.
            let _ = container.delete(true);
            return Ok(false);
        };
        let mut record = Record::read(&self.directory)?;
        record.finished = Some(now());
        record.exit_code = Some(exit.code);
        record.oom_killed = oom;
        let again = !self.stopping
            && !record.stopped
            && match record.options.restart {
                Restart::No => false,
                Restart::OnFailure(most) => exit.code != 0 && (most == 0 || record.restarts < most),
                Restart::Always | Restart::UnlessStopped => true,
            };
        record.phase = if again { Phase::Restarting } else { Phase::Exited };
        // Of a container that removes itself nothing is written that is removed in the next moment. A full disk must not
        // keep us from taking away what is there, which may be what filled it.
        let goes = !again && record.options.auto_remove;
        let written = if goes { Ok(()) } else { record.write(&self.directory) };
        if let Err(Error::NotFound(_)) = container.delete(true) {
            // Somebody else was faster.
        }
        // Nobody can come any more, and who has come is not sent away.
        let _ = nix::sys::socket::shutdown(listener.as_raw_fd(), nix::sys::socket::Shutdown::Read);
        while let Ok((socket, _)) = listener.accept() {
            self.clients.add(socket);
        }
        self.stopping |= self.clients.signals().any(is_ending);
        drop(listener);
        if !again {
            remove::after_end(self.runtime.root(), &self.containers, &self.directory, &record);
        }
        // It could not be removed, or could not be written.
        if goes && is_there(&self.directory) || written.is_err() {
            let _ = record.write(&self.directory);
        }
        self.options.restart = record.options.restart;
        lock.release();
        Ok(again)
    }

    /// Waits before a start, unless it is asked to stop.
    fn wait(&mut self, delay: Duration) {
        let end = Instant::now() + delay;
        loop {
            while let Some(signal) = self.signals.next() {
                self.stopping |= is_ending(signal);
            }
            let left = end.saturating_duration_since(Instant::now());
            if self.stopping || left.is_zero() {
                return;
            }
            self.clients.flush();
            let left = left.as_millis().clamp(1, i32::MAX as u128) as i32;
            let mut fds = vec![libc::pollfd { fd: self.signals.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 }];
            // What is input stays where it is: there is nobody to take it.
            fds.extend(self.clients.poll(true));
            // SAFETY: fds is a valid list of that many.
            if unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, left) } == -1 {
                continue;
            }
            for wish in self.clients.handle(&fds[1..]) {
                match wish {
                    // There is no program to be told.
                    clients::Wish::Signal(number) => self.stopping |= is_ending(number),
                    other => self.clients.postpone(other),
                }
            }
        }
    }

    /// Starts it again, unless it was stopped meanwhile.
    fn start_again(&mut self) -> Result<Option<Running>> {
        let Ok(lock) = self.containers.lock(&self.id) else { return Ok(None) };
        let mut record = Record::read(&self.directory)?;
        let give_up = |mut record: Record| -> Result<Option<Running>> {
            record.phase = Phase::Exited;
            let written = record.write(&self.directory);
            remove::after_end(self.runtime.root(), &self.containers, &self.directory, &record);
            written.map(|()| None)
        };
        // The lock may have been waited for.
        while let Some(signal) = self.signals.next() {
            self.stopping |= is_ending(signal);
        }
        self.stopping |= self.clients.signals().any(is_ending);
        if self.stopping || record.stopped {
            let done = give_up(record);
            lock.release();
            return done;
        }
        record.restarts += 1;
        let finished = record.finished.clone();
        let started =
            Bundle::load(&record.bundle).map_err(Into::into).and_then(|bundle| self.start(&mut record, &bundle));
        let started = match started {
            Ok(running) => Ok(Some(running)),
            Err(e) => {
                record.exit_code = Some(exit_code(&e).into());
                record.error = Some(message(&e));
                record.finished = finished;
                record.phase = Phase::Exited;
                let written = record.write(&self.directory);
                remove::after_end(self.runtime.root(), &self.containers, &self.directory, &record);
                written.map(|()| None)
            }
        };
        lock.release();
        started
    }

    /// Tells everybody the exit code, and stays until they know.
    fn farewell(&mut self, exit: Exit) {
        self.clients.tell(Kind::Exit, &exit.code.to_ne_bytes());
        self.clients.finish();
    }
}

/// Whether a signal asks for the end.
pub(super) fn is_ending(signal: i32) -> bool {
    matches!(signal, libc::SIGTERM | libc::SIGINT | libc::SIGQUIT | libc::SIGHUP)
}

/// The exit code of a command whose container could not be started, docker's.
pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<Error>() {
        Some(Error::Program { missing: true, .. }) => 127,
        Some(Error::Program { missing: false, .. }) => 126,
        _ => 125,
    }
}

fn was_out_of_memory(container: &Container) -> bool {
    container.stats().is_ok_and(|stats| stats.memory.is_some_and(|memory| memory.oom_kills > 0))
}
