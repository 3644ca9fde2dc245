//! Keeps the module out of procfs.
//!
//! The module sees the container's whole tree, and procfs may be mounted in it. There
//! `/proc/self/mem` is the runner's own memory: a module that can write it is native code, and the
//! engine's sandbox is gone. Names do not help, since procfs can be mounted anywhere and reached
//! through symbolic links; so every file that the module opens is judged by the file system it
//! turned out to be on, and closed again where that is a procfs. Other processes' entries are no
//! business of a module either, and nothing in procfs that a module needs is worth an exception.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use wasmtime::component::{Resource, ResourceTable, ResourceTableError};
use wasmtime::{Caller, Extern, Linker, bail};
use wasmtime_wasi::WasiView;
use wasmtime_wasi::filesystem::Descriptor;
use wasmtime_wasi::p1::WasiP1Ctx;
use wasmtime_wasi::p1::types::{Errno, Fd};
use wasmtime_wasi::p1::wasi_snapshot_preview1::{self as preview1, WasiSnapshotPreview1};
use wiggle::{GuestMemory, GuestPtr};

/// The parameters of `path_open` as they come from the module: directory, lookup flags, path and
/// its length, open flags, rights, inheriting rights, descriptor flags, where the result goes.
type PathOpen = (i32, i32, i32, i32, i32, i64, i64, i32, i32);

/// Replaces `path_open` by one that refuses procfs.
pub(crate) fn add_to_linker<T: Send + 'static>(
    linker: &mut Linker<T>,
    context: impl Fn(&mut T) -> &mut WasiP1Ctx + Copy + Send + Sync + 'static,
) -> wasmtime::Result<()> {
    linker.func_wrap_async("wasi_snapshot_preview1", "path_open", move |caller, parameters| {
        Box::new(path_open(caller, context, parameters))
    })?;
    Ok(())
}

async fn path_open<T: Send + 'static>(
    mut caller: Caller<'_, T>,
    context: impl Fn(&mut T) -> &mut WasiP1Ctx + Send,
    parameters: PathOpen,
) -> wasmtime::Result<i32> {
    let (dir, lookup, path, path_len, open, base, inheriting, flags, opened) = parameters;
    let Some(Extern::Memory(memory)) = caller.get_export("memory") else {
        bail!("missing required memory export");
    };
    let (bytes, data) = memory.data_and_store_mut(&mut caller);
    let ctx = context(data);
    let mut guest = GuestMemory::Unshared(bytes);
    ctx.set_hostcall_fuel(usize::MAX);
    // The first call of all makes resources for the streams and directories; it shall not be the
    // one below.
    let _ = ctx.fd_prestat_get(&mut guest, Fd::from(3));
    let slot = next_slot(ctx.ctx().table)?;
    let errno =
        preview1::path_open(ctx, &mut guest, dir, lookup, path, path_len, open, base, inheriting, flags, opened)
            .await?;
    if errno != Errno::Success as i32 || is_harmless(ctx.ctx().table, slot) {
        return Ok(errno);
    }
    let fd: Fd = guest.read(GuestPtr::new(opened as u32))?;
    ctx.fd_close(&mut guest, fd).await?;
    Ok(Errno::Acces as i32)
}

/// The slot that the next resource gets, which is how the file behind a new descriptor is found:
/// preview 1 does not tell.
fn next_slot(table: &mut ResourceTable) -> Result<u32, ResourceTableError> {
    let probe = table.push(())?;
    let slot = probe.rep();
    table.delete(probe)?;
    Ok(slot)
}

/// Whether the file just opened is certainly not on a procfs. The table reuses `slot`; with debug
/// assertions it never reuses any, and takes the one after.
fn is_harmless(table: &ResourceTable, slot: u32) -> bool {
    let descriptor =
        [slot, slot + 1].into_iter().find_map(|slot| table.get(&Resource::<Descriptor>::new_borrow(slot)).ok());
    match descriptor {
        Some(Descriptor::File(file)) => is_procfs(file.file.as_fd()) == Some(false),
        Some(Descriptor::Dir(dir)) => is_procfs(dir.dir.as_fd()) == Some(false),
        None => false,
    }
}

/// `None` if the kernel does not say.
fn is_procfs(fd: BorrowedFd<'_>) -> Option<bool> {
    // SAFETY: all zeroes is a valid statfs.
    let mut answer: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and `answer` a valid struct to fill.
    let result = unsafe { libc::fstatfs(fd.as_raw_fd(), &mut answer) };
    (result == 0).then_some(answer.f_type == libc::PROC_SUPER_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn file_systems_are_told_apart() {
        let Ok(stat) = File::open("/proc/self/stat") else {
            eprintln!("skipped: /proc is not mounted");
            return;
        };
        assert_eq!(is_procfs(stat.as_fd()), Some(true));
        let program = File::open(std::env::current_exe().expect("a path")).expect("open");
        assert_eq!(is_procfs(program.as_fd()), Some(false));
    }

    #[test]
    fn a_file_that_cannot_be_found_is_not_harmless() {
        let mut table = ResourceTable::new();
        let slot = next_slot(&mut table).expect("a slot");
        assert!(!is_harmless(&table, slot));
        table.push("not a file").expect("pushed");
        assert!(!is_harmless(&table, slot));
    }
}
