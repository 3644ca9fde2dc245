//! What is to be run in a sandbox.

use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

/// What a program reads from its standard input.
#[derive(Debug, Default)]
pub enum Input {
    /// Nothing.
    #[default]
    Null,
    /// These bytes.
    Bytes(Vec<u8>),
    /// A descriptor.
    Fd(OwnedFd),
    /// A file of the sandbox.
    Path(PathBuf),
}

/// Where a program's output goes.
#[derive(Debug, Default)]
pub enum Output {
    /// Nowhere.
    #[default]
    Null,
    /// Into the outcome, up to this many bytes; more is [`Status::OutputLimitExceeded`](crate::Status::OutputLimitExceeded).
    Capture(u64),
    /// To a descriptor.
    Fd(OwnedFd),
    /// Into a file of the sandbox, which is made or emptied.
    Path(PathBuf),
}

/// The limits of one execution. One that is higher than the pool's own process may have is as high as that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Processor time of all processes together. Without cgroups that of each one, in whole seconds.
    pub cpu: Option<Duration>,
    /// Time on the clock.
    pub wall: Option<Duration>,
    /// Memory in bytes, with what is written to a tmpfs; the template's by default. If the sandbox has more already, the program
    /// does not begin, and the limit is exceeded. Without cgroups the data of each process.
    pub memory: Option<u64>,
    /// Processes and threads at once; the template's by default. Without cgroups those of the sandbox's user.
    pub processes: Option<u64>,
    /// Size of a file that is written to, in bytes.
    pub file_size: u64,
    /// Open descriptors of each process.
    pub open_files: u64,
    /// The stack of each process in bytes; what the pool's own process has by default.
    pub stack: Option<u64>,
    /// Address space of each process in bytes.
    pub address_space: Option<u64>,
    /// Data of each process in bytes, besides what a group limits.
    pub data: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            cpu: None,
            wall: None,
            memory: None,
            processes: None,
            file_size: 256 << 20,
            open_files: 256,
            stack: None,
            address_space: None,
            data: None,
        }
    }
}

/// A program and all that it is given.
#[derive(Debug)]
pub struct Command {
    pub(crate) args: Vec<OsString>,
    pub(crate) program: Option<OwnedFd>,
    pub(crate) env: Vec<OsString>,
    pub(crate) directory: Option<PathBuf>,
    pub(crate) stdin: Input,
    pub(crate) stdout: Output,
    pub(crate) stderr: Output,
    pub(crate) more: Vec<(u32, OwnedFd)>,
    pub(crate) limits: Limits,
}

/// Where a program is looked for if its environment has no `PATH`.
pub(crate) const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

impl Command {
    /// A program, looked up in the `PATH` of its own environment unless its name has a slash. It begins with an empty
    /// environment, no input, and output that goes nowhere.
    pub fn new(program: impl Into<OsString>) -> Self {
        Self {
            args: vec![program.into()],
            program: None,
            env: Vec::new(),
            directory: None,
            stdin: Input::Null,
            stdout: Output::Null,
            stderr: Output::Null,
            more: Vec::new(),
            limits: Limits::default(),
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Adds a variable to the environment.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        let mut variable = name.as_ref().to_owned();
        variable.push("=");
        variable.push(value);
        self.env.push(variable);
        self
    }

    /// Executes this file; the program's name is only what it is told.
    pub fn program(mut self, file: OwnedFd) -> Self {
        self.program = Some(file);
        self
    }

    /// Its working directory, instead of [`Template::directory_of_work`](crate::Template::directory_of_work).
    pub fn directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// Its standard input.
    pub fn stdin(mut self, input: Input) -> Self {
        self.stdin = input;
        self
    }

    /// Its standard output.
    pub fn stdout(mut self, output: Output) -> Self {
        self.stdout = output;
        self
    }

    /// Its standard error.
    pub fn stderr(mut self, output: Output) -> Self {
        self.stderr = output;
        self
    }

    /// A further descriptor, with the number that it gets: from 3 to 63. What it leads to is the program's: from a directory of
    /// the host all below it can be reached.
    pub fn fd(mut self, number: u32, fd: OwnedFd) -> Self {
        self.more.push((number, fd));
        self
    }

    /// Its limits.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }
}
