//! Limits.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::container::options::Limits;

/// The period in which a quota of processor time holds, in microseconds.
const PERIOD: i64 = 100_000;

/// `linux.resources`, as far as limits say something.
pub(in crate::container) fn resources(limits: &Limits) -> Value {
    let mut out = Map::new();
    let mut memory = Map::new();
    if let Some(limit) = limits.memory {
        memory.insert("limit".into(), limit.into());
        if accounts_for_swap() || limits.memory_swap.is_some() {
            memory.insert("swap".into(), limits.memory_swap.unwrap_or(limit.saturating_mul(2)).into());
        }
    } else if let Some(swap) = limits.memory_swap {
        memory.insert("swap".into(), swap.into());
    }
    if let Some(reservation) = limits.memory_reservation {
        memory.insert("reservation".into(), reservation.into());
    }
    let mut cpu = Map::new();
    if let Some(thousandths) = limits.cpus {
        cpu.insert("quota".into(), (thousandths * PERIOD / 1000).into());
        cpu.insert("period".into(), PERIOD.into());
    }
    if let Some(shares) = limits.cpu_shares {
        cpu.insert("shares".into(), shares.into());
    }
    if let Some(cpus) = &limits.cpuset_cpus {
        cpu.insert("cpus".into(), json!(cpus));
    }
    if let Some(mems) = &limits.cpuset_mems {
        cpu.insert("mems".into(), json!(mems));
    }
    for (name, part) in [("memory", memory), ("cpu", cpu)] {
        if !part.is_empty() {
            out.insert(name.into(), Value::Object(part));
        }
    }
    if let Some(limit) = limits.pids {
        out.insert("pids".into(), json!({"limit": limit}));
    }
    Value::Object(out)
}

/// Whether the kernel can limit swap: always with version 2, and with version 1 when it was started to.
fn accounts_for_swap() -> bool {
    !Path::new("/sys/fs/cgroup/memory").exists()
        || Path::new("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes").exists()
}
