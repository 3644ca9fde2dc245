//! The commands and their flags: runc's, and what crun's users know besides.

use super::scan::{Flag, Order, option, switch};
use super::{container, network, storage};

/// One command.
#[derive(Debug)]
pub(crate) struct Syntax {
    /// Its name.
    pub(crate) name: &'static str,
    /// The words after it, for the help.
    pub(crate) words: &'static str,
    /// What it does.
    pub(crate) about: &'static str,
    /// Its flags, beside the global ones.
    pub(crate) flags: &'static [&'static [Flag]],
    /// Where they may be.
    pub(crate) order: Order,
    /// The least and the most words.
    pub(crate) count: (usize, usize),
}

/// No flags of its own.
pub(super) const NONE: &[&[Flag]] = &[];
/// No limit on the words.
pub(super) const ANY: usize = usize::MAX;

/// Names of groups, whose commands are two words.
pub(crate) const GROUP_NAMES: &[&str] = &["container", "storage", "network", "wasm", "process", "pool"];

/// Flags of every command, before or after its name.
pub(crate) const GLOBAL: &[Flag] = &[
    option("root", None, "DIR", "directory for the state of containers, best on a tmpfs (default /run/runx)"),
    option(
        "storage-root",
        None,
        "DIR",
        "directory for images and what containers keep (default /var/lib/runx; yours, unless root)",
    ),
    option(
        "config-file",
        None,
        "FILE",
        "config file to read instead of /etc/runx/config.toml and, unless root, ~/.config/runx/config.toml",
    ),
    option("log", None, "FILE", "write the log to this file instead of standard error"),
    option("log-format", None, "FORMAT", "format of the log: text or json (default text)"),
    switch("debug", None, "log what is done, too"),
    switch("verbose", Some('v'), "the same; without a command, -v prints the version"),
    switch("systemd-cgroup", None, "let systemd manage the container's cgroup"),
    option(
        "rootless",
        None,
        "VALUE",
        "go on without cgroups that may not be made and that nothing needs: true, false or auto (default: unless root)",
    ),
    option("criu", None, "PATH", ""),
    switch("version", Some('V'), "print the version"),
    switch("help", Some('h'), "print help"),
];

const MAKE: &[Flag] = &[
    option("bundle", Some('b'), "DIR", "the bundle's directory (default: the current one)"),
    option("config", Some('f'), "FILE", "the configuration, if it is not config.json in the bundle"),
    option("console-socket", None, "SOCKET", "unix socket that receives the master of the container's terminal"),
    option("pidfd-socket", None, "SOCKET", "unix socket that receives a pidfd of the container's first process"),
    option("pid-file", None, "FILE", "file to write the pid of the container's first process to"),
    switch("no-pivot", None, "enter the root filesystem without pivot_root, for hosts that run from an initramfs"),
    switch("no-new-keyring", None, "keep the session keyring of the caller"),
    option("preserve-fds", None, "N", "how many descriptors after the first three (and $LISTEN_FDS) are inherited"),
];

const RUN: &[Flag] = &[
    switch("detach", Some('d'), "do not wait for the container's end"),
    switch("keep", None, "do not delete the container when it ends"),
    switch("no-subreaper", None, "leave processes that lose their parent to the host's init"),
];

const EXEC: &[Flag] = &[
    option("process", Some('p'), "FILE", "file with a process description as in config.json; other flags change it"),
    option("console-socket", None, "SOCKET", "unix socket that receives the master of the process's terminal"),
    option("pidfd-socket", None, "SOCKET", "unix socket that receives a pidfd of the process"),
    option("cwd", None, "DIR", "working directory in the container"),
    option("env", Some('e'), "NAME=VALUE", "add a variable to the environment"),
    switch("tty", Some('t'), "give the process a terminal"),
    option("user", Some('u'), "UID[:GID]", "numeric user and group"),
    option("additional-gids", Some('g'), "GID", "add a supplementary group"),
    switch("detach", Some('d'), "do not wait for the process's end"),
    option("pid-file", None, "FILE", "file to write the process's pid to"),
    option("process-label", None, "LABEL", "SELinux label of the process"),
    option("apparmor", None, "PROFILE", "AppArmor profile of the process"),
    switch("no-new-privs", None, "set no_new_privs"),
    option("cap", Some('c'), "CAP", "add a capability to the bounding, effective and permitted sets"),
    option("preserve-fds", None, "N", "how many descriptors after the first three are inherited"),
    option("cgroup", None, "[CONTROLLER,…:]PATH", "run in this group below the container's; it must be there"),
    switch("ignore-paused", None, "if the container is paused, wait until it is resumed"),
];

const KILL: &[Flag] = &[switch("all", Some('a'), "to all of the container's processes; fine if it is not running")];

const DELETE: &[Flag] = &[switch("force", Some('f'), "end it first if it runs; fine if it is not there")];

/// How listings are printed.
pub(super) const FORMAT: &[Flag] =
    &[option("format", Some('f'), "FORMAT", "how to print: table or json (default table)")];

/// Ids only.
pub(super) const QUIET: &[Flag] = &[switch("quiet", Some('q'), "print ids only")];

const PS: &[Flag] = &[switch("all", Some('a'), "also what does not run")];

const MAN: &[Flag] = &[option("output", Some('o'), "DIR", "write all pages to man1 and man5 below this directory")];

const UPDATE: &[Flag] = &[
    option("resources", Some('r'), "FILE", "JSON as linux.resources in config.json; - for standard input"),
    option("blkio-weight", None, "N", "weight of its block I/O, 10 to 1000"),
    option("cpu-period", None, "USEC", "period in which the quota holds"),
    option("cpu-quota", None, "USEC", "processor time in each period; -1 for no limit"),
    option("cpu-burst", None, "USEC", "unused time that may be used later"),
    option("cpu-share", None, "N", "weight of its processor time"),
    option("cpu-rt-period", None, "USEC", "period of realtime scheduling"),
    option("cpu-rt-runtime", None, "USEC", "realtime in each period"),
    option("cpu-idle", None, "0|1", "run only when nothing else wants to"),
    option("cpuset-cpus", None, "LIST", "processors to run on"),
    option("cpuset-mems", None, "LIST", "memory nodes to use"),
    option("kernel-memory", None, "BYTES", ""),
    option("kernel-memory-tcp", None, "BYTES", ""),
    option("memory", None, "BYTES", "limit, with b, k, m or g; -1 for none"),
    option("memory-reservation", None, "BYTES", "what it keeps when memory is short"),
    option("memory-swap", None, "BYTES", "limit on memory and swap together; -1 for none"),
    option("pids-limit", None, "N", "limit on processes and threads; -1 for none"),
    option("l3-cache-schema", None, "SCHEMA", "Intel RDT: L3 cache"),
    option("mem-bw-schema", None, "SCHEMA", "Intel RDT: memory bandwidth"),
];

const IMAGES: &[Flag] = &[
    option("image-path", None, "DIR", "directory of the checkpoint (default: checkpoint)"),
    option("work-path", None, "DIR", "directory for criu's log and statistics (default: the checkpoint's)"),
    switch("tcp-established", None, "keep TCP connections"),
    switch("ext-unix-sk", None, "keep the ends of connections over unix sockets to processes outside"),
    switch("shell-job", None, "it has a terminal from outside"),
    switch("file-locks", None, "keep locks of files"),
    option("manage-cgroups-mode", None, "MODE", "what criu does about cgroups: soft (default), full, strict or ignore"),
    option("empty-ns", None, "network", "neither keep nor restore what is in this namespace"),
    switch("auto-dedup", None, "drop pages from older images once they are in newer ones"),
];

const CHECKPOINT: &[Flag] = &[
    option("parent-path", None, "DIR", "earlier checkpoint that this one adds to, relative to --image-path"),
    switch("leave-running", None, "let the container go on"),
    switch("pre-dump", None, "keep its memory only and let it go on, for a later checkpoint to add to"),
    switch("tcp-skip-in-flight", None, "do without connections that are being made"),
    switch("link-remap", None, "keep files that are open and have been removed"),
];

const RESTORE: &[Flag] = &[
    option("bundle", Some('b'), "DIR", "the bundle's directory (default: the current one)"),
    option("console-socket", None, "SOCKET", "unix socket that receives the master of the container's terminal"),
    switch("detach", Some('d'), "do not wait for the container's end"),
    option("pid-file", None, "FILE", "file to write the pid of the container's first process to"),
    switch("no-subreaper", None, "leave processes that lose their parent to the host's init"),
    option("lsm-profile", None, "TYPE:NAME", "another LSM profile for its processes than they had"),
    option("lsm-mount-context", None, "CONTEXT", "another SELinux context for its mounts than they had"),
];

const EVENTS: &[Flag] = &[
    option("interval", None, "TIME", "time between statistics (default 5s)"),
    switch("stats", None, "print statistics once and end"),
];

const SPEC: &[Flag] = &[
    option("bundle", Some('b'), "DIR", "directory to write it to (default: the current one)"),
    switch("rootless", None, "for a container that is not started by root"),
    switch("defaults", None, "with the capabilities, paths and seccomp profile that \"runx container run\" gives"),
];

const COMPILE: &[Flag] = &[
    option("name", None, "NAME", "the module's name in messages"),
    switch("compact", None, "compile for a process with a small limit on its address space"),
    switch("confined", None, "give up all privileges first and limit memory and time: the module is somebody else's"),
];

/// A row of a table.
pub(super) const fn command(
    name: &'static str,
    words: &'static str,
    about: &'static str,
    flags: &'static [&'static [Flag]],
    order: Order,
    count: (usize, usize),
) -> Syntax {
    Syntax { name, words, about, flags, order, count }
}

/// All commands.
#[rustfmt::skip]
pub(crate) const COMMANDS: &[Syntax] = &[
    command("create", "CONTAINER", "create a container; start then starts its program",
        &[MAKE], Order::Anywhere, (1, 1)),
    command("run", "CONTAINER", "create a container, run its program, and delete it",
        &[MAKE, RUN], Order::Anywhere, (1, 1)),
    command("start", "CONTAINER", "start the program of a created container", NONE, Order::Anywhere, (1, 1)),
    command("exec", "CONTAINER [COMMAND…]", "run another process in a running container",
        &[EXEC], Order::BeforeSecond, (1, ANY)),
    command("state", "CONTAINER", "print the state of a container as JSON", NONE, Order::Anywhere, (1, 1)),
    command("kill", "CONTAINER [SIGNAL]", "send a signal, SIGTERM if none is named, to a container's first process",
        &[KILL], Order::KnownAfterFirst, (1, 2)),
    command("delete", "CONTAINER", "delete a container that has stopped", &[DELETE], Order::Anywhere, (1, 1)),
    command("list", "", "list containers", &[FORMAT, QUIET], Order::Anywhere, (0, 0)),
    command("ps", "[CONTAINER [OPTION OF PS…]]", "list the processes of a container; without one, all that runs: containers, modules, processes, pools",
        &[FORMAT, QUIET, PS], Order::BeforeFirst, (0, ANY)),
    command("pause", "CONTAINER", "stop all processes of a container where they are", NONE, Order::Anywhere, (1, 1)),
    command("resume", "CONTAINER", "let the processes of a paused container go on", NONE, Order::Anywhere, (1, 1)),
    command("update", "CONTAINER", "change the limits of a container", &[UPDATE], Order::Anywhere, (1, 1)),
    command("checkpoint", "CONTAINER", "keep a running container in files, by criu, and delete it",
        &[IMAGES, CHECKPOINT], Order::Anywhere, (1, 1)),
    command("restore", "CONTAINER", "let a container from a checkpoint go on",
        &[IMAGES, RESTORE], Order::Anywhere, (1, 1)),
    command("events", "CONTAINER", "print statistics and out-of-memory events as JSON, until the container stops",
        &[EVENTS], Order::Anywhere, (1, 1)),
    command("spec", "", "write a config.json to begin with", &[SPEC], Order::Anywhere, (0, 0)),
    command("agent", "[-- FLAG…]", "run the daemon for agents here, or in a running container; its flags: runx agent -- --help",
        &[AGENT], Order::BeforeFirst, (0, ANY)),
    command("features", "", "print what this runtime implements as JSON", NONE, Order::Anywhere, (0, 0)),
    command("check", "", "tell what this machine offers to containers, what is missing, and how to get it",
        &[FORMAT], Order::Anywhere, (0, 0)),
    command("info", "", "tell about this program, its directories, and what is in them", &[FORMAT], Order::Anywhere, (0, 0)),
    command("completion", "bash|zsh|fish", "print a script that completes command lines in this shell", NONE, Order::Anywhere, (1, 1)),
    command("man", "[COMMAND…]", "print a page of the manual, or write all of them", &[MAN], Order::Anywhere, (0, 2)),
    command("version", "", "print the version", &[FORMAT], Order::Anywhere, (0, 0)),
];

const PROGRAM: &[Flag] = &[
    switch("detach", Some('d'), "do not wait for its end; prints its id"),
    option("name", None, "ID", "its id, if it is detached"),
    option("dir", None, "HOST::GUEST[:ro]", "directory that it sees; may be given more than once"),
    option("env", Some('e'), "NAME[=VALUE]", "variable of its environment; without a value, yours"),
    option("fuel", None, "N", "end it after about this many instructions"),
    option("memory", None, "BYTES", "limit on its memory, with b, k, m or g"),
    option("timeout", None, "TIME", "end it after this time, such as 500ms or 2m"),
    option("engine", None, "ENGINE", "who executes it: cranelift (default), or pulley, an interpreter"),
    option("network", None, "none|host", "what it may reach over the network (default none)"),
];

const HOOKS: &[Flag] = &[option(
    "hook",
    None,
    "WHEN=COMMAND",
    "shell command to run before-start, after-start, before-stop or after-stop; may be given more than once",
)];

const PROCESS_RUN: &[Flag] = &[
    switch("detach", Some('d'), "do not wait for its end; prints its id"),
    option("name", None, "ID", "its id, if it is detached"),
    option("cwd", None, "DIR", "its working directory"),
    option("env", Some('e'), "NAME[=VALUE]", "variable of its environment; without a value, yours"),
    option("timeout", None, "TIME", "end it after this time, such as 500ms or 2m"),
];

const WASM_RUN: &[Flag] = &[
    option("invoke", None, "FUNCTION", "call this one, such as add(1, 2), and print its results"),
    option("publish", Some('p'), "PORT", "port that it may listen on; may be given more than once"),
];

const WASM_SERVE: &[Flag] = &[
    option("addr", None, "ADDRESS:PORT", "where to listen (default 0.0.0.0:8080)"),
    option(
        "metrics",
        None,
        "ADDRESS:PORT",
        "where Prometheus finds requests, instances and failures (default nowhere)",
    ),
];

const AGENT: &[Flag] =
    &[option("container", None, "CONTAINER", "put it into this container, as its user and in its cgroup")];

const WASM_KILL: &[Flag] = &[option("signal", Some('s'), "SIGNAL", "which one (default SIGTERM)")];

const WASM_RM: &[Flag] = &[switch("force", Some('f'), "end it first if it runs; fine if it is not there")];

const CACHE: &[Flag] = &[option("max-size", None, "BYTES", "prune: keep this much of what was used last (default 0)")];

const POOL_EXEC: &[Flag] = &[
    option("tier", None, "TIER", "what becomes of the sandbox: complete (default), wipe or none"),
    option("cpu-time", None, "TIME", "limit on its processor time, in seconds or such as 500ms"),
    option("wall-time", None, "TIME", "limit on its time on the clock"),
    option("memory", None, "BYTES", "limit on its memory, with b, k, m or g (default 512m)"),
    option("processes", None, "N", "limit on its processes and threads (default 64)"),
    option("network", None, "none|host", "what it may reach over the network (default none)"),
    option("seccomp", None, "deny|kill|off", "what happens to dangerous system calls (default deny)"),
    option("rootfs", None, "DIR", "its root directory, instead of the host's programs and libraries"),
    option("bind", None, "HOST:PATH[:rw]", "file or directory that it sees; may be given more than once"),
    option("cwd", None, "DIR", "its working directory (default /w)"),
    option("env", Some('e'), "NAME[=VALUE]", "variable of its environment; without a value, yours"),
    option("format", Some('f'), "FORMAT", "json: print how it ended as the last line of standard error"),
];

/// Commands that have a command of their own.
#[rustfmt::skip]
const GROUPS: &[Syntax] = &[
    command("wasm run", "FILE|IMAGE [ARGUMENT…]", "run a WASM module or component, from a file or the store",
        &[PROGRAM, WASM_RUN, HOOKS], Order::BeforeFirst, (1, ANY)),
    command("wasm serve", "FILE|IMAGE [ARGUMENT…]", "answer HTTP requests with a component",
        &[PROGRAM, WASM_SERVE, HOOKS], Order::BeforeFirst, (1, ANY)),
    command("wasm inspect", "FILE|IMAGE", "print what a module or component imports and exports as JSON",
        NONE, Order::Anywhere, (1, 1)),
    command("wasm ps", "", "list detached modules", &[FORMAT, QUIET], Order::Anywhere, (0, 0)),
    command("wasm state", "ID", "print the state of a detached module as JSON", NONE, Order::Anywhere, (1, 1)),
    command("wasm kill", "ID [SIGNAL]", "send a signal to a detached module", &[WASM_KILL], Order::KnownAfterFirst, (1, 2)),
    command("wasm logs", "ID", "print what a detached module has printed", NONE, Order::Anywhere, (1, 1)),
    command("wasm rm", "ID", "remove a detached module that has ended", &[WASM_RM], Order::Anywhere, (1, 1)),
    command("wasm cache", "ls|prune|stats", "list compiled modules, remove them, or tell how often they were there (--format prometheus, too)",
        &[FORMAT, CACHE], Order::Anywhere, (1, 1)),
    command("process run", "PROGRAM [ARGUMENT…]", "run a native program without an image",
        &[PROCESS_RUN, HOOKS], Order::BeforeFirst, (1, ANY)),
    command("process ps", "", "list detached processes", &[FORMAT, QUIET], Order::Anywhere, (0, 0)),
    command("process state", "ID", "print the state of a detached process as JSON", NONE, Order::Anywhere, (1, 1)),
    command("process kill", "ID [SIGNAL]", "send a signal to a detached process",
        &[WASM_KILL], Order::KnownAfterFirst, (1, 2)),
    command("process logs", "ID", "print what a detached process has printed", NONE, Order::Anywhere, (1, 1)),
    command("process rm", "ID", "remove a detached process that has ended", &[WASM_RM], Order::Anywhere, (1, 1)),
    command("pool exec", "PROGRAM [ARGUMENT…]", "run a program in a sandbox of a pool of one",
        &[POOL_EXEC], Order::BeforeFirst, (1, ANY)),
    command("pool serve", "[FLAG…]", "offer warm sandboxes over HTTP, as go-judge does; its flags: runx pool serve --help",
        NONE, Order::BeforeFirst, (0, ANY)),
    command("pool stat", "", "print what this machine offers to a pool", &[FORMAT], Order::Anywhere, (0, 0)),
    command("wasm compile", "", "compile a WASM module from standard input to standard output",
        &[COMPILE], Order::Anywhere, (0, 0)),
];

/// The commands of all groups.
pub(crate) fn groups() -> impl Iterator<Item = &'static Syntax> {
    container::COMMANDS.iter().chain(storage::COMMANDS).chain(network::COMMANDS).chain(GROUPS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_flags_of_a_command_have_the_same_name() {
        for syntax in COMMANDS.iter().chain(groups()) {
            let own = || syntax.flags.iter().flat_map(|table| table.iter());
            let names: Vec<_> = own().chain(GLOBAL).map(|flag| flag.long).collect();
            // A command's own letters come before the global ones: `-v` may be a volume.
            let letters: Vec<_> = own().filter_map(|flag| flag.short).collect();
            let twice = |i: usize, same: bool| assert!(!same, "{}: flag {i} is there twice", syntax.name);
            for i in 0..names.len() {
                // `spec --rootless` is a switch of its own, as with runc.
                twice(i, names[i + 1..].contains(&names[i]) && names[i] != "rootless");
            }
            for i in 0..letters.len() {
                twice(i, letters[i + 1..].contains(&letters[i]));
            }
        }
    }
}
