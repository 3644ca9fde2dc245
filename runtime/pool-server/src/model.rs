//! Requests and results, as go-judge's REST interface has them. Times are in nanoseconds, sizes in bytes.

use std::collections::BTreeMap;

use runx_pool::Status;
use serde::{Deserialize, Serialize};

/// Where a file's content comes from, or where it goes.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct File {
    /// A file of the server's machine.
    pub(crate) src: Option<String>,
    /// The content itself.
    pub(crate) content: Option<String>,
    /// A file that the server keeps.
    pub(crate) file_id: Option<String>,
    /// The name under which what is written is told.
    pub(crate) name: Option<String>,
    /// How much of it.
    pub(crate) max: Option<i64>,
    /// What a symbolic link leads to.
    pub(crate) symlink: Option<String>,
    /// For streams only.
    pub(crate) stream_in: Option<serde_json::Value>,
    /// For streams only.
    pub(crate) stream_out: Option<serde_json::Value>,
    /// Whether it is to be a pipe; here it always is one.
    pub(crate) pipe: bool,
}

/// One program with its limits.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Cmd {
    /// The program and its arguments.
    pub(crate) args: Vec<String>,
    /// Its environment, all of it.
    pub(crate) env: Vec<String>,
    /// Its descriptors from 0 on.
    pub(crate) files: Vec<Option<File>>,
    /// Whether it is to have a terminal.
    pub(crate) tty: bool,
    /// Processor time.
    pub(crate) cpu_limit: u64,
    /// An older name of the next.
    pub(crate) real_cpu_limit: u64,
    /// Time on the clock.
    pub(crate) clock_limit: u64,
    /// Memory.
    pub(crate) memory_limit: u64,
    /// Stack.
    pub(crate) stack_limit: u64,
    /// Processes at once.
    pub(crate) proc_limit: u64,
    /// Of a processor, 1000 for a whole one.
    pub(crate) cpu_rate_limit: u64,
    /// Which processors.
    pub(crate) cpu_set_limit: String,
    /// Whether the data segment is limited as well.
    pub(crate) strict_memory_limit: bool,
    /// The same.
    pub(crate) data_segment_limit: bool,
    /// Whether the address space is limited as well.
    pub(crate) address_space_limit: bool,
    /// Files to make before, by their paths.
    pub(crate) copy_in: BTreeMap<String, File>,
    /// Files to tell afterwards; with a question mark at the end they may be missing.
    pub(crate) copy_out: Vec<String>,
    /// Files to keep afterwards.
    pub(crate) copy_out_cached: Vec<String>,
    /// The largest of these; 0 for the server's limit.
    pub(crate) copy_out_max: u64,
    /// Whether one that is larger is cut, and no error.
    pub(crate) copy_out_truncate: bool,
    /// A directory of the server's machine.
    pub(crate) copy_out_dir: String,
}

/// A descriptor of one of a request's commands.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct PipeIndex {
    /// Which command.
    pub(crate) index: usize,
    /// Which of its descriptors.
    pub(crate) fd: usize,
}

/// A pipe from one command to another.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct PipeMap {
    /// Who writes.
    #[serde(rename = "in")]
    pub(crate) from: PipeIndex,
    /// Who reads.
    #[serde(rename = "out")]
    pub(crate) to: PipeIndex,
    /// Whether the server stands between them: who writes is not ended then by one who does not read any more.
    pub(crate) proxy: bool,
    /// With a proxy: the name under which what went through is told.
    pub(crate) name: String,
    /// How much of it.
    pub(crate) max: i64,
}

/// Commands that run at once.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Request {
    /// Told back, on a WebSocket.
    pub(crate) request_id: String,
    /// The commands.
    pub(crate) cmd: Vec<Cmd>,
    /// The pipes between them.
    pub(crate) pipe_mapping: Vec<PipeMap>,
    /// On a WebSocket: the request that is to be given up.
    pub(crate) cancel_request_id: String,
}

/// What went wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct FileError {
    /// Its name in the request.
    pub(crate) name: String,
    /// The kind, as go-judge names it.
    #[serde(rename = "type")]
    pub(crate) kind: &'static str,
    /// In words.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) message: String,
}

/// What came of one command.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Outcome {
    /// The verdict.
    pub(crate) status: &'static str,
    /// Exit code, or the signal's number.
    pub(crate) exit_status: i32,
    /// What went wrong.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) error: String,
    /// Processor time.
    pub(crate) time: u64,
    /// The most memory at once.
    pub(crate) memory: u64,
    /// Time on the clock.
    pub(crate) run_time: u64,
    /// The most processes at once, where the kernel counts them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) proc_peak: Option<u64>,
    /// Contents by names.
    pub(crate) files: BTreeMap<String, String>,
    /// Files that the server keeps, by names.
    pub(crate) file_ids: BTreeMap<String, String>,
    /// What went wrong with files.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) file_error: Vec<FileError>,
    /// How large the contents are, as JSON in bytes.
    #[serde(skip)]
    pub(crate) answered: u64,
}

/// The verdict's name in this interface.
pub(crate) fn status(status: Status) -> &'static str {
    match status {
        Status::Accepted => "Accepted",
        Status::TimeLimitExceeded => "Time Limit Exceeded",
        Status::MemoryLimitExceeded => "Memory Limit Exceeded",
        Status::OutputLimitExceeded => "Output Limit Exceeded",
        Status::FileError => "File Error",
        Status::NonZeroExitStatus => "Nonzero Exit Status",
        Status::Signalled => "Signalled",
        Status::DangerousSyscall => "Dangerous Syscall",
        Status::InternalError => "Internal Error",
    }
}

impl Outcome {
    /// Of a command that did not run.
    pub(crate) fn failed(verdict: Status, error: impl Into<String>, file_error: Vec<FileError>) -> Self {
        Self {
            status: status(verdict),
            exit_status: 0,
            error: error.into(),
            time: 0,
            memory: 0,
            run_time: 0,
            proc_peak: None,
            files: BTreeMap::new(),
            file_ids: BTreeMap::new(),
            file_error,
            answered: 0,
        }
    }
}
