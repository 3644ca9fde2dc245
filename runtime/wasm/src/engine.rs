//! The engine's configuration: the one place where compiler and runner agree.
//!
//! An artifact is bound to the settings that it was compiled with; the engine compares most of them
//! when it loads one. A setting is therefore made here or nowhere, also where the library's default
//! would do: a default may depend on cargo features that another package of the build turned on, or
//! on the environment, which inside a container is the user's.

use crate::Error;
use crate::error::chain;
use wasmtime::{Config, Engine, WasmBacktraceDetails};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// How linear memories lie in the address space. It is compiled into the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Each memory reserves 4 GiB of address space and guard pages, so that code needs no bounds
    /// checks. Reserved is not used: it is `PROT_NONE`, which neither a cgroup nor strict
    /// overcommit counts. Only `RLIMIT_AS` does.
    Reserved,
    /// A memory takes little more address space than it has bytes; code checks bounds, and a memory
    /// that grows may be copied. For processes under an address space limit.
    Compact,
}

impl Layout {
    /// Every layout, the usual one first.
    pub const ALL: [Layout; 2] = [Layout::Reserved, Layout::Compact];

    /// Below this address space limit (bytes) modules get [`Layout::Compact`]: room for three
    /// memories, the program and its stacks.
    pub const LEAST_ADDRESS_SPACE: u64 = 16 * GIB;

    /// The layout for a process whose soft `RLIMIT_AS` is `limit` bytes, `None` meaning no limit.
    pub fn for_address_space(limit: Option<u64>) -> Layout {
        match limit {
            Some(bytes) if bytes < Layout::LEAST_ADDRESS_SPACE => Layout::Compact,
            _ => Layout::Reserved,
        }
    }

    /// The layout for the calling process, by its own `RLIMIT_AS`.
    pub fn of_this_process() -> Layout {
        let mut limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: `limit` is a valid rlimit for the call to fill; on failure it stays as it is.
        unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut limit) };
        Layout::for_address_space((limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur))
    }
}

/// What an artifact holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A core module, for WASI preview 1.
    Module,
    /// A component, for WASI 0.2 and 0.3.
    Component,
}

impl Kind {
    /// What a binary is, by its first bytes; `None` for neither. After the magic number come a version and a *layer*, two
    /// bytes each: 0 for a core module, 1 for a component (Component Model, Binary.md).
    pub fn of(binary: &[u8]) -> Option<Kind> {
        match binary.strip_prefix(b"\0asm")?.get(2..4)? {
            [0, 0] => Some(Kind::Module),
            [1, 0] => Some(Kind::Component),
            _ => None,
        }
    }
}

/// How code is executed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Backend {
    /// As the machine's own code, by Cranelift.
    #[default]
    Native,
    /// As portable code of the interpreter Pulley, for where no memory may be executable that was not a program's. Some ten
    /// times slower.
    Pulley,
}

/// Everything that an artifact is bound to, besides the library and the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Settings {
    /// What it holds.
    pub kind: Kind,
    /// How its memories lie.
    pub layout: Layout,
    /// Whether it counts what it executes, so that it can be given an end.
    pub fuel: bool,
    /// How its code is executed.
    pub backend: Backend,
}

impl Settings {
    /// The machine's own code, without fuel.
    pub fn new(kind: Kind, layout: Layout) -> Settings {
        Settings { kind, layout, fuel: false, backend: Backend::Native }
    }
}

/// Native stack for WebAssembly frames: what a native program's main thread has by default, since
/// interpreters compiled to WebAssembly recurse as deep. Touched pages only are counted.
const WASM_STACK: usize = 8 << 20;

/// On top of [`WASM_STACK`], for the host functions that run on the same stack.
const HOST_STACK: usize = 1 << 20;

/// The configuration, for either side. A process that runs many instances may add how they are allocated.
pub fn config(settings: Settings) -> Config {
    let mut config = Config::new();
    match settings.layout {
        Layout::Reserved => {
            // All that a 32-bit index can reach, so an access beyond the end hits unmapped pages.
            config.memory_reservation(4 * GIB);
            // For the static offset of an access: larger ones are checked in code.
            config.memory_guard_size(32 * MIB);
            // A second fence, against an engine bug that computes a negative offset.
            config.guard_before_linear_memory(true);
        }
        Layout::Compact => {
            // Nothing ahead of need...
            config.memory_reservation(0);
            // ...but a growing memory is not copied for every page.
            config.memory_reservation_for_growth(16 * MIB);
            // One granule: enough to leave small static offsets unchecked.
            config.memory_guard_size(64 * KIB);
            config.guard_before_linear_memory(false);
        }
    }
    // A memory of more than 4 GiB (memory64) outgrows its reservation.
    config.memory_may_move(true);
    match settings.backend {
        // Out-of-bounds accesses, divisions and stack overflows cost nothing until they happen.
        Backend::Native => config.signals_based_traps(true),
        Backend::Pulley => interpreter(&mut config),
    };
    // Data segments are mapped from the artifact: no copying at start, pages shared by instances.
    config.memory_init_cow(true);
    // A table's elements are made when they are called first.
    config.table_lazy_init(true);
    config.max_wasm_stack(WASM_STACK);
    config.async_stack_size(WASM_STACK + HOST_STACK);
    // Traps report function names and offsets (below); DWARF would need a parser in the runner.
    // The default would ask the environment.
    config.wasm_backtrace_details(WasmBacktraceDetails::Disable);
    // The table from native addresses to offsets in the module, for those reports.
    config.generate_address_map(true);
    // For native unwinders, which nothing here uses, at the price of registering them at start.
    config.native_unwind_info(false);
    config.debug_info(false);
    // It slows the code, so only who asks for an end by it pays.
    config.consume_fuel(settings.fuel);
    let component = settings.kind == Kind::Component;
    // A server has many instances, none of which may keep a thread for itself. A process with one module ends with it, so
    // that its end by time comes from outside of the code.
    config.epoch_interruption(component);
    // Belongs to components with async functions, those of WASI 0.3.
    config.concurrency_support(component);
    #[cfg(feature = "components")]
    config.wasm_component_model_async(component);
    // Same results on every machine are not promised; speed is.
    config.relaxed_simd_deterministic(false);
    #[cfg(feature = "compiler")]
    compiler_config(&mut config);
    config
}

/// Without the interpreter, in the small runner, the library refuses what was made for it.
fn interpreter(config: &mut Config) -> &mut Config {
    // The interpreter checks by itself: there is no native code whose faults could be caught.
    config.signals_based_traps(false);
    #[cfg(feature = "components")]
    if let Err(e) = config.target("pulley64") {
        // It is in every build that has this feature.
        panic!("the interpreter is missing: {e}");
    }
    config
}

#[cfg(feature = "compiler")]
fn compiler_config(config: &mut Config) {
    // A module runs many times for each compilation.
    config.strategy(wasmtime::Strategy::Cranelift);
    config.cranelift_opt_level(wasmtime::OptLevel::Speed);
    // Compilation is sequential, since the library's feature for threads is not in this workspace:
    // a compiling process has a CPU limit of its own, which threads would only use up faster.
    // The verifier guards against engine bugs and doubles the time; releases are tested upstream.
    config.cranelift_debug_verifier(false);
}

/// An engine for `settings`. Cheap without the compiler, some milliseconds with it.
///
/// # Errors
///
/// [`Error::Engine`] where the library refuses the configuration on this machine.
pub fn engine(settings: Settings) -> Result<Engine, Error> {
    Engine::new(&config(settings)).map_err(|e| Error::Engine { reason: chain(&e) })
}

/// A short text that differs wherever artifacts of `settings` would not be interchangeable: library
/// version, target and CPU features, settings. For diagnostics; it is stable only within one build.
///
/// # Errors
///
/// As [`engine`].
#[cfg(feature = "compiler")]
pub fn compatibility(settings: Settings) -> Result<String, Error> {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    engine(settings)?.precompile_compatibility_hash().hash(&mut hasher);
    Ok(format!("{:016x}", hasher.finish()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_address_space_gets_the_compact_layout() {
        assert_eq!(Layout::for_address_space(None), Layout::Reserved);
        assert_eq!(Layout::for_address_space(Some(1 << 30)), Layout::Compact);
        assert_eq!(Layout::for_address_space(Some(16 << 30)), Layout::Reserved);
    }

    #[test]
    fn both_layouts_make_an_engine() {
        for layout in Layout::ALL {
            engine(Settings::new(Kind::Module, layout)).expect("an engine");
        }
    }

    #[test]
    fn modules_are_told_from_components() {
        assert_eq!(Kind::of(b"\0asm\x01\0\0\0"), Some(Kind::Module));
        assert_eq!(Kind::of(b"\0asm\x0d\0\x01\0"), Some(Kind::Component));
        assert_eq!(Kind::of(b"\0asm\x01\0"), None);
        assert_eq!(Kind::of(b"(module)"), None);
    }

    #[cfg(feature = "compiler")]
    #[test]
    fn compatibility_tells_layouts_apart_and_is_repeatable() {
        let of = |layout| compatibility(Settings::new(Kind::Module, layout)).expect("a hash");
        assert_ne!(of(Layout::Reserved), of(Layout::Compact));
        assert_eq!(of(Layout::Reserved), of(Layout::Reserved));
    }
}
