//! What is taken off ahead of time, so that programs only inherit that it is gone.

use runx_core::Result;
use runx_core::error::Context;
use runx_core::sys::{capabilities, process};

/// What the init needs: files of the programs' user, becoming that user, and ending its processes.
const KEPT: [u32; 7] = [
    0, // CAP_CHOWN
    1, // CAP_DAC_OVERRIDE
    2, // CAP_DAC_READ_SEARCH
    3, // CAP_FOWNER
    5, // CAP_KILL
    6, // CAP_SETGID
    7, // CAP_SETUID
];

/// For mounting each tmpfs anew.
const SYS_ADMIN: u32 = 21;

/// Gives up everything else, and for programs all. `unwiped` tells that nothing is ever mounted again.
pub(super) fn give_up(unwiped: bool) -> Result<()> {
    process::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0).context("set no_new_privs")?;
    for capability in 0..64 {
        match process::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0) {
            Ok(_) => {}
            // There are no more.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => break,
            Err(e) => return Err(e).context("give up the bounding set of capabilities"),
        }
    }
    let kept =
        KEPT.iter().copied().chain((!unwiped).then_some(SYS_ADMIN)).fold(0, |mask, number| mask | 1u64 << number);
    let (_, permitted, _) = capabilities::get().context("read the capabilities")?;
    capabilities::set(permitted & kept, permitted & kept, 0).context("give up capabilities")
}
