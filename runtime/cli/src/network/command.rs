//! `runx network`: networks by themselves, for bundles that are run by `runx create`, and to look and to clean up.

use anyhow::Context as _;
use serde_json::{Value, json};

use super::{Attached, Namespace, NetworkOptions};
use crate::arguments::{ListFormat, Network};
use crate::{Context, Failure, print};

/// `runx network …`.
pub(crate) fn network(context: &Context, command: &Network) -> Result<u8, Failure> {
    let root = &context.global.root;
    match command {
        Network::Attach { id, kind, ports, format } => {
            let options =
                NetworkOptions { kind: kind.clone(), ports: ports.clone(), settings: &context.config.network };
            let attached = super::attach(&context.runtime(), id, &options)?;
            match (format, &attached.namespace) {
                (ListFormat::Json, _) => print(&format!("{:#}\n", describe(id, &attached))),
                (_, Namespace::Path(path)) => print(&format!("{}\n", path.display())),
                _ => Ok(0),
            }
        }
        Network::Detach { ids } => {
            let failed: Vec<_> = ids.iter().filter_map(|id| super::detach(root, id).err()).collect();
            for error in failed.iter().skip(1) {
                log::error!("{}", crate::message(error));
            }
            failed.into_iter().next().map_or(Ok(0), |error| Err(error.into()))
        }
        Network::Prune => {
            let settings = &context.config.network;
            if super::prune(settings)? { print(&format!("{}\n", settings.bridge)) } else { Ok(0) }
        }
        Network::Check { id } => super::check(root, id).map(|()| 0).map_err(Failure::from),
        Network::Ls { format, quiet } => {
            let ids = super::all(root)?;
            let all = ids.into_iter().filter_map(|id| Some((super::of(root, &id).transpose()?, id)));
            let all = all.map(|(attached, id)| Ok((id, attached?))).collect::<anyhow::Result<Vec<_>>>();
            list(&all.context("list networks")?, *format, *quiet)
        }
    }
}

fn describe(id: &str, attached: &Attached) -> Value {
    let namespace = match &attached.namespace {
        Namespace::Path(path) => json!(path),
        Namespace::Host | Namespace::New => Value::Null,
    };
    json!({
        "id": id,
        "netns": namespace,
        "addresses": attached.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "gateway": attached.gateway,
        "dns": attached.dns,
        "ports": attached.ports,
    })
}

fn list(all: &[(String, Attached)], format: ListFormat, quiet: bool) -> Result<u8, Failure> {
    if quiet {
        return print(&all.iter().map(|(id, _)| format!("{id}\n")).collect::<String>());
    }
    if format == ListFormat::Json {
        let all: Vec<_> = all.iter().map(|(id, attached)| describe(id, attached)).collect();
        return print(&format!("{:#}\n", json!(all)));
    }
    let joined = |parts: Vec<String>| if parts.is_empty() { "-".to_owned() } else { parts.join(", ") };
    let mut rows = vec![["CONTAINER ID".to_owned(), "ADDRESS".to_owned(), "GATEWAY".to_owned(), "PORTS".to_owned()]];
    for (id, attached) in all {
        rows.push([
            id.clone(),
            joined(attached.addresses.iter().map(ToString::to_string).collect()),
            attached.gateway.map_or_else(|| "-".to_owned(), |gateway| gateway.to_string()),
            joined(attached.ports.iter().map(ToString::to_string).collect()),
        ]);
    }
    print(&crate::table::render(&rows))
}
