//! The commands that runc has, too: what their words mean.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::scan::Words;
use super::units::{bytes, duration};
use super::{Command, checkpoint, list_format, text};

/// What `create` and `run` share.
#[derive(Debug)]
pub(crate) struct Create {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) config: Option<PathBuf>,
    pub(crate) console_socket: Option<PathBuf>,
    pub(crate) pidfd_socket: Option<PathBuf>,
    pub(crate) pid_file: Option<PathBuf>,
    pub(crate) no_pivot: bool,
    pub(crate) no_new_keyring: bool,
    pub(crate) preserve_fds: u32,
}

/// `run`.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) create: Create,
    pub(crate) detach: bool,
    pub(crate) keep: bool,
    pub(crate) no_subreaper: bool,
}

/// `exec`.
#[derive(Debug)]
pub(crate) struct Exec {
    pub(crate) id: String,
    pub(crate) args: Vec<String>,
    pub(crate) process: Option<PathBuf>,
    pub(crate) console_socket: Option<PathBuf>,
    pub(crate) pidfd_socket: Option<PathBuf>,
    pub(crate) cwd: Option<PathBuf>,
    pub(crate) env: Vec<String>,
    /// `None` if the flag was not given.
    pub(crate) tty: Option<bool>,
    pub(crate) user: Option<String>,
    pub(crate) additional_gids: Vec<u32>,
    pub(crate) detach: bool,
    pub(crate) pid_file: Option<PathBuf>,
    pub(crate) process_label: Option<String>,
    pub(crate) apparmor: Option<String>,
    /// `None` if the flag was not given.
    pub(crate) no_new_privs: Option<bool>,
    pub(crate) cap: Vec<String>,
    pub(crate) preserve_fds: u32,
    pub(crate) cgroup: Vec<String>,
    pub(crate) ignore_paused: bool,
}

/// `update`.
#[derive(Debug, Default)]
pub(crate) struct Update {
    pub(crate) id: String,
    pub(crate) resources: Option<PathBuf>,
    pub(crate) blkio_weight: Option<u16>,
    pub(crate) cpu_period: Option<u64>,
    pub(crate) cpu_quota: Option<i64>,
    pub(crate) cpu_burst: Option<u64>,
    pub(crate) cpu_share: Option<u64>,
    pub(crate) cpu_rt_period: Option<u64>,
    pub(crate) cpu_rt_runtime: Option<i64>,
    pub(crate) cpu_idle: Option<i64>,
    pub(crate) cpuset_cpus: Option<String>,
    pub(crate) cpuset_mems: Option<String>,
    /// Whether a flag was given that has had no effect for years.
    pub(crate) kernel_memory: bool,
    pub(crate) memory: Option<i64>,
    pub(crate) memory_reservation: Option<i64>,
    pub(crate) memory_swap: Option<i64>,
    pub(crate) pids_limit: Option<i64>,
    pub(crate) l3_cache_schema: Option<String>,
    pub(crate) mem_bw_schema: Option<String>,
}

/// A command by its name. `id` is its first word, and `others` are those after it.
pub(super) fn build(
    name: &str,
    id: String,
    mut others: impl Iterator<Item = OsString>,
    words: &mut Words,
) -> Result<Command> {
    Ok(match name {
        "create" => Command::Create(create(id, words)?),
        "run" => Command::Run(Run {
            create: create(id, words)?,
            detach: words.on("detach"),
            keep: words.on("keep"),
            no_subreaper: words.on("no-subreaper"),
        }),
        "start" => Command::Start { id },
        "exec" => Command::Exec(Box::new(exec(id, others, words)?)),
        "state" => Command::State { id },
        "kill" => {
            let signal = others
                .next()
                .map(text)
                .transpose()?
                .filter(|signal| !signal.is_empty())
                .unwrap_or_else(|| "SIGTERM".to_owned());
            Command::Kill { id, signal, all: words.on("all") }
        }
        "delete" => Command::Delete { id, force: words.on("force") },
        "list" => Command::List { format: list_format(words)?, quiet: words.on("quiet") },
        "ps" if id.is_empty() => {
            Command::PsAll { format: list_format(words)?, all: words.on("all"), quiet: words.on("quiet") }
        }
        "ps" if words.on("all") || words.on("quiet") => {
            bail!("--all and --quiet are for \"ps\" without a container; what follows a container is for ps itself")
        }
        "ps" => Command::Ps { id, format: list_format(words)?, options: others.collect() },
        "pause" => Command::Pause { id },
        "resume" => Command::Resume { id },
        "checkpoint" => Command::Checkpoint(Box::new(checkpoint::checkpoint(id, words)?)),
        "restore" => Command::Restore(Box::new(checkpoint::restore(id, words)?)),
        "update" => Command::Update(Box::new(update(id, words)?)),
        "events" => {
            let interval =
                words.text("interval")?.map_or(Ok(Duration::from_secs(5)), |text| duration("interval", text))?;
            Command::Events { id, interval, once: words.on("stats") }
        }
        "spec" => Command::Spec {
            bundle: words.path("bundle"),
            rootless: words.on("rootless"),
            defaults: words.on("defaults"),
        },
        "features" => Command::Features,
        other => bail!("command {other:?} has no meaning"),
    })
}

fn create(id: String, words: &Words) -> Result<Create> {
    Ok(Create {
        id,
        bundle: words.path("bundle").unwrap_or_else(|| PathBuf::from(".")),
        config: words.path("config"),
        console_socket: words.path("console-socket"),
        pidfd_socket: words.path("pidfd-socket"),
        pid_file: words.path("pid-file"),
        no_pivot: words.on("no-pivot"),
        no_new_keyring: words.on("no-new-keyring"),
        preserve_fds: words.number("preserve-fds")?.unwrap_or(0),
    })
}

fn exec(id: String, args: impl Iterator<Item = OsString>, words: &Words) -> Result<Exec> {
    let owned = |name| words.text(name).map(|text| text.map(str::to_owned));
    // An empty user is a mistake and not the default one, which is root as a rule.
    let user = if words.given("user") { Some(owned("user")?.unwrap_or_default()) } else { None };
    Ok(Exec {
        id,
        args: args.map(text).collect::<Result<_>>()?,
        process: words.path("process"),
        console_socket: words.path("console-socket"),
        pidfd_socket: words.path("pidfd-socket"),
        cwd: words.path("cwd"),
        env: words.texts("env")?,
        tty: words.given("tty").then(|| words.on("tty")),
        user,
        additional_gids: words.numbers("additional-gids")?,
        detach: words.on("detach"),
        pid_file: words.path("pid-file"),
        process_label: owned("process-label")?,
        apparmor: owned("apparmor")?,
        no_new_privs: words.given("no-new-privs").then(|| words.on("no-new-privs")),
        cap: words.texts("cap")?,
        preserve_fds: words.number("preserve-fds")?.unwrap_or(0),
        cgroup: words.texts("cgroup")?,
        ignore_paused: words.on("ignore-paused"),
    })
}

fn update(id: String, words: &Words) -> Result<Update> {
    let owned = |name| words.text(name).map(|text| text.map(str::to_owned));
    let size = |name| words.text(name)?.map(|text| bytes(text).with_context(|| format!("--{name}"))).transpose();
    Ok(Update {
        id,
        resources: words.path("resources"),
        blkio_weight: words.number("blkio-weight")?,
        cpu_period: words.number("cpu-period")?,
        cpu_quota: words.number("cpu-quota")?,
        cpu_burst: words.number("cpu-burst")?,
        cpu_share: words.number("cpu-share")?,
        cpu_rt_period: words.number("cpu-rt-period")?,
        cpu_rt_runtime: words.number("cpu-rt-runtime")?,
        cpu_idle: words.number("cpu-idle")?,
        cpuset_cpus: owned("cpuset-cpus")?,
        cpuset_mems: owned("cpuset-mems")?,
        kernel_memory: size("kernel-memory")?.is_some() | size("kernel-memory-tcp")?.is_some(),
        memory: size("memory")?,
        memory_reservation: size("memory-reservation")?,
        memory_swap: size("memory-swap")?,
        pids_limit: words.number("pids-limit")?,
        l3_cache_schema: owned("l3-cache-schema")?,
        mem_bw_schema: owned("mem-bw-schema")?,
    })
}
