//! Network namespaces with a name: a file that keeps one, whatever becomes of the processes in it.
//!
//! A plugin's DEL needs the namespace to find what its ADD made. One that a file keeps is there for it also when the
//! container's processes were killed, and the one who watched them with them.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use runx_core::spawn::refuse_threads;
use runx_core::sys::netlink::Netlink;
use runx_core::sys::{self, pidfd, process};

/// `NSFS_MAGIC` of linux/magic.h.
const NSFS: i64 = 0x6e73_6673;

/// Whether the file keeps a namespace.
pub(super) fn is_there(file: &Path) -> bool {
    sys::filesystem_magic(file).is_ok_and(|magic| magic == NSFS)
}

/// Makes a network namespace, with its loopback interface up, and keeps it by `file`.
pub(super) fn create(file: &Path) -> Result<()> {
    File::create(file).with_context(|| format!("create {}", file.display()))?;
    let (mut ours, mut theirs) = std::io::pipe().context("make a pipe")?;
    refuse_threads()?;
    // SAFETY: refuse_threads made sure that there is no other thread.
    match unsafe { process::clone(libc::CLONE_NEWNET as u64, None) }.context("clone into a new network namespace")? {
        process::Cloned::Parent { pidfd, .. } => {
            drop(theirs);
            let mut said = String::new();
            let heard = ours.read_to_string(&mut said);
            pidfd::wait(std::os::fd::AsFd::as_fd(&pidfd)).context("wait for the process that made the namespace")?;
            heard.context("hear whether the network namespace was made")?;
            match said.as_str() {
                "done" => Ok(()),
                "" => bail!("make a network namespace: the process that was to do it was killed"),
                error => bail!("{error}"),
            }
        }
        process::Cloned::Child => {
            drop(ours);
            let said = match keep(file) {
                Ok(()) => "done".to_owned(),
                Err(e) => crate::message(&e),
            };
            let told = theirs.write_all(said.as_bytes());
            // SAFETY: ends this process without running destructors that belong to the caller's copy.
            unsafe { libc::_exit(told.is_err().into()) }
        }
    }
}

/// In the process that is in the new namespace, and in the caller's mount namespace.
fn keep(file: &Path) -> Result<()> {
    Netlink::open().and_then(|netlink| netlink.set_up(1, true)).context("bring the loopback interface up")?;
    mount(Some("/proc/self/ns/net"), file, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("keep the network namespace by {}", file.display()))
}

/// Lets go of it; what is not there is fine.
pub(super) fn remove(file: &Path) -> Result<()> {
    while is_there(file) {
        sys::mount::detach(file).with_context(|| format!("unmount {}", file.display()))?;
    }
    match fs::remove_file(file) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", file.display()))
        }
        _ => Ok(()),
    }
}
