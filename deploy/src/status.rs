//! How an installation is: for people, for programs, and for Prometheus.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::containers;
use crate::journal::{Journal, State};
use crate::node::Node;
use crate::pools;
use crate::stage::sha256;
use crate::starts;

/// Why containerd is restarted. Each has its counter from the beginning: Prometheus counts no first step of a series that was not there.
const RESTARTS: [&str; 4] = ["drift", "install", "rollback", "uninstall"];

/// A set of programs on the node.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Programs {
    digest: String,
    current: bool,
    in_use: bool,
}

/// What is known of a node.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Status {
    /// How far the installation is.
    pub(crate) state: State,
    distribution: &'static str,
    containerd: String,
    config_version: i64,
    handler: String,
    /// Whether containerd serves it; `None` if it does not answer.
    pub(crate) registered: Option<bool>,
    /// containerd's file.
    file: Option<String>,
    /// What is not as it was left, if anything.
    pub(crate) drift: Option<String>,
    programs: Vec<Programs>,
    reason: Option<String>,
    #[serde(skip)]
    journal: Journal,
}

/// What a node that is installed should be and is not.
fn drift(node: &Node, journal: &Journal, registered: Option<bool>) -> Result<Option<String>> {
    if journal.state != State::Installed {
        return Ok(None);
    }
    if let Some(change) = &journal.change {
        let path = change.path.display();
        match node.root.read(&change.path).with_context(|| format!("read {path}"))? {
            None => return Ok(Some(format!("{path} is gone"))),
            Some(bytes) if sha256(&bytes) != change.written => return Ok(Some(format!("{path} was changed"))),
            Some(_) => {}
        }
    }
    let current = node.stage().current()?;
    if current.as_deref() != Some(&journal.programs) || !node.root.exists(&node.stage().shim()) {
        return Ok(Some(format!("{} does not lead to the installed programs", node.stage().shim().display())));
    }
    Ok(match registered {
        None => Some("containerd does not answer".into()),
        Some(false) => Some(format!("containerd does not serve the handler {}", node.handler)),
        Some(true) => None,
    })
}

impl Status {
    /// Looks at a node.
    ///
    /// # Errors
    /// When its files cannot be read.
    pub(crate) fn of(node: &Node) -> Result<Self> {
        let journal = node.store().load()?;
        let registered = node.status().ok().map(|status| status.handlers.contains(&node.handler));
        let versions = node.stage().versions()?;
        Ok(Self {
            state: journal.state,
            distribution: node.distribution.name,
            containerd: journal.containerd.clone(),
            config_version: journal.config_version,
            handler: node.handler.clone(),
            registered,
            file: journal.change.as_ref().map(|change| change.path.display().to_string()),
            drift: drift(node, &journal, registered)?,
            programs: versions
                .into_iter()
                .map(|version| Programs { digest: version.digest, current: version.current, in_use: version.in_use })
                .collect(),
            reason: journal.reason.clone(),
            journal,
        })
    }

    /// Whether the handler is in containerd's files because of us.
    pub(crate) fn is_ours(&self) -> bool {
        self.journal.change.is_some()
    }

    /// Whether pods with the handler run here.
    pub(crate) fn is_well(&self) -> bool {
        self.state == State::Installed && self.drift.is_none() && self.registered == Some(true)
    }

    /// Whether there are sets of programs that new pods do not get.
    pub(crate) fn has_old_programs(&self) -> bool {
        self.programs.iter().any(|set| !set.current)
    }

    /// The lines for people.
    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: &str| {
            let _ = writeln!(text, "{name:<14}{value}");
        };
        line("STATE", self.state.name());
        line("DISTRIBUTION", self.distribution);
        if !self.containerd.is_empty() {
            line("CONTAINERD", &format!("{}, configuration of version {}", self.containerd, self.config_version));
        }
        let registered = match self.registered {
            Some(true) => "served by containerd",
            Some(false) => "not served by containerd",
            None => "containerd does not answer",
        };
        line("HANDLER", &format!("{}, {registered}", self.handler));
        line("FILE", self.file.as_deref().unwrap_or("-"));
        line("DRIFT", self.drift.as_deref().unwrap_or("none"));
        for (at, set) in self.programs.iter().enumerate() {
            let notes = [set.current.then_some("current"), set.in_use.then_some("in use")];
            let notes: Vec<&str> = notes.into_iter().flatten().collect();
            let digest = set.digest.get(..12).unwrap_or(&set.digest);
            line(if at == 0 { "PROGRAMS" } else { "" }, &format!("{digest} {}", notes.join(", ")));
        }
        if let Some(reason) = &self.reason {
            line("FAILURE", reason);
        }
        text
    }

    /// The metrics.
    pub(crate) fn metrics(&self, node: &Node) -> String {
        let mut out = Metrics::default();
        out.family("runx_info", "gauge", "What is installed.");
        let version = self.config_version.to_string();
        out.sample(
            "runx_info",
            &[
                ("version", env!("CARGO_PKG_VERSION")),
                ("containerd", &self.containerd),
                ("config_version", &version),
                ("distro", self.distribution),
            ],
            1,
        );
        out.family("runx_install_state", "gauge", "How far the installation is: 1 for the state that it is in.");
        for state in State::ALL {
            out.sample("runx_install_state", &[("state", state.name())], u8::from(state == self.state));
        }
        out.family("runx_handler_registered", "gauge", "Whether containerd serves the handler.");
        out.sample("runx_handler_registered", &[("handler", &self.handler)], u8::from(self.registered == Some(true)));
        out.family("runx_config_drift", "gauge", "Whether the node is not as it was installed.");
        out.sample("runx_config_drift", &[], u8::from(self.drift.is_some()));
        out.family("runx_containerd_restarts_total", "counter", "Restarts of containerd by runx-node.");
        for (reason, count) in restarts(&self.journal.restarts) {
            out.sample("runx_containerd_restarts_total", &[("reason", reason)], count);
        }
        out.family(
            "runx_install_rollbacks_total",
            "counter",
            "Changes of containerd's configuration that were taken back.",
        );
        out.sample("runx_install_rollbacks_total", &[], self.journal.rollbacks);
        out.family("runx_install_duration_seconds", "gauge", "How long the phases of the last installation took.");
        for (phase, seconds) in &self.journal.durations {
            out.sample("runx_install_duration_seconds", &[("phase", phase)], seconds);
        }
        out.family(
            "runx_program_sets",
            "gauge",
            "Sets of programs on the node, of which shims still run or new pods get.",
        );
        out.sample("runx_program_sets", &[], self.programs.len());
        let found = containers::count(&node.root);
        out.family("runx_containers", "gauge", "Containers by kind and state, as their state on the disk says.");
        for kind in containers::KINDS {
            for state in containers::STATES {
                let count = found.counts.get(&(kind, state)).copied().unwrap_or_default();
                out.sample("runx_containers", &[("kind", kind), ("state", state)], count);
            }
        }
        out.family("runx_agents", "gauge", "Containers that have an agent.");
        out.sample("runx_agents", &[], found.agents);
        starts::add(&node.root, &mut out);
        pools::add(&node.root, &mut out);
        let cache = containers::cache(&node.root);
        for (name, what) in [
            ("hits", "Modules whose compiled form was there."),
            ("compiles", "Modules that were compiled."),
            ("failures", "Modules that could not be compiled."),
            ("rejected", "Compiled modules that were damaged and made again."),
            ("evicted", "Compiled modules that went to make room."),
        ] {
            let name_of = format!("runx_wasm_cache_{name}_total");
            out.family(&name_of, "counter", what);
            out.sample(&name_of, &[], cache.counters.get(name).copied().unwrap_or_default());
        }
        out.family("runx_wasm_compile_seconds_total", "counter", "How long compiling took in all.");
        let micros = cache.counters.get("microseconds").copied().unwrap_or_default();
        out.sample("runx_wasm_compile_seconds_total", &[], micros as f64 / 1e6);
        out.family("runx_wasm_cache_artifacts", "gauge", "Compiled modules in the cache.");
        out.sample("runx_wasm_cache_artifacts", &[], cache.artifacts);
        out.family("runx_wasm_cache_bytes", "gauge", "How large they are.");
        out.sample("runx_wasm_cache_bytes", &[], cache.bytes);
        out.0
    }
}

/// How often containerd was restarted for each reason, those that were none yet too.
fn restarts(counted: &BTreeMap<String, u64>) -> BTreeMap<&str, u64> {
    let mut all: BTreeMap<&str, u64> = RESTARTS.into_iter().map(|reason| (reason, 0)).collect();
    all.extend(counted.iter().map(|(reason, count)| (reason.as_str(), *count)));
    all
}

/// Prometheus' text format, version 0.0.4.
#[derive(Default)]
pub(crate) struct Metrics(pub(crate) String);

impl Metrics {
    /// The head of a metric.
    pub(crate) fn family(&mut self, name: &str, kind: &str, what: &str) {
        let _ = writeln!(self.0, "# HELP {name} {what}\n# TYPE {name} {kind}");
    }

    /// A value.
    pub(crate) fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        let escape = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let list: Vec<String> = labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escape(value))).collect();
        let labels = if list.is_empty() { String::new() } else { format!("{{{}}}", list.join(",")) };
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_for_a_restart_has_a_counter_before_there_was_one() {
        assert_eq!(restarts(&BTreeMap::new()), RESTARTS.into_iter().map(|reason| (reason, 0)).collect());
        // A reason of an older version stays counted.
        let counted = [("drift".to_owned(), 3), ("other".to_owned(), 1)].into();
        let all = restarts(&counted);
        assert_eq!((all["drift"], all["install"], all["other"]), (3, 0, 1));
    }

    #[test]
    fn values_of_labels_cannot_break_out() {
        let mut metrics = Metrics::default();
        metrics.family("m", "gauge", "What.");
        metrics.sample("m", &[("a", "x\"\n\\"), ("b", "")], 1.5);
        assert_eq!(metrics.0, "# HELP m What.\n# TYPE m gauge\nm{a=\"x\\\"\\n\\\\\",b=\"\"} 1.5\n");
    }
}
