//! `update`: other limits for a container that is there.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use runx_core::bundle;
use runx_core::spec::{LinuxBlockIo, LinuxPids, LinuxResources};

use super::manage::outcome;
use crate::arguments::Update;
use crate::{Context, Failure};

/// No honest description of limits comes near this size in bytes.
const SIZE_LIMIT: u64 = 1 << 20;

/// `runx update`.
pub(crate) fn update(context: &Context, update: Update) -> Result<u8, Failure> {
    let container = context.runtime().load(&update.id)?;
    let resources = resources(&update)?;
    outcome(container.update(&resources))
}

/// What the file says, and then the flags.
fn resources(update: &Update) -> Result<LinuxResources> {
    for (flag, schema) in [("--l3-cache-schema", &update.l3_cache_schema), ("--mem-bw-schema", &update.mem_bw_schema)] {
        if let Some(schema) = schema {
            bail!("{flag} {schema:?}: Intel RDT of a container cannot be changed");
        }
    }
    let mut resources = match &update.resources {
        Some(path) => read(path)?,
        None => bundle::parse(b"{}", "no limits")?,
    };
    let ignored = ignore_kernel_memory(&mut resources);
    if update.kernel_memory || ignored {
        log::warn!("kernel memory limits are ignored: kernels have none any more");
    }
    set_cpu(&mut resources, update);
    set_memory(&mut resources, update);
    if let Some(weight) = update.blkio_weight.filter(|weight| *weight != 0) {
        let block = resources.block_io_mut().get_or_insert_with(LinuxBlockIo::default);
        block.set_weight(Some(weight));
    }
    if let Some(limit) = update.pids_limit {
        let mut pids = LinuxPids::default();
        pids.set_limit(limit);
        resources.set_pids(Some(pids));
    }
    Ok(resources)
}

fn read(path: &Path) -> Result<LinuxResources> {
    if path != Path::new("-") {
        return Ok(bundle::parse_file(path)?);
    }
    let mut text = Vec::new();
    let input = std::io::stdin().lock();
    std::io::Read::read_to_end(&mut std::io::Read::take(input, SIZE_LIMIT), &mut text)
        .context("read limits from standard input")?;
    Ok(bundle::parse(&text, "standard input")?)
}

#[allow(deprecated, reason = "engines still send these")]
fn ignore_kernel_memory(resources: &mut LinuxResources) -> bool {
    let Some(memory) = resources.memory_mut() else { return false };
    let any = memory.kernel().is_some() || memory.kernel_tcp().is_some();
    memory.set_kernel(None);
    memory.set_kernel_tcp(None);
    any
}

fn set_cpu(resources: &mut LinuxResources, update: &Update) {
    let mut cpu = resources.cpu().clone().unwrap_or_default();
    let before = cpu.clone();
    if let Some(value) = update.cpu_share {
        cpu.set_shares(Some(value));
    }
    if let Some(value) = update.cpu_period {
        cpu.set_period(Some(value));
    }
    if let Some(value) = update.cpu_quota {
        cpu.set_quota(Some(value));
    }
    if let Some(value) = update.cpu_burst {
        cpu.set_burst(Some(value));
    }
    if let Some(value) = update.cpu_rt_period {
        cpu.set_realtime_period(Some(value));
    }
    if let Some(value) = update.cpu_rt_runtime {
        cpu.set_realtime_runtime(Some(value));
    }
    if let Some(value) = update.cpu_idle {
        cpu.set_idle(Some(value));
    }
    if let Some(value) = &update.cpuset_cpus {
        cpu.set_cpus(Some(value.clone()));
    }
    if let Some(value) = &update.cpuset_mems {
        cpu.set_mems(Some(value.clone()));
    }
    if cpu != before || resources.cpu().is_some() {
        resources.set_cpu(Some(cpu));
    }
}

fn set_memory(resources: &mut LinuxResources, update: &Update) {
    let mut memory = resources.memory().unwrap_or_default();
    let before = memory;
    if let Some(value) = update.memory {
        memory.set_limit(Some(value));
    }
    if let Some(value) = update.memory_reservation {
        memory.set_reservation(Some(value));
    }
    if let Some(value) = update.memory_swap {
        memory.set_swap(Some(value));
    }
    if memory != before {
        resources.set_memory(Some(memory));
    }
}

#[cfg(test)]
mod tests {
    use runx_core::spec::{LinuxCpu, LinuxMemory};

    use super::*;

    #[test]
    fn what_was_not_said_is_not_set() {
        let none = resources(&Update::default()).unwrap();
        assert_eq!(none, bundle::parse(b"{}", "x").unwrap());
        let some = resources(&Update { memory: Some(1 << 20), cpu_idle: Some(0), ..Update::default() }).unwrap();
        assert_eq!(some.memory().as_ref().and_then(LinuxMemory::limit), Some(1 << 20));
        assert_eq!(some.cpu().as_ref().and_then(LinuxCpu::idle), Some(0));
        assert!(some.pids().is_none() && some.block_io().is_none());
    }

    #[test]
    fn flags_change_what_the_file_says() {
        let directory = std::env::temp_dir().join(format!("runx-update-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("limits.json");
        std::fs::write(&path, r#"{"memory": {"limit": 5, "kernel": 7}, "cpu": {"shares": 3}}"#).unwrap();
        let both = resources(&Update { resources: Some(path), cpu_share: Some(9), ..Update::default() });
        std::fs::remove_dir_all(directory).unwrap();
        let both = serde_json::to_value(both.unwrap()).unwrap();
        assert_eq!(both, serde_json::json!({"memory": {"limit": 5}, "cpu": {"shares": 9}}));
    }

    #[test]
    fn schemata_are_refused_by_name() {
        let update = Update { l3_cache_schema: Some("L3:0=f".into()), ..Update::default() };
        assert!(resources(&update).unwrap_err().to_string().contains("L3:0=f"));
    }
}
