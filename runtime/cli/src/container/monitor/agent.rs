//! The agent beside a container's own program, where an annotation asks for it: in the same namespaces and cgroup, as the
//! same user, by its descriptor, so that nothing appears in the root filesystem. It is started again when it ends.

use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use runx_core::bundle;
use runx_core::container::{Container, ExecOptions, Runtime};
use runx_core::spec::{Process as ProcessSpec, Spec};
use runx_core::{sys, sys::pidfd, workload};

/// The annotations, the same as in a cluster.
const WANTED: &str = "runx.dev/agent";
const PORT: &str = "runx.dev/agent.port";
const ENVD_PORT: &str = "runx.dev/agent.envd-port";
const TOKEN_FILE: &str = "runx.dev/agent.token-file";

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

/// What annotations ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::container) struct Wish {
    port: u16,
    envd_port: u16,
    token_file: Option<String>,
}

impl Wish {
    /// Reads annotations.
    ///
    /// # Errors
    /// For one that cannot be read, by its name.
    pub(in crate::container) fn of(annotations: &[(String, String)]) -> Result<Option<Self>> {
        let get = |name: &str| annotations.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        match get(WANTED) {
            None | Some("" | "false") => return Ok(None),
            Some("true") => {}
            Some(other) => bail!("annotation {WANTED}: {other:?} is neither true nor false"),
        }
        let port = |key: &str, usual: u16| match get(key) {
            None => Ok(usual),
            Some(text) => text.parse().ok().with_context(|| format!("annotation {key}: {text:?} is not a port")),
        };
        let wish = Self {
            port: port(PORT, USUAL.0)?,
            envd_port: port(ENVD_PORT, USUAL.1)?,
            token_file: get(TOKEN_FILE).map(str::to_owned),
        };
        if wish.port == 0 || wish.port == wish.envd_port {
            bail!("annotations {PORT} and {ENVD_PORT}: the agent needs ports that differ, the first not 0");
        }
        if let Some(path) = wish.token_file.as_ref().filter(|path| !path.starts_with('/')) {
            bail!("annotation {TOKEN_FILE}: the path {path:?} is not absolute");
        }
        Ok(Some(wish))
    }

    /// The process, with the user, the rights and the variables of the container's own.
    fn process(&self, container: &Container) -> Result<ProcessSpec> {
        let config: Spec = bundle::parse_file(&container.state().config_path())?;
        let mut process = config.process().clone().context("the container's configuration has no process")?;
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
        Ok(process)
    }
}

/// One that is to run as long as its container does.
#[derive(Debug)]
pub(super) struct Agent {
    wish: Wish,
    program: PathBuf,
    running: Option<(OwnedFd, Instant)>,
    /// When it is started again.
    due: Instant,
    pause: Duration,
}

impl Agent {
    /// One that is to be started now. Its program lies beside this one.
    pub(super) fn new(wish: Wish, executable: &Path) -> Self {
        let program = executable.with_file_name(PROGRAM);
        Self { wish, program, running: None, due: Instant::now(), pause: PAUSE.0 }
    }

    /// A descriptor that tells of its end, if it runs.
    pub(super) fn watched(&self) -> Option<RawFd> {
        use std::os::fd::AsRawFd;
        self.running.as_ref().map(|(process, _)| process.as_raw_fd())
    }

    /// How long until something is to be done for it.
    pub(super) fn wait(&self) -> Option<Duration> {
        self.running.is_none().then(|| self.due.saturating_duration_since(Instant::now()))
    }

    /// Notes its end, and starts it when that is due.
    pub(super) fn tend(&mut self, runtime: &Runtime, container: &Container) {
        if let Some((process, since)) = &self.running {
            if !matches!(pidfd::try_wait(process.as_fd()), Ok(Some(_)) | Err(_)) {
                return;
            }
            if since.elapsed() > SETTLED {
                self.pause = PAUSE.0;
            }
            self.running = None;
            self.again();
        }
        if Instant::now() >= self.due {
            match self.start(runtime, container) {
                Ok(process) => self.running = Some((process, Instant::now())),
                // The container may be paused, or at its end.
                Err(_) => self.again(),
            }
        }
    }

    fn again(&mut self) {
        self.due = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(PAUSE.1);
    }

    fn start(&self, runtime: &Runtime, container: &Container) -> Result<OwnedFd> {
        let null = || sys::open("/dev/null", libc::O_RDWR).context("open /dev/null");
        let options = ExecOptions {
            stdio: Some([null()?, null()?, null()?]),
            program: Some(workload::clone_program(&self.program)?),
            entered: crate::container::rootless::has_entered(),
            ..ExecOptions::default()
        };
        let mut process = runtime.exec(container, &self.wish.process(container)?, options)?;
        if let Err(e) = process.start() {
            process.discard();
            return Err(e.into());
        }
        Ok(process.into_pidfd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(annotations: &[(&str, &str)]) -> Result<Option<Wish>> {
        let owned: Vec<_> = annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Wish::of(&owned)
    }

    #[test]
    fn it_is_there_only_when_it_is_asked_for_in_words_that_mean_something() {
        assert_eq!(wish(&[]).unwrap(), None);
        assert_eq!(wish(&[(WANTED, "false"), (PORT, "x")]).unwrap(), None);
        let usual = Wish { port: USUAL.0, envd_port: USUAL.1, token_file: None };
        assert_eq!(wish(&[(WANTED, "true")]).unwrap(), Some(usual.clone()));
        let own = wish(&[(WANTED, "true"), (PORT, "1"), (ENVD_PORT, "0"), (TOKEN_FILE, "/t")]).unwrap();
        assert_eq!(own, Some(Wish { port: 1, envd_port: 0, token_file: Some("/t".into()) }));
        for bad in [(WANTED, "yes"), (PORT, "x"), (PORT, "0"), (ENVD_PORT, "44772"), (TOKEN_FILE, "rel")] {
            assert!(wish(&[(WANTED, "true"), bad]).is_err(), "{bad:?}");
        }
    }
}
