//! Keeps the agent beside a container's own program, where annotations ask for one.

use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use runx_core::agent::{PROGRAM, Pauses, Wish};
use runx_core::bundle;
use runx_core::container::{Container, ExecOptions, Runtime};
use runx_core::spec::Spec;
use runx_core::{sys, sys::pidfd, workload};

/// One that is to run as long as its container does.
#[derive(Debug)]
pub(super) struct Agent {
    wish: Wish,
    program: PathBuf,
    running: Option<(OwnedFd, Instant)>,
    /// When it is started again.
    due: Instant,
    pauses: Pauses,
}

impl Agent {
    /// One that is to be started now. Its program lies beside this one.
    pub(super) fn new(wish: Wish, executable: &Path) -> Self {
        let program = executable.with_file_name(PROGRAM);
        Self { wish, program, running: None, due: Instant::now(), pauses: Pauses::default() }
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
            let lived = since.elapsed();
            self.running = None;
            self.again(lived);
        }
        if Instant::now() >= self.due {
            match self.start(runtime, container) {
                Ok(process) => self.running = Some((process, Instant::now())),
                // The container may be paused, or at its end.
                Err(_) => self.again(Duration::ZERO),
            }
        }
    }

    fn again(&mut self, lived: Duration) {
        self.due = Instant::now() + self.pauses.after(lived);
    }

    fn start(&self, runtime: &Runtime, container: &Container) -> Result<OwnedFd> {
        let null = || sys::open("/dev/null", libc::O_RDWR).context("open /dev/null");
        let options = ExecOptions {
            stdio: Some([null()?, null()?, null()?]),
            program: Some(workload::clone_program(&self.program)?),
            entered: crate::container::rootless::has_entered(),
            ..ExecOptions::default()
        };
        let config: Spec = bundle::parse_file(&container.state().config_path())?;
        let mut process = runtime.exec(container, &self.wish.process(&config)?, options)?;
        if let Err(e) = process.start() {
            process.discard();
            return Err(e.into());
        }
        Ok(process.into_pidfd())
    }
}
