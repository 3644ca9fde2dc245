//! Modules in the text format, components made of them, and their places in the cache.

use std::fs;
use std::path::PathBuf;

use sha2::{Digest, Sha256};

/// A command that prints its arguments, its environment and the file `etc/marker`, each followed by a
/// newline, copies standard input if it has arguments, and exits with their number (its name counts). `nonce` makes it unlike
/// any other module, so that no cache knows it.
pub fn show_everything(nonce: &str) -> String {
    format!(
        r#"(module
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $args_sizes_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_get" (func $args_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_sizes_get" (func $environ_sizes_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_get" (func $environ_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open"
    (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (memory (export "memory") 4)
  (data (i32.const 64) "etc/marker")
  (data (i32.const 80) "\n")
  (data (i32.const 90000) "{nonce}")
  (func $write (param $at i32) (param $length i32)
    (i32.store (i32.const 16) (local.get $at))
    (i32.store (i32.const 20) (local.get $length))
    (drop (call $fd_write (i32.const 1) (i32.const 16) (i32.const 1) (i32.const 24))))
  (func $copy (param $fd i32)
    (loop $more
      (i32.store (i32.const 16) (i32.const 40000))
      (i32.store (i32.const 20) (i32.const 4096))
      (if (i32.eqz (call $fd_read (local.get $fd) (i32.const 16) (i32.const 1) (i32.const 24)))
        (then (if (i32.load (i32.const 24))
          (then (call $write (i32.const 40000) (i32.load (i32.const 24))) (br $more)))))))
  (func (export "_start") (local $count i32)
    (drop (call $args_sizes_get (i32.const 0) (i32.const 4)))
    (drop (call $args_get (i32.const 1024) (i32.const 4096)))
    (local.set $count (i32.load (i32.const 0)))
    (call $write (i32.const 4096) (i32.load (i32.const 4)))
    (call $write (i32.const 80) (i32.const 1))
    (drop (call $environ_sizes_get (i32.const 0) (i32.const 4)))
    (drop (call $environ_get (i32.const 1024) (i32.const 4096)))
    (call $write (i32.const 4096) (i32.load (i32.const 4)))
    (call $write (i32.const 80) (i32.const 1))
    (if (i32.eqz (call $path_open (i32.const 3) (i32.const 0) (i32.const 64) (i32.const 10) (i32.const 0)
          (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 28)))
      (then (call $copy (i32.load (i32.const 28)))))
    (if (i32.gt_u (local.get $count) (i32.const 1)) (then (call $copy (i32.const 0))))
    (call $proc_exit (local.get $count))))
"#
    )
}

/// The artifacts that the node's cache holds of a module.
pub fn artifacts(module: &[u8]) -> Vec<PathBuf> {
    let digest = format!("{:x}", Sha256::digest(module));
    let mut found = Vec::new();
    for engine in fs::read_dir("/var/lib/runx/wasm").into_iter().flatten().flatten() {
        for entry in fs::read_dir(engine.path()).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(&digest) && name.ends_with(".cwasm") {
                found.push(entry.path());
            }
        }
    }
    found
}

/// Removes a module's artifacts when it goes.
#[derive(Debug)]
pub struct Forget(pub Vec<u8>);

impl Drop for Forget {
    fn drop(&mut self) {
        for artifact in artifacts(&self.0) {
            let _ = fs::remove_file(artifact.with_extension("sum"));
            let _ = fs::remove_file(artifact);
        }
    }
}

/// A component that answers every HTTP request with the status 418.
pub const TEAPOT: &str = include_str!("guest/teapot.wat");

/// A component that connects to port 7000 of 127.0.0.1 and prints the first that it is told. `nonce` makes it unlike any
/// other one.
///
/// # Panics
/// When it cannot be made.
pub fn connects(nonce: &str) -> Vec<u8> {
    let text = include_str!("guest/connects.wat")
        .replace("(global $free", &format!("(data (i32.const 1000) \"{nonce}\")(global $free"));
    let mut module = wat::parse_str(text).expect("a module");
    let mut resolve = wit_parser::Resolve::default();
    let package = resolve.push_str("connects.wit", include_str!("guest/connects.wit")).expect("the world");
    let world = resolve.select_world(&[package], None).expect("one world");
    wit_component::embed_component_metadata(&mut module, &resolve, world, wit_component::StringEncoding::UTF8)
        .expect("the world goes into the module");
    encode(&module)
}

/// The command component that a command module is, as `wasm-tools component new` makes it.
///
/// # Panics
/// When the module is none.
pub fn component(module: &str) -> Vec<u8> {
    encode(&wat::parse_str(module).expect("a module"))
}

fn encode(module: &[u8]) -> Vec<u8> {
    use wasi_preview1_component_adapter_provider::{
        WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_COMMAND_ADAPTER,
    };
    wit_component::ComponentEncoder::default()
        .module(module)
        .and_then(|encoder| {
            encoder.adapter(WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_COMMAND_ADAPTER)
        })
        .and_then(|mut encoder| encoder.encode())
        .expect("a component")
}
