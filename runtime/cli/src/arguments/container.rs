//! What the commands of `runx container` are told.

mod making;
mod mounts;
mod values;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::scan::{Flag, Order, Words, option, switch};
use super::tables::{ANY, FORMAT, NONE, QUIET, Syntax, command};
use super::{ListFormat, list_format, text};
use crate::container::options::{Limits, Network, Options, Restart};
pub(crate) use values::DetachKeys;
use values::Selection;

/// `runx container …`.
#[derive(Debug)]
pub(crate) enum Container {
    Run(Box<Make>),
    Create(Box<Make>),
    Start { ids: Vec<String>, attach: bool, interactive: bool, streams: Streams },
    Stop { ids: Vec<String>, all: bool, timeout: Option<Duration>, signal: Option<String> },
    Restart { ids: Vec<String>, timeout: Option<Duration> },
    Kill { ids: Vec<String>, signal: String },
    Rm { ids: Vec<String>, force: bool, volumes: bool, all: bool },
    Delete { ids: Vec<String>, timeout: Option<Duration> },
    Ls(Ls),
    Exec(Box<ContainerExec>),
    Logs(Logs),
    Attach { id: String, no_stdin: bool, streams: Streams },
    Inspect { ids: Vec<String> },
    Stats { ids: Vec<String>, no_stream: bool, format: ListFormat },
    Top { id: String, options: Vec<OsString> },
    Pause { ids: Vec<String> },
    Unpause { ids: Vec<String> },
    Wait { ids: Vec<String> },
    Cp { from: String, to: String, archive: bool },
    Update { ids: Vec<String>, limits: Limits, restart: Option<Restart> },
}

/// What `run` and `create` are told.
#[derive(Debug)]
pub(crate) struct Make {
    pub(crate) id: Option<String>,
    pub(crate) options: Options,
    /// `--network`, if it was given.
    pub(crate) network: Option<Network>,
    /// The size of a log's file, and how many there are, if they were given.
    pub(crate) log: (Option<u64>, Option<u32>),
    pub(crate) detach: bool,
    pub(crate) streams: Streams,
    pub(crate) pull: Pull,
    pub(crate) cidfile: Option<PathBuf>,
}

/// When an image is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pull {
    Always,
    Missing,
    Never,
}

/// How the user's streams are connected.
#[derive(Debug)]
pub(crate) struct Streams {
    /// Pass signals on.
    pub(crate) sig_proxy: bool,
    pub(crate) detach_keys: DetachKeys,
}

/// `ls`.
#[derive(Debug)]
pub(crate) struct Ls {
    pub(crate) all: bool,
    pub(crate) quiet: bool,
    pub(crate) format: ListFormat,
    pub(crate) no_trunc: bool,
    /// The newest that many.
    pub(crate) last: Option<usize>,
    pub(crate) selection: Selection,
}

/// `exec`.
#[derive(Debug)]
pub(crate) struct ContainerExec {
    pub(crate) id: String,
    pub(crate) args: Vec<String>,
    pub(crate) tty: bool,
    pub(crate) interactive: bool,
    pub(crate) detach: bool,
    pub(crate) env: Vec<String>,
    pub(crate) cwd: Option<String>,
    pub(crate) user: Option<String>,
    pub(crate) privileged: bool,
}

/// `logs`.
#[derive(Debug)]
pub(crate) struct Logs {
    pub(crate) id: String,
    pub(crate) follow: bool,
    /// The last that many lines.
    pub(crate) tail: Option<usize>,
    pub(crate) since: Option<std::time::SystemTime>,
    pub(crate) until: Option<std::time::SystemTime>,
    pub(crate) timestamps: bool,
}

const ID: &[Flag] = &[option("id", Some('i'), "CONTAINER", "the container, as another way to name it")];
const LONG_ID: &[Flag] = &[option("id", None, "CONTAINER", "the container, as another way to name it")];

const STREAMS: &[Flag] = &[
    switch("sig-proxy", None, "pass signals on to the container (default true)"),
    option(
        "detach-keys",
        None,
        "KEYS",
        "keys that leave the container alone (default ctrl-p,ctrl-q); none for no keys",
    ),
];

const DETACH: &[Flag] = &[switch("detach", Some('d'), "run it in the background and print its id")];
const REMOVE: &[Flag] = &[switch("rm", None, "remove it at its end")];

const START: &[Flag] = &[
    switch("attach", Some('a'), "stay with it: its output, and its exit code"),
    switch("interactive", Some('i'), "the same, with standard input"),
];

const TIME: &[Flag] =
    &[option("time", Some('t'), "SECONDS", "how long to wait before it is killed (default 10, or its --stop-timeout)")];
const STOP: &[Flag] = &[
    option("signal", Some('s'), "SIGNAL", "what asks it to stop (default SIGTERM, or its --stop-signal)"),
    switch("all", Some('a'), "all that run"),
];
const KILL: &[Flag] = &[option("signal", Some('s'), "SIGNAL", "which one (default SIGKILL)")];
const RM: &[Flag] = &[
    switch("force", Some('f'), "kill it first if it runs; fine if it is not there"),
    switch("volumes", Some('v'), "remove its volumes without a name, too"),
    switch("all", Some('a'), "all that do not run; with --force, all"),
];

const LS: &[Flag] = &[
    switch("all", Some('a'), "those that do not run, too"),
    switch("no-trunc", None, "do not shorten what is long"),
    switch("latest", Some('l'), "the newest one"),
    option("last", Some('n'), "N", "the newest so many, whether they run or not"),
    option(
        "filter",
        None,
        "KEY=VALUE",
        "those with this id, name, status, image, label, exited or ancestor; may be given more than once",
    ),
];

const EXEC: &[Flag] = &[
    switch("interactive", Some('i'), "pass standard input on"),
    switch("tty", Some('t'), "give it a terminal"),
    switch("detach", Some('d'), "do not wait for its end"),
    option("env", Some('e'), "NAME[=VALUE]", "variable of its environment; without a value, yours"),
    option("workdir", Some('w'), "DIR", "its working directory"),
    option("user", Some('u'), "USER[:GROUP]", "who executes it, by name or number"),
    switch("privileged", None, "with all capabilities"),
    option("command", Some('c'), "PROGRAM", "the program, as another way to name it"),
    option("args", Some('a'), "ARGUMENT", "its argument; may be given more than once"),
];

const LOGS: &[Flag] = &[
    switch("follow", Some('f'), "go on with what comes, until its end"),
    option("tail", Some('n'), "N", "the last so many lines; all (default) for all"),
    option(
        "since",
        None,
        "TIME",
        "what came since then: 2006-01-02T15:04:05Z, a number of seconds, or 10m for ten minutes ago",
    ),
    option("until", None, "TIME", "what came until then"),
    switch("timestamps", Some('t'), "with the time of each line"),
];

const ATTACH: &[Flag] = &[switch("no-stdin", None, "do not pass standard input on")];
const STATS: &[Flag] = &[switch("no-stream", None, "print them once")];
const CP: &[Flag] = &[switch("archive", Some('a'), "keep owners")];
const RESTART_POLICY: &[Flag] = &[option(
    "restart",
    None,
    "POLICY",
    "when it is started again: no (default), on-failure[:N], always or unless-stopped",
)];

/// All of them.
#[rustfmt::skip]
pub(super) const COMMANDS: &[Syntax] = &[
    command("container run", "IMAGE [COMMAND…]", "run a program in a new container",
        &[making::FLAGS, making::LIMITS, RESTART_POLICY, DETACH, REMOVE, STREAMS], Order::BeforeFirst, (0, ANY)),
    command("container create", "IMAGE [COMMAND…]", "make a container, for start",
        &[making::FLAGS, making::LIMITS, RESTART_POLICY, REMOVE], Order::BeforeFirst, (0, ANY)),
    command("container start", "CONTAINER…", "start containers that are there",
        &[START, STREAMS, LONG_ID], Order::Anywhere, (0, ANY)),
    command("container stop", "CONTAINER…", "ask containers to stop, and kill those that do not",
        &[TIME, STOP, ID], Order::Anywhere, (0, ANY)),
    command("container restart", "CONTAINER…", "stop containers and start them again",
        &[TIME, ID], Order::Anywhere, (0, ANY)),
    command("container kill", "CONTAINER…", "send a signal to containers", &[KILL, ID], Order::Anywhere, (0, ANY)),
    command("container rm", "CONTAINER…", "remove containers that do not run", &[RM, ID], Order::Anywhere, (0, ANY)),
    command("container delete", "CONTAINER…", "stop containers that run, and remove them",
        &[TIME, ID], Order::Anywhere, (0, ANY)),
    command("container ls", "", "list containers", &[LS, FORMAT, QUIET], Order::Anywhere, (0, 0)),
    command("container list", "", "the same", &[LS, FORMAT, QUIET], Order::Anywhere, (0, 0)),
    command("container ps", "", "the same", &[LS, FORMAT, QUIET], Order::Anywhere, (0, 0)),
    command("container exec", "CONTAINER COMMAND…", "run another program in a container",
        &[EXEC, LONG_ID], Order::BeforeFirst, (0, ANY)),
    command("container logs", "CONTAINER", "print what a container has printed", &[LOGS, ID], Order::Anywhere, (0, 1)),
    command("container attach", "CONTAINER", "connect to a container's streams",
        &[ATTACH, STREAMS, ID], Order::Anywhere, (0, 1)),
    command("container inspect", "CONTAINER…", "print all that is known of containers as JSON",
        &[ID], Order::Anywhere, (0, ANY)),
    command("container stats", "[CONTAINER…]", "print what containers use, again and again",
        &[STATS, FORMAT], Order::Anywhere, (0, ANY)),
    command("container top", "CONTAINER [OPTION OF PS…]", "list the processes of a container",
        NONE, Order::BeforeFirst, (1, ANY)),
    command("container pause", "CONTAINER…", "stop all processes of containers where they are",
        &[ID], Order::Anywhere, (0, ANY)),
    command("container unpause", "CONTAINER…", "let the processes of paused containers go on",
        &[ID], Order::Anywhere, (0, ANY)),
    command("container wait", "CONTAINER…", "wait for the end of containers and print their exit codes",
        &[ID], Order::Anywhere, (0, ANY)),
    command("container cp", "CONTAINER:PATH DIR|FILE|- (or the other way)", "copy files out of a container, or into it",
        &[CP], Order::Anywhere, (2, 2)),
    command("container update", "CONTAINER…", "change the limits of containers",
        &[making::LIMITS, RESTART_POLICY, ID], Order::Anywhere, (0, ANY)),
];

/// The command `name`, of which `first` is the first word and `rest` what follows.
pub(super) fn build(
    name: &str,
    first: String,
    rest: impl Iterator<Item = OsString>,
    words: &mut Words,
) -> Result<Container> {
    let given = words.text("id")?.filter(|_| !matches!(name, "container run" | "container create")).map(str::to_owned);
    let mut others = Vec::new();
    if !first.is_empty() {
        others.push(first);
    }
    if name == "container top" {
        return Ok(Container::Top { id: others.pop().unwrap_or_default(), options: rest.collect() });
    }
    for word in rest {
        others.push(text(word)?);
    }
    match name {
        "container run" | "container create" => {
            let make = Box::new(making::make(others, words)?);
            return Ok(if name == "container run" { Container::Run(make) } else { Container::Create(make) });
        }
        "container ls" | "container list" | "container ps" => return ls(words),
        "container cp" => {
            let [from, to] = <[String; 2]>::try_from(others).map_err(|_| anyhow::anyhow!("two words are needed"))?;
            return Ok(Container::Cp { from, to, archive: words.on("archive") });
        }
        "container exec" => return exec(given, others, words),
        _ => {}
    }
    let mut ids: Vec<String> = given.into_iter().collect();
    ids.append(&mut others);
    let all = words.on("all");
    if ids.is_empty() && !all && name != "container stats" {
        bail!("it needs the id of a container: \"runx container ls --all\" lists them");
    }
    if all && !ids.is_empty() {
        bail!("--all and the containers {} exclude each other", ids.join(", "));
    }
    let one = |ids: &mut Vec<String>| match ids.len() {
        1 => Ok(ids.remove(0)),
        count => Err(anyhow::anyhow!("it takes one container, not {count}")),
    };
    let time =
        |words: &Words| -> Result<Option<Duration>> { Ok(words.number::<u64>("time")?.map(Duration::from_secs)) };
    Ok(match name {
        "container start" => {
            let (attach, interactive) = (words.on("attach"), words.on("interactive"));
            if (attach || interactive) && ids.len() > 1 {
                bail!("--attach and --interactive take one container, not {}", ids.len());
            }
            Container::Start { ids, attach, interactive, streams: streams(words)? }
        }
        "container stop" => {
            let signal = words.text("signal")?.map(str::to_owned);
            Container::Stop { ids, all, timeout: time(words)?, signal }
        }
        "container restart" => Container::Restart { ids, timeout: time(words)? },
        "container kill" => Container::Kill { ids, signal: words.text("signal")?.unwrap_or("SIGKILL").to_owned() },
        "container rm" => Container::Rm { ids, force: words.on("force"), volumes: words.on("volumes"), all },
        "container delete" => Container::Delete { ids, timeout: time(words)? },
        "container logs" => Container::Logs(logs(one(&mut ids)?, words)?),
        "container attach" => {
            Container::Attach { id: one(&mut ids)?, no_stdin: words.on("no-stdin"), streams: streams(words)? }
        }
        "container inspect" => Container::Inspect { ids },
        "container stats" => Container::Stats { ids, no_stream: words.on("no-stream"), format: list_format(words)? },
        "container pause" => Container::Pause { ids },
        "container unpause" => Container::Unpause { ids },
        "container wait" => Container::Wait { ids },
        "container update" => {
            let restart = words.text("restart")?.map(values::restart).transpose()?;
            let limits = making::limits(words)?;
            if restart.is_none() && limits == Limits::default() {
                bail!("no limit is named: its flags are told by \"runx help container update\"");
            }
            Container::Update { ids, limits, restart }
        }
        other => bail!("command {other:?} has no meaning"),
    })
}

fn streams(words: &Words) -> Result<Streams> {
    Ok(Streams {
        sig_proxy: !words.given("sig-proxy") || words.on("sig-proxy"),
        detach_keys: words.text("detach-keys")?.map_or_else(|| Ok(DetachKeys::default()), DetachKeys::parse)?,
    })
}

fn ls(words: &Words) -> Result<Container> {
    if let Some(format) = words.text("format")?.filter(|format| format.contains('=')) {
        bail!("-f is --format: a filter is given as --filter {format}");
    }
    let last = if words.on("latest") { Some(1) } else { words.number("last")? };
    Ok(Container::Ls(Ls {
        all: words.on("all"),
        quiet: words.on("quiet"),
        format: list_format(words)?,
        no_trunc: words.on("no-trunc"),
        last,
        selection: Selection::parse(&words.texts("filter")?)?,
    }))
}

fn exec(given: Option<String>, mut others: Vec<String>, words: &Words) -> Result<Container> {
    let id = match given {
        Some(id) => id,
        None if others.is_empty() => {
            bail!("it needs the id of a container: \"runx container ls\" lists those that run")
        }
        None => others.remove(0),
    };
    let args = match words.text("command")? {
        Some(program) if others.is_empty() => std::iter::once(program.to_owned()).chain(words.texts("args")?).collect(),
        Some(_) => bail!("--command and the command {:?} exclude each other", others.join(" ")),
        None if words.given("args") => bail!("--args needs --command"),
        None if others.is_empty() => bail!("it needs a command, as in: runx container exec {id} ls /"),
        None => others,
    };
    Ok(Container::Exec(Box::new(ContainerExec {
        id,
        args,
        tty: words.on("tty"),
        interactive: words.on("interactive"),
        detach: words.on("detach"),
        env: values::environment(&words.texts("env")?),
        cwd: words.text("workdir")?.map(str::to_owned),
        user: if words.given("user") { Some(words.text("user")?.unwrap_or_default().to_owned()) } else { None },
        privileged: words.on("privileged"),
    })))
}

fn logs(id: String, words: &Words) -> Result<Logs> {
    let tail = match words.text("tail")? {
        None | Some("all" | "-1") => None,
        Some(text) => Some(text.parse().ok().with_context(|| format!("--tail {text:?} is neither a number nor all"))?),
    };
    let time = |name| words.text(name)?.map(|text| values::time(name, text)).transpose();
    Ok(Logs {
        id,
        follow: words.on("follow"),
        tail,
        since: time("since")?,
        until: time("until")?,
        timestamps: words.on("timestamps"),
    })
}

#[cfg(test)]
mod tests;
