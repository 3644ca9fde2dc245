//! From a module to an artifact. Only with the cargo feature `compiler`.

use crate::Error;
use crate::engine::{self, Backend, Kind, Layout, Settings};
use crate::error::chain;
use std::borrow::Cow;

/// The first bytes of the binary format, of modules and components alike.
const MAGIC: &[u8] = b"\0asm";

/// How a module is compiled.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// It must suit the process that will run it, see [`Layout::for_address_space`].
    pub layout: Layout,
    /// Count what is executed.
    pub fuel: bool,
    /// For whom.
    pub backend: Backend,
}

impl From<Layout> for Form {
    fn from(layout: Layout) -> Form {
        Form { layout, fuel: false, backend: Backend::Native }
    }
}

/// Compiles a module or a component, in the binary or the text format, for this machine's CPU.
///
/// `name` is for messages. The result is the bytes of an artifact, which the runner of the same
/// build accepts on the same machine. The module is somebody else's program: time and memory can be
/// large, so run this in a process with limits.
///
/// # Errors
///
/// [`Error::Empty`], [`Error::NotWasm`], [`Error::Component`], [`Error::Invalid`], each naming the
/// module, or [`Error::Engine`].
pub fn compile(bytes: &[u8], name: &str, form: Form) -> Result<Vec<u8>, Error> {
    let named = || name.to_owned();
    if bytes.is_empty() {
        return Err(Error::Empty { name: named() });
    }
    let binary: Cow<'_, [u8]> = if bytes.starts_with(MAGIC) {
        Cow::Borrowed(bytes)
    } else {
        let not_wasm = |reason| Error::NotWasm { name: named(), reason };
        wat::parse_bytes(bytes).map_err(|e| not_wasm(e.to_string()))?
    };
    // What is neither is a module of a version that the engine will name.
    let kind = Kind::of(&binary).unwrap_or(Kind::Module);
    if kind == Kind::Component && cfg!(not(feature = "components")) {
        return Err(Error::Component { name: named() });
    }
    let Form { layout, fuel, backend } = form;
    let engine = engine::engine(Settings { kind, layout, fuel, backend })?;
    let compiled = match kind {
        Kind::Module => engine.precompile_module(&binary),
        Kind::Component => engine.precompile_component(&binary),
    };
    compiled.map_err(|e| Error::Invalid { name: named(), kind, reason: chain(&e) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(bytes: &[u8]) -> Error {
        compile(bytes, "/app/hello.wasm", Layout::Reserved.into()).expect_err("an error")
    }

    #[test]
    fn text_and_binary_give_the_same_artifact() {
        let text = "(module (func (export \"_start\")))";
        let binary = wat::parse_str(text).expect("binary");
        let artifact = compile(&binary, "a", Layout::Reserved.into()).expect("an artifact");
        assert!(artifact.starts_with(b"\x7fELF"));
        assert_eq!(artifact, compile(text.as_bytes(), "b", Layout::Reserved.into()).expect("an artifact"));
    }

    #[test]
    fn an_empty_file_is_named() {
        let error = failure(b"");
        assert!(matches!(error, Error::Empty { .. }));
        assert_eq!(error.to_string(), "/app/hello.wasm: the file is empty");
    }

    #[test]
    fn a_native_program_is_not_wasm() {
        let error = failure(b"\x7fELF\x02\x01\x01\0\xff\xfe");
        assert!(matches!(error, Error::NotWasm { .. }), "{error:?}");
        assert!(error.to_string().starts_with("/app/hello.wasm: not a WebAssembly module: "));
    }

    #[test]
    fn bad_text_is_reported_with_line_and_column() {
        let error = failure(b"(module\n  (func (export \"_start\") (i32.frob)))\n");
        assert!(matches!(error, Error::NotWasm { .. }), "{error:?}");
        assert!(error.to_string().contains(":2:28"), "{error}");
    }

    #[test]
    fn components_are_recognised_in_both_formats() {
        let binary = wat::parse_str("(component)").expect("a binary");
        for component in [binary.as_slice(), b"(component)"] {
            let compiled = compile(component, "/app/hello.wasm", Layout::Reserved.into());
            // Only with what components need of the engine can they be compiled.
            assert_eq!(compiled.is_ok(), cfg!(feature = "components"));
            assert!(compiled.is_ok() || matches!(compiled, Err(Error::Component { .. })));
        }
    }

    #[test]
    fn the_validator_is_quoted() {
        let error = failure(b"(module (func (result i32)))");
        assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
        assert!(error.to_string().contains("type mismatch"), "{error}");
        let error = failure(b"\0asm\x01\0\0\0\xff");
        assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
        assert!(error.to_string().contains("offset"), "{error}");
    }

    #[test]
    fn a_truncated_header_is_invalid() {
        assert!(matches!(failure(b"\0asm"), Error::Invalid { .. }));
    }
}
