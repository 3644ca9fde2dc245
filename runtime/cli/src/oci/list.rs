//! `state` and `list`.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use runx_core::container::{Container, Status};
use serde::Serialize;

use crate::arguments::ListFormat;
use crate::{Context, Failure, print};

/// What `state` and `list` tell of a container, in runc's names and order.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Description<'a> {
    oci_version: &'a str,
    id: &'a str,
    pid: i32,
    status: String,
    bundle: &'a Path,
    rootfs: &'a Path,
    created: &'a str,
    #[serde(skip_serializing_if = "HashMap::is_empty")]
    annotations: &'a HashMap<String, String>,
    owner: String,
}

fn describe<'a>(container: &'a Container, users: &mut Users) -> Description<'a> {
    let state = container.state();
    let status = container.status();
    Description {
        oci_version: &state.oci_version,
        id: &state.id,
        pid: if status == Status::Stopped { 0 } else { state.pid },
        status: status.to_string(),
        bundle: &state.bundle,
        rootfs: &state.rootfs,
        created: &state.created,
        annotations: &state.annotations,
        owner: users.name(state.owner),
    }
}

/// The host's users, read when the first is asked for.
#[derive(Default)]
struct Users(Option<String>);

impl Users {
    /// The name of a user, or the number.
    fn name(&mut self, uid: u32) -> String {
        let passwd = self.0.get_or_insert_with(|| fs::read_to_string("/etc/passwd").unwrap_or_default());
        let name = passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
        });
        name.unwrap_or_else(|| format!("#{uid}"))
    }
}

/// `runx state`.
pub(crate) fn state(context: &Context, id: &str) -> Result<u8, Failure> {
    let container = context.runtime().load(id)?;
    let text = serde_json::to_string_pretty(&describe(&container, &mut Users::default()));
    print(&format!("{}\n", text.context("print the state")?))
}

/// `runx list`.
pub(crate) fn list(context: &Context, format: ListFormat, quiet: bool) -> Result<u8, Failure> {
    let runtime = context.runtime();
    if context.global.root_given {
        // A root that nobody ever used is a mistake; the default one is not.
        fs::metadata(runtime.root()).with_context(|| format!("list containers below {}", runtime.root().display()))?;
    }
    let containers = runtime.list()?;
    if quiet {
        return print(&containers.iter().map(|container| format!("{}\n", container.state().id)).collect::<String>());
    }
    let mut users = Users::default();
    let all: Vec<_> = containers.iter().map(|container| describe(container, &mut users)).collect();
    match format {
        ListFormat::Json => print(&format!("{}\n", serde_json::to_string(&all).context("print the list")?)),
        ListFormat::Table => print(&table(&all)),
    }
}

fn table(all: &[Description<'_>]) -> String {
    let titles = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned);
    let mut rows = vec![titles];
    rows.extend(all.iter().map(|container| {
        [
            container.id.to_owned(),
            container.pid.to_string(),
            container.status.clone(),
            container.bundle.display().to_string(),
            container.created.to_owned(),
            container.owner.clone(),
        ]
    }));
    // As narrow as runc's columns, or as wide as they must be.
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0).max(9);
    let widths: [usize; 5] = std::array::from_fn(width);
    let mut out = String::new();
    for row in &rows {
        for (cell, width) in row.iter().zip(widths) {
            out.push_str(&format!("{cell:width$}   "));
        }
        out.push_str(&row[5]);
        out.push('\n');
    }
    out
}
