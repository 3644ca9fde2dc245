//! What a pool and the init of a sandbox say to each other.

use super::{Decoded, Malformed, Reader, Writer};

/// The most descriptors that an execution is given.
pub(crate) const MAX_FDS: usize = 64;

/// A file to be opened in a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OpenFile {
    pub(crate) path: Vec<u8>,
    /// Open for writing, else for reading.
    pub(crate) write: bool,
    /// Make it, with directories above it, if it is not there; empty it if it is.
    pub(crate) create: bool,
    /// Permission bits of one that is made.
    pub(crate) mode: u32,
}

/// An execution.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Execute {
    /// Paths that are tried in turn; none if the last descriptor is the program.
    pub(crate) programs: Vec<Vec<u8>>,
    pub(crate) args: Vec<Vec<u8>>,
    pub(crate) env: Vec<Vec<u8>>,
    pub(crate) directory: Vec<u8>,
    /// `RLIMIT_*`, soft and hard limit.
    pub(crate) limits: Vec<(u32, u64, u64)>,
    /// The numbers that the descriptors get, in order.
    pub(crate) targets: Vec<u32>,
}

/// To the init.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToInit {
    /// It is in its cgroups.
    Entered,
    Ping,
    /// Open files; those that could be go back with the answer.
    Open(Vec<OpenFile>),
    /// Make symbolic links: target and path.
    Symlink(Vec<(Vec<u8>, Vec<u8>)>),
    /// Remove files and whole directories.
    Delete(Vec<Vec<u8>>),
    /// Run a program to its end.
    Execute(Box<Execute>),
    /// Be as new, as far as the same namespaces allow: with fresh tmpfs and session keyring if `wipe`.
    Reset {
        wipe: bool,
    },
}

/// How a program ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ended {
    /// The exit code, or 0.
    pub(crate) code: u32,
    /// The signal that ended it, or 0.
    pub(crate) signal: u32,
    /// Processor time of it and of all others that it left behind, in microseconds.
    pub(crate) user_us: u64,
    pub(crate) system_us: u64,
    /// The largest resident set of one of them, in bytes.
    pub(crate) resident: u64,
    /// From before the clone to the program's end, in nanoseconds.
    pub(crate) wall_ns: u64,
}

/// What a sandbox looks like from inside, to be compared with another's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Look {
    /// A hash of the mount table without what differs in any case.
    pub(crate) mounts: u64,
    /// Open descriptors of the init.
    pub(crate) descriptors: u32,
    /// Whether there are other processes.
    pub(crate) processes: bool,
    /// System V and POSIX objects of its IPC namespace.
    pub(crate) ipc: u32,
}

/// From the init.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum FromInit {
    /// It is set up, or reset.
    Ready(Look),
    Pong,
    /// An error number for each file, 0 for one that goes with this message.
    Opened(Vec<u32>),
    /// An error number for each item.
    Done(Vec<u32>),
    Ended(Ended),
    /// The program could not be started: the step and the error number.
    NotStarted {
        step: String,
        errno: u32,
    },
    /// It could not be set up; it exits.
    Failed {
        message: String,
        errno: u32,
    },
}

fn texts(w: &mut Writer, list: &[Vec<u8>]) {
    w.list(list, |w, item| {
        w.bytes(item);
    });
}

fn read_texts(r: &mut Reader<'_>) -> Decoded<Vec<Vec<u8>>> {
    r.list(text)
}

/// A string that goes to the kernel.
fn text(r: &mut Reader<'_>) -> Decoded<Vec<u8>> {
    let bytes = r.bytes()?;
    if bytes.contains(&0) { Err(Malformed("a string holds a NUL byte")) } else { Ok(bytes.to_vec()) }
}

impl ToInit {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new(match self {
            Self::Entered => 1,
            Self::Ping => 2,
            Self::Open(_) => 3,
            Self::Symlink(_) => 4,
            Self::Delete(_) => 5,
            Self::Execute(_) => 6,
            Self::Reset { .. } => 7,
        });
        match self {
            Self::Entered | Self::Ping => {}
            Self::Open(files) => {
                w.list(files, |w, file| {
                    w.bytes(&file.path).flag(file.write).flag(file.create).u32(file.mode);
                });
            }
            Self::Symlink(links) => {
                w.list(links, |w, (target, path)| {
                    w.bytes(target).bytes(path);
                });
            }
            Self::Delete(paths) => texts(&mut w, paths),
            Self::Execute(execute) => {
                texts(&mut w, &execute.programs);
                texts(&mut w, &execute.args);
                texts(&mut w, &execute.env);
                w.bytes(&execute.directory);
                w.list(&execute.limits, |w, (kind, soft, hard)| {
                    w.u32(*kind).u64(*soft).u64(*hard);
                });
                w.list(&execute.targets, |w, number| {
                    w.u32(*number);
                });
            }
            Self::Reset { wipe } => {
                w.flag(*wipe);
            }
        }
        w.finish()
    }

    pub(crate) fn decode(message: &[u8]) -> Decoded<Self> {
        let mut r = Reader::new(message);
        let decoded = match r.u8()? {
            1 => Self::Entered,
            2 => Self::Ping,
            3 => Self::Open(r.list(|r| {
                Ok(OpenFile { path: text(r)?, write: r.flag()?, create: r.flag()?, mode: r.u32()? & 0o777 })
            })?),
            4 => Self::Symlink(r.list(|r| Ok((text(r)?, text(r)?)))?),
            5 => Self::Delete(read_texts(&mut r)?),
            6 => {
                let execute = Execute {
                    programs: read_texts(&mut r)?,
                    args: read_texts(&mut r)?,
                    env: read_texts(&mut r)?,
                    directory: text(&mut r)?,
                    limits: r.list(|r| Ok((r.u32()?, r.u64()?, r.u64()?)))?,
                    targets: r.list(Reader::u32)?,
                };
                if execute.targets.len() > MAX_FDS || execute.targets.iter().any(|number| *number as usize >= MAX_FDS) {
                    return Err(Malformed("too many descriptors"));
                }
                Self::Execute(Box::new(execute))
            }
            7 => Self::Reset { wipe: r.flag()? },
            _ => return Err(Malformed("it is of no known kind")),
        };
        r.end()?;
        Ok(decoded)
    }
}

impl FromInit {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new(match self {
            Self::Ready(_) => 1,
            Self::Pong => 2,
            Self::Opened(_) => 3,
            Self::Done(_) => 4,
            Self::Ended(_) => 5,
            Self::NotStarted { .. } => 6,
            Self::Failed { .. } => 7,
        });
        match self {
            Self::Ready(look) => {
                w.u64(look.mounts).u32(look.descriptors).flag(look.processes).u32(look.ipc);
            }
            Self::Pong => {}
            Self::Opened(errors) | Self::Done(errors) => {
                w.list(errors, |w, errno| {
                    w.u32(*errno);
                });
            }
            Self::Ended(ended) => {
                w.u32(ended.code).u32(ended.signal).u64(ended.user_us).u64(ended.system_us);
                w.u64(ended.resident).u64(ended.wall_ns);
            }
            Self::NotStarted { step, errno } => {
                w.bytes(step.as_bytes()).u32(*errno);
            }
            Self::Failed { message, errno } => {
                w.bytes(message.as_bytes()).u32(*errno);
            }
        }
        w.finish()
    }

    pub(crate) fn decode(message: &[u8]) -> Decoded<Self> {
        let mut r = Reader::new(message);
        let decoded = match r.u8()? {
            1 => Self::Ready(Look { mounts: r.u64()?, descriptors: r.u32()?, processes: r.flag()?, ipc: r.u32()? }),
            2 => Self::Pong,
            3 => Self::Opened(r.list(Reader::u32)?),
            4 => Self::Done(r.list(Reader::u32)?),
            5 => Self::Ended(Ended {
                code: r.u32()?,
                signal: r.u32()?,
                user_us: r.u64()?,
                system_us: r.u64()?,
                resident: r.u64()?,
                wall_ns: r.u64()?,
            }),
            6 => Self::NotStarted { step: r.text()?, errno: r.u32()? },
            7 => Self::Failed { message: r.text()?, errno: r.u32()? },
            _ => return Err(Malformed("it is of no known kind")),
        };
        r.end()?;
        Ok(decoded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to_init() -> Vec<ToInit> {
        let file = OpenFile { path: b"/w/a".to_vec(), write: true, create: false, mode: 0o644 };
        let execute = Execute {
            programs: vec![b"/bin/true".to_vec()],
            args: vec![b"true".to_vec(), Vec::new()],
            env: vec![b"A=b".to_vec()],
            directory: b"/w".to_vec(),
            limits: vec![(1, 2, u64::MAX)],
            targets: vec![0, 1, 2, 9],
        };
        vec![
            ToInit::Entered,
            ToInit::Ping,
            ToInit::Open(vec![file.clone(), OpenFile { create: true, ..file }]),
            ToInit::Symlink(vec![(b"a".to_vec(), b"/w/b".to_vec())]),
            ToInit::Delete(vec![b"/w/b".to_vec()]),
            ToInit::Execute(Box::new(execute)),
            ToInit::Reset { wipe: true },
        ]
    }

    fn from_init() -> Vec<FromInit> {
        vec![
            FromInit::Ready(Look { mounts: 7, descriptors: 5, processes: false, ipc: 1 }),
            FromInit::Pong,
            FromInit::Opened(vec![0, 2]),
            FromInit::Done(vec![17]),
            FromInit::Ended(Ended { code: 3, wall_ns: 1 << 40, ..Ended::default() }),
            FromInit::NotStarted { step: "execute".into(), errno: 2 },
            FromInit::Failed { message: "mount a tmpfs".into(), errno: 1 },
        ]
    }

    #[test]
    fn what_is_written_is_read_and_nothing_shorter_or_longer_is() {
        for message in to_init() {
            let bytes = message.encode();
            assert_eq!(ToInit::decode(&bytes).as_ref(), Ok(&message));
            for cut in 0..bytes.len() {
                assert!(ToInit::decode(&bytes[..cut]).is_err(), "{message:?} cut at {cut}");
            }
            assert!(ToInit::decode(&[&bytes[..], &[0]].concat()).is_err());
        }
        for message in from_init() {
            let bytes = message.encode();
            assert_eq!(FromInit::decode(&bytes).as_ref(), Ok(&message));
            for cut in 0..bytes.len() {
                assert!(FromInit::decode(&bytes[..cut]).is_err(), "{message:?} cut at {cut}");
            }
        }
    }

    #[test]
    fn messages_of_any_form_are_read_or_refused() {
        let good: Vec<_> =
            to_init().iter().map(ToInit::encode).chain(from_init().iter().map(FromInit::encode)).collect();
        let good: Vec<_> = good.iter().map(Vec::as_slice).collect();
        runx_fuzz::feed("pool messages", &good, 20_000, |input| {
            // What is accepted means the same when it is written again.
            if let Ok(message) = ToInit::decode(input) {
                assert_eq!(ToInit::decode(&message.encode()), Ok(message));
            }
            if let Ok(message) = FromInit::decode(input) {
                assert_eq!(FromInit::decode(&message.encode()), Ok(message));
            }
        });
    }

    #[test]
    fn a_long_list_that_is_not_there_takes_no_memory() {
        let mut w = Writer::new(5);
        w.u32(u32::MAX);
        assert!(ToInit::decode(&w.finish()).is_err());
        let targets = Execute { targets: vec![64], ..Execute::default() };
        assert!(ToInit::decode(&ToInit::Execute(Box::new(targets)).encode()).is_err());
    }
}
