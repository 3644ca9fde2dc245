//! The agents of a pod: who has which port, and that each runs as long as its container. What asks for one, and what it
//! is, the core knows ([`runx_core::agent`]). containerd does not know of it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use runx_core::agent::{PROGRAM, Pauses, Wish};
use runx_core::bundle;
use runx_core::spec::Spec;

use crate::container::{Container, Standing};
use crate::reaper::exit_of;
use crate::service::Service;

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
    let process = match spec.and_then(|spec| wish.process(&spec)) {
        Ok(process) => process,
        Err(e) => return log::error!("container {}: its agent: {e}", container.id),
    };
    let mut pauses = Pauses::default();
    loop {
        if container.standing() == Standing::Stopped {
            return;
        }
        let mut lived = Duration::ZERO;
        match service.run_apart(&container, process.clone(), service.beside(PROGRAM)).await {
            Ok((pid, pidfd)) => {
                let begun = Instant::now();
                let code = exit_of(pidfd).await;
                lived = begun.elapsed();
                service.forget_apart(pid);
                log::warn!("container {}: its agent has ended with {code:?}", container.id);
            }
            Err(e) => log::error!("container {}: its agent: {e}", container.id),
        }
        let ended = container.init.wait();
        if tokio::time::timeout(pauses.after(lived), ended).await.is_ok() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
