//! `runx wasm cache`.

use anyhow::Context as _;
use runx_core::workload::cache::{Cache, Entry};
use serde_json::json;

use crate::arguments::ListFormat;
use crate::{Context, Failure, print};

/// `runx wasm cache ls`.
pub(super) fn ls(context: &Context, format: ListFormat) -> Result<u8, Failure> {
    let config = context.wasm();
    let entries = Cache::new(&config.cache).entries()?;
    let mut out = String::new();
    match format {
        ListFormat::Json => {
            let list: Vec<_> = entries.iter().map(describe).collect();
            out = serde_json::to_string(&list).context("print as JSON")? + "\n";
        }
        ListFormat::Table => {
            out.push_str(&format!("{:12}  {:16}  {:>10}  {:20}  FORM\n", "MODULE", "ENGINE", "SIZE", "USED"));
            for entry in &entries {
                out.push_str(&format!(
                    "{:12}  {:16}  {:>10}  {:20}  {}\n",
                    &entry.module[..12],
                    entry.engine,
                    entry.size,
                    humantime::format_rfc3339_seconds(entry.used).to_string(),
                    form(entry)
                ));
            }
        }
    }
    print(&out)
}

fn form(entry: &Entry) -> String {
    let form = entry.form;
    let words = [(form.compact, "compact"), (form.fuel, "fuel"), (form.pulley, "pulley")];
    let words: Vec<_> = words.into_iter().filter_map(|(on, word)| on.then_some(word)).collect();
    if words.is_empty() { "usual".to_owned() } else { words.join(",") }
}

fn describe(entry: &Entry) -> serde_json::Value {
    json!({
        "module": entry.module,
        "engine": entry.engine,
        "size": entry.size,
        "used": humantime::format_rfc3339_seconds(entry.used).to_string(),
        "compact": entry.form.compact,
        "fuel": entry.form.fuel,
        "pulley": entry.form.pulley,
        "path": entry.path,
    })
}

/// `runx wasm cache prune`.
pub(super) fn prune(context: &Context, limit: u64) -> Result<u8, Failure> {
    let config = context.wasm();
    let gone = Cache::new(&config.cache).prune(limit)?;
    let bytes: u64 = gone.iter().map(|entry| entry.size).sum();
    print(&format!("removed {} compiled modules, {bytes} bytes\n", gone.len()))
}
