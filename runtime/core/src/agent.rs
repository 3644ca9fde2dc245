//! The agent beside a container's own program: what annotations ask for, and the process that answers them.
//!
//! It runs in the container's namespaces and cgroup, as the container's user and with his rights, and is executed by its
//! descriptor, so that nothing appears in the root filesystem. It is started after the container's program, which never
//! waits for it, is started again when it ends, and ends with the container. Who starts it is not decided here: the shim
//! and the monitor of `runx container` keep one, and `runx agent` puts one into a container that runs.

use std::path::Path;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::spec::{Process, Spec};
use crate::workload;

/// The program's file name, and what it is called in a container.
pub const PROGRAM: &str = "runx-agent";

/// Where it makes a token when it is given none, the first that can be: only the container's user can read it.
pub const TOKENS: &str = "/dev/.runx-agent/token,/dev/shm/.runx-agent/token";

/// Whether there is to be one: `"true"`.
const WANTED: &str = "runx.dev/agent";

/// Which containers of a pod get one, by their names; the first one without this.
const CONTAINERS: &str = "runx.dev/agent.containers";

/// The ports, of all or with `.NAME` of one container. 0 is none for the second.
const PORT: &str = "runx.dev/agent.port";
const ENVD_PORT: &str = "runx.dev/agent.envd-port";

/// A file in the container that holds the token, from a Secret say.
const TOKEN_FILE: &str = "runx.dev/agent.token-file";

/// What CRI says of a container.
const KIND: &str = "io.kubernetes.cri.container-type";
const NAME: &str = "io.kubernetes.cri.container-name";

/// The ports that the protocols' clients go by.
const USUAL: (u16, u16) = (44_772, 49_983);

/// How long one that ended is waited with, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// One that has lived this long has not ended because of its start.
const SETTLED: Duration = Duration::from_secs(60);

/// What a container's annotations ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// The port of its own protocol; never 0.
    pub port: u16,
    /// The port for E2B's clients, another one; 0 for none.
    pub envd_port: u16,
    /// A file in the container that holds the token; it makes one without.
    pub token_file: Option<String>,
    /// No container was named, so only the first one of a pod gets it.
    pub any: bool,
}

impl Wish {
    /// What a configuration asks for. The containers that hold a pod together get none, nor do WASM modules, whose root
    /// filesystem a program can do nothing in.
    ///
    /// # Errors
    /// For an annotation that cannot be read, by its name.
    pub fn of(spec: &Spec) -> Result<Option<Self>> {
        let annotations = spec.annotations().as_ref();
        let wish = Self::read(|name| annotations.and_then(|all| all.get(name)).map(String::as_str))?;
        Ok(wish.filter(|_| !is_module(spec)))
    }

    /// What annotations ask for, before there is a configuration.
    ///
    /// # Errors
    /// For one that cannot be read, by its name.
    pub fn read<'a>(get: impl Fn(&str) -> Option<&'a str>) -> Result<Option<Self>> {
        match get(WANTED) {
            None | Some("" | "false") => return Ok(None),
            Some("true") => {}
            Some(other) => return Err(invalid(WANTED, format!("{other:?} is neither true nor false"))),
        }
        if get(KIND) == Some("sandbox") {
            return Ok(None);
        }
        // Only the containers of pods have names that could be on the list.
        let name = get(NAME);
        let listed = get(CONTAINERS).zip(name).map(|(list, name)| list.split(',').any(|one| one.trim() == name));
        if listed == Some(false) {
            return Ok(None);
        }
        let port = |key: &str, usual: u16| {
            let own = name.map(|name| format!("{key}.{name}"));
            let own = own.and_then(|key| get(&key).map(|text| (key, text)));
            match own.or_else(|| get(key).map(|text| (key.to_owned(), text))) {
                None => Ok(usual),
                Some((key, text)) => text.parse().map_err(|_| invalid(&key, format!("{text:?} is not a port"))),
            }
        };
        let wish = Self {
            port: port(PORT, USUAL.0)?,
            envd_port: port(ENVD_PORT, USUAL.1)?,
            token_file: get(TOKEN_FILE).map(str::to_owned),
            any: listed.is_none(),
        };
        if wish.port == 0 || wish.port == wish.envd_port {
            let both = format!("{PORT} or {ENVD_PORT}");
            return Err(invalid(&both, "the agent needs ports that differ, the first not 0".into()));
        }
        if let Some(path) = wish.token_file.as_ref().filter(|path| !path.starts_with('/')) {
            return Err(invalid(TOKEN_FILE, format!("the path {path:?} is not absolute")));
        }
        Ok(Some(wish))
    }

    /// The process that answers it. `config` is the container's configuration.
    ///
    /// # Errors
    /// When the configuration has no process.
    pub fn process(&self, config: &Spec) -> Result<Process> {
        let mut flags: Vec<String> = ["--log-level", "3", "--address", "0.0.0.0"].map(str::to_owned).into();
        flags.extend(["--port".into(), self.port.to_string()]);
        if self.envd_port != 0 {
            flags.extend(["--envd-port".into(), self.envd_port.to_string()]);
        }
        match &self.token_file {
            Some(path) => flags.extend(["--access-token-file".into(), path.clone()]),
            None => flags.extend(["--generate-token".into(), TOKENS.into()]),
        }
        process(config, flags)
    }
}

/// The agent with these flags, with the user, the rights and the variables of the container's own process. `config` is the
/// container's configuration.
///
/// # Errors
/// When the configuration has no process.
pub fn process(config: &Spec, flags: impl IntoIterator<Item = String>) -> Result<Process> {
    let mut process = config.process().clone().ok_or_else(|| Error::spec("process is missing"))?;
    process.set_args(Some(std::iter::once(PROGRAM.to_owned()).chain(flags).collect()));
    process.set_terminal(Some(false));
    process.set_console_size(None);
    Ok(process)
}

/// How long to wait before an agent is started again: twice as long each time, until one has lived for a while.
#[derive(Clone, Debug)]
pub struct Pauses {
    next: Duration,
}

impl Default for Pauses {
    fn default() -> Self {
        Self { next: PAUSE.0 }
    }
}

impl Pauses {
    /// The pause after one that has lived so long; no time for one that could not be started.
    pub fn after(&mut self, lived: Duration) -> Duration {
        let pause = if lived > SETTLED { PAUSE.0 } else { self.next };
        self.next = (pause * 2).min(PAUSE.1);
        pause
    }
}

fn invalid(annotation: &str, reason: String) -> Error {
    Error::InvalidSpec { document: format!("annotation {annotation}"), reason }
}

fn is_module(spec: &Spec) -> bool {
    let args = spec.process().as_ref().and_then(|process| process.args().as_ref());
    let first = args.and_then(|args| args.first());
    first.is_some_and(|name| workload::has_module_name(Path::new(name)))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn spec(annotations: &[(&str, &str)], args: &[&str]) -> Spec {
        let annotations: HashMap<_, _> = annotations.iter().copied().collect();
        let process = serde_json::json!({
            "args": args, "cwd": "/work", "env": ["A=b"], "user": {"uid": 5, "gid": 6}, "terminal": true,
            "consoleSize": {"height": 1, "width": 2}, "noNewPrivileges": true,
        });
        serde_json::from_value(serde_json::json!({
            "ociVersion": "1.2.0", "annotations": annotations, "process": process, "root": {"path": "rootfs"},
        }))
        .unwrap()
    }

    fn wish(annotations: &[(&str, &str)]) -> Result<Option<Wish>> {
        Wish::of(&spec(annotations, &["sh"]))
    }

    #[test]
    fn who_asks_for_it_gets_it_and_nobody_else() {
        assert_eq!(wish(&[]).unwrap(), None);
        assert_eq!(wish(&[(WANTED, "")]).unwrap(), None);
        assert_eq!(wish(&[(WANTED, "false"), (PORT, "x")]).unwrap(), None);
        assert_eq!(wish(&[(WANTED, "true"), (KIND, "sandbox")]).unwrap(), None);
        assert_eq!(Wish::of(&spec(&[(WANTED, "true")], &["/app.wasm"])).unwrap(), None);
        let usual = Wish { port: USUAL.0, envd_port: USUAL.1, token_file: None, any: true };
        assert_eq!(wish(&[(WANTED, "true")]).unwrap(), Some(usual.clone()));
        assert_eq!(wish(&[(WANTED, "true"), (NAME, "c")]).unwrap(), Some(usual.clone()));
        // Without a pod there is nothing to choose from.
        assert_eq!(wish(&[(WANTED, "true"), (CONTAINERS, "a, b")]).unwrap(), Some(usual));
        let own = wish(&[(WANTED, "true"), (PORT, "1"), (ENVD_PORT, "0"), (TOKEN_FILE, "/t")]).unwrap();
        assert_eq!(own, Some(Wish { port: 1, envd_port: 0, token_file: Some("/t".into()), any: true }));
    }

    #[test]
    fn containers_of_a_pod_are_chosen_by_name_and_have_ports_of_their_own() {
        let of = |name| {
            let all =
                [(WANTED, "true"), (CONTAINERS, "a, b"), (PORT, "6"), ("runx.dev/agent.port.b", "7"), (NAME, name)];
            wish(&all).unwrap().map(|wish| (wish.port, wish.envd_port, wish.any))
        };
        assert_eq!(of("a"), Some((6, USUAL.1, false)));
        assert_eq!(of("b"), Some((7, USUAL.1, false)));
        assert_eq!(of("c"), None);
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_its_name() {
        for wrong in [
            (PORT, "x"),
            (PORT, "0"),
            (PORT, "49983"),
            (PORT, "65536"),
            (ENVD_PORT, "44772"),
            (ENVD_PORT, "-1"),
            (TOKEN_FILE, "relative"),
        ] {
            let e = wish(&[(WANTED, "true"), wrong]).unwrap_err().to_string();
            assert!(e.starts_with("invalid annotation ") && e.contains(wrong.0), "{wrong:?}: {e}");
        }
        let e = wish(&[(WANTED, "yes")]).unwrap_err().to_string();
        assert_eq!(e, "invalid annotation runx.dev/agent: \"yes\" is neither true nor false");
        let own = [(WANTED, "true"), (NAME, "b"), ("runx.dev/agent.port.b", "x")];
        assert!(wish(&own).unwrap_err().to_string().contains("runx.dev/agent.port.b"));
    }

    #[test]
    fn its_process_is_the_containers_own_with_another_command_line() {
        let config = spec(&[], &["sh", "-c", "x"]);
        let wish = Wish { port: 1, envd_port: 0, token_file: Some("/t".into()), any: true };
        let process = wish.process(&config).unwrap();
        let line = "runx-agent --log-level 3 --address 0.0.0.0 --port 1 --access-token-file /t";
        assert_eq!(process.args().as_ref().unwrap().join(" "), line);
        let mut same = process.clone();
        same.set_args(config.process().as_ref().unwrap().args().clone());
        same.set_terminal(Some(true));
        same.set_console_size(config.process().as_ref().unwrap().console_size());
        assert_eq!(Some(same), *config.process());
        assert_eq!((process.terminal(), process.console_size()), (Some(false), None));
        let both = Wish { envd_port: 2, token_file: None, ..wish };
        let process = both.process(&config).unwrap();
        let line = process.args().as_ref().unwrap().join(" ");
        assert!(line.contains("--envd-port 2") && line.ends_with(&format!("--generate-token {TOKENS}")), "{line}");
        let mut none = config;
        none.set_process(None);
        assert!(both.process(&none).is_err());
    }

    #[test]
    fn it_is_started_again_ever_more_slowly_until_one_has_lived() {
        let mut pauses = Pauses::default();
        let mut pause = |lived| pauses.after(Duration::from_secs(lived)).as_millis();
        assert_eq!([0, 1, 60].map(&mut pause), [500, 1000, 2000]);
        assert_eq!([0; 6].map(&mut pause), [4000, 8000, 16_000, 30_000, 30_000, 30_000]);
        assert_eq!([61, 0].map(&mut pause), [500, 1000]);
    }
}
