//! Kinds of workload: a native program, or a WASM module or component, for which a program that runs it and its compiled
//! artifact are found.
//!
//! The engine is not in this library: the artifact is made by a short-lived `runx-wasm-compiler` without privileges, and
//! executed inside the container by the runner, or by the host where it is a component. What is here is the [`cache`]
//! between them.

pub mod cache;
mod compiler_group;
pub mod counters;
pub mod limits;
pub mod provided;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::sys::{self, mount};
use cache::{Cache, Form};
use limits::Limits;
use provided::Provided;

/// The first bytes of every binary module and component.
pub const MAGIC: &[u8] = b"\0asm";

/// The file name of what runs core modules in containers.
pub const RUNNER: &str = "runx-wasm-runner";

/// The file name of what runs components, and modules without a container.
pub const HOST: &str = "runx-wasm-host";

/// The compiler's file name.
pub const COMPILER: &str = "runx-wasm-compiler";

/// The largest module that is accepted, in bytes.
const MODULE_LIMIT: u64 = 512 << 20;

/// A process with less address space than this many bytes gets a module that was compiled to reserve
/// little of it.
pub const RESERVED_ADDRESS_SPACE: u64 = 16 << 30;

/// Whether a path is named like a module: `.wasm`, or `.wat` for the text format.
pub fn has_module_name(path: &Path) -> bool {
    matches!(path.extension().and_then(|extension| extension.to_str()), Some("wasm" | "wat"))
}

/// What a WASM file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A core module, for WASI preview 1.
    Module,
    /// A component, for WASI 0.2 and 0.3.
    Component,
}

impl Kind {
    /// What a file holds, by its beginning. What is neither is taken for a module, and the compiler says what is wrong
    /// with it.
    ///
    /// # Errors
    /// Those of reading.
    pub fn of(file: &File) -> io::Result<Self> {
        // Room for the comment that a text may begin with.
        let mut beginning = vec![0; 64 << 10];
        let mut length = 0;
        while length < beginning.len() {
            match file.read_at(&mut beginning[length..], length as u64)? {
                0 => break,
                n => length += n,
            }
        }
        Ok(Self::of_bytes(&beginning[..length]))
    }

    /// After the magic number come a version and a *layer*, two bytes each: 0 for a core module, 1 for a component
    /// (Component Model, Binary.md). A text begins with the word.
    fn of_bytes(beginning: &[u8]) -> Self {
        let component = match beginning.strip_prefix(MAGIC) {
            Some(rest) => rest.get(2..4) == Some(&[1, 0]),
            None => first_word(beginning) == Some(b"component".as_slice()),
        };
        if component { Self::Component } else { Self::Module }
    }
}

/// The word after the first parenthesis of a text, past comments: `;;` to the end of a line, and `(; ;)`, which nest.
fn first_word(text: &[u8]) -> Option<&[u8]> {
    let mut rest = text.trim_ascii_start();
    loop {
        if rest.starts_with(b";;") {
            let end = rest.iter().position(|byte| *byte == b'\n')?;
            rest = rest[end..].trim_ascii_start();
        } else if rest.starts_with(b"(;") {
            let mut depth = 0;
            let mut at = 0;
            loop {
                match rest.get(at..at + 2)? {
                    b"(;" => (depth, at) = (depth + 1, at + 2),
                    b";)" => (depth, at) = (depth - 1, at + 2),
                    _ => at += 1,
                }
                if depth == 0 {
                    break;
                }
            }
            rest = rest[at..].trim_ascii_start();
        } else {
            let word = rest.strip_prefix(b"(")?.trim_ascii_start();
            let end = word.iter().position(|byte| !byte.is_ascii_alphanumeric()).unwrap_or(word.len());
            return Some(&word[..end]);
        }
    }
}

/// Where a module is.
#[derive(Clone, Copy)]
pub enum Module<'a> {
    /// In a file.
    File(&'a File),
    /// Elsewhere.
    Provided(&'a dyn Provided),
}

/// Where the parts for running modules are.
#[derive(Clone, Debug)]
pub struct WasmConfig {
    /// What runs core modules in containers.
    pub runner: PathBuf,
    /// What runs components, and modules without a container.
    pub host: PathBuf,
    /// The compiler.
    pub compiler: PathBuf,
    /// The cache, for root only.
    pub cache: PathBuf,
}

impl WasmConfig {
    /// The programs beside the one at `executable`, and the node's cache.
    pub fn beside(executable: &Path) -> Self {
        let directory = executable.parent().unwrap_or(Path::new("/"));
        Self {
            runner: directory.join(RUNNER),
            host: directory.join(HOST),
            compiler: directory.join(COMPILER),
            cache: PathBuf::from("/var/lib/runx/wasm"),
        }
    }

    /// What runs `module` in a container, and its compiled artifact, which is compiled if the cache lacks it: both on
    /// mounts of their own that cannot be written. Returns what that program is told besides, too.
    ///
    /// # Errors
    /// [`Error::Wasm`] with what is wrong with the module, and system errors.
    pub fn prepare(&self, name: &str, module: Module<'_>, limits: &Limits) -> Result<(OwnedFd, OwnedFd, String)> {
        let compact = limits.address_space.is_some_and(|limit| limit < RESERVED_ADDRESS_SPACE);
        let kind = match module {
            Module::File(file) => Kind::of(file),
            Module::Provided(module) => module.beginning().map(|beginning| Kind::of_bytes(&beginning)),
        };
        let kind = kind.with_context(|| format!("read module {name}"))?;
        // The small one only begins where a command begins, and has the machine's own code only.
        let path =
            if kind == Kind::Component || limits.invoke.is_some() || limits.pulley { &self.host } else { &self.runner };
        let program = open_program(name, path)?;
        let artifact = self.artifact(
            name,
            module,
            &program,
            path,
            Form { compact, fuel: limits.fuel.is_some(), pulley: limits.pulley },
        )?;
        let program = mount::read_only_clone(program.as_fd()).on("clone the program", path)?;
        let artifact = mount::read_only_clone(artifact.as_fd())
            .and_then(|tree| sys::open(format!("/proc/self/fd/{}", tree.as_raw_fd()), libc::O_RDONLY))
            .with_context(|| format!("clone the artifact of module {name}"))?;
        Ok((program, artifact, limits.words(kind)))
    }

    /// What runs `module` without a container, and its compiled artifact.
    ///
    /// # Errors
    /// As for [`Self::prepare`].
    pub fn prepare_for_host(&self, name: &str, module: &File, form: Form) -> Result<(PathBuf, File)> {
        let program = open_program(name, &self.host)?;
        let artifact = self.artifact(name, Module::File(module), &program, &self.host, form)?;
        Ok((self.host.clone(), artifact))
    }

    fn artifact(&self, name: &str, module: Module<'_>, program: &File, path: &Path, form: Form) -> Result<File> {
        let wasm = |reason: String| Error::Wasm { module: name.to_owned(), reason };
        let cache = Cache::new(&self.cache);
        let engine = cache.digest(program).on("read", path)?;
        // Before all of it is read.
        let check = |file: &File| {
            let size = file.metadata().with_context(|| format!("look at module {name}"))?.len();
            match size {
                0 => Err(wasm("the file is empty".into())),
                size if size > MODULE_LIMIT => {
                    Err(wasm(format!("it has {size} bytes, more than the limit of {MODULE_LIMIT}")))
                }
                _ => Ok(()),
            }
        };
        let read;
        let module = match module {
            Module::Provided(module) => {
                let key = module.digest();
                // It becomes the name of a file.
                if key.len() != 64 || !key.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)) {
                    return Err(wasm(format!("its digest {key:?} is not SHA-256")));
                }
                if let Some(artifact) = cache.find(key, &engine, form) {
                    return Ok(artifact);
                }
                read = module.read().with_context(|| format!("read module {name}"))?;
                check(&read)?;
                &read
            }
            Module::File(file) => {
                check(file)?;
                let key = cache.digest(file).with_context(|| format!("read module {name}"))?;
                if let Some(artifact) = cache.find(&key, &engine, form) {
                    return Ok(artifact);
                }
                file
            }
        };
        cache.compile(name, module, &engine, form, &self.compiler)
    }
}

/// A program of ours, to be executed in a container by its descriptor: alone on a mount that cannot be written.
///
/// # Errors
/// When it is missing.
pub fn clone_program(path: &Path) -> Result<OwnedFd> {
    let file = File::open(path).on("open", path)?;
    mount::read_only_clone(file.as_fd()).on("clone", path)
}

fn open_program(name: &str, path: &Path) -> Result<File> {
    File::open(path).map_err(|e| Error::Wasm {
        module: name.to_owned(),
        reason: format!("open the program that runs it, {}: {e}", path.display()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn names_tell_modules() {
        for name in ["/app.wasm", "hello.wat"] {
            assert!(has_module_name(Path::new(name)), "{name}");
        }
        for name in ["/bin/sh", "wasm", "/x.wasm/run"] {
            assert!(!has_module_name(Path::new(name)), "{name}");
        }
    }

    #[test]
    fn modules_are_told_from_components() {
        for module in [&b"\0asm\x01\0\0\0"[..], b"(module)", b"", b"x", b";; (component)\n(module)", b"(; (component"] {
            assert_eq!(Kind::of_bytes(module), Kind::Module, "{module:?}");
        }
        for component in
            [&b"\0asm\x0d\0\x01\0"[..], b" (component $x)", b";; a\n(; b (; c ;) ;) ( component)", b"(component"]
        {
            assert_eq!(Kind::of_bytes(component), Kind::Component, "{component:?}");
        }
    }

    #[test]
    fn a_missing_runner_is_named() {
        let base = std::env::temp_dir().join(format!("runx-workload-runner-{}", std::process::id()));
        fs::create_dir_all(&base).unwrap();
        let config = WasmConfig { cache: base.join("cache"), ..WasmConfig::beside(&base.join("runx")) };
        let path = base.join("m.wasm");
        for (content, program) in [(&b"\0asm\x01\0\0\0"[..], RUNNER), (b"(component)", HOST)] {
            fs::write(&path, content).unwrap();
            let error =
                config.prepare("/m.wasm", Module::File(&File::open(&path).unwrap()), &Limits::default()).unwrap_err();
            let error = error.to_string();
            assert!(error.contains("/m.wasm") && error.contains(program), "{error}");
        }
        fs::remove_dir_all(base).unwrap();
    }
}
