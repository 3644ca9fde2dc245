//! What a module or component imports and exports, as JSON on standard output.

use anyhow::{Result, anyhow};
use runx_wasm::run::Outcome;
use wasmtime::component::types::ComponentItem;

use crate::arguments::Arguments;
use crate::artifact::{self, Program};

/// Prints it.
pub(crate) fn print(arguments: &Arguments) -> Result<Outcome> {
    let artifact = artifact::load(arguments)?;
    let (kind, imports, exports) = match &artifact.program {
        Program::Module(module) => (
            "module",
            module.imports().map(|one| (format!("{} {}", one.module(), one.name()), external(&one.ty()))).collect(),
            module.exports().map(|one| (one.name().to_owned(), external(&one.ty()))).collect::<Vec<_>>(),
        ),
        Program::Component(component) => {
            let of = component.component_type();
            (
                "component",
                of.imports(&artifact.engine).map(|(name, one)| (name.to_owned(), item(&one.ty))).collect(),
                of.exports(&artifact.engine).map(|(name, one)| (name.to_owned(), item(&one.ty))).collect(),
            )
        }
    };
    let text = document(kind, world(kind, &imports, &exports), &imports, &exports)?;
    use std::io::Write;
    writeln!(std::io::stdout(), "{text}")?;
    Ok(Outcome::Exited(0))
}

type Items = Vec<(String, String)>;

fn external(kind: &wasmtime::ExternType) -> String {
    match kind {
        wasmtime::ExternType::Func(function) => {
            let list = |kinds: Vec<String>| kinds.join(", ");
            let results = list(function.results().map(|kind| kind.to_string()).collect());
            let arrow = if results.is_empty() { String::new() } else { format!(" -> {results}") };
            format!("func({}){arrow}", list(function.params().map(|kind| kind.to_string()).collect()))
        }
        wasmtime::ExternType::Global(_) => "global".to_owned(),
        wasmtime::ExternType::Table(_) => "table".to_owned(),
        wasmtime::ExternType::Memory(memory) => format!("memory of {} pages", memory.minimum()),
        wasmtime::ExternType::Tag(_) => "tag".to_owned(),
    }
}

fn item(kind: &ComponentItem) -> String {
    match kind {
        ComponentItem::ComponentFunc(_) | ComponentItem::CoreFunc(_) => "func",
        ComponentItem::Module(_) => "module",
        ComponentItem::Component(_) => "component",
        ComponentItem::ComponentInstance(_) => "interface",
        ComponentItem::Type(_) => "type",
        ComponentItem::Resource(_) => "resource",
    }
    .to_owned()
}

/// What it can be run as.
fn world(kind: &str, imports: &Items, exports: &Items) -> &'static str {
    let exported = |prefix: &str| exports.iter().any(|(name, _)| name.starts_with(prefix));
    match kind {
        "module" if exported("_start") => "wasi_snapshot_preview1 command",
        "module" if exported("_initialize") => "wasi_snapshot_preview1 reactor",
        "module" if imports.is_empty() => "module without imports",
        "module" => "module",
        _ if exported("wasi:cli/run@0.3") => "wasi:cli/command 0.3",
        _ if exported("wasi:cli/run@0.2") => "wasi:cli/command 0.2",
        _ if exported("wasi:http/handler@0.3") => "wasi:http/service 0.3",
        _ if exported("wasi:http/incoming-handler@0.2") => "wasi:http/proxy 0.2",
        _ => "component",
    }
}

fn document(kind: &str, world: &str, imports: &Items, exports: &Items) -> Result<String> {
    let list = |items: &Items| -> Vec<serde_json::Value> {
        items.iter().map(|(name, kind)| serde_json::json!({"name": name, "type": kind})).collect()
    };
    let value = serde_json::json!({"kind": kind, "world": world, "imports": list(imports), "exports": list(exports)});
    serde_json::to_string_pretty(&value).map_err(|e| anyhow!("print as JSON: {e}"))
}
