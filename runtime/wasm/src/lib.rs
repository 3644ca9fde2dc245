//! WebAssembly for runx: one engine configuration, the ahead-of-time compiler, and the runner.
//!
//! A module is compiled once by [`compile::compile`] (cargo feature `compiler`) into an *artifact*,
//! native code in an ELF file that only an engine with the same settings accepts. The program
//! `runx-wasm-runner` maps an artifact and runs it under WASI preview 1; it is the last step of a
//! WASM container, executed inside the container's namespaces, under its user and its seccomp
//! profile, and it has no compiler.
//!
//! Cargo unifies features over all packages of one build, so the runner is always built by itself:
//!
//! ```text
//! cargo build --release -p runx-wasm
//! ```
//!
//! In a build of the whole workspace, a package that asks for `compiler` would put Cranelift into
//! the runner too. `tests/lean.rs` looks for it.
//!
//! # The runner's contract
//!
//! ```text
//! runx-wasm-runner ARTIFACT_FD ARG0 ARG1...
//! ```
//!
//! `ARTIFACT_FD` is an open, readable descriptor of the artifact, 3 or above, on a file system that
//! is not mounted `noexec`; `ARG0...` are the module's arguments, the first of them the module as
//! the user named it. Environment, working directory and standard streams are the process's own.
//! `/proc`, `/tmp` and a writable root file system are not needed.
//!
//! | exit code | meaning |
//! |---|---|
//! | what the module said | `proc_exit(n)` gives `n` modulo 256, a return from `_start` gives 0 |
//! | 128 + n | ended by signal n |
//! | 134 | the module trapped; what and where is on stderr (128 + SIGABRT, as for a native abort) |
//! | 126 | the module could not be started; why is on stderr |
//!
//! What is on stderr then is also left in `/dev/termination-log`, if the kubelet has mounted a file there.
//!
//! # Who may write the artifact
//!
//! An artifact is native code: whoever can change it owns every container that runs it. The runner
//! must keep its descriptor and its mapping, and a process with the right capabilities in the same
//! container can reach both through /proc. So the descriptor has to come from a mount that is
//! read-only (a detached clone will do), and the file from a compiler that the caller trusts.

#[cfg(feature = "compiler")]
pub mod compile;
pub mod engine;
mod error;
mod guard;
pub mod launch;
pub mod run;
pub mod signals;
pub mod stdio;
pub mod termination;
mod wasi;

pub use error::Error;
