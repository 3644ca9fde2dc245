//! The command line: the global flags, and which command is meant. What a command's own words mean is in a file for each
//! group of them.

mod checkpoint;
pub(crate) mod complete;
mod container;
pub(crate) mod help;
mod network;
mod oci;
mod pool;
mod scan;
mod storage;
mod suggest;
mod tables;
mod units;
mod wasm;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::config::Config;
pub(crate) use checkpoint::{Checkpoint, Restore};
pub(crate) use container::{Container, ContainerExec, DetachKeys, Logs, Ls, Make, Pull, Streams};
use help::Topic;
pub(crate) use network::Network;
pub(crate) use oci::{Create, Exec, Run, Update};
pub(crate) use pool::{Pool, PoolExec};
pub(crate) use scan::Flag;
use scan::{Order, Words};
pub(crate) use storage::{ImageFilter, ImageMount, Images, Storage};
use tables::{COMMANDS, groups};
pub(crate) use tables::{GLOBAL, GROUP_NAMES, Syntax};
pub(crate) use units::bytes;
pub(crate) use wasm::{Instances, Process, Program, StatsFormat, Wasm};

/// What all commands share.
#[derive(Clone, Debug)]
pub(crate) struct Global {
    /// Where the state of containers is.
    pub(crate) root: PathBuf,
    /// Whether that was said, or is the default.
    pub(crate) root_given: bool,
    /// Where images are, and what containers keep, if that was said.
    pub(crate) storage_root: Option<PathBuf>,
    /// The config file, if it is not the usual one.
    pub(crate) config_file: Option<PathBuf>,
    /// File to write the log to, instead of standard error.
    pub(crate) log: Option<PathBuf>,
    /// Format of the log.
    pub(crate) log_format: LogFormat,
    /// Whether that was said, or is the default.
    log_format_given: bool,
    /// Log what is done, too.
    pub(crate) debug: bool,
    /// Let systemd manage cgroups.
    pub(crate) systemd_cgroup: bool,
    systemd_cgroup_given: bool,
    /// Whether lacking permission on cgroups is fine; `None`: find out.
    pub(crate) rootless: Option<bool>,
    /// A flag that runc used to have was given.
    pub(crate) criu: bool,
}

impl Global {
    /// Takes from the config file what no flag says.
    pub(crate) fn complete(&mut self, config: &Config) {
        if let Some(root) = config.root.as_ref().filter(|_| !self.root_given) {
            self.root.clone_from(root);
        }
        if let Some(format) = config.log_format.filter(|_| !self.log_format_given) {
            self.log_format = format;
        }
        self.storage_root = self.storage_root.take().or_else(|| config.storage_root.clone());
        self.log = self.log.take().or_else(|| config.log.clone());
        if !self.systemd_cgroup_given {
            self.systemd_cgroup = config.systemd_cgroup;
        }
    }

    /// Where images are, and what containers keep.
    pub(crate) fn storage_root(&self) -> PathBuf {
        self.storage_root.clone().unwrap_or_else(default_storage_root)
    }
}

/// Formats of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// For programs, a JSON object a line.
    Json,
}

/// Formats of listings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ListFormat {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// The commands.
#[derive(Debug)]
pub(crate) enum Command {
    Create(Create),
    Run(Run),
    Start { id: String },
    Exec(Box<Exec>),
    State { id: String },
    Kill { id: String, signal: String, all: bool },
    Delete { id: String, force: bool },
    List { format: ListFormat, quiet: bool },
    PsAll { format: ListFormat, all: bool, quiet: bool },
    Ps { id: String, format: ListFormat, options: Vec<OsString> },
    Pause { id: String },
    Resume { id: String },
    Update(Box<Update>),
    Checkpoint(Box<Checkpoint>),
    Restore(Box<Restore>),
    Events { id: String, interval: Duration, once: bool },
    Spec { bundle: Option<PathBuf>, rootless: bool, defaults: bool },
    Features,
    Wasm(Box<Wasm>),
    Process(Box<Process>),
    Agent(Agent),
    Pool(Box<Pool>),
    Container(Box<Container>),
    Network(Box<Network>),
    Check { format: ListFormat },
    Info { format: ListFormat },
    Version { format: ListFormat },
    Storage(Box<Storage>),
    Help(Topic),
    Completion { shell: String },
    Complete { words: Vec<OsString> },
    Man { of: Topic, output: Option<PathBuf> },
}

/// `agent`.
#[derive(Debug)]
pub(crate) struct Agent {
    /// Where it is put; `None` for this machine.
    pub(crate) container: Option<String>,
    /// Its own flags.
    pub(crate) flags: Vec<String>,
}

/// What `-v` and `--version` mean.
const VERSION: Command = Command::Version { format: ListFormat::Table };

/// Reads the command line, without the program's name. The global flags come back even if there is a mistake
/// in the rest, so that it is reported where they say.
pub(crate) fn parse(args: impl Iterator<Item = OsString>) -> (Result<Global>, Result<Command>) {
    let mut words = Words::default();
    if let Err(e) = words.read(args, &[GLOBAL], Order::BeforeFirst) {
        return (global(&words), Err(e));
    }
    let rest = std::mem::take(&mut words.others);
    let command = command(rest, &mut words);
    (global(&words), command)
}

fn global(words: &Words) -> Result<Global> {
    let root_given = words.given("root");
    let root = match words.path("root") {
        Some(root) => root,
        None if root_given => PathBuf::from("/"),
        None => default_root(),
    };
    let root = directory("root", &root)?;
    let storage_root = match words.path("storage-root") {
        None if words.given("storage-root") => Some(PathBuf::from("/")),
        other => other,
    };
    let storage_root = storage_root.map(|path| directory("storage-root", &path)).transpose()?;
    let config_file = match words.path("config-file") {
        None if words.given("config-file") => bail!("--config-file must not be empty"),
        other => other,
    };
    let log_format = match words.text("log-format")? {
        None | Some("text") => LogFormat::Text,
        Some("json") => LogFormat::Json,
        Some(other) => bail!("invalid --log-format {other:?}: it is text or json"),
    };
    let rootless = match words.text("rootless")? {
        None => None,
        Some(text) => match text.to_ascii_lowercase().as_str() {
            "auto" => None,
            "1" | "t" | "true" => Some(true),
            "0" | "f" | "false" => Some(false),
            _ => bail!("invalid --rootless {text:?}: it is true, false or auto"),
        },
    };
    Ok(Global {
        root,
        root_given,
        storage_root,
        config_file,
        log: words.path("log"),
        log_format,
        log_format_given: words.given("log-format"),
        debug: words.on("debug") || words.on("verbose"),
        systemd_cgroup: words.on("systemd-cgroup"),
        systemd_cgroup_given: words.given("systemd-cgroup"),
        rootless,
        criu: words.given("criu"),
    })
}

/// The absolute form of the directory that a flag names, which must not be everything.
fn directory(flag: &str, path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path).with_context(|| format!("--{flag} {}", path.display()))?;
    if path.components().all(|part| matches!(part, std::path::Component::RootDir)) {
        bail!("--{flag} must not be empty or /");
    }
    Ok(path)
}

/// Whether the machine is this user's. The root of a user namespace may call himself so, or still be the user who made it.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
        && (std::env::var_os("USER").is_some_and(|name| name == "root") || !runx_core::rootless::is_unprivileged())
}

/// Where people who are not root may keep data, by the XDG Base Directory Specification.
fn default_storage_root() -> PathBuf {
    let own = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    match own("XDG_DATA_HOME").or_else(|| own("HOME").map(|home| home.join(".local/share"))) {
        Some(data) if !is_root() => data.join("runx"),
        _ => PathBuf::from("/var/lib/runx"),
    }
}

/// Where people who are not root may write, as runc has it.
fn default_root() -> PathBuf {
    let variable = std::env::var_os("XDG_RUNTIME_DIR").filter(|directory| !directory.is_empty());
    let user = nix::unistd::geteuid();
    match variable.map(PathBuf::from) {
        Some(directory) if !is_root() => directory.join("runx"),
        None if !user.is_root() && Path::new(&format!("/run/user/{user}")).is_dir() => {
            PathBuf::from(format!("/run/user/{user}/runx"))
        }
        _ => PathBuf::from("/run/runx"),
    }
}

fn command(rest: Vec<OsString>, words: &mut Words) -> Result<Command> {
    let mut rest = rest.into_iter();
    if words.on("version") {
        return Ok(VERSION);
    }
    let Some(mut name) = rest.next() else {
        let version = words.on("verbose") && !words.on("help");
        return Ok(if version { VERSION } else { Command::Help(Topic::All) });
    };
    if name == complete::NAME {
        return Ok(Command::Complete { words: rest.collect() });
    }
    let asked = words.on("help") || matches!(name.to_str(), Some("help" | "h"));
    if matches!(name.to_str(), Some("help" | "h")) {
        match rest.next() {
            Some(of) => name = of,
            None => return Ok(Command::Help(Topic::All)),
        }
    }
    if name == "pool" && !asked && rest.as_slice().first().is_some_and(|verb| verb == "serve") {
        // Its flags are the server's.
        return Ok(Command::Pool(Box::new(Pool::Serve { flags: rest.skip(1).collect() })));
    }
    let syntax = match name.to_str() {
        Some(name) if GROUP_NAMES.contains(&name) => {
            let verb = rest.next().unwrap_or_default();
            if verb.is_empty() || matches!(verb.to_str(), Some("--help" | "-h" | "-help" | "help" | "h")) {
                return Ok(Command::Help(Topic::find(&[name]).unwrap_or(Topic::All)));
            }
            let wanted = format!("{name} {}", verb.display());
            groups().find(|syntax| syntax.name == wanted).with_context(|| no_verb(name, &verb))?
        }
        known => COMMANDS.iter().find(|syntax| Some(syntax.name) == known).with_context(|| no_command(&name))?,
    };
    if asked {
        return Ok(Command::Help(Topic::Command(syntax)));
    }
    let tables: Vec<_> = syntax.flags.iter().copied().chain([GLOBAL]).collect();
    words.read(rest, &tables, syntax.order).with_context(|| format!("{} (see \"runx help {0}\")", syntax.name))?;
    if words.on("help") {
        return Ok(Command::Help(Topic::Command(syntax)));
    }
    let (least, most) = syntax.count;
    let count = words.others.len();
    if count < least || count > most {
        let wanted = match (least, most) {
            (least, most) if least == most => format!("exactly {least}"),
            (least, _) if count < least => format!("a minimum of {least}"),
            (_, most) => format!("a maximum of {most}"),
        };
        bail!("{:?} requires {wanted} argument(s), not {count} (see \"runx help {0}\")", syntax.name);
    }
    build(syntax.name, words).with_context(|| syntax.name.to_owned())
}

fn no_command(name: &std::ffi::OsStr) -> String {
    let meant = name.to_str().and_then(suggest::command);
    let meant = meant.map(|meant| format!("did you mean \"runx {meant}\"? ")).unwrap_or_default();
    format!("unknown command {name:?}: {meant}\"runx help\" lists all")
}

fn no_verb(group: &str, verb: &std::ffi::OsStr) -> String {
    let verbs: Vec<_> = help::of_group(group).map(|(verb, _)| verb).collect();
    let meant = verb.to_str().and_then(|verb| suggest::verb(group, verb));
    let meant = meant.map(|meant| format!("did you mean \"runx {group} {meant}\"? ")).unwrap_or_default();
    format!("{group} has no command {verb:?}: {meant}it has {} (see \"runx help {group}\")", verbs.join(", "))
}

fn build(name: &str, words: &mut Words) -> Result<Command> {
    let mut others = std::mem::take(&mut words.others).into_iter();
    let id = others.next().map(text).transpose()?.unwrap_or_default();
    Ok(match name {
        "check" => Command::Check { format: list_format(words)? },
        "info" => Command::Info { format: list_format(words)? },
        "completion" => Command::Completion { shell: id },
        "man" => {
            let second = others.next().map(text).transpose()?.unwrap_or_default();
            let names: Vec<_> = [id.as_str(), &second].into_iter().filter(|word| !word.is_empty()).collect();
            let of = Topic::find(&names).with_context(|| {
                let name = names.first().copied().unwrap_or_default();
                if names.len() > 1 { no_verb(name, second.as_ref()) } else { no_command(name.as_ref()) }
            })?;
            Command::Man { of, output: words.path("output") }
        }
        "version" => Command::Version { format: list_format(words)? },
        "agent" => {
            let own = std::iter::once(id).filter(|word| !word.is_empty()).map(Ok);
            let flags = own.chain(others.map(text)).collect::<Result<Vec<_>>>()?;
            Command::Agent(Agent { container: words.text("container")?.map(str::to_owned), flags })
        }
        name if name.starts_with("container ") => {
            Command::Container(Box::new(container::build(name, id, others, words)?))
        }
        name if name.starts_with("process ") => {
            Command::Process(Box::new(wasm::build_process(name, id, others, words)?))
        }
        name if name.starts_with("network ") => Command::Network(Box::new(network::build(name, id, others, words)?)),
        name if name.starts_with("storage ") => Command::Storage(Box::new(storage::build(name, id, others, words)?)),
        name if name.starts_with("pool ") => Command::Pool(Box::new(pool::build(name, id, others, words)?)),
        name if name.starts_with("wasm ") => Command::Wasm(Box::new(wasm::build(name, id, others, words)?)),
        name => oci::build(name, id, others, words)?,
    })
}

fn text(word: OsString) -> Result<String> {
    word.into_string().map_err(|word| anyhow::anyhow!("{word:?} is not UTF-8"))
}

fn list_format(words: &Words) -> Result<ListFormat> {
    match words.text("format")? {
        None | Some("table") => Ok(ListFormat::Table),
        Some("json") => Ok(ListFormat::Json),
        Some(other) => bail!("invalid format option {other:?}: it is table or json"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &[&str]) -> (Result<Global>, Result<Command>) {
        super::parse(line.iter().map(OsString::from))
    }

    #[test]
    fn a_lone_v_is_the_version_and_one_before_a_command_is_verbose() {
        assert!(matches!(parse(&["-v"]).1, Ok(Command::Version { .. })));
        assert!(matches!(parse(&["--version"]).1, Ok(Command::Version { .. })));
        let (global, command) = parse(&["-v", "state", "c"]);
        assert!(global.unwrap().debug && matches!(command, Ok(Command::State { .. })));
    }

    #[test]
    fn global_flags_are_kept_when_the_rest_is_wrong() {
        let (global, command) = parse(&["--log-format", "json", "state", "--nope", "c"]);
        assert_eq!(global.unwrap().log_format, LogFormat::Json);
        assert!(format!("{:#}", command.unwrap_err()).contains("--nope"));
        let (global, command) = parse(&["state", "c", "--root", "/x"]);
        assert_eq!(global.unwrap().root, Path::new("/x"));
        assert!(command.is_ok());
    }

    #[test]
    fn words_are_counted() {
        for (line, wanted) in [
            (&["state"][..], "exactly 1"),
            (&["state", "a", "b"], "exactly 1"),
            (&["exec"], "a minimum of 1"),
            (&["kill", "a", "9", "b"], "a maximum of 2"),
            (&["list", "a"], "exactly 0"),
        ] {
            assert!(format!("{:#}", parse(line).1.unwrap_err()).contains(wanted), "{line:?}");
        }
    }

    #[test]
    fn roots_that_are_everything_are_refused() {
        for bad in ["/", "", "//"] {
            assert!(parse(&["--root", bad, "list"]).0.is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_empty_user_is_not_the_default_user() {
        match parse(&["exec", "-u", "", "c", "id"]).1 {
            Ok(Command::Exec(exec)) => assert_eq!(exec.user.as_deref(), Some("")),
            other => panic!("{other:?}"),
        }
    }
}
