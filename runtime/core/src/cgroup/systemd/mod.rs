//! Cgroups as units of systemd: a container is a scope, which systemd makes, in a slice.
//!
//! systemd is the one who changes the tree, so that it and we do not undo each other's work. It is asked over D-Bus,
//! by a client of our own ([`bus`]): a call, an answer and one signal are a few hundred lines and need no thread,
//! which a process that clones must not have.

mod bus;
mod message;
mod properties;
mod text;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::runtime::LinuxResources;
use serde::{Deserialize, Serialize};

use super::devices::Allowed;
use crate::error::{Context, Error, Result};
use bus::{Bus, Failure};
use message::Value;
use properties::Properties;

/// Where containers go whose cgroupsPath names no slice, as with runc.
const DEFAULT_SLICE: &str = "system.slice";

/// The beginning of the name of a scope whose cgroupsPath is not given.
const DEFAULT_PREFIX: &str = "runx";

/// Properties that say which unit it is; an annotation must not change that.
const OWN: &[&str] = &["PIDs", "PIDFDs", "Slice"];

/// The unit of one container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unit {
    /// Its name: `prefix-name.scope`.
    pub name: String,
    /// The name of the slice that it is in.
    pub slice: String,
}

/// Where a container's limits are, for what systemd has to be told of them.
#[derive(Clone, Copy)]
pub(super) enum Group<'a> {
    /// The directory of the controller `cpu`.
    V1(Option<&'a Path>),
    /// The directory.
    V2(&'a Path),
}

/// What a unit is to be like when it is made.
pub(super) struct Start<'a> {
    pub(super) id: &'a str,
    pub(super) pid: i32,
    pub(super) group: Group<'a>,
    /// For version 1, where systemd writes these into the group.
    pub(super) devices: Option<Allowed>,
    pub(super) resources: Option<&'a LinuxResources>,
    pub(super) annotations: Option<&'a HashMap<String, String>>,
}

/// A slice's directory: `a-b.slice` is `a.slice/a-b.slice`.
fn expand_slice(slice: &str) -> Result<PathBuf> {
    let bad = || Error::spec(format!("linux.cgroupsPath: {slice:?} is not the name of a slice"));
    let stem = slice.strip_suffix(".slice").filter(|_| is_name(slice)).ok_or_else(bad)?;
    if stem == "-" {
        return Ok(PathBuf::new());
    }
    let mut path = PathBuf::new();
    let mut name = String::new();
    for part in stem.split('-') {
        if part.is_empty() {
            return Err(bad());
        }
        name = if name.is_empty() { part.to_owned() } else { format!("{name}-{part}") };
        path.push(format!("{name}.slice"));
    }
    Ok(path)
}

/// Whether systemd takes this as a unit's name.
fn is_name(name: &str) -> bool {
    name.len() <= 255 && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte))
}

impl Unit {
    /// The unit that `linux.cgroupsPath` names as `slice:prefix:name`. Without one it is `runx-ID.scope` in
    /// system.slice. No slice is system.slice, too, and no prefix is none.
    pub(super) fn named(cgroups_path: Option<&Path>, id: &str) -> Result<Self> {
        let text = match cgroups_path {
            Some(path) => path.to_string_lossy().into_owned(),
            None => format!("{DEFAULT_SLICE}:{DEFAULT_PREFIX}:{id}"),
        };
        let parts: Vec<&str> = text.split(':').collect();
        let [slice, prefix, name] = parts[..] else {
            return Err(Error::spec(format!(
                "linux.cgroupsPath {text:?}: expected the form \"slice:prefix:name\" for systemd cgroups"
            )));
        };
        let slice = if slice.is_empty() { DEFAULT_SLICE } else { slice };
        expand_slice(slice)?;
        let dash = if prefix.is_empty() { "" } else { "-" };
        let unit = format!("{prefix}{dash}{name}.scope");
        if name.is_empty() || name.ends_with(".slice") || !is_name(&unit) {
            return Err(Error::spec(format!(
                "linux.cgroupsPath {text:?}: {unit:?} is not the name of a scope: only letters, digits and \
                 :-_.\\@ are allowed, 255 in all, and a slice holds no processes"
            )));
        }
        Ok(Self { name: unit, slice: slice.to_owned() })
    }

    /// Its directory in the tree.
    pub(super) fn path(&self) -> Result<PathBuf> {
        Ok(expand_slice(&self.slice)?.join(&self.name))
    }

    /// Has systemd make the unit, with the process in it and the limits set. Tells the limits as they are to be
    /// written to the group.
    pub(super) fn start(&self, start: &Start<'_>) -> Result<Option<LinuxResources>> {
        let mut bus = self.connect()?;
        let mut properties = self.limits(&mut bus, start.group, start.resources)?;
        properties.set("Description", format!("runx container {}", start.id).as_str());
        properties.set("Slice", self.slice.as_str());
        properties.set("PIDs", Value::Array("u".to_owned(), vec![Value::U32(start.pid as u32)]));
        properties.set("Delegate", true);
        properties.set("DefaultDependencies", false);
        // A unit that failed is as uninteresting, once it is over, as one that did not.
        properties.set("CollectMode", "inactive-or-failed");
        let io = if matches!(start.group, Group::V1(_)) { "BlockIOAccounting" } else { "IOAccounting" };
        for accounting in ["CPUAccounting", "MemoryAccounting", "TasksAccounting", io] {
            properties.set(accounting, true);
        }
        match &start.devices {
            Some(allowed) => properties.devices(allowed.clone()),
            // With version 2 the program that we attach decides alone; systemd is to attach none.
            None => properties.set("DevicePolicy", "auto"),
        }
        if let Some(resources) = start.resources {
            properties.oom_policy(resources);
        }
        for (name, value) in start.annotations.map_or(Ok(Vec::new()), properties::from_annotations)? {
            if OWN.contains(&name.as_str()) {
                return Err(Error::spec(format!("annotation org.systemd.property.{name}: it is the container's own")));
            }
            properties.set(&name, value);
        }
        let adjusted = start.resources.map(|resources| properties.adjusted(resources));
        self.start_transient(&mut bus, properties)?;
        Ok(adjusted)
    }

    fn start_transient(&self, bus: &mut Bus, properties: Properties) -> Result<()> {
        let arguments = [
            self.name.as_str().into(),
            "replace".into(),
            properties.into_value(),
            Value::Array("(sa(sv))".to_owned(), Vec::new()),
        ];
        let mut answer = bus.manager("StartTransientUnit", &arguments);
        // What a container of the same name left, if it failed, is in the way until it is reset.
        if answer.as_ref().is_err_and(|e| e.is("UnitExists")) && self.reset(bus).is_ok() {
            answer = bus.manager("StartTransientUnit", &arguments);
        }
        let what = || format!("start systemd unit {:?} in {:?}", self.name, self.slice);
        let answer = answer.map_err(Failure::into_io).with_context(what)?;
        let job = answer.body().text().with_context(what)?;
        let result = match bus.wait(&job) {
            // systemd executes itself anew at times; the job goes on.
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => self.settle().with_context(what)?,
            other => other.with_context(what)?,
        };
        if result == "done" {
            return Ok(());
        }
        let _ = self.reset(bus);
        Err(io::Error::other(format!("the job's result is {result:?}"))).with_context(what)
    }

    /// Waits over a new connection until the unit has started or failed.
    fn settle(&self) -> io::Result<String> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let state = Bus::connect().map_err(Failure::Io).and_then(|mut bus| {
                let path = bus.manager("GetUnit", &[self.name.as_str().into()])?.body().text()?;
                bus.property(Some(&path), "Unit", "ActiveState")
            });
            match state {
                Ok(state) if state == "active" => return Ok("done".into()),
                Ok(state) if state == "failed" => return Ok(state),
                Ok(_) | Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(50)),
                Ok(state) => return Ok(state),
                Err(e) => return Err(e.into_io()),
            }
        }
    }

    /// Tells systemd of new limits. Tells them as they are to be written to the group.
    pub(super) fn update(&self, group: Group<'_>, resources: &LinuxResources) -> Result<LinuxResources> {
        let mut bus = self.connect()?;
        let properties = self.limits(&mut bus, group, Some(resources))?;
        let adjusted = properties.adjusted(resources);
        if !properties.list.is_empty() {
            const UNTIL_THE_UNIT_ENDS: bool = true;
            bus.manager(
                "SetUnitProperties",
                &[self.name.as_str().into(), UNTIL_THE_UNIT_ENDS.into(), properties.into_value()],
            )
            .map_err(Failure::into_io)
            .with_context(|| format!("set properties of systemd unit {:?}", self.name))?;
        }
        Ok(adjusted)
    }

    /// Ends the unit. One that is not there is fine: it ends by itself with its last process.
    pub(super) fn stop(&self) -> Result<()> {
        let what = || format!("stop systemd unit {:?}", self.name);
        let mut bus = self.connect()?;
        let answer = match bus.manager("StopUnit", &[self.name.as_str().into(), "replace".into()]) {
            Err(e) if e.is("NoSuchUnit") => return Ok(()),
            other => other.map_err(Failure::into_io).with_context(what)?,
        };
        let job = answer.body().text().with_context(what)?;
        let result = bus.wait(&job).with_context(what)?;
        if result != "done" {
            log::warn!("systemd unit {:?}: the job to stop it ended as {result:?}", self.name);
        }
        // If it failed, it would stay where CollectMode is the user's.
        let _ = self.reset(&mut bus);
        Ok(())
    }

    fn reset(&self, bus: &mut Bus) -> Result<(), Failure> {
        bus.manager("ResetFailedUnit", &[self.name.as_str().into()]).map(drop)
    }

    fn connect(&self) -> Result<Bus> {
        Bus::connect().with_context(|| format!("connect to systemd for unit {:?}", self.name))
    }

    fn limits(&self, bus: &mut Bus, group: Group<'_>, resources: Option<&LinuxResources>) -> Result<Properties> {
        let needed = resources.is_some_and(properties::needs_version);
        let mut properties = Properties::new(if needed { version(bus)? } else { properties::KNOWS_IDLE - 1 });
        match (group, resources) {
            (_, None) => {}
            (Group::V1(cpu), Some(resources)) => properties.limits_1(cpu, resources)?,
            (Group::V2(path), Some(resources)) => properties.limits_2(path, resources)?,
        }
        Ok(properties)
    }
}

/// systemd's version, from a text like `252.39-1~deb12u2` or `v245`.
fn version(bus: &mut Bus) -> Result<u32> {
    let what = "ask systemd for its version";
    let text = bus.property(None, "Manager", "Version").map_err(Failure::into_io).context(what)?;
    let digits: String = text.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
    digits.parse().map_err(|_| Error::system(what, io::Error::other(format!("{text:?} is no version"))))
}

/// Whether this machine was booted with systemd, as sd_booted(3) has it.
pub(super) fn is_running() -> bool {
    std::fs::symlink_metadata("/run/systemd/system").is_ok_and(|found| found.is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_lie_in_those_that_their_names_begin_with() {
        assert_eq!(expand_slice("a-b-c.slice").unwrap(), Path::new("a.slice/a-b.slice/a-b-c.slice"));
        assert_eq!(expand_slice("system.slice").unwrap(), Path::new("system.slice"));
        assert_eq!(expand_slice("-.slice").unwrap(), Path::new(""));
        for bad in ["", "a", ".slice", "-a.slice", "a--b.slice", "a-.slice", "a/b.slice", "a.slice.d", "ü.slice"] {
            assert!(expand_slice(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_cgroups_path_names_slice_prefix_and_container() {
        let named = |path: &str| Unit::named(Some(Path::new(path)), "id");
        let unit = named("kubepods-besteffort.slice:cri-containerd:abc").unwrap();
        assert_eq!(unit.name, "cri-containerd-abc.scope");
        assert_eq!(
            unit.path().unwrap(),
            Path::new("kubepods.slice/kubepods-besteffort.slice/cri-containerd-abc.scope")
        );
        assert_eq!(named("::abc").unwrap(), Unit { name: "abc.scope".into(), slice: "system.slice".into() });
        assert_eq!(Unit::named(None, "c1").unwrap().name, "runx-c1.scope");
        let long = format!("::{}", "x".repeat(255));
        for bad in ["/a/b", "a:b", "a:b:c:d", "system.slice:p:", "system.slice:p:n+1", "s:p:n", "::a.slice", &long] {
            assert!(named(bad).is_err(), "{bad}");
        }
    }
}
