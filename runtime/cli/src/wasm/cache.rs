//! `runx wasm cache`.

use anyhow::Context as _;
use runx_core::workload::cache::{Cache, Entry};
use runx_core::workload::counters::Counters;
use serde_json::json;

use crate::arguments::{ListFormat, StatsFormat};
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

/// `runx wasm cache stats`.
pub(super) fn stats(context: &Context, format: StatsFormat) -> Result<u8, Failure> {
    let config = context.wasm();
    let entries = Cache::new(&config.cache).entries()?;
    let bytes: u64 = entries.iter().map(|entry| entry.size).sum();
    let counters =
        Counters::read(&config.cache).with_context(|| format!("read the counters in {}", config.cache.display()))?;
    print(&match format {
        StatsFormat::List(ListFormat::Json) => {
            let all = json!({
                "entries": entries.len(),
                "bytes": bytes,
                "hits": counters.hits,
                "compiles": counters.compiles,
                "failures": counters.failures,
                "compile_seconds": counters.microseconds as f64 / 1e6,
                "rejected": counters.rejected,
                "evicted": counters.evicted,
            });
            format!("{all}\n")
        }
        StatsFormat::List(ListFormat::Table) => format!(
            "COMPILED  {:>12}\nBYTES     {bytes:>12}\nHITS      {:>12}\nCOMPILES  {:>12}  in {:.1} s\n\
             FAILURES  {:>12}\nREJECTED  {:>12}\nEVICTED   {:>12}\n",
            entries.len(),
            counters.hits,
            counters.compiles,
            counters.microseconds as f64 / 1e6,
            counters.failures,
            counters.rejected,
            counters.evicted
        ),
        StatsFormat::Prometheus => format!(
            "{}# HELP runx_wasm_cache_entries Compiled modules in the cache.\n# TYPE runx_wasm_cache_entries gauge\n\
             runx_wasm_cache_entries {}\n# HELP runx_wasm_cache_bytes Their size.\n# TYPE runx_wasm_cache_bytes gauge\n\
             runx_wasm_cache_bytes {bytes}\n",
            counters.prometheus(),
            entries.len()
        ),
    })
}

/// `runx wasm cache prune`.
pub(super) fn prune(context: &Context, limit: u64) -> Result<u8, Failure> {
    let config = context.wasm();
    let gone = Cache::new(&config.cache).prune(limit)?;
    let bytes: u64 = gone.iter().map(|entry| entry.size).sum();
    print(&format!("removed {} compiled modules, {bytes} bytes\n", gone.len()))
}
