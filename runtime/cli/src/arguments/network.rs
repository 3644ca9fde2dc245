//! What the commands of `runx network` are told.

use std::ffi::OsString;

use anyhow::{Result, bail};
use runx_core::container::validate_id;

use super::scan::{Flag, Order, Words, option};
use super::tables::{ANY, FORMAT, NONE, QUIET, Syntax, command};
use super::{ListFormat, list_format, text};
use crate::network::Kind;
use crate::network::ports::{self, Port};

/// `runx network …`.
#[derive(Debug)]
pub(crate) enum Network {
    Attach { id: String, kind: Kind, ports: Vec<Port>, format: ListFormat },
    Detach { ids: Vec<String> },
    Check { id: String },
    Prune,
    Ls { format: ListFormat, quiet: bool },
}

const ATTACH: &[Flag] = &[
    option("network", None, "NETWORK", "bridge (default), none, host, or container:ID for another container's"),
    option(
        "publish",
        Some('p'),
        "[IP:][HOST:]PORT[/PROTOCOL]",
        "port of the host for a port of the container; also ranges; may be given more than once",
    ),
];

/// All of them.
#[rustfmt::skip]
pub(super) const COMMANDS: &[Syntax] = &[
    command("network attach", "CONTAINER", "give a container that is about to be created a network; prints its namespace's path",
        &[ATTACH, FORMAT], Order::Anywhere, (1, 1)),
    command("network detach", "CONTAINER…", "take its network away; fine if it has none", NONE, Order::Anywhere, (1, ANY)),
    command("network check", "CONTAINER", "ask whether its network is still as it was made", NONE, Order::Anywhere, (1, 1)),
    command("network prune", "", "remove the bridge and its rules, if no container uses it", NONE, Order::Anywhere, (0, 0)),
    command("network ls", "", "list the containers that are attached to a bridge", &[FORMAT, QUIET], Order::Anywhere, (0, 0)),
];

/// The command `name`, of which `first` is the first word and `rest` what follows.
pub(super) fn build(
    name: &str,
    first: String,
    rest: impl Iterator<Item = OsString>,
    words: &mut Words,
) -> Result<Network> {
    if !matches!(name, "network ls" | "network prune") {
        validate_id(&first)?;
    }
    Ok(match name {
        "network attach" => Network::Attach {
            id: first,
            kind: words.text("network")?.map_or(Ok(Kind::Bridge), str::parse)?,
            ports: words.texts("publish")?.iter().map(|text| ports::parse(text)).collect::<Result<Vec<_>>>()?.concat(),
            format: list_format(words)?,
        },
        "network detach" => {
            let rest = rest.map(text).collect::<Result<Vec<_>>>()?;
            rest.iter().try_for_each(|id| validate_id(id))?;
            Network::Detach { ids: std::iter::once(first).chain(rest).collect() }
        }
        "network prune" => Network::Prune,
        "network check" => Network::Check { id: first },
        "network ls" => Network::Ls { format: list_format(words)?, quiet: words.on("quiet") },
        other => bail!("command {other:?} has no meaning"),
    })
}
