//! Whether the runner carries the compiler: only in a build that asked for it. The part with
//! `compiler` shows that the search can find something.

/// Names that the compiler's code brings into any build of it: symbols, or paths in panic messages.
const TRACES: [&[u8]; 2] = [b"cranelift_codegen", b"cranelift-codegen"];

#[test]
fn the_runner_has_a_compiler_only_if_the_build_asked_for_it() {
    let runner = std::fs::read(env!("CARGO_BIN_EXE_runx-wasm-runner")).expect("the runner");
    let found = TRACES.iter().any(|trace| runner.windows(trace.len()).any(|bytes| bytes == *trace));
    assert_eq!(found, cfg!(feature = "compiler"));
}
