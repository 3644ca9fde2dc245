//! The node's systemd, as far as it has to do something for us.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::dbus::{Body, Bus, Message};

const MANAGER: (&str, &str) = ("/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager");

/// How a unit is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unit {
    /// `loaded` if there is such a unit.
    pub(crate) load: String,
    /// `active` if it runs.
    pub(crate) active: String,
}

fn manager(bus: &mut Bus, member: &str, signature: &str, body: &Body) -> io::Result<Message> {
    bus.call(MANAGER.0, (MANAGER.1, member), signature, body)
}

fn property(bus: &mut Bus, path: &str, name: &str) -> io::Result<String> {
    let mut body = Body::default();
    body.string("org.freedesktop.systemd1.Unit");
    body.string(name);
    let mut answer = bus.call(path, ("org.freedesktop.DBus.Properties", "Get"), "ss", &body)?;
    answer.signature()?;
    answer.string()
}

/// How a unit is.
///
/// # Errors
/// When systemd cannot be asked.
pub(super) fn unit(socket: &Path, name: &str) -> io::Result<Unit> {
    let mut bus = Bus::connect(socket)?;
    let mut body = Body::default();
    body.string(name);
    let path = manager(&mut bus, "LoadUnit", "s", &body)?.string()?;
    Ok(Unit { load: property(&mut bus, &path, "LoadState")?, active: property(&mut bus, &path, "ActiveState")? })
}

/// Waits for the end of the job that an answer names, and tells its result.
fn job(bus: &mut Bus, mut answer: Message, deadline: Instant) -> io::Result<String> {
    let path = answer.string()?;
    loop {
        let mut signal = bus.signal("JobRemoved", deadline)?;
        signal.number()?;
        if signal.string()? == path {
            signal.string()?;
            return signal.string();
        }
    }
}

fn subscribed(socket: &Path) -> io::Result<Bus> {
    let mut bus = Bus::connect(socket)?;
    manager(&mut bus, "Subscribe", "", &Body::default())?;
    Ok(bus)
}

/// Restarts a unit and waits until it says that it is up, or is not.
///
/// # Errors
/// When it does not come up.
pub(super) fn restart(socket: &Path, name: &str, patience: Duration) -> io::Result<()> {
    let mut bus = subscribed(socket)?;
    // Who has tried too often is not started again otherwise; a unit that did not fail is fine.
    let mut body = Body::default();
    body.string(name);
    let _ = manager(&mut bus, "ResetFailedUnit", "s", &body);
    body.string("replace");
    let answer = manager(&mut bus, "RestartUnit", "ss", &body)?;
    match job(&mut bus, answer, Instant::now() + patience)?.as_str() {
        "done" => Ok(()),
        result => Err(io::Error::other(format!("the job of systemd that restarts {name} ends with {result:?}"))),
    }
}

/// What a transient unit is to do.
pub(super) struct Run<'a> {
    /// Its name, with `.service`.
    pub(super) unit: &'a str,
    /// The program and its arguments.
    pub(super) command: &'a [String],
    /// Where standard output goes. The file is there.
    pub(super) output: &'a Path,
    /// Where standard error goes.
    pub(super) errors: &'a Path,
}

/// Runs a program on the node, as a unit that is gone when it has ended. Tells whether its exit code was 0.
///
/// # Errors
/// When systemd does not start it, or it does not end.
pub(super) fn run(socket: &Path, what: &Run<'_>, patience: Duration) -> io::Result<bool> {
    let mut bus = subscribed(socket)?;
    let mut body = Body::default();
    body.string(what.unit);
    body.string("fail");
    body.array(8, |properties| {
        let text = |properties: &mut Body, name: &str, value: &str| {
            properties.structure();
            properties.string(name);
            properties.signature("s");
            properties.string(value);
        };
        let path = |path: &Path| path.to_string_lossy().into_owned();
        text(properties, "Description", "runx-node reads containerd's configuration");
        text(properties, "Type", "oneshot");
        text(properties, "CollectMode", "inactive-or-failed");
        text(properties, "StandardOutputFile", &path(what.output));
        text(properties, "StandardErrorFile", &path(what.errors));
        properties.structure();
        properties.string("TimeoutStartUSec");
        properties.signature("t");
        properties.long(patience.as_micros() as u64);
        properties.structure();
        properties.string("ExecStart");
        properties.signature("a(sasb)");
        properties.array(8, |commands| {
            commands.structure();
            commands.string(&what.command[0]);
            commands.array(4, |words| what.command.iter().for_each(|word| words.string(word)));
            // A failure is one.
            commands.number(0);
        });
    });
    // No auxiliary units.
    body.array(8, |_| {});
    let answer = manager(&mut bus, "StartTransientUnit", "ssa(sv)a(sa(sv))", &body)?;
    let result = job(&mut bus, answer, Instant::now() + patience + Duration::from_secs(5))?;
    Ok(result == "done")
}

/// Where systemd listens to its own programs.
pub(super) fn socket() -> PathBuf {
    "/run/systemd/private".into()
}
