//! `ls`.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::record::{Containers, Record};
use super::status::{Seen, Status};
use crate::arguments::{ListFormat, Ls};
use crate::network::{self, ports::Port};
use crate::{Context, Failure, print};

/// `runx container ls`.
pub(super) fn ls(context: &Context, ls: &Ls) -> Result<u8, Failure> {
    let containers = Containers::of(context);
    let mut all = Vec::new();
    for record in containers.all()? {
        if ls.last.is_some_and(|last| all.len() >= last) {
            break;
        }
        let seen = Seen::look(context, record)?;
        let shown = ls.all || ls.last.is_some() || ls.selection.names_status() || !seen.status.is_down();
        if shown && ls.selection.selects(|key, value| matches(&seen, key, value)) {
            all.push(seen);
        }
    }
    if ls.quiet {
        return print(&all.iter().map(|seen| format!("{}\n", seen.record.id)).collect::<String>());
    }
    match ls.format {
        ListFormat::Json => {
            let list: Vec<Value> = all.iter().map(|seen| describe(context, seen)).collect();
            print(&(serde_json::to_string(&list).context("print the list")? + "\n"))
        }
        ListFormat::Table => print(&table(context, &all, ls.no_trunc)),
    }
}

fn matches(seen: &Seen, key: &str, value: &str) -> bool {
    let record = &seen.record;
    match key {
        "id" => record.id.starts_with(value),
        "name" => record.id.contains(value),
        "status" if value == "stopped" => seen.status == Status::Exited,
        "status" => seen.status.to_string() == value,
        "image" | "ancestor" => {
            record.options.image.as_deref() == Some(value)
                || record.options.image.as_deref().is_some_and(|image| image.split(':').next() == Some(value))
                || record.image_id.as_deref().is_some_and(|id| id.trim_start_matches("sha256:").starts_with(value))
        }
        "exited" => seen.status == Status::Exited && record.exit_code == value.parse().ok(),
        "label" => match value.split_once('=') {
            Some((label, wanted)) => record.labels.get(label).is_some_and(|found| found == wanted),
            None => record.labels.contains_key(value),
        },
        _ => false,
    }
}

fn describe(context: &Context, seen: &Seen) -> Value {
    let record = &seen.record;
    json!({
        "id": record.id,
        "image": record.options.image,
        "imageId": record.image_id,
        "command": record.args,
        "pid": seen.pid().unwrap_or(0),
        "status": seen.status.to_string(),
        "exitCode": if seen.status == Status::Exited { record.exit_code } else { None },
        "created": record.created,
        "started": record.started,
        "finished": record.finished,
        "rootfs": record.rootfs,
        "bundle": record.bundle,
        "network": record.options.network.to_string(),
        "ports": ports(context, seen),
        "labels": record.labels,
        "annotations": record.options.annotations.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
        "restarts": record.restarts,
    })
}

/// Its published ports: while it runs, with those of the host that were chosen.
fn ports(context: &Context, seen: &Seen) -> Vec<Port> {
    let asked = &seen.record.options.publish;
    if asked.is_empty() || !seen.status.is_up() {
        return asked.clone();
    }
    let attached = network::of(&context.global.root, &seen.record.id).ok().flatten();
    attached.map_or_else(|| asked.clone(), |attached| attached.ports)
}

/// The status in words for people.
fn status(seen: &Seen) -> String {
    let record = &seen.record;
    let code = record.exit_code.map_or_else(|| "?".to_owned(), |code| code.to_string());
    match seen.status {
        Status::Exited => format!("exited ({code})"),
        Status::Restarting => format!("restarting ({code})"),
        Status::Running | Status::Paused if !record.is_monitored() => format!("{} (no monitor)", seen.status),
        status => status.to_string(),
    }
}

/// How long ago that was, in words.
pub(crate) fn ago(time: &str) -> String {
    let Ok(time) = humantime::parse_rfc3339(time) else { return time.to_owned() };
    let seconds = SystemTime::now().duration_since(time).unwrap_or(Duration::ZERO).as_secs();
    let (number, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86400 => (seconds / 3600, "hour"),
        _ => (seconds / 86400, "day"),
    };
    format!("{number} {unit}{} ago", if number == 1 { "" } else { "s" })
}

/// Shortens a text from its beginning, where the end says more, or from its end.
fn shortened(text: &str, width: usize, keep_end: bool) -> String {
    let count = text.chars().count();
    if count <= width {
        return text.to_owned();
    }
    if keep_end {
        format!("…{}", text.chars().skip(count - width + 1).collect::<String>())
    } else {
        format!("{}…", text.chars().take(width - 1).collect::<String>())
    }
}

fn table(context: &Context, all: &[Seen], whole: bool) -> String {
    let cut = |text: &str, width: usize, keep_end: bool| {
        if whole { text.to_owned() } else { shortened(text, width, keep_end) }
    };
    let image = |record: &Record| record.options.image.clone().unwrap_or_else(|| "-".to_owned());
    let titles = ["CONTAINER ID", "IMAGE", "COMMAND", "PID", "STATUS", "CREATED", "PORTS", "ROOTFS"];
    let mut rows = vec![titles.map(str::to_owned)];
    rows.extend(all.iter().map(|seen| {
        let record = &seen.record;
        [
            record.id.clone(),
            cut(&image(record), 32, true),
            cut(&record.args.join(" "), 24, false),
            seen.pid().unwrap_or(0).to_string(),
            status(seen),
            ago(&record.created),
            match record.options.publish.is_empty() {
                true => "-".to_owned(),
                false => ports(context, seen).iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
            },
            cut(&record.rootfs.display().to_string(), 48, true),
        ]
    }));
    format_table(&rows)
}

/// A table for a terminal, which what moves the cursor is not for.
pub(super) fn format_table<const N: usize>(rows: &[[String; N]]) -> String {
    let plain = |cell: &String| cell.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    let rows: Vec<[String; N]> = rows.iter().map(|row| std::array::from_fn(|column| plain(&row[column]))).collect();
    crate::table::render(&rows)
}
