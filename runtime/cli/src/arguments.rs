//! The command line: runc's commands and flags, before or after the container's id.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// An OCI runtime for Linux containers and WASM modules.
#[derive(Debug, Parser)]
#[command(name = "runx", version, disable_help_subcommand = true)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options before the command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Directory for the state of containers; it should be on a tmpfs.
    #[arg(long, default_value = "/run/runx", value_name = "DIR")]
    pub(crate) root: PathBuf,
    /// File to write the log to, instead of standard error.
    #[arg(long, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,
    /// Format of the log.
    #[arg(long, default_value = "text", value_name = "FORMAT")]
    pub(crate) log_format: LogFormat,
    /// Log what is done, too.
    #[arg(long)]
    pub(crate) debug: bool,
    /// Let systemd manage cgroups.
    #[arg(long)]
    pub(crate) systemd_cgroup: bool,
}

/// Formats of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// For programs, a JSON object a line.
    Json,
}

/// Formats of listings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ListFormat {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a container; `start` then starts its program.
    Create(Create),
    /// Create a container, run its program, and delete it.
    Run(Run),
    /// Start the program of a created container.
    Start {
        /// The container.
        #[arg(value_name = "CONTAINER")]
        id: String,
    },
    /// Run another process in a running container.
    Exec(Exec),
    /// Print the state of a container as JSON.
    State {
        /// The container.
        #[arg(value_name = "CONTAINER")]
        id: String,
    },
    /// Send a signal to a container's first process.
    Kill {
        /// Send it to all of the container's processes.
        #[arg(short, long)]
        all: bool,
        /// The container.
        #[arg(value_name = "CONTAINER")]
        id: String,
        /// A number or name.
        #[arg(default_value = "SIGTERM", allow_hyphen_values = true)]
        signal: String,
    },
    /// Delete a container that has stopped.
    Delete {
        /// End it first if it runs; fine if it is not there.
        #[arg(short, long)]
        force: bool,
        /// The container.
        #[arg(value_name = "CONTAINER")]
        id: String,
    },
    /// Stop all processes of a container where they are.
    Pause {
        /// The container.
        #[arg(value_name = "CONTAINER")]
        id: String,
    },
    /// Let the processes of a paused container go on.
    Resume {
        /// The container.
        #[arg(value_name = "CONTAINER")]
        id: String,
    },
    /// List containers.
    List {
        /// How to print them.
        #[arg(short, long, default_value = "table", value_name = "FORMAT")]
        format: ListFormat,
        /// Print ids only.
        #[arg(short, long)]
        quiet: bool,
    },
    /// Write a config.json to begin with.
    Spec {
        /// Directory to write it to.
        #[arg(short, long, default_value = ".", value_name = "DIR")]
        bundle: PathBuf,
    },
    /// WASM modules.
    #[command(subcommand)]
    Wasm(WasmCommand),
}

impl Command {
    /// Whether this command forks into containers.
    pub(crate) fn makes_processes(&self) -> bool {
        matches!(self, Self::Create(_) | Self::Run(_) | Self::Exec(_))
    }
}

/// What `create` and `run` share.
#[derive(Debug, Args)]
pub(crate) struct Create {
    /// The bundle's directory.
    #[arg(short, long, default_value = ".", value_name = "DIR")]
    pub(crate) bundle: PathBuf,
    /// Unix socket that receives the master of the container's terminal.
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console_socket: Option<PathBuf>,
    /// File to write the pid of the container's first process to.
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Enter the root filesystem without pivot_root, for hosts that run from an initramfs.
    #[arg(long)]
    pub(crate) no_pivot: bool,
    /// Keep the session keyring of the caller.
    #[arg(long)]
    pub(crate) no_new_keyring: bool,
    /// How many descriptors after the first three the container inherits.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) preserve_fds: u32,
    /// A name for the container.
    #[arg(value_name = "CONTAINER")]
    pub(crate) id: String,
}

/// `run`.
#[derive(Debug, Args)]
pub(crate) struct Run {
    #[command(flatten)]
    pub(crate) create: Create,
    /// Do not wait for the container's end.
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Do not delete the container when it ends.
    #[arg(long)]
    pub(crate) keep: bool,
    /// Leave processes that lose their parent to the host's init.
    #[arg(long)]
    pub(crate) no_subreaper: bool,
}

/// `exec`.
#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// Unix socket that receives the master of the process's terminal.
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console_socket: Option<PathBuf>,
    /// Working directory in the container.
    #[arg(long, value_name = "DIR")]
    pub(crate) cwd: Option<PathBuf>,
    /// Add a variable to the environment.
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub(crate) env: Vec<String>,
    /// Give the process a terminal.
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Numeric user and, after a colon, group.
    #[arg(short, long, value_name = "UID[:GID]")]
    pub(crate) user: Option<String>,
    /// Add a supplementary group.
    #[arg(short = 'g', long, value_name = "GID")]
    pub(crate) additional_gids: Vec<u32>,
    /// File with a process description as in config.json.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) process: Option<PathBuf>,
    /// Do not wait for the process's end.
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// File to write the process's pid to.
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Set no_new_privs.
    #[arg(long)]
    pub(crate) no_new_privs: bool,
    /// Add a capability to the bounding, effective and permitted sets.
    #[arg(short, long, value_name = "CAP")]
    pub(crate) cap: Vec<String>,
    /// How many descriptors after the first three the process inherits.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) preserve_fds: u32,
    /// The container.
    #[arg(value_name = "CONTAINER")]
    pub(crate) id: String,
    /// The program and its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    pub(crate) args: Vec<String>,
}

/// `wasm`.
#[derive(Debug, Subcommand)]
pub(crate) enum WasmCommand {
    /// Compile a module from standard input to standard output.
    Compile(Compile),
}

/// `wasm compile`.
#[derive(Debug, Args)]
pub(crate) struct Compile {
    /// The module's name in messages.
    #[arg(long, default_value = "module", value_name = "NAME")]
    pub(crate) name: String,
    /// Compile for a process with a small limit on its address space.
    #[arg(long)]
    pub(crate) compact: bool,
    /// Give up all privileges first and limit memory and time: the module is somebody else's.
    #[arg(long)]
    pub(crate) confined: bool,
}
