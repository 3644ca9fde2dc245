//! What a container is doing: its record, the state of the core, and the kernel, together.

use std::fmt;

use anyhow::Result;
use runx_core::Error;
use runx_core::container::{Container, Status as CoreStatus};

use super::record::{Containers, Phase, Record};
use crate::Context;

/// The status of a container in docker's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// It was never started.
    Created,
    /// It is being started.
    Starting,
    /// Its program runs.
    Running,
    /// Its processes are frozen.
    Paused,
    /// It ended and is waited for until it is started again.
    Restarting,
    /// Its program has ended and its monitor is clearing up.
    Stopping,
    /// It ended.
    Exited,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Restarting => "restarting",
            Self::Stopping => "stopping",
            Self::Exited => "exited",
        })
    }
}

impl Status {
    /// Whether it has processes.
    pub(crate) fn is_up(self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }

    /// Whether it neither has processes nor will have them by itself.
    pub(crate) fn is_down(self) -> bool {
        matches!(self, Self::Created | Self::Exited)
    }
}

/// A container and what it is doing.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) record: Record,
    pub(crate) status: Status,
    /// The core's, while it has one.
    pub(crate) core: Option<Container>,
}

impl Seen {
    /// Its first process, if that is alive.
    pub(crate) fn pid(&self) -> Option<i32> {
        self.core.as_ref().and_then(Container::pid)
    }

    /// Looks at the container of a record.
    pub(crate) fn look(context: &Context, mut record: Record) -> Result<Self> {
        let core = match context.runtime().load(&record.id) {
            Ok(core) => Some(core),
            Err(Error::NotFound(_)) => None,
            Err(e) => return Err(e.into()),
        };
        // A container of another root's state, or of the command for engines, may have the same id.
        let core = core.filter(|core| core.state().bundle == record.bundle);
        let mut monitored = record.is_monitored();
        if !monitored
            && matches!(record.phase, Phase::Running | Phase::Restarting)
            && let Ok(newer) = Record::read(&Containers::of(context).directory(&record.id))
        {
            // Its monitor has ended since the record was read: what it wrote last counts.
            record = newer;
            monitored = record.is_monitored();
        }
        let status = match core.as_ref().map(Container::status) {
            Some(CoreStatus::Running) => Status::Running,
            Some(CoreStatus::Paused) => Status::Paused,
            Some(CoreStatus::Creating | CoreStatus::Created) if monitored => Status::Starting,
            _ if monitored && record.phase == Phase::Restarting => Status::Restarting,
            _ if monitored && record.phase == Phase::Running => Status::Stopping,
            _ if record.phase == Phase::Created => Status::Created,
            _ => Status::Exited,
        };
        Ok(Self { record, status, core })
    }
}
