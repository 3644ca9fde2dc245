//! What a module or component in a container may use beyond what its cgroup says.
//!
//! Its memory is bounded before the cgroup's limit is, so that it fails in its own words and is not killed. Fuel, wall time and
//! another function than its start come from annotations.

use std::collections::HashMap;
use std::fmt::Write;

use oci_spec::runtime::Spec;

use super::Kind;
use crate::error::{Error, Result};

/// What of a container's memory is not for the module's, in bytes: the program that runs it, its tables and stacks.
pub const MARGIN: u64 = 16 << 20;

/// About how many instructions it may execute.
pub const FUEL: &str = "runx.dev/wasm.fuel";

/// How long it may take, such as `500ms`, `10s` or `2m`.
pub const TIMEOUT: &str = "runx.dev/wasm.timeout";

/// The function to call instead of its start, such as `run` or `add(1, 2)`.
pub const INVOKE: &str = "runx.dev/wasm.invoke";

/// Who executes it: `cranelift`, as the machine's own code, or `pulley`, an interpreter, which needs no memory that is
/// executable.
pub const ENGINE: &str = "runx.dev/wasm.engine";

/// The limits of one container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// The limit on its address space in bytes, which decides how it is compiled.
    pub address_space: Option<u64>,
    /// How large a linear memory may become, in bytes.
    pub memory: Option<u64>,
    /// About how many instructions it may execute.
    pub fuel: Option<u64>,
    /// How long it may take, in milliseconds.
    pub timeout: Option<u64>,
    /// The function to call instead of its start.
    pub invoke: Option<String>,
    /// It is interpreted.
    pub pulley: bool,
}

impl Limits {
    /// Those of a configuration.
    ///
    /// # Errors
    /// [`Error::InvalidSpec`] naming an annotation that cannot be read.
    pub fn of(spec: &Spec, address_space: Option<u64>) -> Result<Self> {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let memory = resources.and_then(|resources| resources.memory().as_ref()?.limit());
        let memory = memory.and_then(|limit| u64::try_from(limit).ok()).and_then(|limit| limit.checked_sub(MARGIN));
        let empty = HashMap::new();
        let annotations = spec.annotations().as_ref().unwrap_or(&empty);
        let read = |key: &str, parse: fn(&str) -> Option<u64>, form: &str| {
            let Some(text) = annotations.get(key) else { return Ok(None) };
            parse(text).map(Some).ok_or_else(|| Error::spec(format!("annotation {key}: {text:?} is not {form}")))
        };
        let pulley = match annotations.get(ENGINE).map(String::as_str) {
            None | Some("cranelift") => false,
            Some("pulley") => true,
            Some(other) => {
                return Err(Error::spec(format!("annotation {ENGINE}: {other:?} is neither cranelift nor pulley")));
            }
        };
        Ok(Self {
            pulley,
            address_space,
            memory: memory.filter(|memory| *memory > 0),
            fuel: read(FUEL, |text| text.parse().ok(), "a number of instructions")?,
            timeout: read(TIMEOUT, milliseconds, "a time such as 500ms, 10s or 2m")?,
            invoke: annotations.get(INVOKE).filter(|name| !name.is_empty()).cloned(),
        })
    }

    /// What the program that runs it is told after the descriptor's number.
    pub(crate) fn words(&self, kind: Kind) -> String {
        let mut out = String::new();
        if kind == Kind::Component {
            out.push_str(",kind=component");
        }
        if self.pulley {
            out.push_str(",engine=pulley");
        }
        for (key, value) in [("memory", self.memory), ("fuel", self.fuel), ("timeout", self.timeout)] {
            if let Some(value) = value {
                // Writing to a string does not fail.
                let _ = write!(out, ",{key}={value}");
            }
        }
        if let Some(invoke) = &self.invoke {
            let _ = write!(out, ",invoke={invoke}");
        }
        out
    }
}

fn milliseconds(text: &str) -> Option<u64> {
    let at = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(at);
    let factor = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor).filter(|time| *time > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(value: serde_json::Value) -> Result<Limits> {
        Limits::of(&serde_json::from_value(value).unwrap(), None)
    }

    #[test]
    fn memory_is_what_the_limit_leaves() {
        let of = |limit: i64| {
            let spec = serde_json::json!({"ociVersion": "1.3.0", "linux": {"resources": {"memory": {"limit": limit}}}});
            limits(spec).unwrap().memory
        };
        assert_eq!(of(64 << 20), Some(48 << 20));
        assert_eq!(of(1 << 20), None);
        assert_eq!(of(-1), None);
    }

    #[test]
    fn annotations_are_read_or_refused_by_name() {
        let with =
            |key: &str, value: &str| limits(serde_json::json!({"ociVersion": "1.3.0", "annotations": {key: value}}));
        assert_eq!(with(FUEL, "1000").unwrap().words(Kind::Module), ",fuel=1000");
        assert_eq!(with(TIMEOUT, "2m").unwrap().words(Kind::Component), ",kind=component,timeout=120000");
        assert_eq!(with(INVOKE, "add(1, 2)").unwrap().words(Kind::Module), ",invoke=add(1, 2)");
        assert_eq!(with(ENGINE, "pulley").unwrap().words(Kind::Module), ",engine=pulley");
        for (key, value) in
            [(ENGINE, "v8"), (FUEL, "many"), (FUEL, "-1"), (TIMEOUT, "5"), (TIMEOUT, "0s"), (TIMEOUT, "1d")]
        {
            let error = with(key, value).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains(value), "{error}");
        }
    }
}
