//! Loop devices: files as block devices, for snapshotters whose snapshots are images of filesystems.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

// loop(4), linux/loop.h.
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// How often another process may take the device that was free.
const TRIES: u32 = 100;

/// `struct loop_info64`.
#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// A loop device of a file. It is freed when it is neither open nor mounted any more.
#[derive(Debug)]
pub(super) struct LoopDevice {
    /// Its path.
    pub(super) path: String,
    #[allow(dead_code, reason = "held until the device is mounted")]
    device: File,
}

impl LoopDevice {
    /// Attaches a file to a free device.
    ///
    /// # Errors
    /// The kernel's, with what was attempted.
    pub(super) fn attach(file: &Path, read_only: bool, direct: bool) -> io::Result<Self> {
        let what = |what: &str, e: io::Error| io::Error::new(e.kind(), format!("{what}: {e}"));
        let backing = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(file)
            .map_err(|e| what(&format!("open {}", file.display()), e))?;
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/loop-control")
            .map_err(|e| what("open /dev/loop-control", e))?;
        for _ in 0..TRIES {
            // SAFETY: the call takes no argument.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) };
            if number < 0 {
                return Err(what("find a free loop device", io::Error::last_os_error()));
            }
            let path = format!("/dev/loop{number}");
            let device = OpenOptions::new()
                .read(true)
                .write(!read_only)
                .open(&path)
                .map_err(|e| what(&format!("open {path}"), e))?;
            let mut flags = LO_FLAGS_AUTOCLEAR;
            flags |= if read_only { LO_FLAGS_READ_ONLY } else { 0 };
            flags |= if direct { LO_FLAGS_DIRECT_IO } else { 0 };
            // SAFETY: Config is plain data for which all zeroes is a valid value.
            let mut config: Config = unsafe { std::mem::zeroed() };
            config.fd = backing.as_raw_fd() as u32;
            config.info.flags = flags;
            // SAFETY: config is a valid loop_config, and both descriptors are open.
            match unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as _, &config) } {
                0 => return Ok(Self { path, device }),
                _ => match io::Error::last_os_error() {
                    e if e.raw_os_error() == Some(libc::EBUSY) => {}
                    e => return Err(what(&format!("attach {} to {path}", file.display()), e)),
                },
            }
        }
        Err(io::Error::new(io::ErrorKind::ResourceBusy, "every free loop device was taken by somebody else"))
    }
}
