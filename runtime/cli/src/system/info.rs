//! `runx info` and `runx version`: this program, its parts, and what there is on this machine.

use std::path::Path;

use anyhow::Context as _;
use runx_image::Store;
use serde_json::{Value, json};

use crate::arguments::ListFormat;
use crate::{Context, Failure, print, version};

/// `runx version`.
pub(crate) fn version(format: ListFormat) -> Result<u8, Failure> {
    match format {
        ListFormat::Table => print(&version::text()),
        ListFormat::Json => print(&format!("{:#}\n", version::value())),
    }
}

/// `runx info`.
pub(crate) fn info(context: &Context, format: ListFormat) -> Result<u8, Failure> {
    let (root, storage) = (&context.global.root, context.global.storage_root());
    let (mut running, mut all) = (0, 0);
    for container in context.runtime().list()? {
        all += 1;
        running += usize::from(container.pid().is_some());
    }
    let count = |directory: &Path| std::fs::read_dir(directory).into_iter().flatten().flatten().count();
    // One that is not there is not made by the question.
    let images = if storage.join("storage").is_dir() {
        Store::open(&storage).and_then(|store| store.images()).context("count the images")?.len()
    } else {
        0
    };
    let directory = context.executable.parent().unwrap_or(Path::new("/"));
    let there = |name: &&str| Some(directory.join(name)).filter(|path| path.is_file());
    let programs: Vec<_> = PROGRAMS.iter().map(|name| (*name, there(name))).collect();
    let config: Vec<_> = context.config.files.iter().map(|file| file.display().to_string()).collect();
    let value = json!({
        "version": version::value(),
        "executable": context.executable,
        "programs": programs.iter().map(|(name, path)| (*name, json!(path))).collect::<Value>(),
        "configFiles": config,
        "root": root,
        "storageRoot": storage,
        "ordinaryUser": runx_core::rootless::is_ordinary_user(),
        "containers": {"running": running, "all": all},
        "images": images,
        "modules": count(&root.join(".wasm")),
        "processes": count(&root.join(".process")),
        "network": {
            "bridge": context.config.network.bridge,
            "subnet": context.config.network.subnet,
            "attached": crate::network::all(root)?.len(),
            "plugins": context.config.network.plugins,
        },
    });
    if format == ListFormat::Json {
        return print(&format!("{value:#}\n"));
    }
    let subnet =
        context.config.network.subnet.map_or_else(|| "chosen when first used".to_owned(), |subnet| subnet.to_string());
    let mut lines = vec![
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("program", context.executable.display().to_string()),
        ("config files", if config.is_empty() { "none".to_owned() } else { config.join(", ") }),
        ("state", root.display().to_string()),
        ("storage", storage.display().to_string()),
        ("containers", format!("{all}, of which {running} run")),
        ("images", images.to_string()),
        ("modules", count(&root.join(".wasm")).to_string()),
        ("processes", count(&root.join(".process")).to_string()),
        ("network", format!("bridge {}, subnet {subnet}", context.config.network.bridge)),
    ];
    let missing: Vec<_> = programs.iter().filter(|(_, path)| path.is_none()).map(|(name, _)| *name).collect();
    if !missing.is_empty() {
        lines.push(("missing", format!("{} (see runx check)", missing.join(", "))));
    }
    print(&lines.iter().map(|(name, value)| format!("{name:14}{value}\n")).collect::<String>())
}

/// The programs that belong to this one.
const PROGRAMS: &[&str] = &[
    "containerd-shim-runx-v1",
    "runx-agent",
    "runx-image-client",
    "runx-pool-server",
    "runx-wasm-compiler",
    "runx-wasm-host",
    "runx-wasm-runner",
];
