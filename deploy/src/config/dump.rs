//! What containerd itself makes of its files: `containerd config dump`.

use std::collections::BTreeSet;

use serde_json::{Map, Value};
use toml_edit::DocumentMut;

use super::{Error, plugin};

/// A dump, read.
#[derive(Clone, Debug)]
pub(crate) struct Dump {
    tree: Map<String, Value>,
    document: DocumentMut,
    version: i64,
}

/// Whether a text is a duration as Go prints it: `10.6µs`, `1m2s`.
fn is_duration(text: &str) -> bool {
    let known = |c: char| c.is_ascii_digit() || ".nuµmsh".contains(c);
    text.starts_with(|c: char| c.is_ascii_digit()) && text.ends_with(['s', 'm', 'h']) && text.chars().all(known)
}

/// Lines of standard error that warn, without their times, and without how long something took: 2.3 and later say so of
/// configurations of older versions.
pub(crate) fn warnings(stderr: &str) -> BTreeSet<String> {
    let wanted = |line: &&str| line.contains("level=warning") || line.contains("level=error");
    let took = |word: &str| word.split_once('=').is_some_and(|(_, value)| is_duration(value.trim_matches('"')));
    let timeless = |line: &str| {
        let rest = line.split_once("level=").map_or("", |(_, rest)| rest);
        rest.split(' ').filter(|word| !took(word)).collect::<Vec<_>>().join(" ")
    };
    stderr.lines().filter(wanted).map(timeless).collect()
}

impl Dump {
    /// Reads one.
    ///
    /// # Errors
    /// When it is not what containerd prints.
    pub(crate) fn parse(text: &str) -> Result<Self, Error> {
        let syntax = |why: String| Error::Syntax { path: "what `containerd config dump` prints".into(), why };
        let mut tree: Map<String, Value> = toml_edit::de::from_str(text).map_err(|e| syntax(e.message().to_owned()))?;
        let (document, version) = super::parse("what `containerd config dump` prints", text)?;
        // Which files it is from.
        tree.remove("imports");
        Ok(Self { tree, document, version })
    }

    fn runtimes(&self) -> Option<&Map<String, Value>> {
        self.tree.get("plugins")?.get(plugin(self.version))?.get("containerd")?.get("runtimes")?.as_object()
    }

    /// A handler's table.
    pub(crate) fn handler(&self, name: &str) -> Option<&Value> {
        self.runtimes()?.get(name)
    }

    /// The names of all handlers.
    pub(crate) fn handlers(&self) -> Vec<&str> {
        self.runtimes().into_iter().flatten().map(|(name, _)| name.as_str()).collect()
    }

    /// Whether CRI is there at all.
    pub(crate) fn has_cri(&self) -> bool {
        let disabled = self.tree.get("disabled_plugins").and_then(Value::as_array);
        let is_cri = |name: &Value| {
            name.as_str().is_some_and(|name| name == "cri" || name == "io.containerd.grpc.v1.cri" || name == plugin(3))
        };
        self.runtimes().is_some() && !disabled.into_iter().flatten().any(is_cri)
    }

    /// Whether the handler that pods get by default has its cgroups made by systemd, so that the kubelet's own driver is
    /// systemd, too: the two have to agree on a node.
    pub(crate) fn systemd_cgroup(&self) -> bool {
        let containerd =
            self.tree.get("plugins").and_then(|plugins| plugins.get(plugin(self.version))?.get("containerd"));
        let default = containerd.and_then(|it| it.get("default_runtime_name")?.as_str()).unwrap_or("runc");
        let found = self.handler(default).and_then(|handler| handler.get("options")?.get("SystemdCgroup")?.as_bool());
        found.unwrap_or(false)
    }

    /// A handler's tables as text, under CRI's key in a configuration of a version.
    pub(crate) fn tables(&self, name: &str, version: i64) -> Option<String> {
        let item = super::runtimes(&self.document, self.version)?.get(name)?.clone();
        let mut out = DocumentMut::new();
        let mut at = out.as_table_mut();
        for key in ["plugins", plugin(version), "containerd", "runtimes"] {
            let item = at.entry(key).or_insert_with(|| {
                let mut table = toml_edit::Table::new();
                table.set_implicit(true);
                toml_edit::Item::Table(table)
            });
            at = item.as_table_mut()?;
        }
        at.insert(name, item);
        Some(out.to_string().trim_start().to_owned())
    }

    /// What differs from another dump, apart from one handler: names of settings.
    pub(crate) fn differences(&self, other: &Self, apart: &str) -> Vec<String> {
        let strip = |dump: &Self| {
            let mut tree = Value::Object(dump.tree.clone());
            let path = format!("/plugins/{}/containerd/runtimes", plugin(dump.version).replace('/', "~1"));
            if let Some(runtimes) = tree.pointer_mut(&path).and_then(Value::as_object_mut) {
                runtimes.remove(apart);
            }
            tree
        };
        let mut out = Vec::new();
        compare("", &strip(self), &strip(other), &mut out);
        out
    }
}

fn compare(at: &str, before: &Value, after: &Value, out: &mut Vec<String>) {
    match (before, after) {
        (Value::Object(before), Value::Object(after)) => {
            let names: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
            for name in names {
                let at = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
                match (before.get(name), after.get(name)) {
                    (Some(before), Some(after)) => compare(&at, before, after, out),
                    (Some(_), None) => out.push(format!("{at} is gone")),
                    (None, _) => out.push(format!("{at} is new")),
                }
            }
        }
        _ if before == after => {}
        // Not the values: some are passwords of registries.
        _ => out.push(format!("{at} is changed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "version = 2\nimports = ['a']\n[plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = 'p'\n\
        [plugins.'io.containerd.grpc.v1.cri'.containerd]\ndefault_runtime_name = 'runc'\n\
        [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\nruntime_type = 'r'\n\
        [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc.options]\nSystemdCgroup = true\n";

    #[test]
    fn only_the_handler_may_differ() {
        let before = Dump::parse(BEFORE).unwrap();
        let with = format!("{BEFORE}[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runx]\nx = 1\n");
        let after = Dump::parse(&with.replace("['a']", "['b']")).unwrap();
        assert!(before.differences(&after, "runx").is_empty());
        assert_eq!(after.handlers(), ["runc", "runx"]);
        let clobbered = Dump::parse(&with.replace("'p'", "'q'").replace("runtimes.runc", "runtimes.other")).unwrap();
        let cri = "plugins.io.containerd.grpc.v1.cri";
        assert_eq!(
            before.differences(&clobbered, "runx"),
            [
                format!("{cri}.containerd.runtimes.other is new"),
                format!("{cri}.containerd.runtimes.runc is gone"),
                format!("{cri}.sandbox_image is changed")
            ]
        );
    }

    #[test]
    fn the_cgroup_driver_and_the_tables_are_those_of_runc() {
        let dump = Dump::parse(BEFORE).unwrap();
        assert!(dump.systemd_cgroup() && dump.has_cri());
        let tables = dump.tables("runc", 2).unwrap();
        let again = Dump::parse(&format!("version = 2\n{tables}")).unwrap();
        assert_eq!(again.handler("runc"), dump.handler("runc"));
        assert!(!tables.contains("[plugins]"), "{tables}");
        assert!(!Dump::parse(&format!("disabled_plugins = ['cri']\n{BEFORE}")).unwrap().has_cri());
    }

    #[test]
    fn warnings_are_compared_without_their_times() {
        let line = |time: u8| format!("time=\"{time}\" level=warning msg=\"x\"\ntime=\"1\" level=info msg=\"y\"\n");
        assert_eq!(warnings(&line(1)), warnings(&line(2)));
        assert_eq!(warnings(&line(1)).len(), 1);
        let migrated = |took: &str| format!("time=\"1\" level=warning msg=\"Configuration migrated\" t=\"{took}\"\n");
        assert_eq!(warnings(&migrated("10.636µs")), warnings(&migrated("1m2s")));
        for value in ["other", "10", "v1s", "s"] {
            assert_ne!(warnings(&migrated("10.636µs")), warnings(&migrated(value)), "{value}");
        }
    }
}
