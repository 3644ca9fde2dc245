//! The runtime-spec's limits, which are those of version 1, in terms of version 2.

use std::path::Path;

use oci_spec::runtime::{LinuxMemory, LinuxPids, LinuxRdma};

use super::files::read_number;
use crate::error::{Error, Result};

/// `cpu.shares` (2 to 262144, 1024 by default) as `cpu.weight` (1 to 10000, 100 by default), by the
/// curve that maps both ends and the default onto each other, as runc and crun do.
pub(super) fn weight_from_shares(shares: u64) -> u64 {
    if shares <= 2 {
        return 1;
    }
    if shares >= 262_144 {
        return 10_000;
    }
    let log = (shares as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    10f64.powf(exponent).ceil() as u64
}

/// `blkio.weight` (10 to 1000) as `io.weight` (1 to 10000).
pub(super) fn io_weight(weight: u16) -> u64 {
    1 + u64::from(weight).saturating_sub(10) * 9999 / 990
}

/// What `pids.max` is to be, if anything: a limit of 0 is one, as the runtime-spec says. systemd knows no 0, and a
/// container has one process anyway, so 1 means the same: no further one.
pub(super) fn pids_max(pids: &LinuxPids) -> Option<u64> {
    match pids.limit() {
        i64::MIN..0 => None,
        limit => Some(limit.max(1) as u64),
    }
}

/// A limit as version 2 takes it; negative is none.
pub(super) fn limit_text(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

/// What `memory.swap.max` is to be, if anything. The spec counts memory and swap together, version 2 swap alone.
///
/// # Errors
/// When the difference cannot be told, or is negative.
pub(super) fn swap_alone(memory: &LinuxMemory) -> Result<Option<i64>> {
    let limit = memory.limit().unwrap_or(0);
    let swap = match memory.swap().unwrap_or(0) {
        // No limit on memory alone means none on the sum either.
        0 if limit < 0 => return Ok(Some(-1)),
        0 => return Ok(None),
        swap => swap,
    };
    if swap < 0 {
        return Ok(Some(-1));
    }
    match limit {
        i64::MIN..0 => Ok(Some(swap)),
        0 => Err(Error::spec(format!(
            "linux.resources.memory.swap {swap} counts memory and swap together, so it needs memory.limit"
        ))),
        limit if swap < limit => {
            Err(Error::spec(format!("linux.resources.memory.swap {swap} is less than memory.limit {limit}")))
        }
        limit => Ok(Some(swap - limit)),
    }
}

/// `memory.swappiness`, if it is given: clients in Go write -1 for "not set", which arrives as the largest number.
pub(super) fn swappiness(memory: &LinuxMemory) -> Result<Option<u64>> {
    match memory.swappiness() {
        None | Some(u64::MAX) => Ok(None),
        Some(value) if value > 100 => {
            Err(Error::spec(format!("linux.resources.memory.swappiness {value} is over 100")))
        }
        some => Ok(some),
    }
}

/// `memory.checkBeforeUpdate`: a limit that is in use up already is refused, where it would else kill.
pub(super) fn check_before_update(directory: &Path, usage: &str, memory: &LinuxMemory) -> Result<()> {
    if memory.check_before_update() != Some(true) {
        return Ok(());
    }
    let used = read_number(directory, usage).unwrap_or(0);
    for (field, limit) in [("limit", memory.limit()), ("swap", memory.swap())] {
        if let Some(limit) = limit.and_then(|limit| u64::try_from(limit).ok()).filter(|limit| *limit != 0)
            && limit <= used
        {
            return Err(Error::spec(format!(
                "linux.resources.memory.{field} {limit} is not more than the {used} bytes in use"
            )));
        }
    }
    Ok(())
}

/// A line of `rdma.max`: only what is given changes.
pub(super) fn rdma_line(device: &str, limits: &LinuxRdma) -> Result<String> {
    let mut line = device.to_owned();
    for (key, value) in [("hca_handle", limits.hca_handles()), ("hca_object", limits.hca_objects())] {
        if let Some(value) = value {
            line.push_str(&format!(" {key}={value}"));
        }
    }
    if line.len() == device.len() {
        return Err(Error::spec(format!("linux.resources.rdma: {device:?} has neither hcaHandles nor hcaObjects")));
    }
    Ok(line)
}

/// Says that a limit on the kernel's memory has no effect. Version 2 never had one, version 1 lost it in Linux
/// 5.16; runc accepts it all the same, and so do the engines' old configurations expect.
pub(super) fn warn_kernel_memory(field: &str, value: i64) {
    log::warn!("linux.resources.memory.{field} {value} has no effect: this kernel has no such limit");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_map_onto_weights_at_both_ends_and_the_default() {
        assert_eq!([2, 1024, 262_144].map(weight_from_shares), [1, 100, 10_000]);
        assert!(weight_from_shares(1025) >= 100 && weight_from_shares(1023) <= 100);
    }

    #[test]
    fn weights_of_devices_map_onto_each_other_at_both_ends() {
        assert_eq!([10, 1000].map(io_weight), [1, 10_000]);
        assert_eq!(io_weight(1), 1);
    }

    #[test]
    fn no_processes_means_no_further_one_and_minus_one_means_any_number() {
        let max = |limit| pids_max(LinuxPids::default().set_limit(limit));
        assert_eq!([-1, 0, 1, 7].map(max), [None, Some(1), Some(1), Some(7)]);
    }

    fn memory(limit: Option<i64>, swap: Option<i64>) -> LinuxMemory {
        let mut memory = LinuxMemory::default();
        memory.set_limit(limit).set_swap(swap);
        memory
    }

    #[test]
    fn swap_is_what_the_sum_leaves_after_memory() {
        let alone = |limit, swap| swap_alone(&memory(limit, swap));
        assert_eq!(alone(Some(100), Some(300)).unwrap(), Some(200));
        assert_eq!(alone(Some(100), Some(100)).unwrap(), Some(0));
        assert_eq!(alone(Some(100), Some(-1)).unwrap(), Some(-1));
        assert_eq!(alone(Some(-1), None).unwrap(), Some(-1));
        assert_eq!(alone(Some(-1), Some(300)).unwrap(), Some(300));
        assert_eq!(alone(Some(100), None).unwrap(), None);
        assert!(alone(None, Some(300)).unwrap_err().to_string().contains("needs memory.limit"));
        assert!(alone(Some(400), Some(300)).unwrap_err().to_string().contains("less than"));
    }

    #[test]
    fn rdma_limits_name_only_what_is_given() {
        let mut limits = LinuxRdma::default();
        assert!(rdma_line("mlx5_1", &limits).is_err());
        *limits.hca_objects_mut() = Some(7);
        assert_eq!(rdma_line("mlx5_1", &limits).unwrap(), "mlx5_1 hca_object=7");
    }
}
