//! config.json: what a container is asked to be, with docker's defaults, in the words of the runtime-spec.

mod devices;
mod mounts;
mod profile;
mod resources;
mod security;

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use runx_core::spec::Spec;
use runx_core::sys;
use serde_json::{Value, json};

use super::options::{Network, Options};
use super::record::{Containers, Record};
use super::rootless;
use super::users::{self, User};
use crate::network::Namespace;
pub(super) use mounts::source;
pub(super) use resources::resources;
pub(super) use security::all_capabilities;

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The configuration of a container whose root filesystem is at `rootfs`.
///
/// # Errors
/// What it is asked to be that it cannot be here.
pub(super) fn make(containers: &Containers, record: &Record, rootfs: &Path, network: &Namespace) -> Result<Spec> {
    let options = &record.options;
    let root = sys::open(rootfs, libc::O_PATH | libc::O_DIRECTORY)
        .with_context(|| format!("open the root filesystem {}", rootfs.display()))?;
    let user = options.user.as_deref().unwrap_or(&record.defaults.user);
    let user = users::resolve(root.as_fd(), user, &options.groups)?;
    let directory = containers.directory(&record.id);
    let mut config = json!({
        "ociVersion": "1.2.0",
        "process": process(record, &user)?,
        "root": {"path": rootfs, "readonly": options.read_only},
        "hostname": hostname(record),
        "mounts": mounts::mounts(containers, record, &directory)?,
        "annotations": annotations(options),
        "linux": {
            "namespaces": namespaces(network),
            "sysctl": options.sysctls.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
            "resources": resources(&options.limits),
        }
    });
    if !runx_core::rootless::is_unprivileged() {
        config["linux"]["cgroupsPath"] = json!(format!("/runx/{}", record.id));
    }
    rootless::adapt(&mut config);
    devices::add(options, &mut config)?;
    security::add(options, &mut config);
    let mut spec: Spec = serde_json::from_value(config).context("make the container's configuration")?;
    profile::add(options, &mut spec)?;
    Ok(spec)
}

/// The command line: the entrypoint, and the command.
///
/// # Errors
/// When there is none.
pub(super) fn command_line(record: &Record) -> Result<Vec<String>> {
    let (options, defaults) = (&record.options, &record.defaults);
    let entrypoint = options.entrypoint.as_ref().unwrap_or(&defaults.entrypoint);
    // Another entrypoint does not take the image's arguments.
    let command = match options.command.is_empty() && options.entrypoint.is_none() {
        true => &defaults.command,
        false => &options.command,
    };
    let args: Vec<String> = entrypoint.iter().chain(command).cloned().collect();
    match args.first() {
        Some(program) if !program.is_empty() => Ok(args),
        // A root filesystem without an image says nothing; a shell is what people want to see there.
        _ if options.image.is_none() => Ok(vec!["/bin/sh".to_owned()]),
        _ => bail!(
            "no command: the image {:?} has neither an entrypoint nor a command; name one after the image",
            options.image.as_deref().unwrap_or_default()
        ),
    }
}

fn process(record: &Record, user: &User) -> Result<Value> {
    let (options, defaults) = (&record.options, &record.defaults);
    let cwd = match options.cwd.as_deref().unwrap_or(&defaults.cwd) {
        "" => "/",
        cwd if cwd.starts_with('/') => cwd,
        other => bail!("the working directory {other:?} is not absolute"),
    };
    let limit = |(name, soft, hard): &(String, u64, u64)| json!({"type": format!("RLIMIT_{}", name.to_ascii_uppercase()), "soft": soft, "hard": hard});
    Ok(json!({
        "terminal": options.tty,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups},
        "args": record.args,
        "env": environment(record, user),
        "cwd": cwd,
        "capabilities": security::capabilities(options, user.uid == 0)?,
        "rlimits": options.ulimits.iter().map(limit).collect::<Vec<_>>(),
        "noNewPrivileges": options.security.no_new_privileges,
    }))
}

/// The environment: defaults, then what the image says, then what the user says.
fn environment(record: &Record, user: &User) -> Vec<String> {
    let (options, defaults) = (&record.options, &record.defaults);
    let mut env = vec![PATH.to_owned(), format!("HOSTNAME={}", hostname(record))];
    if options.tty {
        env.push("TERM=xterm".to_owned());
    }
    for variable in defaults.env.iter().chain(&options.env) {
        crate::oci::exec::set_variable(&mut env, variable);
    }
    if !env.iter().any(|variable| variable.starts_with("HOME=")) {
        env.push(format!("HOME={}", user.home));
    }
    env
}

/// The host name: what was said; on the host's network the host's; else the id, as far as it can be one.
pub(super) fn hostname(record: &Record) -> String {
    if let Some(name) = &record.options.hostname {
        return name.clone();
    }
    if record.options.network == Network::Host
        && let Ok(name) = nix::unistd::gethostname()
    {
        return name.to_string_lossy().into_owned();
    }
    let name: String =
        record.id.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).take(63).collect();
    match name.trim_matches(['-', '.']) {
        "" => "runx".to_owned(),
        name => name.to_owned(),
    }
}

fn annotations(options: &Options) -> std::collections::BTreeMap<String, String> {
    options.annotations.iter().cloned().collect()
}

fn namespaces(network: &Namespace) -> Value {
    let mut all: Vec<Value> = ["pid", "ipc", "uts", "mount", "cgroup"].map(|kind| json!({"type": kind})).to_vec();
    match network {
        Namespace::Path(path) => all.push(json!({"type": "network", "path": path})),
        Namespace::Host => {}
        Namespace::New => all.push(json!({"type": "network"})),
    }
    Value::Array(all)
}

/// Writes the configuration to its place, whole or not at all.
pub(super) fn write(spec: &Spec, bundle: &Path) -> Result<()> {
    let text = serde_json::to_vec(spec).context("write the container's configuration")?;
    if !bundle.is_dir() {
        fs::create_dir_all(bundle).with_context(|| format!("create {}", bundle.display()))?;
    }
    super::record::write_atomically(&bundle.join("config.json"), &text)
}
