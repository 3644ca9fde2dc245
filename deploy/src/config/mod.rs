//! containerd's configuration: what is put into it, and how.

mod dump;
mod edit;
mod imports;

pub(crate) use dump::{Dump, warnings};
pub(crate) use edit::{Ours, are_equal, has_block, remove, with_block};
pub(crate) use imports::Imports;

use toml_edit::{DocumentMut, Item};

/// Why a configuration is left alone.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// It cannot be read.
    #[error("{path} is no TOML: {why}")]
    Syntax {
        /// The file.
        path: String,
        /// What the parser says.
        why: String,
    },
    /// Its version is none that is known.
    #[error("{path} has version = {version}, and runx-node knows 1 to 4")]
    Version {
        /// The file.
        path: String,
        /// What it has.
        version: String,
    },
    /// A handler of that name is there, and not by this program.
    #[error(
        "the handler {handler:?} is in containerd's configuration already, and not by runx-node: remove it, or choose another \
         name with --handler"
    )]
    Foreign {
        /// The handler.
        handler: String,
    },
    /// The tables do not fit into the file.
    #[error("{path}: the tables of the handler cannot be added: {why}")]
    Shape {
        /// The file.
        path: String,
        /// What is in the way.
        why: String,
    },
}

/// What is registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Handler {
    /// The name that a RuntimeClass has as its handler.
    pub(crate) name: String,
    /// containerd's type of it.
    pub(crate) runtime_type: String,
    /// The shim, by a path that stays the same over upgrades.
    pub(crate) shim: String,
    /// What the shim is told.
    pub(crate) options: Options,
}

/// Options of the shim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Options {
    /// None: cgroups are made by runx.
    None,
    /// The kubelet has its cgroups made by systemd.
    SystemdCgroup,
    /// The same, in a file.
    File(String),
}

/// The key of CRI's table in a configuration of a version.
pub(crate) fn plugin(version: i64) -> &'static str {
    match version {
        1 => "cri",
        2 => "io.containerd.grpc.v1.cri",
        _ => "io.containerd.cri.v1.runtime",
    }
}

/// Reads a configuration and its version.
///
/// # Errors
/// When it is no TOML, or of a version that is not known.
pub(crate) fn parse(path: &str, text: &str) -> Result<(DocumentMut, i64), Error> {
    // Not as the error shows itself: that has the whole line, and some have the passwords of registries.
    let document: DocumentMut = text.parse().map_err(|e: toml_edit::TomlError| {
        let line = e
            .span()
            .map(|span| 1 + text.as_bytes()[..span.start.min(text.len())].iter().filter(|b| **b == b'\n').count());
        let line = line.map_or(String::new(), |line| format!("line {line}: "));
        Error::Syntax { path: path.into(), why: format!("{line}{}", e.message()) }
    })?;
    let version = match document.get("version") {
        None => 1,
        Some(item) => match item.as_integer() {
            // What Go's decoder takes for none.
            Some(0) => 1,
            Some(version @ 1..=4) => version,
            _ => return Err(Error::Version { path: path.into(), version: item.to_string().trim().into() }),
        },
    };
    Ok((document, version))
}

/// A document that imports exactly these files.
///
/// # Errors
/// When it is no TOML.
pub(crate) fn with_imports(path: &str, text: &str, files: &[std::path::PathBuf]) -> Result<String, Error> {
    let (mut document, _) = parse(path, text)?;
    imports::set(&mut document, files);
    Ok(document.to_string())
}

/// The table of handlers of a document.
pub(crate) fn runtimes(document: &DocumentMut, version: i64) -> Option<&Item> {
    document.get("plugins")?.get(plugin(version))?.get("containerd")?.get("runtimes")
}

fn quoted(text: &str) -> String {
    toml_edit::Value::from(text).to_string().trim().to_owned()
}

/// A key of a table, quoted where it has to be.
fn key(text: &str) -> String {
    let bare = !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if bare { text.to_owned() } else { quoted(text) }
}

/// The handler's tables, for a configuration of a version.
pub(crate) fn tables(handler: &Handler, version: i64) -> String {
    let table = format!("plugins.{}.containerd.runtimes.{}", key(plugin(version)), key(&handler.name));
    let mut text = format!(
        "[{table}]\n  runtime_type = {}\n  runtime_path = {}\n  pod_annotations = [\"runx.dev/*\"]\n",
        quoted(&handler.runtime_type),
        quoted(&handler.shim)
    );
    match &handler.options {
        Options::None => {}
        Options::SystemdCgroup => text.push_str(&format!("  [{table}.options]\n    SystemdCgroup = true\n")),
        Options::File(path) => text.push_str(&format!(
            "  [{table}.options]\n    TypeUrl = \"runtimeoptions.v1.Options\"\n    ConfigPath = {}\n",
            quoted(path)
        )),
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_others_refused() {
        let of = |text| parse("c", text).map(|(_, version)| version).map_err(|e| e.to_string());
        assert_eq!([of(""), of("version = 2"), of("# version = 9\nversion=4")], [Ok(1), Ok(2), Ok(4)]);
        assert!(of("version = 5").unwrap_err().contains("knows 1 to 4"));
        assert!(of("version = \"2\"").unwrap_err().contains("\"2\""));
        assert!(of("version = ").unwrap_err().contains("no TOML"));
        let error = of("version = 2\n[a]\npassword = \"secret\nb = 1\n").unwrap_err();
        assert!(error.contains("line 3: ") && !error.contains("secret"), "{error}");
        // The key of a table is not the document's.
        assert_eq!(of("[plugins]\nversion = 3\n"), Ok(1));
    }

    #[test]
    fn tables_are_for_the_version() {
        let mut handler = Handler {
            name: "runx".into(),
            runtime_type: "io.containerd.runx.v1".into(),
            shim: "/opt/runx/current/containerd-shim-runx-v1".into(),
            options: Options::None,
        };
        for version in 1..=4 {
            handler.options = if version % 2 == 0 { Options::SystemdCgroup } else { Options::None };
            let (document, _) = parse("c", &tables(&handler, version)).unwrap();
            let runx = &runtimes(&document, version).unwrap()["runx"];
            assert_eq!(runx["runtime_path"].as_str(), Some("/opt/runx/current/containerd-shim-runx-v1"));
            assert_eq!(runx.get("options").is_some(), version % 2 == 0);
        }
    }
}
