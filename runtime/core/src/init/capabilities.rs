//! Capability sets of the process, capabilities(7).
//!
//! Loading a seccomp filter without no_new_privs needs `CAP_SYS_ADMIN`, and after it only what the
//! filter allows can be called. So everything but the last `capset` happens before the filter.

use crate::capability::{self, SYS_ADMIN};
use crate::error::{Context, Result};
use crate::plan::{CapabilitySets, ProcessPlan};
use crate::sys::capabilities::{get, set};
use crate::sys::process::prctl;

fn wanted(process: &ProcessPlan) -> CapabilitySets {
    process.capabilities.unwrap_or_default()
}

/// Drops from the bounding set what is not in the plan's. Needs `CAP_SETPCAP`, so it comes before the
/// change of user.
pub(super) fn drop_bounding(process: &ProcessPlan) -> Result<()> {
    let keep = wanted(process).bounding;
    for number in 0..64 {
        // The kernel answers EINVAL above the last capability that it knows.
        match prctl(libc::PR_CAPBSET_READ, number, 0, 0) {
            Ok(1) if keep & (1 << number) == 0 => {
                prctl(libc::PR_CAPBSET_DROP, number, 0, 0)
                    .with_context(|| format!("drop {} from the bounding set", capability::name(number)))?;
            }
            Ok(_) => {}
            Err(_) => break,
        }
    }
    Ok(())
}

/// After the change of user, with everything still permitted: looks at files with the program's own
/// effective set, so that a lookup fails where the program's own would.
pub(super) fn look_as_program(process: &ProcessPlan) -> Result<()> {
    let sets = wanted(process);
    let (_, permitted, _) = get().context("read capabilities")?;
    set(sets.effective & permitted, permitted, sets.inheritable & permitted).context("set capabilities")
}

/// Makes everything that is permitted effective again.
pub(super) fn raise_all() {
    if let Ok((_, permitted, inheritable)) = get() {
        // Where this fails, the step that needed it fails next, with its own name.
        let _ = set(permitted, permitted, inheritable);
    }
}

/// Ambient capabilities, and what the seccomp filter needs.
pub(super) fn before_filter(process: &ProcessPlan) -> Result<()> {
    let sets = wanted(process);
    let (_, permitted, inheritable) = get().context("read capabilities")?;
    for number in (0..64).filter(|number| sets.ambient & (1 << number) != 0) {
        let bit = 1u64 << number;
        if bit & inheritable & permitted & sets.permitted == 0 {
            // As runc has it. The runtime has said so.
            continue;
        }
        prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong, number, 0)
            .with_context(|| format!("make {} ambient", capability::name(number)))?;
    }
    if process.seccomp.is_some() && !process.no_new_privileges {
        set((sets.effective & permitted) | (SYS_ADMIN & permitted), permitted, inheritable)
            .context("keep CAP_SYS_ADMIN for the seccomp filter")?;
    }
    Ok(())
}

/// The sets of the plan; what this process never had is left out.
pub(super) fn set_final(process: &ProcessPlan) -> Result<()> {
    let sets = wanted(process);
    let (_, permitted, _) = get().context("read capabilities")?;
    set(sets.effective & permitted, sets.permitted & permitted, sets.inheritable & permitted)
        .context("set capabilities")
}
