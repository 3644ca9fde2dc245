//! Writes the modules and components that `make bench` measures with into a directory: `first-N.wasm`, each unlike any other,
//! `hello.wasm`, `component.wasm` (the same as a component), `waits.wasm`, and `teapot.wat`, which answers HTTP requests.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use runx_tests::wasm;

/// Prints a line and returns.
fn hello(nonce: &str) -> String {
    format!(
        r#"(module
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 64) "hello\n") (data (i32.const 128) "{nonce}")
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 64)) (i32.store (i32.const 4) (i32.const 6))
    (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))"#
    )
}

/// Sleeps for a day, and holds what 64 KiB of its memory it has touched.
const WAITS: &str = r#"(module
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start")
    ;; A subscription to the monotonic clock, relative.
    (i32.store (i32.const 16) (i32.const 1))
    (i64.store (i32.const 24) (i64.const 86400000000000))
    (drop (call $poll (i32.const 0) (i32.const 128) (i32.const 1) (i32.const 256)))))"#;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let directory = arguments.next();
    let count = arguments.next().and_then(|count| count.to_str()?.parse().ok());
    let (Some(directory), Some(count)): (_, Option<u32>) = (directory, count) else {
        eprintln!("usage: wasm-guests DIRECTORY COUNT");
        return ExitCode::from(2);
    };
    let directory = PathBuf::from(directory);
    // No cache has seen them.
    let nonce = format!("{:?}", std::time::SystemTime::now());
    let mut files = vec![
        ("hello.wasm".to_owned(), wat::parse_str(hello("same")).expect("a module")),
        ("component.wasm".to_owned(), wasm::component(&hello("same"))),
        ("waits.wasm".to_owned(), wat::parse_str(WAITS).expect("a module")),
        ("teapot.wat".to_owned(), wasm::TEAPOT.as_bytes().to_vec()),
    ];
    for number in 0..count {
        let module = hello(&format!("{nonce} {number}"));
        files.push((format!("first-{number}.wasm"), wat::parse_str(&module).expect("a module")));
        files.push((format!("first-component-{number}.wasm"), wasm::component(&module)));
    }
    for (name, content) in files {
        if let Err(e) = fs::write(directory.join(&name), content) {
            eprintln!("write {name}: {e}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
