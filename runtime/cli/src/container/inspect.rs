//! `inspect`: all that is known of a container.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::log;
use super::record::Containers;
use super::status::{Seen, Status};
use crate::{Context, Failure, message, print};

/// `runx container inspect`.
pub(super) fn inspect(context: &Context, ids: &[String]) -> Result<u8, Failure> {
    let containers = Containers::of(context);
    let (mut all, mut failed) = (Vec::new(), None);
    for word in ids {
        match containers.find(word).and_then(|record| Seen::look(context, record)) {
            Ok(seen) => all.push(describe(context, &containers, &seen)),
            Err(e) => {
                if let Some(before) = failed.replace(e) {
                    ::log::error!("{}", message(&before));
                }
            }
        }
    }
    print(&(serde_json::to_string_pretty(&all).context("print as JSON")? + "\n"))?;
    failed.map_or(Ok(0), |error| Err(error.into()))
}

fn describe(context: &Context, containers: &Containers, seen: &Seen) -> Value {
    let record = &seen.record;
    let options = &record.options;
    let directory = containers.directory(&record.id);
    let config = std::fs::read(record.bundle.join("config.json")).ok();
    let config: Option<Value> = config.and_then(|text| serde_json::from_slice(&text).ok());
    let attached = crate::network::of(&context.global.root, &record.id).ok().flatten();
    let state = seen.core.as_ref().map(|core| core.state());
    json!({
        "id": record.id,
        "created": record.created,
        "args": record.args,
        "image": options.image,
        "imageId": record.image_id,
        "state": {
            "status": seen.status.to_string(),
            "running": seen.status == Status::Running,
            "paused": seen.status == Status::Paused,
            "restarting": seen.status == Status::Restarting,
            "pid": seen.pid().unwrap_or(0),
            "startTime": state.filter(|_| seen.pid().is_some()).map(|state| state.start_time),
            "started": record.started,
            "finished": record.finished,
            "exitCode": record.exit_code,
            "oomKilled": record.oom_killed,
            "error": record.error,
            "restartCount": record.restarts,
            "monitorPid": record.monitor.filter(|monitor| monitor.alive()).map(|monitor| monitor.pid),
        },
        "bundle": record.bundle,
        "rootfs": record.rootfs,
        "logPath": directory.join(log::FILE),
        "hostsPath": directory.join("hosts"),
        "hostnamePath": directory.join("hostname"),
        "resolvConfPath": directory.join("resolv.conf"),
        "namespaces": namespaces(seen.pid()),
        "cgroups": state.map(|state| state.cgroup.paths()),
        "network": {
            "mode": options.network.to_string(),
            "ports": options.publish,
            "addresses": attached.as_ref().map(|attached| {
                attached.addresses.iter().map(ToString::to_string).collect::<Vec<_>>()
            }),
            "gateway": attached.as_ref().and_then(|attached| attached.gateway),
            "published": attached.as_ref().map(|attached| &attached.ports),
        },
        "mounts": config.as_ref().map(|config| &config["mounts"]),
        "volumes": record.volumes,
        "restartPolicy": options.restart.to_string(),
        "autoRemove": options.auto_remove,
        "stopSignal": options.stop_signal.as_deref().or(record.defaults.stop_signal.as_deref()).unwrap_or("SIGTERM"),
        "stopTimeout": options.stop_timeout().as_secs(),
        "log": {"maxSize": options.log.max_size, "maxFile": options.log.max_file},
        "labels": record.labels,
        "annotations": options.annotations.iter().cloned().collect::<BTreeMap<_, _>>(),
        "limits": options.limits,
        "config": config,
    })
}

/// The paths of a running container's namespaces.
fn namespaces(pid: Option<i32>) -> Option<BTreeMap<&'static str, String>> {
    let pid = pid?;
    let kinds = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];
    Some(kinds.into_iter().map(|kind| (kind, format!("/proc/{pid}/ns/{kind}"))).collect())
}
