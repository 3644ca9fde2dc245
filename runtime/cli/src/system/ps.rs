//! `runx ps` without a container: all that runs, of every kind.

use std::collections::HashSet;
use std::fs;

use anyhow::Context as _;
use runx_core::container::Status as CoreStatus;
use serde::Serialize;

use crate::arguments::ListFormat;
use crate::container::record::Containers;
use crate::container::status::Seen;
use crate::instances::{self, Group};
use crate::{Context, Failure, print};

/// Something that runs, or did.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    id: String,
    /// container: of `runx container`; bundle: of the commands for engines; module, process, pool.
    kind: &'static str,
    /// 0 for what does not run.
    pid: i32,
    status: String,
    /// RFC 3339; of a pool unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    created: Option<String>,
    /// Image, bundle, or command line.
    what: String,
    #[serde(skip)]
    down: bool,
}

/// `runx ps`.
pub(crate) fn ps(context: &Context, format: ListFormat, all: bool, quiet: bool) -> Result<u8, Failure> {
    let mut rows = containers(context)?;
    rows.extend(bundles(context, &rows)?);
    for (group, kind) in [(Group::Modules, "module"), (Group::Processes, "process")] {
        rows.extend(instances::all(context, group)?.into_iter().map(|one| Row {
            down: one.pid == 0,
            id: one.id,
            kind,
            pid: one.pid,
            status: one.status.to_owned(),
            created: Some(one.created),
            what: one.command.join(" "),
        }));
    }
    rows.extend(pools());
    rows.retain(|row| all || !row.down);
    match format {
        _ if quiet => print(&rows.iter().map(|row| format!("{}\n", row.id)).collect::<String>()),
        ListFormat::Json => print(&(serde_json::to_string(&rows).context("print as JSON")? + "\n")),
        ListFormat::Table => print(&table(&rows)),
    }
}

fn table(rows: &[Row]) -> String {
    let mut cells = vec![["ID", "KIND", "PID", "STATUS", "CREATED", "WHAT"].map(str::to_owned)];
    // What moves the cursor is nothing for a terminal, and of long command lines the beginning says enough.
    let plain = |text: &str, most: usize| -> String {
        let text: String = text.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        if text.chars().count() > most { text.chars().take(most - 1).chain(['…']).collect() } else { text }
    };
    cells.extend(rows.iter().map(|row| {
        let created = row.created.as_deref().unwrap_or("-");
        [
            plain(&row.id, 64),
            row.kind.to_owned(),
            row.pid.to_string(),
            row.status.clone(),
            created.get(..19).unwrap_or(created).to_owned(),
            plain(&row.what, 48),
        ]
    }));
    crate::table::render(&cells)
}

/// Those of `runx container`.
fn containers(context: &Context) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for record in Containers::of(context).all()? {
        let seen = Seen::look(context, record)?;
        rows.push(Row {
            pid: seen.pid().unwrap_or(0),
            status: seen.status.to_string(),
            down: seen.status.is_down(),
            kind: "container",
            created: Some(seen.record.created),
            what: seen.record.options.image.unwrap_or_else(|| seen.record.rootfs.display().to_string()),
            id: seen.record.id,
        });
    }
    Ok(rows)
}

/// Those that were made from a bundle, by `runx create` or an engine.
fn bundles(context: &Context, known: &[Row]) -> anyhow::Result<Vec<Row>> {
    let known: HashSet<&str> = known.iter().map(|row| row.id.as_str()).collect();
    let all = context.runtime().list()?;
    let others = all.iter().filter(|container| !known.contains(container.state().id.as_str()));
    Ok(others
        .map(|container| {
            let (state, status) = (container.state(), container.status());
            Row {
                id: state.id.clone(),
                kind: "bundle",
                pid: container.pid().unwrap_or(0),
                status: status.to_string(),
                created: Some(state.created.clone()),
                what: state.bundle.display().to_string(),
                down: status == CoreStatus::Stopped,
            }
        })
        .collect())
}

/// A command line without what only its receiver is to know.
fn without_secrets(words: &[std::borrow::Cow<'_, str>]) -> Vec<String> {
    let names_one = |word: &str| word.starts_with('-') && word.trim_start_matches('-') == "auth-token";
    let one = |(at, word): (usize, &std::borrow::Cow<'_, str>)| match word.split_once('=') {
        _ if at > 0 && names_one(&words[at - 1]) => "…".to_owned(),
        Some((name, _)) if names_one(name) => format!("{name}=…"),
        _ => word.clone().into_owned(),
    };
    words.iter().enumerate().map(one).collect()
}

/// Servers of pools on this machine, which keep no state: they are known by their program. Those of other users are theirs.
fn pools() -> Vec<Row> {
    let mut rows = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let Ok(program) = fs::read_link(entry.path().join("exe")) else { continue };
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        if name != "runx-pool-server" && name != "runx-pool-server (deleted)" {
            continue;
        }
        // A process that it has forked is no server of its own.
        let parent = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let parent =
            parent.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(1)?.parse::<i32>().ok());
        let parent = parent.and_then(|parent| fs::read_link(format!("/proc/{parent}/exe")).ok());
        if parent.as_ref() == Some(&program) {
            continue;
        }
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        // One that is just being executed has none yet.
        if command.is_empty() {
            continue;
        }
        let words: Vec<_> = command.split(|byte| *byte == 0).skip(1).map(String::from_utf8_lossy).collect();
        let words = without_secrets(&words);
        rows.push(Row {
            id: format!("pool-{pid}"),
            kind: "pool",
            pid,
            status: "running".to_owned(),
            created: None,
            what: format!("runx pool serve {}", words.join(" ")).trim_end().to_owned(),
            down: false,
        });
    }
    rows.sort_by_key(|row| row.pid);
    rows
}
