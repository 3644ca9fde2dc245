//! What tests of the installer begin with: containerds, their configurations, and machines that run.

use serde_json::Value;

use super::{HANDLER, Machine, PAUSE, Package, packages};
use crate::skip;

/// The head of a configuration whose containerd runs anywhere, and the key of CRI's table.
pub fn head(version: i64) -> (String, &'static str) {
    let cri = match version {
        1 => "cri",
        2 => "io.containerd.grpc.v1.cri",
        _ => "io.containerd.cri.v1.runtime",
    };
    let first = if version == 1 { String::new() } else { format!("version = {version}\n") };
    (format!("# The node's own.\n{first}"), cri)
}

/// As it is on most nodes: with runc, and with a setting that must not be lost.
pub fn usual(version: i64, imports: &str) -> String {
    let (head, cri) = head(version);
    let image = if version < 3 {
        format!("[plugins.\"{cri}\"]\n  sandbox_image = \"{}\"   # ours\n", PAUSE)
    } else {
        format!("[plugins.\"io.containerd.cri.v1.images\".pinned_images]\n  sandbox = '{}'\n", PAUSE)
    };
    format!(
        "{head}{imports}{image}\n[plugins.\"{cri}\".containerd.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\"\n  \
         [plugins.\"{cri}\".containerd.runtimes.runc.options]\n    SystemdCgroup = false\n\
         [plugins.\"io.containerd.nri.v1.nri\"]\n  disable = true\n[plugins.\"{cri}\".cni]\n  conf_dir = '/etc/cni/net.d'"
    )
}

/// As [`usual`], of version 2, for a machine whose pods may not be given any score for lack of memory.
pub fn usual_for_pods() -> String {
    let head = "[plugins.\"io.containerd.grpc.v1.cri\"]\n";
    usual(2, "").replacen(head, &format!("{head}  restrict_oom_score_adj = true\n"), 1)
}

/// A line that has containerd read a directory of drop-ins.
pub const IMPORTS: &str = "imports = [\"/etc/containerd/conf.d/*.toml\"]\n";

/// Main files that a containerd may have, and what they are called here.
pub fn configurations(package: &Package) -> Vec<(&'static str, Option<String>)> {
    let mut all = vec![
        ("no main file", None),
        ("version 2 with runc", Some(usual(2, ""))),
        ("version 2 with nothing", Some("version = 2\n".to_owned())),
        ("version 2 with a directory of drop-ins", Some(usual(2, IMPORTS))),
    ];
    if package.version < (2, 0) {
        let (head, cri) = head(1);
        all.push(("version 1", Some(format!("{head}[plugins.{cri}]\n  sandbox_image = 'x'\n"))));
        all.push((
            "version 2 in one line",
            Some("version = 2\nplugins = {\"io.containerd.grpc.v1.cri\" = {sandbox_image = 'x', containerd = {default_runtime_name = \
                  'runc', runtimes = {runc = {runtime_type = 'io.containerd.runc.v2'}}}}} # all\n".to_owned()),
        ));
    } else {
        all.push(("version 3 with runc", Some(usual(3, ""))));
        all.push(("version 3 with a directory of drop-ins", Some(usual(3, IMPORTS))));
        all.push(("version 3 with nothing", Some("version = 3\n".to_owned())));
    }
    if package.version >= (2, 3) {
        all.push(("version 4", Some(usual(4, IMPORTS))));
    }
    all
}

/// All containerds; it is said aloud if there is only the installed one.
///
/// # Panics
/// When one does not tell its version.
pub fn every_package() -> Vec<Package> {
    let all = packages();
    if all.len() < 2 {
        skip("other containerds than the installed one: RUNX_CONTAINERDS names none");
    }
    all
}

/// The containerds that have directories of drop-ins for CRI, 2.0 and later; it is said aloud if there is none.
///
/// # Panics
/// When one does not tell its version.
pub fn newer_packages() -> Vec<Package> {
    let mut all = packages();
    all.retain(|package| package.version >= (2, 0));
    if all.is_empty() {
        skip("a containerd of 2.0 or later: RUNX_CONTAINERDS names none");
    }
    all
}

/// The installed containerd.
///
/// # Panics
/// When there is none.
pub fn one_package() -> Package {
    packages().remove(0)
}

/// A machine that runs, and programs to install on it. What it is for is said.
///
/// # Panics
/// When it does not come up.
pub fn started(package: &Package, name: &str, config: Option<&str>) -> Machine {
    eprintln!("containerd {}.{}: {name}", package.version.0, package.version.1);
    let machine = Machine::start(package, config);
    machine.set_programs("one");
    machine
}

/// What the installer says of it.
///
/// # Panics
/// When that is no JSON.
pub fn status(machine: &Machine) -> Value {
    let done = machine.node(&["status", "--format", "json"]);
    serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {} {}", done.stdout, done.stderr))
}

/// Fails the test unless containerd is ready for pods, and serves runc, and our handler or not.
///
/// # Panics
/// When it is otherwise.
#[track_caller]
pub fn serves(machine: &Machine, expected: bool) {
    let handlers = machine.handlers().expect("containerd is ready for pods");
    assert!(handlers.contains(&"runc".to_owned()), "{handlers:?}");
    assert_eq!(handlers.contains(&HANDLER.to_owned()), expected, "{handlers:?}");
}
