//! `create` and `run`: a new container.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result, anyhow};
use runx_core::agent::Wish;
use runx_core::spec::Spec;

use super::options::{LogOptions, MountKind, Network, Options};
use super::record::{Containers, Lock, Record, now, random_id};
use super::{attach, remove, rootfs, rootless, spec, start};
use crate::arguments::Make;
use crate::oci::foreground::Signals;
use crate::{Context, Failure, print};

/// Exit code of a `run` whose container could not be made, docker's.
const NOT_RUN: u8 = 125;

/// `runx container create`.
pub(super) fn create(context: &Context, mut make: Make) -> Result<u8, Failure> {
    make.options.stdin_once = make.options.interactive;
    let containers = Containers::of(context);
    let (record, lock) = new(context, &containers, make)?;
    drop(lock);
    print(&format!("{}\n", record.id))
}

/// `runx container run`.
pub(super) fn run(context: &Context, make: Make) -> Result<u8, Failure> {
    // What has no code of its own has docker's for a container that did not come to be.
    let code = |failure: &Failure| if failure.code == 1 { NOT_RUN } else { failure.code };
    run_new(context, make).map_err(|failure| Failure { code: code(&failure), ..failure })
}

fn run_new(context: &Context, mut make: Make) -> Result<u8, Failure> {
    let failed = |error: anyhow::Error| Failure { error, code: NOT_RUN };
    let attached = !make.detach;
    let (tty, interactive) = (make.options.tty, make.options.interactive);
    if attached && tty && interactive && !attach::is_terminal(0) {
        return Err(failed(anyhow!(
            "-t with -i connects your terminal to the container's, but standard input is none: leave -t out"
        )));
    }
    make.options.stdin_once = attached && interactive;
    let containers = Containers::of(context);
    let streams = std::mem::replace(
        &mut make.streams,
        crate::arguments::Streams { sig_proxy: true, detach_keys: Default::default() },
    );
    let (record, lock) = new(context, &containers, make).map_err(failed)?;
    // From here on a signal is for the container, or comes once it runs.
    let signals = Signals::hold().map_err(failed)?;
    let id = record.id.clone();
    let greeting = if attached { attach::greeting(tty, !attach::is_terminal(1)) } else { Vec::new() };
    let started = start::start(context, &containers, record, lock, &greeting);
    let socket = match started {
        Ok(socket) => socket,
        Err(failure) => {
            // Nothing has run, and nothing is to be seen of it.
            if let Ok(lock) = containers.lock(&id) {
                let _ = remove::wipe(&context.runtime(), &containers, &id, lock, true);
            }
            return Err(failure);
        }
    };
    if !attached {
        return print(&format!("{id}\n"));
    }
    let attachment = attach::Attachment {
        socket,
        containers: &containers,
        id: &id,
        state: context.global.root.join(&id),
        tty,
        input: interactive,
        streams: &streams,
    };
    Ok(start::conclude(&id, attachment.serve(&signals).map_err(failed)?))
}

/// Makes a container that was not started. Nothing is left when that fails.
pub(super) fn new(context: &Context, containers: &Containers, make: Make) -> Result<(Record, Lock)> {
    let Make { id, mut options, network, log, cidfile, pull, .. } = make;
    rootless::enter()?;
    configured(context, &mut options, network, log)?;
    rootless::check(&options)?;
    if let Some(rootfs) = &options.rootfs {
        options.rootfs = Some(rootfs::given(rootfs)?);
    }
    if let Network::Container(other) = &options.network {
        // By its whole id, which stays when others come.
        options.network = Network::Container(containers.resolve(other).context("--network")?);
    }
    // Of several with one name the last one holds.
    let annotation = |name: &str| options.annotations.iter().rev().find(|(key, _)| key == name);
    Wish::read(|name| annotation(name).map(|(_, value)| value.as_str())).context("--annotation")?;
    let image = match (&options.image, &options.rootfs) {
        (Some(name), None) => Some(rootfs::image(context, containers, name, pull)?),
        _ => None,
    };
    let id = match id {
        Some(id) => id,
        None => unused_id(containers)?,
    };
    remove::sweep(containers);
    let (directory, lock) = containers.make(&id)?;
    let made = fill(&id, &directory, options, image).and_then(|record| {
        if let Some(file) = &cidfile {
            write_cidfile(file, &id)?;
        }
        Ok(record)
    });
    match made {
        Ok(record) => Ok((record, lock)),
        Err(e) => {
            let half = Record { id, ..Record::default() };
            if let Err(left) = remove::discard(containers, &directory, &half, false) {
                log::warn!("after a container that could not be made: {}", crate::message(&left));
            }
            Err(e)
        }
    }
}

/// What the config file says of that which no flag says.
fn configured(
    context: &Context,
    options: &mut Options,
    network: Option<Network>,
    (max_size, max_file): (Option<u64>, Option<u32>),
) -> Result<()> {
    let config = &context.config.container;
    let usual = LogOptions::default();
    options.log = LogOptions {
        max_size: max_size.or(config.log.max_size.and_then(|size| u64::try_from(size).ok())).unwrap_or(usual.max_size),
        max_file: max_file.or(config.log.max_file).unwrap_or(usual.max_file),
    };
    if let Some(bundle) = options.bundle.as_ref().filter(|bundle| bundle.join("config.json").exists()) {
        // All else is decided there, by nobody's defaults.
        if network.is_some() {
            anyhow::bail!(
                "--bundle: {} is there already and decides about --network",
                bundle.join("config.json").display()
            );
        }
        return Ok(());
    }
    options.network = match (network, config.network.as_deref()) {
        (Some(given), _) => given,
        (None, Some(text)) if options.publish.is_empty() => Network::from_str(text)?,
        (None, _) => Network::default(),
    };
    let limits = &mut options.limits;
    if limits.memory_swap.is_none() {
        limits.memory = limits.memory.or(config.memory);
    }
    limits.cpus = limits.cpus.or(config.cpus.map(|cpus| (cpus * 1000.0).round().max(10.0) as i64));
    limits.pids = limits.pids.or(config.pids_limit);
    Ok(())
}

fn unused_id(containers: &Containers) -> Result<String> {
    loop {
        let id = random_id()?;
        if !containers.directory(&id).exists() {
            return Ok(id);
        }
    }
}

fn fill(id: &str, directory: &Path, options: Options, image: Option<rootfs::Image>) -> Result<Record> {
    let mut record = Record { id: id.to_owned(), created: now(), options, ..Record::default() };
    record.bundle = bundle(&mut record, directory)?;
    if record.options.given_configuration {
        take_configuration(&mut record)?;
    } else {
        if let Some(image) = &image {
            rootfs::prepare(directory, image, &mut record)?;
        }
        record.rootfs = rootfs::place(directory, &record);
        record.args = spec::command_line(&record)?;
    }
    record.labels = record.defaults.labels.iter().chain(&record.options.labels).cloned().collect();
    name_volumes(&mut record)?;
    record.write(directory)?;
    Ok(record)
}

/// Gives names to volumes that have none, and adds those that the image asks for.
fn name_volumes(record: &mut Record) -> Result<()> {
    for path in record.defaults.volumes.clone() {
        if !record.options.mounts.iter().any(|mount| mount.target == path) {
            record.options.mounts.push(super::options::Mount {
                kind: MountKind::Volume,
                source: String::new(),
                target: path,
                options: vec!["bind".into(), "rprivate".into()],
                make: false,
                fill: true,
            });
        }
    }
    for mount in &mut record.options.mounts {
        if mount.kind == MountKind::Volume && mount.source.is_empty() {
            mount.source = format!("{}{}{}", random_id()?, random_id()?, random_id()?);
            record.volumes.push(mount.source.clone());
        }
    }
    Ok(())
}

/// Where the configuration is; whether it is there already is noted.
fn bundle(record: &mut Record, directory: &Path) -> Result<PathBuf> {
    let Some(bundle) = &record.options.bundle else {
        return fs::canonicalize(directory).with_context(|| format!("find {}", directory.display()));
    };
    fs::create_dir_all(bundle).with_context(|| format!("--bundle: create {}", bundle.display()))?;
    let bundle = fs::canonicalize(bundle).with_context(|| format!("--bundle {}", bundle.display()))?;
    record.options.given_configuration = bundle.join("config.json").exists();
    record.options.bundle = Some(bundle.clone());
    Ok(bundle)
}

/// A bundle's configuration is taken as it is, so that flags which would change it are refused.
fn take_configuration(record: &mut Record) -> Result<()> {
    let path = record.bundle.join("config.json");
    let config: Spec = runx_core::bundle::parse_file(&path)?;
    let plain = Options::default();
    let options = &record.options;
    let decided = [
        ("a command", !options.command.is_empty()),
        ("--image", options.image.is_some()),
        ("--rootfs", options.rootfs.is_some()),
        ("--env", !options.env.is_empty()),
        ("--user", options.user.is_some()),
        ("--workdir", options.cwd.is_some()),
        ("--volume, --mount or --tmpfs", !options.mounts.is_empty()),
        ("--read-only", options.read_only),
        ("a limit", options.limits != plain.limits || !options.ulimits.is_empty()),
        ("--cap-add or --cap-drop", !options.cap_add.is_empty() || !options.cap_drop.is_empty()),
        ("--privileged", options.privileged),
        ("--device", !options.devices.is_empty()),
        ("--hostname", options.hostname.is_some()),
        ("--publish", !options.publish.is_empty()),
        ("--annotation", !options.annotations.is_empty()),
        ("--sysctl", !options.sysctls.is_empty()),
        ("--entrypoint", options.entrypoint.is_some()),
        ("--group-add", !options.groups.is_empty()),
        ("--security-opt", options.security != plain.security),
        ("--dns, --dns-search or --add-host", {
            !options.dns.is_empty() || !options.dns_search.is_empty() || !options.hosts.is_empty()
        }),
        ("--shm-size", options.shm_size.is_some()),
    ];
    if let Some((flag, _)) = decided.iter().find(|(_, given)| *given) {
        anyhow::bail!("--bundle: {} is there already and decides about {flag}", path.display());
    }
    let process = config.process().as_ref().context("the bundle's configuration has no process")?;
    record.args = process.args().clone().unwrap_or_default();
    let terminal = process.terminal().unwrap_or(false);
    if options.tty && !terminal {
        anyhow::bail!("--bundle: {} says that there is no terminal, and --tty that there is one", path.display());
    }
    record.options.tty = terminal;
    let root = config.root().as_ref().context("the bundle's configuration has no root")?;
    record.rootfs = record.bundle.join(root.path());
    Ok(())
}

fn write_cidfile(file: &Path, id: &str) -> Result<()> {
    let opened = fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(file);
    opened
        .and_then(|mut file| std::io::Write::write_all(&mut file, id.as_bytes()))
        .with_context(|| format!("--cidfile: write {}; it must not be there before", file.display()))
}
