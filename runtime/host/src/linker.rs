//! What components may import: WASI 0.2 and 0.3, HTTP included.

use anyhow::{Result, anyhow};
use wasmtime::Engine;
use wasmtime::component::Linker;

use crate::context::Host;

/// A linker with all of it. What an import gets depends on what the context allows.
pub(crate) fn linker(engine: &Engine) -> Result<Linker<Host>> {
    let mut linker = Linker::new(engine);
    let add = |linker: &mut Linker<Host>| -> wasmtime::Result<()> {
        wasmtime_wasi::p2::add_to_linker_async(linker)?;
        wasmtime_wasi_http::p2::add_only_http_to_linker_async(linker)?;
        wasmtime_wasi::p3::add_to_linker(linker)?;
        wasmtime_wasi_http::p3::add_to_linker(linker)
    };
    add(&mut linker).map_err(|e| anyhow!("define WASI: {e:#}"))?;
    Ok(linker)
}
