//! `cp`: files out of a container, or into it.
//!
//! Paths in a container are looked up by a process that has its root, below that and without the links of a procfs, so that
//! none leads out of it. Between that process and the command flows a tar stream, of which neither side trusts the other.

mod ids;
mod lookup;
mod receive;
mod root;
mod send;

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};
use runx_core::spawn::refuse_threads;
use runx_core::sys::{self, pidfd, process};

use super::record::{Containers, Record};
use super::status::Seen;
use super::{rootfs, rootless, volumes};
use crate::{Context, Failure, message};
use ids::Ids;
use lookup::Lookup;
pub(super) use root::Root;

/// One side of a copy.
enum Place {
    /// A path in a container.
    Inside(String, String),
    /// A path of the host.
    Outside(PathBuf),
    /// A tar stream on a standard stream.
    Stream,
}

impl Place {
    fn parse(text: &str) -> Self {
        if text == "-" {
            return Self::Stream;
        }
        // As with docker, a path that has a colon is told by a slash or dot before it.
        match text.split_once(':') {
            Some((id, path)) if !id.is_empty() && !id.contains('/') && !id.starts_with('.') => {
                Self::Inside(id.to_owned(), path.to_owned())
            }
            _ => Self::Outside(PathBuf::from(text)),
        }
    }
}

/// What is to be copied, as the sender sees it.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub(super) path: PathBuf,
    /// Of a directory, what is in it, and not the directory itself.
    contents: bool,
}

impl Source {
    pub(super) fn new(text: &Path) -> Self {
        let bytes = text.as_os_str().as_encoded_bytes();
        let contents = bytes.ends_with(b"/.") || bytes == b"." || bytes == b"/";
        Self { path: text.to_owned(), contents }
    }
}

/// Where it is to be copied to.
#[derive(Clone, Debug)]
pub(super) struct Destination {
    pub(super) path: PathBuf,
    /// Of a directory, only what is in it comes.
    pub(super) contents: bool,
    /// Keep owners, and bits that lend the owner's rights.
    pub(super) archive: bool,
    /// Its entries keep their whole names: it is a stream that somebody else made.
    pub(super) foreign: bool,
}

/// `runx container cp`.
pub(super) fn cp(context: &Context, from: &str, to: &str, archive: bool) -> Result<u8, Failure> {
    match (Place::parse(from), Place::parse(to)) {
        (Place::Inside(id, path), to) => {
            let source = Source::new(&absolute(&path));
            with_root(context, &id, None, |root| out(root, &source, to, archive))?;
        }
        (from, Place::Inside(id, path)) => {
            let path = absolute(&path);
            with_root(context, &id, Some(&path), |root| into(root, from, path.clone(), archive))?;
        }
        _ => {
            return Err(anyhow!(
                "neither {from:?} nor {to:?} is in a container: one of them has the form CONTAINER:PATH"
            )
            .into());
        }
    }
    Ok(0)
}

fn absolute(path: &str) -> PathBuf {
    // Joining would drop what ends the path and means something.
    PathBuf::from(if path.starts_with('/') { path.to_owned() } else { format!("/{path}") })
}

/// Does something with the root directory of a container, whether or not it runs; `written` is the path to be copied to.
fn with_root<T>(
    context: &Context,
    word: &str,
    written: Option<&Path>,
    act: impl FnOnce(&Root) -> Result<T>,
) -> Result<T> {
    let containers = Containers::of(context);
    let id = containers.resolve(word)?;
    let seen = Seen::look(context, containers.find(&id)?)?;
    let open = |path: &Path| {
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        sys::open(path, flags).with_context(|| format!("open the root of container {id:?}, {}", path.display()))
    };
    if let (Some(pid), Some(core)) = (seen.pid().filter(|_| seen.status.is_up()), &seen.core) {
        let entered = crate::oci::exec::enter(core)?;
        let has_users = !entered && core.state().namespaces & libc::CLONE_NEWUSER != 0;
        let ids = has_users.then(|| Ids::of_process(pid)).transpose()?;
        let root = open(Path::new(&format!("/proc/{pid}/root")))?;
        // Its number may be another process's by now.
        if core.pid() != Some(pid) {
            bail!("container {id:?} has ended in this moment");
        }
        return act(&Root::plain(root).with_users(ids, written.is_some())?);
    }
    rootless::enter()?;
    // Nobody starts or removes it meanwhile.
    let lock = containers.lock(&id)?;
    let directory = containers.directory(&id);
    let record = Record::read(&directory)?;
    let status = Seen::look(context, record.clone())?.status;
    if !status.is_down() {
        bail!("container {id:?} is {status}: copy when it runs or has ended");
    }
    let rootfs = rootfs::mount(&directory, &record)?;
    let done = open(&rootfs).and_then(|root| {
        // What is copied into a volume must not keep it from what the image has there.
        volumes::fill(&containers, &record, &rootfs)?;
        act(&Root::of(&containers, &record, root, written)?)
    });
    let unmounted = rootfs::unmount(&directory, &record);
    lock.release();
    if done.is_err()
        && let Err(e) = &unmounted
    {
        // What went wrong first is the reason.
        log::warn!("container {id:?}: {}", message(e));
    }
    done.and_then(|done| unmounted.map(|()| done))
}

/// Out of a container.
fn out(root: &Root, source: &Source, to: Place, archive: bool) -> Result<()> {
    match to {
        Place::Stream => {
            // SAFETY: standard output stays open for as long as this program runs.
            let stdout = unsafe { std::os::fd::BorrowedFd::borrow_raw(1) };
            if super::attach::is_terminal(1) {
                bail!("a tar stream is nothing for a terminal: send it to a file or a pipe");
            }
            let stdout = File::from(stdout.try_clone_to_owned()?);
            in_root(root, None, |inside| send::send(inside, source, stdout))?.finish()
        }
        Place::Outside(path) => {
            let destination = Destination { path, contents: source.contents, archive, foreign: false };
            copy_out(root, source, &destination)
        }
        Place::Inside(..) => bail!("from container to container: copy to the host first, or through a pipe with -"),
    }
}

/// Copies from below `root` to a place of the host.
pub(super) fn copy_out(root: &Root, source: &Source, destination: &Destination) -> Result<()> {
    let (reader, writer) = io::pipe().context("make a pipe")?;
    let child = in_root(root, Some(reader.as_raw_fd()), |inside| send::send(inside, source, writer))?;
    let received = receive::receive(&Lookup::Host, reader, destination);
    match (child.finish(), received) {
        // A receiver that fails reads no more, and the sender only sees that.
        (Err(e), Err(received)) if is_broken_pipe(&e) => Err(received),
        // Of a sender that fails the receiver only sees that its stream ends.
        (Err(e), _) => Err(e),
        (Ok(()), received) => received,
    }
}

/// Into a container.
fn into(root: &Root, from: Place, path: PathBuf, archive: bool) -> Result<()> {
    let mut destination = Destination { path, contents: false, archive, foreign: false };
    match from {
        Place::Stream => {
            destination.foreign = true;
            // SAFETY: standard input stays open for as long as this program runs.
            let stdin = unsafe { std::os::fd::BorrowedFd::borrow_raw(0) };
            let stdin = File::from(stdin.try_clone_to_owned()?);
            in_root(root, None, |inside| receive::receive(inside, stdin, &destination))?.finish()
        }
        Place::Outside(path) => {
            let source = Source::new(&path);
            destination.contents = source.contents;
            let (reader, writer) = io::pipe().context("make a pipe")?;
            let receive = |inside: &Lookup| receive::receive(inside, reader, &destination);
            let child = in_root(root, Some(writer.as_raw_fd()), receive)?;
            let sent = send::send(&Lookup::Host, &source, writer);
            match (child.finish(), sent) {
                // A receiver that failed reads no more: what it says is the reason.
                (Err(e), Ok(())) => Err(e),
                (Err(e), Err(sent)) if is_broken_pipe(&sent) => Err(e),
                (_, sent) => sent,
            }
        }
        Place::Inside(..) => bail!("from container to container: copy to the host first, or through a pipe with -"),
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe))
}

/// The exit code of a sender whose stream was not read to its end.
const NOT_READ: i32 = 2;

/// A process in a container's root.
struct Child {
    process: OwnedFd,
    said: PipeReader,
}

impl Child {
    /// Waits for its end.
    fn finish(mut self) -> Result<()> {
        let mut said = String::new();
        self.said.read_to_string(&mut said).context("hear from the process in the container's root")?;
        let exit = pidfd::wait(self.process.as_fd()).context("wait for the process in the container's root")?;
        match exit.code {
            0 => Ok(()),
            NOT_READ => Err(io::Error::new(io::ErrorKind::BrokenPipe, said).into()),
            _ if said.is_empty() => bail!("the process in the container's root ended with code {}", exit.code),
            _ => bail!("{said}"),
        }
    }
}

/// Does something in another process whose root directory is `root`, which `act` goes to. The end of the pipe that stays
/// here is closed there: each side must see that the other one has gone.
fn in_root(root: &Root, ours: Option<RawFd>, act: impl FnOnce(&Lookup) -> Result<()>) -> Result<Child> {
    refuse_threads()?;
    let (reader, writer) = io::pipe().context("make a pipe")?;
    let parent = std::process::id();
    // SAFETY: refuse_threads made sure that there is no other thread.
    match unsafe { process::clone(0, None) }.context("clone a process for the container's root")? {
        process::Cloned::Parent { pidfd, .. } => Ok(Child { process: pidfd, said: reader }),
        process::Cloned::Child => {
            drop(reader);
            if let Some(ours) = ours {
                // SAFETY: this process never returns to what owned it.
                unsafe { libc::close(ours) };
            }
            let code = enter_and_act(root, act, writer, parent);
            // SAFETY: ends this process without running destructors that belong to the caller's copy.
            unsafe { libc::_exit(code) }
        }
    }
}

fn enter_and_act(root: &Root, act: impl FnOnce(&Lookup) -> Result<()>, mut caller: PipeWriter, parent: u32) -> i32 {
    // Modes are as the stream says.
    // SAFETY: umask takes a number and cannot fail.
    unsafe { libc::umask(0) };
    // It holds the caller's lock of the container as well.
    if !process::end_with(parent) {
        return 1;
    }
    let entered = root.enter();
    // With other ids the kernel has forgotten it.
    if !process::end_with(parent) {
        return 1;
    }
    match entered.and_then(|inside| act(&inside)) {
        Ok(()) => 0,
        Err(e) => {
            let _ = caller.write_all(message(&e).as_bytes());
            if is_broken_pipe(&e) { NOT_READ } else { 1 }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_what_comes_before_a_colon_and_is_no_path() {
        assert!(matches!(Place::parse("-"), Place::Stream));
        assert!(matches!(Place::parse("web:/etc"), Place::Inside(id, path) if id == "web" && path == "/etc"));
        for outside in ["./a:b", "/a:b", ":x", "plain", "../a:b"] {
            assert!(matches!(Place::parse(outside), Place::Outside(_)), "{outside}");
        }
    }
}
