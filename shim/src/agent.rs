//! The agent beside a container's own program: an annotation asks for it, and the shim starts it in the same namespaces and
//! cgroup, as the same user, by its descriptor, so that nothing appears in the root filesystem. containerd does not know of it.
//!
//! It is started after the container's program, which never waits for it; it is started again when it dies, and ends with the
//! container.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use runx_core::spec::{Process as ProcessSpec, Spec};
use runx_core::{bundle, workload};

use crate::container::{Container, Standing};
use crate::reaper::exit_of;
use crate::service::Service;

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

/// The program's file name, and what it is called in the container.
const PROGRAM: &str = "runx-agent";

/// Where it makes a token when it is given none, the first that can be: only the container's user can read it.
const TOKENS: &str = "/dev/.runx-agent/token,/dev/shm/.runx-agent/token";

/// How long one that died is waited with, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// One that has lived this long has not died from its start.
const SETTLED: Duration = Duration::from_secs(60);

/// What a container's annotations ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wish {
    port: u16,
    envd_port: u16,
    token_file: Option<String>,
    /// It is not named: the first of its pod gets it.
    any: bool,
}

impl Wish {
    /// Of a configuration.
    ///
    /// # Errors
    /// An annotation that cannot be read, by its name.
    pub(crate) fn of(spec: &Spec) -> Result<Option<Self>, String> {
        let empty = HashMap::new();
        let annotations = spec.annotations().as_ref().unwrap_or(&empty);
        let get = |name: &str| annotations.get(name).map(String::as_str);
        match get(WANTED) {
            None | Some("" | "false") => return Ok(None),
            Some("true") => {}
            Some(other) => return Err(format!("annotation {WANTED}: {other:?} is neither true nor false")),
        }
        if get(KIND) == Some("sandbox") || is_module(spec) {
            return Ok(None);
        }
        let name = get(NAME);
        let listed = get(CONTAINERS).map(|list| list.split(',').any(|one| Some(one.trim()) == name));
        if listed == Some(false) {
            return Ok(None);
        }
        let port = |key: &str, usual: u16| {
            let own = name.and_then(|name| get(&format!("{key}.{name}")).map(|text| (format!("{key}.{name}"), text)));
            match own.or_else(|| get(key).map(|text| (key.to_owned(), text))) {
                None => Ok(usual),
                Some((key, text)) => text.parse().map_err(|_| format!("annotation {key}: {text:?} is not a port")),
            }
        };
        let wish = Self {
            port: port(PORT, USUAL.0)?,
            envd_port: port(ENVD_PORT, USUAL.1)?,
            token_file: get(TOKEN_FILE).map(str::to_owned),
            any: listed.is_none(),
        };
        if wish.port == 0 || wish.port == wish.envd_port {
            return Err(format!(
                "annotations {PORT} and {ENVD_PORT}: the agent needs ports that differ, the first not 0"
            ));
        }
        if wish.token_file.as_ref().is_some_and(|path| !path.starts_with('/')) {
            return Err(format!("annotation {TOKEN_FILE}: the path is not absolute"));
        }
        Ok(Some(wish))
    }

    /// The process, with the user, the rights and the variables of the container's own.
    fn process(&self, config: &Spec) -> Option<ProcessSpec> {
        let mut process = config.process().clone()?;
        let mut args: Vec<String> = vec![PROGRAM.into(), "--log-level".into(), "3".into()];
        args.extend(["--address".into(), "0.0.0.0".into(), "--port".into(), self.port.to_string()]);
        if self.envd_port != 0 {
            args.extend(["--envd-port".into(), self.envd_port.to_string()]);
        }
        match &self.token_file {
            Some(path) => args.extend(["--access-token-file".into(), path.clone()]),
            None => args.extend(["--generate-token".into(), TOKENS.into()]),
        }
        process.set_args(Some(args));
        process.set_terminal(Some(false));
        process.set_console_size(None);
        Some(process)
    }
}

fn is_module(spec: &Spec) -> bool {
    let args = spec.process().as_ref().and_then(|process| process.args().as_ref());
    let first = args.and_then(|args| args.first());
    first.is_some_and(|name| workload::has_module_name(std::path::Path::new(name)))
}

/// The ports of a pod's agents, which share a network.
#[derive(Debug, Default)]
pub(crate) struct Ports(Mutex<HashMap<u16, String>>);

impl Ports {
    fn taken(&self) -> MutexGuard<'_, HashMap<u16, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the ports for a container. Where no container was named and another one has an agent, there is nothing to take.
    ///
    /// # Errors
    /// Who has one of them.
    pub(crate) fn reserve(&self, wish: &Wish, id: &str) -> Result<(), String> {
        let mut taken = self.taken();
        if wish.any && !taken.is_empty() {
            return Ok(());
        }
        let wanted = [wish.port, wish.envd_port];
        for port in wanted.iter().filter(|port| **port != 0) {
            if let Some(other) = taken.get(port) {
                return Err(format!("port {port} of its agent is that of the agent of container {other}"));
            }
        }
        taken.extend(wanted.into_iter().filter(|port| *port != 0).map(|port| (port, id.to_owned())));
        Ok(())
    }

    /// Whether a container has any.
    pub(crate) fn has(&self, id: &str) -> bool {
        self.taken().values().any(|of| of == id)
    }

    /// Gives a container's back.
    pub(crate) fn release(&self, id: &str) {
        self.taken().retain(|_, of| of != id);
    }
}

/// Keeps an agent running as long as its container runs.
pub(crate) async fn keep(service: Service, container: Arc<Container>, wish: Wish) {
    let spec = bundle::parse_file::<Spec>(&container.core.state().config_path());
    let process = match spec.map(|spec| wish.process(&spec)) {
        Ok(Some(process)) => process,
        Ok(None) => return,
        Err(e) => return log::error!("container {}: its agent: {e}", container.id),
    };
    let mut pause = PAUSE.0;
    loop {
        if container.standing() == Standing::Stopped {
            return;
        }
        let begun = Instant::now();
        match service.run_apart(&container, process.clone(), service.beside(PROGRAM)).await {
            Ok((pid, pidfd)) => {
                let code = exit_of(pidfd).await;
                service.forget_apart(pid);
                log::warn!("container {}: its agent has ended with {code:?}", container.id);
            }
            Err(e) => log::error!("container {}: its agent: {e}", container.id),
        }
        if begun.elapsed() > SETTLED {
            pause = PAUSE.0;
        }
        let ended = container.init.wait();
        if tokio::time::timeout(pause, ended).await.is_ok() {
            return;
        }
        pause = (pause * 2).min(PAUSE.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(annotations: &[(&str, &str)]) -> Result<Option<Wish>, String> {
        let annotations: HashMap<_, _> =
            annotations.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        let mut spec = Spec::default();
        spec.set_annotations(Some(annotations));
        Wish::of(&spec)
    }

    #[test]
    fn who_asks_for_it_gets_it_and_nobody_else() {
        assert_eq!(wish(&[]), Ok(None));
        assert_eq!(wish(&[(WANTED, "false")]), Ok(None));
        assert_eq!(wish(&[(WANTED, "true"), (KIND, "sandbox")]), Ok(None));
        assert_eq!(wish(&[(WANTED, "true"), (CONTAINERS, "a, b"), (NAME, "c")]), Ok(None));
        let named =
            wish(&[(WANTED, "true"), (CONTAINERS, "a, b"), (NAME, "b"), ("runx.dev/agent.port.b", "7")]).unwrap();
        let named = named.unwrap();
        assert_eq!((named.port, named.envd_port, named.any), (7, USUAL.1, false));
        for wrong in [(WANTED, "yes"), (PORT, "x"), (PORT, "0"), (PORT, "49983"), (TOKEN_FILE, "relative")] {
            assert!(wish(&[(WANTED, if wrong.0 == WANTED { wrong.1 } else { "true" }), wrong]).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn ports_are_one_containers() {
        let ports = Ports::default();
        let wish = |any, port| Wish { port, envd_port: port + 1, token_file: None, any };
        ports.reserve(&wish(false, 10), "a").unwrap();
        assert!(ports.reserve(&wish(false, 11), "b").unwrap_err().contains("container a"));
        // Who was not named goes without.
        ports.reserve(&wish(true, 50), "c").unwrap();
        assert!(ports.has("a") && !ports.has("c"));
        ports.release("a");
        ports.reserve(&wish(false, 11), "b").unwrap();
    }
}
