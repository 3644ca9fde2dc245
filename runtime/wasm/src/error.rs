//! What can go wrong before a module runs.

use crate::engine::Kind;

/// An error of the compiler or the runner. `name` is always the module as the caller named it, and
/// every message starts with it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file has no bytes.
    #[error("{name}: the file is empty")]
    Empty {
        /// The module.
        name: String,
    },
    /// Neither the binary format's magic number nor text that parses.
    #[error("{name}: not a WebAssembly module: {reason}")]
    NotWasm {
        /// The module.
        name: String,
        /// What the parser of the text format said, with line and column.
        reason: String,
    },
    /// A component (WASI 0.2 and later), where only core modules can be run.
    #[error("{name}: this is a component, and this program is for core modules (WASI preview 1) only")]
    Component {
        /// The module.
        name: String,
    },
    /// The module does not validate, or needs a feature that the engine does not have.
    #[error("{name}: invalid {}: {reason}", noun(*kind))]
    Invalid {
        /// The module.
        name: String,
        /// Whether it is one, or a component.
        kind: Kind,
        /// What the validator said, with the offset in the file.
        reason: String,
    },
    /// The artifact cannot be mapped, or was made for another engine.
    #[error("{name}: cannot load the compiled artifact: {reason}")]
    Artifact {
        /// The module.
        name: String,
        /// The engine's reason.
        reason: String,
    },
    /// An import that nobody provides, or one of another type; or no memory for the instance.
    #[error("{name}: cannot instantiate the module: {reason}")]
    Instantiate {
        /// The module.
        name: String,
        /// The engine's reason, which names the import.
        reason: String,
    },
    /// There is no function `_start` without parameters and results, so nothing to run.
    #[error("{name}: not a WASI command: {reason}")]
    NoStart {
        /// The module.
        name: String,
        /// What is there instead.
        reason: String,
    },
    /// The process cannot be prepared: its directories, its event loop.
    #[error("{name}: {attempt}: {reason}")]
    Setup {
        /// The module.
        name: String,
        /// What was attempted, on what.
        attempt: String,
        /// What the kernel or the library said.
        reason: String,
    },
    /// The engine refuses its own configuration: this machine lacks something.
    #[error("cannot set up the WebAssembly engine: {reason}")]
    Engine {
        /// The engine's reason.
        reason: String,
    },
}

/// The whole chain of causes on one line, without a native backtrace, whatever the environment asks.
pub(crate) fn chain(error: &wasmtime::Error) -> String {
    format!("{error:#}")
}

fn noun(kind: Kind) -> &'static str {
    match kind {
        Kind::Module => "module",
        Kind::Component => "component",
    }
}
