//! Where traces are left, known to who leaves them and to who looks for them.

use std::ffi::CStr;
use std::io;

/// A key of System V objects, and a descriptor's number in a background process.
pub(crate) const KEY: libc::key_t = 0x7275_6e78;
/// A name of everything that has one.
pub(crate) const NAME: &str = "runx-probe";
/// The same for the kernel.
pub(crate) const C_NAME: &CStr = c"runx-probe";
/// With the slash that POSIX wants.
pub(crate) const QUEUE: &CStr = c"/runx-probe";
/// A TCP port of the loopback interface.
pub(crate) const PORT: u16 = 7777;
/// A time that no file has by chance, in seconds.
pub(crate) const TIME: i64 = 987_654_321;
/// Where files can be.
pub(crate) const PLACES: [&str; 3] = ["/w", "/tmp", "/dev/shm"];

pub(crate) fn check(value: i64) -> io::Result<i64> {
    if value == -1 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

pub(crate) const USER_KEYRING: i64 = -4;
pub(crate) const SESSION_KEYRING: i64 = -3;

pub(crate) fn add_key(keyring: i64) -> io::Result<i64> {
    // SAFETY: the strings are NUL-terminated, and the payload is valid for its length.
    check(unsafe {
        libc::syscall(libc::SYS_add_key, c"user".as_ptr(), C_NAME.as_ptr(), c"secret".as_ptr(), 6usize, keyring)
    })
}

pub(crate) fn find_key(keyring: i64) -> bool {
    const SEARCH: i64 = 10;
    // SAFETY: the strings are NUL-terminated.
    unsafe { libc::syscall(libc::SYS_keyctl, SEARCH, keyring, c"user".as_ptr(), C_NAME.as_ptr(), 0) != -1 }
}

/// An abstract address.
pub(crate) fn abstract_address() -> io::Result<std::os::unix::net::SocketAddr> {
    use std::os::linux::net::SocketAddrExt;
    std::os::unix::net::SocketAddr::from_abstract_name(NAME)
}
