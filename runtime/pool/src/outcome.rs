//! How an execution ended, in the words of online judges.

use std::time::Duration;

/// The verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// The program ended with exit code 0 and within its limits.
    Accepted,
    /// It took more processor time, or time on the clock, than it may.
    TimeLimitExceeded,
    /// It took more memory than it may.
    MemoryLimitExceeded,
    /// It wrote more than it may, to a captured stream or a file.
    OutputLimitExceeded,
    /// A file that was to be its input or output cannot be opened.
    FileError,
    /// It ended with another exit code.
    NonZeroExitStatus,
    /// A signal ended it.
    Signalled,
    /// It made a system call for which the filter ends programs.
    DangerousSyscall,
    /// It could not be run; [`Outcome::error`] tells why.
    InternalError,
}

impl Status {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Accepted,
        Self::TimeLimitExceeded,
        Self::MemoryLimitExceeded,
        Self::OutputLimitExceeded,
        Self::FileError,
        Self::NonZeroExitStatus,
        Self::Signalled,
        Self::DangerousSyscall,
        Self::InternalError,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Accepted => "Accepted",
            Self::TimeLimitExceeded => "TimeLimitExceeded",
            Self::MemoryLimitExceeded => "MemoryLimitExceeded",
            Self::OutputLimitExceeded => "OutputLimitExceeded",
            Self::FileError => "FileError",
            Self::NonZeroExitStatus => "NonZeroExitStatus",
            Self::Signalled => "Signalled",
            Self::DangerousSyscall => "DangerousSyscall",
            Self::InternalError => "InternalError",
        }
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What came of an execution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The verdict.
    pub status: Status,
    /// The program's exit code; 0 if a signal ended it.
    pub exit_code: i32,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Processor time of all its processes. Without cgroups that of those that were waited for.
    pub cpu: Duration,
    /// Time on the clock from the start of the program to its end.
    pub wall: Duration,
    /// The most memory that the sandbox had at once, in bytes. Without cgroups the largest process.
    pub memory: u64,
    /// The most processes and threads at once, where the kernel counts them.
    pub processes: Option<u64>,
    /// What was captured of standard output.
    pub stdout: Vec<u8>,
    /// What was captured of standard error.
    pub stderr: Vec<u8>,
    /// What went wrong, for [`Status::InternalError`] and [`Status::FileError`].
    pub error: Option<String>,
}

impl Outcome {
    /// The code that a shell would show: the exit code, or 128 and the signal's number.
    pub fn code(&self) -> i32 {
        self.signal.map_or(self.exit_code, |signal| 128 + signal)
    }
}
