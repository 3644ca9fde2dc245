//! `compile MODULE ARTIFACT`: what a node does once per module, for trying the runner by hand.

use runx_wasm::compile::compile;
use runx_wasm::engine::Layout;
use std::error::Error;
use std::time::Instant;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(module), Some(artifact)) = (args.next(), args.next()) else {
        return Err("usage: compile MODULE ARTIFACT".into());
    };
    let bytes = std::fs::read(&module)?;
    let start = Instant::now();
    let compiled = compile(&bytes, &module, Layout::of_this_process().into())?;
    eprintln!("{module}: {} bytes to {} in {:?}", bytes.len(), compiled.len(), start.elapsed());
    std::fs::write(artifact, compiled)?;
    Ok(())
}
