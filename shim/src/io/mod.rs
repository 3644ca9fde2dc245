//! Standard streams: between the FIFOs, files, loggers and terminals of containerd's clients and the pipes of
//! the processes.
//!
//! A FIFO is opened for both reading and writing, so that neither side's coming and going disturbs the
//! process: while containerd restarts, output waits in the FIFO.

mod copy;
mod logger;
mod readers;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use crate::reaper::Reaper;
use logger::Logger;

/// How long a delete waits for output that somebody still holds open.
const DRAIN: Duration = Duration::from_secs(10);

/// The streams of a process as the request names them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Streams {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

/// Whose streams they are, and who looks after what is started for them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner<'a> {
    /// The namespace of the container.
    pub(crate) namespace: &'a str,
    /// The id of the container, or of the exec.
    pub(crate) id: &'a str,
    /// The user and group that own pipes.
    pub(crate) ids: (u32, u32),
    pub(crate) reaper: &'a Reaper,
}

/// Where output goes.
#[derive(Debug)]
enum Sink {
    /// A FIFO, or a logger's pipe.
    Pipe(File),
    /// A file, which is always ready.
    File(File),
}

/// The ends that stay here, before they are connected.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    stdin: Option<(OwnedFd, PathBuf)>,
    outputs: Vec<(OwnedFd, Sink)>,
    logger: Option<Logger>,
}

/// The client's side of standard input.
#[derive(Debug)]
enum Input {
    /// Opened only when the process starts: a client may take a reader at the other end for its task's
    /// being there, and would lose the end of its input if it were not.
    Fifo(PathBuf),
    /// An ordinary file, which needs nobody to copy it.
    File(File),
}

/// A task that copies output, and what tells that it has come to its end.
#[derive(Debug)]
struct Output {
    task: JoinHandle<()>,
    copied: oneshot::Receiver<()>,
}

/// The streams of a running process.
#[derive(Debug)]
pub(crate) struct Connections {
    outputs: Mutex<Vec<Output>>,
    input: Mutex<Option<JoinHandle<()>>>,
    /// Keeps the FIFO from ending when a client goes away, until `CloseIO`.
    hold: Mutex<Option<File>>,
    /// What is connected when the process starts.
    pending_input: Mutex<Option<(OwnedFd, PathBuf)>>,
    master: Option<Arc<OwnedFd>>,
    /// Tells those who copy a terminal's output when its process has ended.
    ended: watch::Sender<Option<tokio::time::Instant>>,
    logger: Mutex<Option<Logger>>,
}

fn with_path(path: &Path, what: &str) -> impl FnOnce(io::Error) -> io::Error {
    let text = format!("{what} {}", path.display());
    move |e| io::Error::new(e.kind(), format!("{text}: {e}"))
}

fn open_sink(target: &str) -> io::Result<Option<Sink>> {
    if target.is_empty() {
        return Ok(None);
    }
    let path = match target.split_once("://") {
        None => Path::new(target),
        Some(("fifo", path)) => Path::new(path),
        Some(("file", rest)) => {
            let path = PathBuf::from(logger::decode(rest.split(['?', '#']).next().unwrap_or(rest), false));
            if let Some(directory) = path.parent() {
                fs::create_dir_all(directory).map_err(with_path(directory, "create"))?;
            }
            let mut options = OpenOptions::new();
            let opened = options.append(true).create(true).mode(0o644).open(&path);
            return opened.map(|file| Some(Sink::File(file))).map_err(with_path(&path, "open"));
        }
        Some((scheme, _)) => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("unknown scheme {scheme:?} of {target:?}: there are fifo, file, binary and binary-v2"),
            ));
        }
    };
    if fs::metadata(path).is_ok_and(|meta| meta.file_type().is_fifo()) {
        return Ok(Some(Sink::Pipe(open_fifo(path, OFlag::O_RDWR)?)));
    }
    // What is not there was a FIFO, and would become a file that grows for nobody.
    let file = OpenOptions::new().append(true).open(path).map_err(with_path(path, "open"))?;
    Ok(Some(Sink::File(file)))
}

fn open_fifo(path: &Path, mode: OFlag) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(mode != OFlag::O_WRONLY).write(mode != OFlag::O_RDONLY).custom_flags(libc::O_NONBLOCK);
    options.open(path).map_err(with_path(path, "open FIFO"))
}

fn open_input(path: &str) -> io::Result<Option<Input>> {
    if path.is_empty() {
        return Ok(None);
    }
    let path = Path::new(path.strip_prefix("fifo://").unwrap_or(path));
    if fs::metadata(path).is_ok_and(|meta| meta.file_type().is_fifo()) {
        return Ok(Some(Input::Fifo(path.to_owned())));
    }
    File::open(path).map(|file| Some(Input::File(file))).map_err(with_path(path, "open"))
}

fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

fn null(write: bool) -> io::Result<OwnedFd> {
    Ok(OpenOptions::new().read(!write).write(write).open("/dev/null")?.into())
}

/// A pipe whose ends the given user may open again, through /proc/PID/fd.
fn pipe(owner: (u32, u32)) -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    if owner != (0, 0) {
        for end in [&reader, &writer] {
            nix::unistd::fchown(end, Some(owner.0.into()), Some(owner.1.into()))?;
        }
    }
    Ok((reader, writer))
}

impl Streams {
    /// Whether to open them is to wait for a logger, or for a disk.
    pub(crate) fn may_wait(&self) -> bool {
        self.stdout.contains("://")
    }

    /// Opens everything. For a process without a terminal, the descriptors that become its standard
    /// streams come along.
    pub(crate) fn open(&self, owner: Owner<'_>) -> io::Result<(Option<[OwnedFd; 3]>, Ends)> {
        let mut ends = Ends::default();
        let stdin = self.open_stdin(owner, &mut ends)?;
        let [stdout, stderr] = match logger::Address::parse(&self.stdout) {
            Some(address) => self.start_logger(&address?, owner, &mut ends)?,
            None => self.open_outputs(owner, &mut ends)?,
        };
        Ok(((!self.terminal).then_some([stdin, stdout, stderr]), ends))
    }

    fn open_stdin(&self, owner: Owner<'_>, ends: &mut Ends) -> io::Result<OwnedFd> {
        match open_input(&self.stdin)? {
            Some(Input::File(file)) => Ok(file.into()),
            // The master takes the place of the pipe once it is there.
            Some(Input::Fifo(path)) if self.terminal => {
                ends.stdin = Some((null(true)?, path));
                null(false)
            }
            Some(Input::Fifo(path)) => {
                let (reader, writer) = pipe(owner.ids)?;
                set_nonblocking(&writer)?;
                ends.stdin = Some((writer, path));
                Ok(reader)
            }
            None => null(false),
        }
    }

    fn open_outputs(&self, owner: Owner<'_>, ends: &mut Ends) -> io::Result<[OwnedFd; 2]> {
        let output = open_sink(&self.stdout)?;
        if self.terminal {
            ends.outputs.extend(output.map(|sink| Ok::<_, io::Error>((null(false)?, sink))).transpose()?);
            return Ok([null(true)?, null(true)?]);
        }
        // As with containerd's shim, a log file takes both streams.
        let errors = match &output {
            Some(Sink::File(file)) if self.stdout.starts_with("file://") => Some(Sink::File(file.try_clone()?)),
            _ => open_sink(&self.stderr)?,
        };
        let mut connect = |sink: Option<Sink>| match sink {
            Some(sink) => {
                let (reader, writer) = pipe(owner.ids)?;
                set_nonblocking(&reader)?;
                ends.outputs.push((reader, sink));
                Ok(writer)
            }
            None => null(true),
        };
        Ok([connect(output)?, connect(errors)?])
    }

    /// Starts a logger, which a process without a terminal writes to itself.
    fn start_logger(&self, address: &logger::Address, owner: Owner<'_>, ends: &mut Ends) -> io::Result<[OwnedFd; 2]> {
        let (logger, [stdout, stderr]) = Logger::start(address, owner)?;
        ends.logger = Some(logger);
        if self.terminal {
            set_nonblocking(&stdout)?;
            ends.outputs.push((null(false)?, Sink::Pipe(stdout.into())));
            return Ok([null(true)?, null(true)?]);
        }
        Ok([stdout, stderr])
    }
}

impl Ends {
    /// Begins to copy, in tasks of the current runtime. `master` is the process's terminal if it has
    /// one.
    pub(crate) fn connect(self, master: Option<OwnedFd>) -> io::Result<Connections> {
        let master = master.map(Arc::new);
        if let Some(master) = &master {
            set_nonblocking(master)?;
        }
        let connections = Connections {
            outputs: Mutex::default(),
            input: Mutex::default(),
            hold: Mutex::default(),
            pending_input: Mutex::default(),
            master,
            ended: watch::Sender::new(None),
            logger: Mutex::new(self.logger),
        };
        for (reader, sink) in self.outputs {
            let from = match &connections.master {
                Some(master) => master.try_clone()?,
                None => reader,
            };
            let (told, copied) = oneshot::channel();
            let ended = connections.master.as_ref().map(|_| copy::Ended::new(connections.ended.subscribe()));
            let task = tokio::spawn(copy::output(watched(from, Interest::READABLE)?, sink, told, ended)?);
            lock(&connections.outputs).push(Output { task, copied });
        }
        if let Some((writer, path)) = self.stdin {
            let to = match &connections.master {
                Some(master) => master.try_clone()?,
                None => writer,
            };
            *lock(&connections.pending_input) = Some((to, path));
        }
        Ok(connections)
    }
}

/// A descriptor that the runtime watches.
pub(crate) fn watched<T: AsFd + AsRawFd>(fd: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: every type used here owns one descriptor, returns the same one each time, and closes it
    // only when it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Connections {
    /// Begins to copy standard input, which does not end before [`Self::close_stdin`].
    pub(crate) fn open_stdin(&self) -> io::Result<()> {
        let Some((to, path)) = lock(&self.pending_input).take() else { return Ok(()) };
        let reader = open_fifo(&path, OFlag::O_RDONLY)?;
        *lock(&self.hold) = Some(open_fifo(&path, OFlag::O_WRONLY)?);
        *lock(&self.input) = Some(tokio::spawn(copy::input(reader, to)));
        Ok(())
    }

    /// Lets standard input end once its clients have closed it, too.
    pub(crate) fn close_stdin(&self) {
        lock(&self.hold).take();
    }

    /// Sets the size of the terminal; without one there is nothing to do.
    pub(crate) fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        let Some(master) = &self.master else { return Ok(()) };
        let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: size is a valid winsize.
        match unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &size) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    /// Nothing is read for a process that has ended, and what others write to its terminal is not its output.
    pub(crate) fn process_ended(&self) {
        self.stop_input();
        self.ended.send_replace(Some(tokio::time::Instant::now()));
    }

    fn stop_input(&self) {
        lock(&self.pending_input).take();
        if let Some(task) = lock(&self.input).take() {
            task.abort();
        }
        self.close_stdin();
    }

    /// Waits for the rest of the output, but not for ever: a grandchild may hold it open. Then ends the logger.
    pub(crate) async fn drain(&self) {
        self.stop_input();
        let outputs = std::mem::take(&mut *lock(&self.outputs));
        let deadline = tokio::time::Instant::now() + DRAIN;
        for output in outputs {
            if tokio::time::timeout_at(deadline, output.copied).await.is_err() {
                log::warn!("output is still held open: it is cut off");
            }
            output.task.abort();
        }
        let logger = lock(&self.logger).take();
        if let Some(logger) = logger {
            logger.end().await;
        }
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        for output in lock(&self.outputs).drain(..) {
            output.task.abort();
        }
        if let Some(task) = lock(&self.input).take() {
            task.abort();
        }
    }
}
