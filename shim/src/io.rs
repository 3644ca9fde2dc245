//! Standard streams: between the FIFOs, files and terminals of containerd's clients and the pipes of
//! the processes.
//!
//! A FIFO is opened for both reading and writing, so that neither side's coming and going disturbs the
//! process: while containerd restarts, output waits in the FIFO. Bytes move by `splice(2)` where both
//! ends are pipes, so an idle container costs no buffer.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

/// How long a delete waits for output that somebody still holds open.
const DRAIN: Duration = Duration::from_secs(10);

/// Bytes moved at a time.
const CHUNK: usize = 64 << 10;

/// The streams of a process as the request names them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Streams {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

/// Where output goes.
#[derive(Debug)]
struct Sink {
    file: File,
    fifo: bool,
}

/// The ends that stay here, before they are connected.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    stdin: Option<(OwnedFd, PathBuf)>,
    outputs: Vec<(OwnedFd, Sink)>,
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

/// The streams of a running process.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    outputs: Mutex<Vec<JoinHandle<()>>>,
    input: Mutex<Option<JoinHandle<()>>>,
    /// Keeps the FIFO from ending when a client goes away, until `CloseIO`.
    hold: Mutex<Option<File>>,
    /// What is connected when the process starts.
    pending_input: Mutex<Option<(OwnedFd, PathBuf)>>,
    master: Option<Arc<OwnedFd>>,
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
            let path = Path::new(rest.split('?').next().unwrap_or(rest));
            if let Some(directory) = path.parent() {
                fs::create_dir_all(directory).map_err(with_path(directory, "create"))?;
            }
            path
        }
        Some((scheme, _)) => {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("log scheme {scheme:?} of {target:?} is not supported (only fifo and file are)"),
            ));
        }
    };
    if fs::metadata(path).is_ok_and(|meta| meta.file_type().is_fifo()) {
        let file = open_fifo(path, OFlag::O_RDWR)?;
        return Ok(Some(Sink { file, fifo: true }));
    }
    let file = OpenOptions::new().append(true).create(true).mode(0o640).open(path).map_err(with_path(path, "open"))?;
    Ok(Some(Sink { file, fifo: false }))
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

impl Streams {
    /// Opens everything. For a process without a terminal, the descriptors that become its standard
    /// streams come along.
    pub(crate) fn open(&self, owner: (u32, u32)) -> io::Result<(Option<[OwnedFd; 3]>, Ends)> {
        let mut ends = Ends::default();
        let input = open_input(&self.stdin)?;
        let output = open_sink(&self.stdout)?;
        if self.terminal {
            // The master takes the place of the pipes once it is there.
            if let Some(Input::Fifo(path)) = input {
                ends.stdin = Some((null(true)?, path));
            }
            if let Some(sink) = output {
                ends.outputs.push((null(false)?, sink));
            }
            return Ok((None, ends));
        }
        // As containerd's shim, a log file takes both streams.
        let same_file = self.stdout.starts_with("file://") && (self.stderr.is_empty() || self.stderr == self.stdout);
        let errors = match &output {
            Some(sink) if same_file => Some(Sink { file: sink.file.try_clone()?, fifo: false }),
            _ => open_sink(&self.stderr)?,
        };
        let pipe = || -> io::Result<(OwnedFd, OwnedFd)> {
            let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
            if owner != (0, 0) {
                for end in [&reader, &writer] {
                    nix::unistd::fchown(end, Some(owner.0.into()), Some(owner.1.into()))?;
                }
            }
            Ok((reader, writer))
        };
        let stdin = match input {
            Some(Input::File(file)) => file.into(),
            Some(Input::Fifo(path)) => {
                let (reader, writer) = pipe()?;
                set_nonblocking(&writer)?;
                ends.stdin = Some((writer, path));
                reader
            }
            None => null(false)?,
        };
        let mut outputs = Vec::with_capacity(2);
        for sink in [output, errors] {
            outputs.push(match sink {
                Some(sink) => {
                    let (reader, writer) = pipe()?;
                    set_nonblocking(&reader)?;
                    ends.outputs.push((reader, sink));
                    writer
                }
                None => null(true)?,
            });
        }
        let mut outputs = outputs.into_iter();
        match (outputs.next(), outputs.next()) {
            (Some(stdout), Some(stderr)) => Ok((Some([stdin, stdout, stderr]), ends)),
            _ => Err(io::Error::other("a standard stream is missing")),
        }
    }
}

impl Ends {
    /// Begins to copy, in tasks of the current runtime. `master` is the process's terminal if it has
    /// one.
    pub(crate) fn connect(self, master: Option<OwnedFd>) -> io::Result<Connections> {
        let mut connections = Connections::default();
        if let Some(master) = master {
            set_nonblocking(&master)?;
            connections.master = Some(Arc::new(master));
        }
        for (reader, sink) in self.outputs {
            let from = match &connections.master {
                Some(master) => master.try_clone()?,
                None => reader,
            };
            let task = copy_output(watched(from, Interest::READABLE)?, sink)?;
            lock(&connections.outputs).push(tokio::spawn(task));
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
        *lock(&self.input) = Some(tokio::spawn(copy_input(reader, to)));
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

    /// Nothing is read for a process that has ended.
    pub(crate) fn stop_input(&self) {
        lock(&self.pending_input).take();
        if let Some(task) = lock(&self.input).take() {
            task.abort();
        }
        self.close_stdin();
    }

    /// Waits for the rest of the output, but not for ever: a grandchild may hold it open.
    pub(crate) async fn drain(&self) {
        self.stop_input();
        let tasks = std::mem::take(&mut *lock(&self.outputs));
        let deadline = tokio::time::Instant::now() + DRAIN;
        for task in tasks {
            let abort = task.abort_handle();
            if tokio::time::timeout_at(deadline, task).await.is_err() {
                log::warn!("output is still held open: it is cut off");
                abort.abort();
            }
        }
    }
}

fn copy_output(from: AsyncFd<OwnedFd>, sink: Sink) -> io::Result<impl Future<Output = ()>> {
    let to = if sink.fifo { Target::Pipe(watched(sink.file, Interest::WRITABLE)?) } else { Target::File(sink.file) };
    Ok(async move {
        let copied = match to {
            Target::Pipe(to) => move_bytes(&from, &to).await,
            Target::File(to) => to_file(&from, to).await,
        };
        if let Err(e) = copied {
            log::warn!("copy output: {e}");
        }
    })
}

enum Target {
    Pipe(AsyncFd<File>),
    File(File),
}

async fn copy_input(reader: File, to: OwnedFd) {
    let copied = async {
        let to = watched(to, Interest::WRITABLE)?;
        let from = watched(reader, Interest::READABLE)?;
        move_bytes(&from, &to).await
    };
    if let Err(e) = copied.await {
        log::debug!("copy input: {e}");
    }
}

async fn to_file(from: &AsyncFd<OwnedFd>, mut to: File) -> io::Result<()> {
    loop {
        let mut guard = from.readable().await?;
        let mut buffer = vec![0u8; CHUNK];
        match read(from.get_ref().as_fd(), &mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => to.write_all(&buffer[..n])?,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => guard.clear_ready(),
            Err(e) => return end_of_terminal(e),
        }
    }
}

/// A terminal whose other side has been closed reads as an error.
fn end_of_terminal(error: io::Error) -> io::Result<()> {
    if error.raw_os_error() == Some(libc::EIO) { Ok(()) } else { Err(error) }
}

fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    Ok(nix::unistd::read(fd, buffer)?)
}

/// Moves bytes until the end of `from`. Both are non-blocking; at least one is a pipe if `splice` is to
/// work, and where it does not a buffer takes its place.
async fn move_bytes<F: AsRawFd + AsFd, T: AsRawFd + AsFd>(from: &AsyncFd<F>, to: &AsyncFd<T>) -> io::Result<()> {
    loop {
        let mut readable = from.readable().await?;
        match splice(from.get_ref().as_fd(), to.get_ref().as_fd()) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                // Which end was not ready is asked of the source: were it the target that a reader has just
                // emptied, bytes would wait for an edge that never comes.
                if is_ready(from.get_ref().as_fd(), libc::POLLIN)? {
                    wait_writable(to).await?;
                } else {
                    readable.clear_ready();
                }
            }
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => return copy_bytes(from, to).await,
            Err(e) => return end_of_terminal(e),
        }
    }
}

async fn copy_bytes<F: AsRawFd + AsFd, T: AsRawFd + AsFd>(from: &AsyncFd<F>, to: &AsyncFd<T>) -> io::Result<()> {
    loop {
        let mut readable = from.readable().await?;
        let mut buffer = vec![0u8; 4096];
        let n = match read(from.get_ref().as_fd(), &mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                readable.clear_ready();
                continue;
            }
            Err(e) => return end_of_terminal(e),
        };
        let mut rest = &buffer[..n];
        while !rest.is_empty() {
            match nix::unistd::write(to.get_ref().as_fd(), rest) {
                Ok(n) => rest = &rest[n..],
                Err(nix::errno::Errno::EAGAIN) => wait_writable(to).await?,
                Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return end_of_terminal(e.into()),
            }
        }
    }
}

async fn wait_writable<T: AsRawFd + AsFd>(to: &AsyncFd<T>) -> io::Result<()> {
    loop {
        let mut guard = to.writable().await?;
        if is_ready(to.get_ref().as_fd(), libc::POLLOUT)? {
            return Ok(());
        }
        guard.clear_ready();
    }
}

fn is_ready(fd: BorrowedFd<'_>, events: libc::c_short) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: poll is one valid pollfd.
    match unsafe { libc::poll(&mut poll, 1, 0) } {
        -1 => Err(io::Error::last_os_error()),
        // An error or the end counts: the next call reports it.
        ready => Ok(ready > 0),
    }
}

fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<usize> {
    let flags = libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK;
    // SAFETY: no offsets are passed; both descriptors are borrowed for the call.
    let n = unsafe {
        libc::splice(from.as_raw_fd(), std::ptr::null_mut(), to.as_raw_fd(), std::ptr::null_mut(), CHUNK, flags)
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}
