//! The flags of `run` and `create`.

use anyhow::{Context, Result, bail};

use super::values::{self, DetachKeys};
use super::{Make, Pull, Streams};
use crate::arguments::scan::{Flag, Words, option, switch};
use crate::arguments::units::bytes;
use crate::container::options::{Limits, LogOptions, Options, Seccomp, Security};

/// What makes a container.
pub(super) const FLAGS: &[Flag] = &[
    option("id", None, "ID", "its id (default: a random one)"),
    option("name", None, "ID", "the same"),
    option("image", Some('m'), "IMAGE", "its image, as another way to name it"),
    option("rootfs", Some('r'), "DIR", "its root filesystem, instead of an image"),
    option(
        "bundle",
        Some('b'),
        "DIR",
        "where its config.json is: one that is there is taken as it is, else it is written",
    ),
    option("command", Some('c'), "PROGRAM", "its program, as another way to name it"),
    option("args", Some('a'), "ARGUMENT", "the program's argument; may be given more than once"),
    switch("tty", Some('t'), "give it a terminal"),
    switch("interactive", Some('i'), "keep its standard input open"),
    option("env", Some('e'), "NAME[=VALUE]", "variable of its environment; without a value, yours"),
    option("env-file", None, "FILE", "file with a variable a line"),
    option("workdir", Some('w'), "DIR", "its working directory"),
    option("user", Some('u'), "USER[:GROUP]", "who executes it, by name or number"),
    option("group-add", None, "GROUP", "group that its user is in, too"),
    option("volume", Some('v'), "SOURCE:PATH[:OPTION,…]", "host's file or directory, or volume by name, that it sees"),
    option("mount", None, "type=bind|volume|tmpfs,…", "the same, with src=, dst=, ro and others named"),
    option("tmpfs", None, "PATH[:OPTION,…]", "directory in memory"),
    switch("read-only", None, "its root filesystem cannot be written"),
    option("ulimit", None, "NAME=SOFT[:HARD]", "limit of its processes, such as nofile=1024:2048"),
    option("cap-add", None, "CAP", "capability that it has, too; ALL for all"),
    option("cap-drop", None, "CAP", "capability that it has not; ALL for all"),
    option(
        "security-opt",
        None,
        "OPTION",
        "seccomp=FILE|unconfined, apparmor=PROFILE, label=LABEL, or no-new-privileges",
    ),
    switch("privileged", None, "all capabilities and devices, and nothing hidden"),
    option("device", None, "PATH[:PATH[:rwm]]", "host's device that it has"),
    option("hostname", None, "NAME", "its host name (default: its id)"),
    option("network", None, "NETWORK", "bridge (default), none, host, or container:ID"),
    option("net", None, "NETWORK", "the same"),
    option("publish", Some('p'), "[[ADDRESS:]PORT:]PORT[/udp]", "port of the host that leads to one of its own"),
    option("dns", None, "ADDRESS", "name server (default: the host's)"),
    option("dns-search", None, "DOMAIN", "domain to look names up in"),
    option("add-host", None, "NAME:ADDRESS", "line of its /etc/hosts; host-gateway is the host's address"),
    option("annotation", None, "KEY=VALUE", "annotation, as in config.json"),
    option("label", Some('l'), "KEY[=VALUE]", "label, for filters"),
    option(
        "entrypoint",
        None,
        "PROGRAM",
        "what is executed instead of the image's entrypoint; its command is the arguments",
    ),
    option("stop-signal", None, "SIGNAL", "what asks it to stop (default SIGTERM)"),
    option("stop-timeout", None, "SECONDS", "how long stop waits before it is killed (default 10)"),
    option("shm-size", None, "BYTES", "size of its /dev/shm (default 64m)"),
    option("sysctl", None, "NAME=VALUE", "kernel parameter of its namespaces"),
    option("pull", None, "WHEN", "fetch the image: missing (default), always or never"),
    option("log-opt", None, "NAME=VALUE", "max-size=BYTES (default 10m) and max-file=N (default 3) bound its log"),
    option("cidfile", None, "FILE", "file to write its id to"),
];

/// What `update` changes, too.
pub(super) const LIMITS: &[Flag] = &[
    option("memory", None, "BYTES", "limit on its memory, with b, k, m or g"),
    option("memory-swap", None, "BYTES", "limit on memory and swap together; -1 for none (default: twice the memory)"),
    option("memory-reservation", None, "BYTES", "what it keeps when memory is short"),
    option("cpus", None, "N", "processors that it may use, such as 1.5"),
    option("cpu-shares", None, "N", "weight of its processor time (default 1024)"),
    option("cpuset-cpus", None, "LIST", "processors to run on, such as 0-2,4"),
    option("cpuset-mems", None, "LIST", "memory nodes to use"),
    option("pids-limit", None, "N", "limit on processes and threads; -1 for none"),
];

/// Reads [`LIMITS`].
pub(super) fn limits(words: &Words) -> Result<Limits> {
    let size = |name| words.text(name)?.map(|text| bytes(text).with_context(|| format!("--{name}"))).transpose();
    let positive = |name: &str, value: Option<i64>| match value {
        Some(value) if value <= 0 => Err(anyhow::anyhow!("--{name} {value}: it is not above 0")),
        other => Ok(other),
    };
    let limits = Limits {
        memory: positive("memory", size("memory")?)?,
        memory_swap: size("memory-swap")?,
        memory_reservation: positive("memory-reservation", size("memory-reservation")?)?,
        cpus: words.text("cpus")?.map(values::cpus).transpose()?,
        cpu_shares: words.number("cpu-shares")?,
        cpuset_cpus: words.text("cpuset-cpus")?.map(str::to_owned),
        cpuset_mems: words.text("cpuset-mems")?.map(str::to_owned),
        pids: words.number::<i64>("pids-limit")?.map(|limit| if limit <= 0 { -1 } else { limit }),
    };
    if let (Some(memory), Some(swap)) = (limits.memory, limits.memory_swap)
        && swap != -1
        && swap < memory
    {
        bail!("--memory-swap is the limit on memory and swap together: {swap} is below --memory, which is {memory}");
    }
    Ok(limits)
}

/// Reads what `run` and `create` are told.
pub(super) fn make(others: Vec<String>, words: &Words) -> Result<Make> {
    let owned = |name| words.text(name).map(|text| text.map(str::to_owned));
    let id = match (owned("id")?, owned("name")?) {
        (Some(id), Some(name)) if id != name => bail!("--id {id:?} and --name {name:?} are the same flag"),
        (id, name) => id.or(name),
    };
    let (image, rootfs) = (owned("image")?, words.path("rootfs"));
    if image.is_some() && rootfs.is_some() {
        bail!("--image and --rootfs exclude each other");
    }
    let mut others = others.into_iter();
    let named = image.is_some() || rootfs.is_some() || (words.given("bundle") && others.len() == 0);
    let (program, interactive) = (owned("command")?, words.on("interactive"));
    // What follows -i is taken for an image, and then the flag that names one, or a root filesystem, for its command.
    let names_root = |word: &String| {
        let name = word.split('=').next().unwrap_or_default();
        ["-m", "--image", "-r", "--rootfs", "-b", "--bundle"].contains(&name)
    };
    if !named
        && interactive
        && id.is_none()
        && let [word, flag, ..] = others.as_slice()
        && names_root(flag)
    {
        bail!(
            "-i is --interactive and takes no value: for a container that is called {word:?} say --id {word}, and for an \
             image --image {word} or -m {word}"
        );
    }
    // Docker's -m is the memory, and then the image follows.
    if let (Some(size), [word, ..]) = (&image, others.as_slice())
        && size.starts_with(|first: char| first.is_ascii_digit())
        && size.ends_with(|last: char| last.is_ascii_alphabetic())
        && bytes(size).is_ok()
    {
        bail!("-m is --image, and {size:?} is no image: for a limit on memory say --memory {size} {word}");
    }
    let image = if named { image } else { others.next() };
    if image.is_none() && !named {
        bail!("it needs an image, or --rootfs DIR: \"runx storage ls\" lists the images that are here");
    }
    let mut command: Vec<String> = others.collect();
    match program {
        Some(program) if command.is_empty() => {
            command = std::iter::once(program).chain(words.texts("args")?).collect();
        }
        Some(program) => {
            bail!("--command {program:?} and the command {:?} exclude each other", command.join(" "))
        }
        None => command.extend(words.texts("args")?),
    }
    let (detach, auto_remove) = (words.on("detach"), words.on("rm"));
    let restart = words.text("restart")?.map(values::restart).transpose()?.unwrap_or_default();
    if auto_remove && restart != Default::default() {
        bail!("--rm and --restart {restart} exclude each other: what is to be started again cannot be removed");
    }
    let network = match (words.text("network")?, words.text("net")?) {
        (Some(one), Some(other)) if one != other => bail!("--network {one:?} and --net {other:?} are the same flag"),
        (one, other) => one.or(other).map(values::network).transpose()?,
    };
    let mut publish = Vec::new();
    for text in words.texts("publish")? {
        publish.extend(crate::network::ports::parse(&text)?);
    }
    if let Some(other) = network.as_ref().filter(|network| **network != Default::default() && !publish.is_empty()) {
        bail!("--publish: ports are published with --network bridge, not {other}");
    }
    let mut env = Vec::new();
    for file in words.texts("env-file")? {
        env.extend(values::env_file(&file)?);
    }
    env.extend(values::environment(&words.texts("env")?));
    let mut mounts = Vec::new();
    for text in words.texts("volume")? {
        mounts.push(super::mounts::volume(&text)?);
    }
    for text in words.texts("mount")? {
        mounts.push(super::mounts::mount(&text)?);
    }
    for text in words.texts("tmpfs")? {
        mounts.push(super::mounts::tmpfs(&text)?);
    }
    super::mounts::check(&mounts)?;
    let pairs = |name: &str| -> Result<Vec<(String, String)>> {
        words.texts(name)?.iter().map(|text| values::pair(name, text)).collect()
    };
    let label = |text: &String| {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        (key.to_owned(), value.to_owned())
    };
    let stop_signal = owned("stop-signal")?;
    if let Some(signal) = &stop_signal {
        crate::oci::signal::parse(signal).context("--stop-signal")?;
    }
    let options = Options {
        image,
        rootfs,
        bundle: words.path("bundle"),
        given_configuration: false,
        command,
        entrypoint: if words.given("entrypoint") {
            Some(words.text("entrypoint")?.map(str::to_owned).into_iter().collect())
        } else {
            None
        },
        tty: words.on("tty"),
        interactive,
        stdin_once: false,
        auto_remove,
        env,
        cwd: owned("workdir")?,
        user: if words.given("user") { Some(owned("user")?.unwrap_or_default()) } else { None },
        groups: words.texts("group-add")?,
        mounts,
        read_only: words.on("read-only"),
        limits: limits(words)?,
        ulimits: words.texts("ulimit")?.iter().map(|text| values::ulimit(text)).collect::<Result<_>>()?,
        cap_add: words.texts("cap-add")?.iter().map(|text| values::capability(text)).collect::<Result<_>>()?,
        cap_drop: words.texts("cap-drop")?.iter().map(|text| values::capability(text)).collect::<Result<_>>()?,
        security: security(&words.texts("security-opt")?)?,
        privileged: words.on("privileged"),
        devices: words.texts("device")?.iter().map(|text| values::device(text)).collect::<Result<_>>()?,
        hostname: owned("hostname")?.map(|name| values::hostname(&name)).transpose()?,
        network: network.clone().unwrap_or_default(),
        publish,
        dns: words.texts("dns")?.iter().map(|text| values::address("dns", text)).collect::<Result<_>>()?,
        dns_search: words.texts("dns-search")?,
        hosts: words.texts("add-host")?.iter().map(|text| values::host(text)).collect::<Result<_>>()?,
        restart,
        annotations: pairs("annotation")?,
        labels: words.texts("label")?.iter().map(label).collect(),
        stop_signal,
        stop_timeout: words.number("stop-timeout")?,
        shm_size: words.text("shm-size")?.map(|text| bytes(text).context("--shm-size")).transpose()?,
        sysctls: pairs("sysctl")?,
        log: LogOptions::default(),
    };
    let log = log(&words.texts("log-opt")?)?;
    let pull = match words.text("pull")? {
        None | Some("missing") => Pull::Missing,
        Some("always") => Pull::Always,
        Some("never") => Pull::Never,
        Some(other) => bail!("invalid --pull {other:?}: it is missing, always or never"),
    };
    let keys = words.text("detach-keys")?;
    let streams = Streams {
        sig_proxy: !words.given("sig-proxy") || words.on("sig-proxy"),
        detach_keys: keys.map_or_else(|| Ok(DetachKeys::default()), DetachKeys::parse)?,
    };
    Ok(Make { id, options, network, log, detach, streams, pull, cidfile: words.path("cidfile") })
}

fn security(texts: &[String]) -> Result<Security> {
    let mut security = Security::default();
    for text in texts {
        // Docker's older form has a colon.
        let split = text.split_once('=').or_else(|| text.split_once(':'));
        match split.unwrap_or((text, "")) {
            ("no-new-privileges", "" | "true") => security.no_new_privileges = true,
            ("no-new-privileges", "false") => security.no_new_privileges = false,
            ("seccomp", "unconfined") => security.seccomp = Seccomp::Unconfined,
            ("seccomp", file) if !file.is_empty() => {
                let text = std::fs::read(file).with_context(|| format!("--security-opt seccomp: read {file}"))?;
                let profile = serde_json::from_slice(&text)
                    .with_context(|| format!("--security-opt seccomp: {file} is not JSON"))?;
                security.seccomp = Seccomp::Profile(profile);
            }
            ("apparmor", profile) if !profile.is_empty() => security.apparmor = Some(profile.to_owned()),
            ("label", label) if !label.is_empty() => security.label = Some(label.to_owned()),
            _ => bail!(
                "--security-opt {text:?} is none of seccomp=FILE, seccomp=unconfined, apparmor=PROFILE, label=LABEL and \
                 no-new-privileges"
            ),
        }
    }
    Ok(security)
}

/// The size of a log's file, and how many there are, as far as they are said.
fn log(texts: &[String]) -> Result<(Option<u64>, Option<u32>)> {
    let (mut max_size, mut max_file) = (None, None);
    for text in texts {
        match text.split_once('=') {
            Some(("max-size", size)) => {
                let size = bytes(size).with_context(|| format!("--log-opt {text}"))?;
                let size = u64::try_from(size).ok().filter(|size| *size >= 4096);
                max_size =
                    Some(size.with_context(|| format!("--log-opt {text}: the size of a log file is at least 4k"))?);
            }
            Some(("max-file", count)) => {
                let count = count.parse().ok().filter(|count| (1..=1000).contains(count));
                max_file =
                    Some(count.with_context(|| format!("--log-opt {text}: the number of log files is 1 to 1000"))?);
            }
            _ => bail!("--log-opt {text:?} is neither max-size=BYTES nor max-file=N"),
        }
    }
    Ok((max_size, max_file))
}
