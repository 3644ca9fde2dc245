//! The command line. Each flag has a variable of the environment, which is how a DaemonSet sets it: `--install-dir` is
//! `RUNX_INSTALL_DIR`.

use std::collections::BTreeMap;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Registers runx on the node.
    Install,
    /// Takes it away.
    Uninstall,
    /// Tells how it is.
    Status,
    /// Installs, watches, and serves.
    Run,
    /// Waits until a DaemonSet has done so on all nodes.
    Wait,
}

/// Commands that take a flag.
type Takers = &'static [Command];

use Command::{Install, Run, Status, Uninstall, Wait};

const COMMANDS: [Command; 5] = [Install, Uninstall, Status, Run, Wait];
/// Those that have to do with the node that they run on.
const ALL: Takers = &[Install, Uninstall, Status, Run];
const CHANGE: Takers = &[Install, Uninstall, Run];
const CLUSTER: Takers = &[Install, Uninstall, Run, Wait];
const INSTALL: Takers = &[Install, Run];

/// A flag's name, what its value is (`None` for a switch), who takes it, and what it does.
const FLAGS: [(&str, Option<&str>, Takers, &str); 23] = [
    ("root", Some("DIR"), ALL, "the directory that stands for the node's / (default /)"),
    ("programs", Some("DIR"), INSTALL, "where runx's programs are, outside of --root (default /programs)"),
    ("install-dir", Some("DIR"), ALL, "where they go on the node (default /opt/runx)"),
    ("state-dir", Some("DIR"), ALL, "where the journal is on the node (default /var/lib/runx/node)"),
    ("handler", Some("NAME"), ALL, "the handler's name, for RuntimeClasses (default runx)"),
    ("distribution", Some("NAME"), ALL, "kubeadm, kind, k3s, rke2 or k0s (default: what is recognized)"),
    ("containerd", Some("PATH"), ALL, "the node's containerd (default: where the distribution has it)"),
    ("containerd-config", Some("PATH"), ALL, "its main file (likewise)"),
    ("socket", Some("PATH"), ALL, "its socket (likewise)"),
    ("unit", Some("NAME"), CHANGE, "the unit of systemd that runs it (likewise)"),
    ("restart-command", Some("COMMAND"), ALL, "restarts it where there is no systemd: for sh -c"),
    ("enter", Some("COMMAND"), ALL, "comes before the node's programs, with --restart-command: chroot DIR"),
    ("timeout", Some("SECONDS"), CLUSTER, "how long containerd, or the DaemonSet, may take (default 60)"),
    ("node-name", Some("NAME"), CHANGE, "the node whose labels are set (default: none are)"),
    ("daemonset", Some("NAMESPACE/NAME"), &[Wait], "whose pods are waited for"),
    ("api", Some("URL"), CLUSTER, "the cluster's API (default: what a pod is told)"),
    ("account", Some("DIR"), CLUSTER, "the directory of token and ca.crt (default: what a pod has)"),
    ("listen", Some("ADDRESS"), &[Run], "where /healthz, /readyz and /metrics are (default 0.0.0.0:8090)"),
    ("interval", Some("SECONDS"), &[Run], "how often it looks for drift (default 30)"),
    ("jitter", Some("SECONDS"), &[Run], "the longest pause, by chance, before it restarts containerd (default 0)"),
    ("uninstall", None, &[Run], "take runx away instead, as soon as no pod uses it, and then tell that it is ready"),
    ("force", None, &[Install, Uninstall], "try again what failed twice; take it away from under running pods"),
    ("format", Some("FORMAT"), &[Status], "table or json (default table)"),
];

/// A command and its flags.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// What is to be done.
    pub(crate) command: Command,
    values: BTreeMap<&'static str, String>,
}

/// What a command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// Something to do.
    Do(Arguments),
    /// Something to print.
    Print(String),
}

fn usage() -> String {
    let mut text = String::from(
        "Registers runx with containerd on a Kubernetes node, or takes it away.\n\nUsage: runx-node COMMAND [FLAG...]\n\n\
         Commands:\n  install     bring the programs, register the handler, restart containerd if that changed something\n  \
         uninstall   take it away; the files of containerd become what they were\n  \
         status      tell how it is: exit code 0 if all is well, 1 if not, 3 if it is not installed\n  \
         run         install, then watch and serve /healthz, /readyz and /metrics: for a DaemonSet\n  \
         wait        wait until that DaemonSet has done so on all nodes: for a hook\n\nFlags:\n",
    );
    for (name, value, takers, what) in FLAGS {
        let flag = value.map_or_else(|| format!("--{name}"), |value| format!("--{name} {value}"));
        let names: Vec<&str> = takers.iter().map(|taker| taker.name()).collect();
        let of = if takers == ALL { String::new() } else { format!(" [{}]", names.join(", ")) };
        text.push_str(&format!("  {flag:<27} {what}{of}\n"));
    }
    text.push_str(
        "  --version, --help\n\nEach flag can be given as a variable, too: --install-dir as RUNX_INSTALL_DIR.\n",
    );
    text
}

impl Command {
    fn name(self) -> &'static str {
        match self {
            Install => "install",
            Uninstall => "uninstall",
            Status => "status",
            Run => "run",
            Wait => "wait",
        }
    }
}

fn variable(flag: &str) -> String {
    format!("RUNX_{}", flag.to_ascii_uppercase().replace('-', "_"))
}

impl Arguments {
    /// Reads a command line and the environment.
    ///
    /// # Errors
    /// With what is wrong with it.
    pub(crate) fn parse(
        words: impl IntoIterator<Item = String>,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<Asked, String> {
        let mut words = words.into_iter();
        let first = words.next().ok_or("a command is missing: install, uninstall, status, run or wait (see --help)")?;
        let command = match first.as_str() {
            "--help" | "-h" | "help" => return Ok(Asked::Print(usage())),
            "--version" | "-v" => return Ok(Asked::Print(format!("runx-node {}\n", env!("CARGO_PKG_VERSION")))),
            name => COMMANDS.iter().copied().find(|command| command.name() == name),
        };
        let Some(command) = command else {
            return Err(format!(
                "{first:?} is no command: there are install, uninstall, status, run and wait (see --help)"
            ));
        };
        let mut values = BTreeMap::new();
        for (name, value, takers, _) in FLAGS {
            if let Some(found) =
                environment(&variable(name)).filter(|found| takers.contains(&command) && !found.is_empty())
            {
                match (value, found.as_str()) {
                    (Some(_), _) | (None, "true" | "1") => drop(values.insert(name, found)),
                    (None, "false" | "0") => {}
                    (None, _) => return Err(format!("{}={found:?}: it is true or false", variable(name))),
                }
            }
        }
        while let Some(word) = words.next() {
            if word == "--help" || word == "-h" {
                return Ok(Asked::Print(usage()));
            }
            let (flag, joined) = match word.split_once('=') {
                Some((flag, value)) => (flag.to_owned(), Some(value.to_owned())),
                None => (word.clone(), None),
            };
            let known = flag.strip_prefix("--").and_then(|flag| FLAGS.iter().find(|(name, ..)| *name == flag));
            let Some((name, value, takers, _)) = known else {
                return Err(format!("{word:?} is no flag (see --help)"));
            };
            if !takers.contains(&command) {
                return Err(format!("{} takes no --{name} (see --help)", command.name()));
            }
            let given = match (value, joined) {
                (None, None) => "true".to_owned(),
                (None, Some(_)) => return Err(format!("--{name} takes no value")),
                (Some(_), Some(value)) => value,
                (Some(what), None) => words.next().ok_or_else(|| format!("--{name} needs a value: {what}"))?,
            };
            if given.is_empty() {
                return Err(format!("--{name} is empty"));
            }
            values.insert(name, given);
        }
        Ok(Asked::Do(Self { command, values }))
    }

    /// A flag's value, if it was given.
    pub(crate) fn get(&self, flag: &str) -> Option<&str> {
        debug_assert!(FLAGS.iter().any(|(name, ..)| *name == flag), "{flag} is no flag");
        self.values.get(flag).map(String::as_str)
    }

    /// Whether a switch was given.
    pub(crate) fn has(&self, flag: &str) -> bool {
        self.get(flag).is_some()
    }

    /// Whether runx is to be on the node afterwards.
    pub(crate) fn installs(&self) -> bool {
        self.command == Install || self.command == Run && !self.has("uninstall")
    }

    /// A flag's value, or else a default.
    pub(crate) fn or<'a>(&'a self, flag: &str, default: &'a str) -> &'a str {
        self.get(flag).unwrap_or(default)
    }

    /// A number of seconds.
    ///
    /// # Errors
    /// When it is none.
    pub(crate) fn seconds(&self, flag: &str, default: u64) -> Result<std::time::Duration, String> {
        // Where nothing is the default, nothing can be asked for.
        let least = default.min(1);
        let seconds = match self.get(flag) {
            None => default,
            Some(text) => text
                .parse()
                .ok()
                .filter(|seconds| (least..=86_400).contains(seconds))
                .ok_or_else(|| format!("--{flag} {text:?}: it is a number of seconds from {least} to 86400"))?,
        };
        Ok(std::time::Duration::from_secs(seconds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str, environment: &[(&str, &str)]) -> Result<Asked, String> {
        let variable =
            |name: &str| environment.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Arguments::parse(line.split_ascii_whitespace().map(str::to_owned), variable)
    }

    fn arguments(line: &str, environment: &[(&str, &str)]) -> Arguments {
        match parse(line, environment).unwrap() {
            Asked::Do(arguments) => arguments,
            Asked::Print(text) => panic!("{text}"),
        }
    }

    #[test]
    fn flags_are_over_the_environment() {
        let environment =
            [("RUNX_INSTALL_DIR", "/a"), ("RUNX_HANDLER", "h"), ("RUNX_FORCE", "true"), ("RUNX_LISTEN", "x")];
        let found = arguments("install --install-dir=/b --timeout 5", &environment);
        assert_eq!((found.command, found.get("install-dir"), found.get("handler")), (Install, Some("/b"), Some("h")));
        assert!(found.has("force"));
        assert_eq!(found.seconds("timeout", 60).unwrap().as_secs(), 5);
        // Another command's is not looked at.
        assert_eq!(found.get("listen"), None);
        assert_eq!(arguments("status", &[]).or("root", "/"), "/");
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (line, word) in [
            ("", "command is missing"),
            ("remove", "\"remove\" is no command"),
            ("install --nosuch", "\"--nosuch\" is no flag"),
            ("install extra", "\"extra\" is no flag"),
            ("install --format json", "install takes no --format"),
            ("install --root", "--root needs a value: DIR"),
            ("install --root=", "--root is empty"),
            ("install --force=yes", "--force takes no value"),
        ] {
            let error = parse(line, &[]).unwrap_err();
            assert!(error.contains(word), "{line}: {error}");
        }
        assert!(parse("install", &[("RUNX_FORCE", "maybe")]).unwrap_err().contains("RUNX_FORCE"));
        assert!(arguments("run --timeout 0", &[]).seconds("timeout", 60).is_err());
        assert!(arguments("run --jitter -1", &[]).seconds("jitter", 0).is_err());
        assert_eq!(arguments("run --jitter 0", &[]).seconds("jitter", 0).unwrap().as_secs(), 0);
    }

    #[test]
    fn help_names_every_flag() {
        let Asked::Print(text) = parse("install --help", &[]).unwrap() else { panic!("it is printed") };
        for (name, ..) in FLAGS {
            assert!(text.contains(&format!("--{name}")), "{name}");
        }
    }
}
