//! WebAssembly for runx: one engine configuration and the ahead-of-time compiler.

#[cfg(feature = "compiler")]
pub mod compile;
pub mod engine;
mod error;

pub use error::Error;
