//! Mapping a component's artifact by its descriptor.
//!
//! The engine maps files of components by path only, and in a container there is no path: /proc is gone, and the artifact is
//! on a mount that is nowhere attached. So the file is mapped here, and the engine told how to make its code executable.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use wasmtime::{Config, CustomCodeMemory};

/// A file in memory, for the life of this process.
pub(crate) fn map(file: &File) -> Result<NonNull<[u8]>> {
    let length = usize::try_from(file.metadata().context("look at the artifact")?.len())?;
    ensure!(length > 0, "the artifact is empty");
    // SAFETY: a new mapping takes nothing of ours. Private and read-only, so that others with the file share its pages.
    let at =
        unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0) };
    ensure!(at != libc::MAP_FAILED, "map the artifact: {}", std::io::Error::last_os_error());
    let at = NonNull::new(at.cast::<u8>()).context("the artifact was mapped to address 0")?;
    Ok(NonNull::slice_from_raw_parts(at, length))
}

/// Lets the engine execute what [`map`] mapped.
pub(crate) fn allow(config: &mut Config) {
    config.with_custom_code_memory(Some(Arc::new(Protection)));
}

struct Protection;

impl Protection {
    fn set(ptr: *const u8, len: usize, protection: libc::c_int) -> wasmtime::Result<()> {
        // SAFETY: the engine passes whole pages of an artifact that map mapped, and nothing writes to them.
        match unsafe { libc::mprotect(ptr.cast_mut().cast(), len, protection) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error().into()),
        }
    }
}

impl CustomCodeMemory for Protection {
    fn required_alignment(&self) -> usize {
        // SAFETY: sysconf only answers.
        usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
    }

    fn publish_executable(&self, ptr: *const u8, len: usize) -> wasmtime::Result<()> {
        Self::set(ptr, len, libc::PROT_READ | libc::PROT_EXEC)
    }

    fn unpublish_executable(&self, ptr: *const u8, len: usize) -> wasmtime::Result<()> {
        Self::set(ptr, len, libc::PROT_READ)
    }
}
