//! `update`: other limits, and another restart policy, for containers that are there.

use anyhow::{Context as _, Result};
use runx_core::spec::LinuxResources;
use serde_json::Value;

use super::options::{Limits, Restart};
use super::record::{Containers, Record, write_atomically};
use super::status::Seen;
use super::{each, spec};
use crate::{Context, Failure};

/// `runx container update`.
pub(super) fn update(
    context: &Context,
    ids: &[String],
    limits: &Limits,
    restart: Option<Restart>,
) -> Result<u8, Failure> {
    let containers = Containers::of(context);
    each(ids, |word| {
        let id = containers.resolve(word)?;
        let lock = containers.lock(&id)?;
        let directory = containers.directory(&id);
        let seen = Seen::look(context, Record::read(&directory)?)?;
        let mut record = seen.record.clone();
        if record.options.given_configuration && *limits != Limits::default() {
            anyhow::bail!("container {id:?}: its limits are those of {}", record.bundle.join("config.json").display());
        }
        if record.options.auto_remove && restart.is_some_and(|restart| restart != Restart::No) {
            anyhow::bail!("container {id:?} was made with --rm, so that it cannot be started again");
        }
        merge(&mut record.options.limits, limits);
        if let Some(restart) = restart {
            record.options.restart = restart;
        }
        if let Some(core) = seen.core.as_ref().filter(|_| seen.status.is_up()) {
            // The memory's limit alone would leave the swap's below it.
            let mut changed = limits.clone();
            if limits.memory.is_some() && limits.memory_swap.is_none() {
                changed.memory_swap = record.options.limits.memory_swap;
            }
            let resources = spec::resources(&changed);
            if resources.as_object().is_some_and(|fields| !fields.is_empty()) {
                let resources: LinuxResources = serde_json::from_value(resources)?;
                core.update(&resources)?;
            }
        }
        if !record.options.given_configuration {
            keep(&record).with_context(|| format!("change the configuration of container {id:?}"))?;
        }
        record.write(&directory)?;
        lock.release();
        Ok(word.to_owned())
    })
}

/// Writes the limits into the configuration, too, with which a policy starts the container again.
fn keep(record: &Record) -> Result<()> {
    let path = record.bundle.join("config.json");
    let text = match std::fs::read(&path) {
        // It was never started.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.with_context(|| format!("read {}", path.display()))?,
    };
    let mut config: Value = serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))?;
    if let Value::Object(limits) = spec::resources(&record.options.limits) {
        for (name, limit) in limits {
            config["linux"]["resources"][&name] = limit;
        }
    }
    let text = serde_json::to_vec(&config).context("write config.json")?;
    write_atomically(&path, &text)
}

fn merge(kept: &mut Limits, new: &Limits) {
    fn take<T: Clone>(kept: &mut Option<T>, new: &Option<T>) {
        if new.is_some() {
            kept.clone_from(new);
        }
    }
    take(&mut kept.memory, &new.memory);
    take(&mut kept.memory_swap, &new.memory_swap);
    take(&mut kept.memory_reservation, &new.memory_reservation);
    take(&mut kept.cpus, &new.cpus);
    take(&mut kept.cpu_shares, &new.cpu_shares);
    take(&mut kept.cpuset_cpus, &new.cpuset_cpus);
    take(&mut kept.cpuset_mems, &new.cpuset_mems);
    take(&mut kept.pids, &new.pids);
}
