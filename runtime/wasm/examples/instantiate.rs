//! How long an instance of a compiled module takes to be made and dropped, without running anything: one line of JSON.
//!
//! ```text
//! runx wasm compile < hello.wasm > hello.cwasm && instantiate hello.cwasm 10000
//! ```

use std::fs::File;
use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

use runx_wasm::engine::{self, Kind, Layout, Settings};
use runx_wasm::run;
use wasmtime::{Linker, Module, Store};
use wasmtime_wasi::WasiCtxBuilder;
use wasmtime_wasi::p1::WasiP1Ctx;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (Some(path), Some(Ok(rounds))) = (arguments.next(), arguments.next().map(|text| text.parse())) else {
        let _ = writeln!(std::io::stderr(), "usage: instantiate ARTIFACT ROUNDS");
        return ExitCode::from(2);
    };
    match measure(&path, rounds) {
        Ok(mut microseconds) if !microseconds.is_empty() => {
            microseconds.sort_by(f64::total_cmp);
            let (median, last) = (microseconds[microseconds.len() / 2], microseconds[microseconds.len() * 99 / 100]);
            let _ = writeln!(
                std::io::stdout(),
                "{{\"median_us\": {median:.2}, \"p99_us\": {last:.2}, \"min_us\": {:.2}}}",
                microseconds[0]
            );
            ExitCode::SUCCESS
        }
        Ok(_) => ExitCode::from(2),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{path}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(path: &str, rounds: usize) -> wasmtime::Result<Vec<f64>> {
    let engine = engine::engine(Settings::new(Kind::Module, Layout::of_this_process()))
        .map_err(|error| wasmtime::Error::msg(error.to_string()))?;
    // SAFETY: whoever measures has compiled it, and nobody changes it meanwhile.
    let module = unsafe { Module::deserialize_open_file(&engine, File::open(path)?)? };
    let mut linker: Linker<WasiP1Ctx> = Linker::new(&engine);
    run::add_to_linker(&mut linker, |context| context)?;
    let ready = linker.instantiate_pre(&module)?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    runtime.block_on(async {
        let mut out = Vec::with_capacity(rounds);
        for _ in 0..rounds {
            let begun = Instant::now();
            let mut store = Store::new(&engine, WasiCtxBuilder::new().build_p1());
            ready.instantiate_async(&mut store).await?;
            drop(store);
            out.push(begun.elapsed().as_secs_f64() * 1e6);
        }
        Ok(out)
    })
}
