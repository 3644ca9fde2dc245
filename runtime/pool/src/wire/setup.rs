//! What the spawner is told: once what every sandbox is like, and then to make one.

use super::{Decoded, Malformed, Reader, Writer};

/// A host file or directory at a place in the sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BindPlan {
    /// Where it comes from; empty if it comes as a descriptor of a detached mount.
    pub(crate) source: Vec<u8>,
    pub(crate) target: Vec<u8>,
    pub(crate) directory: bool,
    pub(crate) writable: bool,
    /// It is a device, and may be used as one.
    pub(crate) device: bool,
}

/// A tmpfs that each sandbox gets afresh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TmpfsPlan {
    pub(crate) target: Vec<u8>,
    pub(crate) size: u64,
    pub(crate) inodes: u64,
    pub(crate) mode: u32,
}

/// What every sandbox is like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Setup {
    /// The root is the first bind; else a tmpfs that the binds are put into.
    pub(crate) rootfs: bool,
    pub(crate) binds: Vec<BindPlan>,
    pub(crate) links: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) tmpfs: Vec<TmpfsPlan>,
    pub(crate) masked: Vec<Vec<u8>>,
    pub(crate) proc: bool,
    pub(crate) devices: bool,
    pub(crate) hostname: Vec<u8>,
    pub(crate) own_network: bool,
    /// Ask for a user namespace and its mappings.
    pub(crate) user_namespace: bool,
    /// Only one user id can be had: groups cannot be left.
    pub(crate) single_id: bool,
    /// The seccomp program.
    pub(crate) filter: Vec<u8>,
    /// A sandbox is never wiped, so its init can give up all that this takes, and load the filter ahead.
    pub(crate) unwiped: bool,
}

/// To the spawner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToSpawner {
    /// The first message; detached mounts go with it.
    Setup(Box<Setup>),
    /// Its ids are mapped.
    Mapped,
    /// Make a sandbox for this user id. Its end of a socket goes with this message, and a cgroup v2 directory to be born
    /// in, if `cgroup`; else the init waits for the word that it is in its cgroups, if `wait`.
    Make { uid: u32, cgroup: bool, wait: bool },
}

/// From the spawner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum FromSpawner {
    /// It is in a new user namespace and waits for mappings.
    Map,
    /// The spawner proper was made; its pidfd goes with this message.
    Born,
    /// All is prepared.
    Ready,
    /// A sandbox was made; its pidfd goes with this message.
    Made,
    /// What was asked for last failed.
    Failed { message: String, errno: u32 },
}

impl ToSpawner {
    pub(crate) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Setup(setup) => {
                let mut w = Writer::new(1);
                w.flag(setup.rootfs);
                w.list(&setup.binds, |w, bind| {
                    w.bytes(&bind.source).bytes(&bind.target).flag(bind.directory).flag(bind.writable);
                    w.flag(bind.device);
                });
                w.list(&setup.links, |w, (target, path)| {
                    w.bytes(target).bytes(path);
                });
                w.list(&setup.tmpfs, |w, tmpfs| {
                    w.bytes(&tmpfs.target).u64(tmpfs.size).u64(tmpfs.inodes).u32(tmpfs.mode);
                });
                w.list(&setup.masked, |w, path| {
                    w.bytes(path);
                });
                w.flag(setup.proc).flag(setup.devices).bytes(&setup.hostname).flag(setup.own_network);
                w.flag(setup.user_namespace).flag(setup.single_id).bytes(&setup.filter).flag(setup.unwiped);
                w.finish()
            }
            Self::Mapped => Writer::new(2).finish(),
            Self::Make { uid, cgroup, wait } => {
                let mut w = Writer::new(3);
                w.u32(*uid).flag(*cgroup).flag(*wait);
                w.finish()
            }
        }
    }

    pub(crate) fn decode(message: &[u8]) -> Decoded<Self> {
        let mut r = Reader::new(message);
        let owned = |r: &mut Reader<'_>| r.bytes().map(<[u8]>::to_vec);
        let decoded = match r.u8()? {
            1 => Self::Setup(Box::new(Setup {
                rootfs: r.flag()?,
                binds: r.list(|r| {
                    Ok(BindPlan {
                        source: owned(r)?,
                        target: owned(r)?,
                        directory: r.flag()?,
                        writable: r.flag()?,
                        device: r.flag()?,
                    })
                })?,
                links: r.list(|r| Ok((owned(r)?, owned(r)?)))?,
                tmpfs: r
                    .list(|r| Ok(TmpfsPlan { target: owned(r)?, size: r.u64()?, inodes: r.u64()?, mode: r.u32()? }))?,
                masked: r.list(owned)?,
                proc: r.flag()?,
                devices: r.flag()?,
                hostname: owned(&mut r)?,
                own_network: r.flag()?,
                user_namespace: r.flag()?,
                single_id: r.flag()?,
                filter: owned(&mut r)?,
                unwiped: r.flag()?,
            })),
            2 => Self::Mapped,
            3 => Self::Make { uid: r.u32()?, cgroup: r.flag()?, wait: r.flag()? },
            _ => return Err(Malformed("it is of no known kind")),
        };
        r.end()?;
        Ok(decoded)
    }
}

impl FromSpawner {
    pub(crate) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Map => vec![1],
            Self::Born => vec![2],
            Self::Ready => vec![3],
            Self::Made => vec![4],
            Self::Failed { message, errno } => {
                let mut w = Writer::new(5);
                w.bytes(message.as_bytes()).u32(*errno);
                w.finish()
            }
        }
    }

    pub(crate) fn decode(message: &[u8]) -> Decoded<Self> {
        let mut r = Reader::new(message);
        let decoded = match r.u8()? {
            1 => Self::Map,
            2 => Self::Born,
            3 => Self::Ready,
            4 => Self::Made,
            5 => Self::Failed { message: r.text()?, errno: r.u32()? },
            _ => return Err(Malformed("it is of no known kind")),
        };
        r.end()?;
        Ok(decoded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_anything_else_refused() {
        let (source, target) = (b"/usr".to_vec(), b"/usr".to_vec());
        let bind = BindPlan { source, target, directory: true, writable: false, device: false };
        let setup = Setup {
            binds: vec![bind],
            links: vec![(b"usr/bin".to_vec(), b"/bin".to_vec())],
            tmpfs: vec![TmpfsPlan { target: b"/w".to_vec(), size: 1 << 20, inodes: 100, mode: 0o700 }],
            hostname: b"pool".to_vec(),
            filter: vec![1; 16],
            proc: true,
            ..Setup::default()
        };
        let make = ToSpawner::Make { uid: 70_000, cgroup: true, wait: false };
        let asked = [ToSpawner::Setup(Box::new(setup)), ToSpawner::Mapped, make];
        let failed = FromSpawner::Failed { message: "clone".into(), errno: 11 };
        let said = [FromSpawner::Map, FromSpawner::Born, FromSpawner::Ready, FromSpawner::Made, failed];
        for message in &asked {
            let bytes = message.encode();
            assert_eq!(ToSpawner::decode(&bytes).as_ref(), Ok(message));
            assert!((0..bytes.len()).all(|cut| ToSpawner::decode(&bytes[..cut]).is_err()));
        }
        for message in &said {
            let bytes = message.encode();
            assert_eq!(FromSpawner::decode(&bytes).as_ref(), Ok(message));
            assert!((0..bytes.len()).all(|cut| FromSpawner::decode(&bytes[..cut]).is_err()));
        }
        let good: Vec<_> = asked.iter().map(ToSpawner::encode).chain(said.iter().map(FromSpawner::encode)).collect();
        let good: Vec<_> = good.iter().map(Vec::as_slice).collect();
        runx_fuzz::feed("spawner messages", &good, 10_000, |input| {
            let _ = ToSpawner::decode(input);
            let _ = FromSpawner::decode(input);
        });
    }
}
