//! `--invoke`: a function by its name, with arguments as text.

use anyhow::{Context, Result, anyhow, bail, ensure};
use wasmtime::component::wasm_wave::untyped::UntypedFuncCall;
use wasmtime::component::wasm_wave::wasm::{DisplayFuncResults, WasmFunc};
use wasmtime::component::{self, Component, types};
use wasmtime::{Instance, Store, Val, ValType};

use crate::context::Host;

/// Splits `name(a, b)` or `name`.
fn split(call: &str) -> Result<(&str, Vec<&str>)> {
    let Some((name, rest)) = call.split_once('(') else { return Ok((call.trim(), Vec::new())) };
    let inside = rest.trim().strip_suffix(')').with_context(|| format!("--invoke {call:?} lacks its \")\""))?;
    let words = inside.split(',').map(str::trim).filter(|word| !word.is_empty());
    Ok((name.trim(), words.collect()))
}

/// Calls a function of a module with numbers: `add(1, 2)`. Returns its results as text, a trap, or why it cannot be
/// called.
async fn module<T: Send + 'static>(
    instance: &Instance,
    store: &mut Store<T>,
    call: &str,
) -> Result<wasmtime::Result<String>> {
    let (name, words) = split(call)?;
    let function = instance
        .get_func(&mut *store, name)
        .with_context(|| format!("--invoke {call:?}: the module exports no function {name:?}"))?;
    let signature = function.ty(&*store);
    ensure!(
        signature.params().len() == words.len(),
        "--invoke {call:?}: {name} takes {} argument(s), not {}",
        signature.params().len(),
        words.len()
    );
    let parameters =
        signature.params().zip(&words).map(|(kind, word)| value(&kind, word)).collect::<Result<Vec<_>>>()?;
    let mut results = vec![Val::I32(0); signature.results().len()];
    Ok(function.call_async(&mut *store, &parameters, &mut results).await.map(|()| {
        let shown: Vec<String> = results.iter().map(show).collect();
        shown.join(" ")
    }))
}

/// As [`module`], after the constructors of a library have run: `_initialize`, if it exports that.
pub(crate) async fn initialized<T: Send + 'static>(
    instance: &Instance,
    store: &mut Store<T>,
    call: &str,
) -> Result<wasmtime::Result<String>> {
    if let Ok(initialize) = instance.get_typed_func::<(), ()>(&mut *store, "_initialize")
        && let Err(trap) = initialize.call_async(&mut *store, ()).await
    {
        return Ok(Err(trap));
    }
    module(instance, store, call).await
}

fn value(kind: &ValType, word: &str) -> Result<Val> {
    let bad = || anyhow!("--invoke: {word:?} is no {kind}");
    Ok(match kind {
        // Written with a sign or as the bits.
        ValType::I32 => {
            Val::I32(word.parse::<i32>().or_else(|_| word.parse::<u32>().map(|bits| bits as i32)).map_err(|_| bad())?)
        }
        ValType::I64 => {
            Val::I64(word.parse::<i64>().or_else(|_| word.parse::<u64>().map(|bits| bits as i64)).map_err(|_| bad())?)
        }
        ValType::F32 => Val::F32(word.parse::<f32>().map_err(|_| bad())?.to_bits()),
        ValType::F64 => Val::F64(word.parse::<f64>().map_err(|_| bad())?.to_bits()),
        _ => bail!("--invoke: a value of type {kind} cannot be written as text"),
    })
}

fn show(value: &Val) -> String {
    match value {
        Val::I32(n) => n.to_string(),
        Val::I64(n) => n.to_string(),
        Val::F32(bits) => f32::from_bits(*bits).to_string(),
        Val::F64(bits) => f64::from_bits(*bits).to_string(),
        other => format!("{other:?}"),
    }
}

/// Calls a function of a component with values as WAVE writes them: `greet("x", [1, 2])`.
pub(crate) async fn component(
    component: &Component,
    instance: &component::Instance,
    store: &mut Store<Host>,
    call: &str,
) -> Result<wasmtime::Result<String>> {
    // A name alone is a call without arguments.
    let whole = if call.contains('(') { call.to_owned() } else { format!("{call}()") };
    let parsed = UntypedFuncCall::parse(&whole).map_err(|e| anyhow!("--invoke {call:?}: {e}"))?;
    let name = parsed.name().to_owned();
    let (index, signature) = find(component, store, &name)
        .with_context(|| format!("--invoke {call:?}: the component exports no function {name:?}"))?;
    let kinds: Vec<_> = WasmFunc::params(&signature).collect();
    let parameters = parsed.to_wasm_params::<component::Val>(&kinds).map_err(|e| anyhow!("--invoke {call:?}: {e}"))?;
    let function = instance.get_func(&mut *store, index).context("the function that was just found is gone")?;
    let mut results = vec![component::Val::Bool(false); signature.results().len()];
    let done = store
        .run_concurrent(async |store| function.call_concurrent(store, &parameters, &mut results).await)
        .await
        .and_then(|result| result);
    Ok(done.map(|()| DisplayFuncResults(&results).to_string()))
}

/// A function of the component itself, or of one of the interfaces that it exports.
fn find(
    component: &Component,
    store: &Store<Host>,
    name: &str,
) -> Option<(component::ComponentExportIndex, types::ComponentFunc)> {
    use types::ComponentItem::{ComponentFunc, ComponentInstance};
    if let Some((ComponentFunc(function), index)) = component.get_export(None, name) {
        return Some((index, function));
    }
    let of_component = component.component_type();
    of_component.exports(store.engine()).find_map(|(interface, item)| {
        let ComponentInstance(_) = item.ty else { return None };
        let (_, outer) = component.get_export(None, interface)?;
        match component.get_export(Some(&outer), name)? {
            (ComponentFunc(function), index) => Some((index, function)),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_split_into_name_and_words() {
        assert_eq!(split("f").unwrap(), ("f", vec![]));
        assert_eq!(split("f( 1, -2 )").unwrap(), ("f", vec!["1", "-2"]));
        assert_eq!(split("f()").unwrap(), ("f", vec![]));
        assert!(split("f(1").is_err());
    }

    #[test]
    fn numbers_may_have_a_sign_or_be_bits() {
        assert!(matches!(value(&ValType::I32, "-1").unwrap(), Val::I32(-1)));
        assert!(matches!(value(&ValType::I32, "4294967295").unwrap(), Val::I32(-1)));
        assert!(value(&ValType::I32, "4294967296").is_err());
        assert!(value(&ValType::F64, "x").is_err());
    }
}
