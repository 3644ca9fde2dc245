//! Plugins of the Container Network Interface: how they are called, CNI specification 1.0.0, sections 2, 4 and 5.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use runx_core::sys::{self, pidfd};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The version of the specification that results and configurations are in.
pub(super) const VERSION: &str = "1.0.0";

/// No plugin takes this long unless it hangs.
const PATIENCE_MS: i32 = 60_000;

/// What a plugin is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    Add,
    Check,
    Del,
}

impl Verb {
    fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Check => "CHECK",
            Self::Del => "DEL",
        }
    }
}

/// A network, and the container that is attached to it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Attachment {
    /// The network's name.
    pub(super) network: String,
    /// The configuration of each plugin, in order.
    pub(super) chain: Vec<Value>,
    /// Arguments by the capability that they are for.
    pub(super) capabilities: Value,
    /// Directories of plugins.
    pub(super) path: Vec<PathBuf>,
    /// The container's name for plugins.
    pub(super) container: String,
    /// The interface inside it.
    pub(super) interface: String,
    /// What ADD resulted in so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) result: Option<Value>,
}

/// What a plugin prints when it fails.
#[derive(Deserialize)]
struct Failed {
    #[serde(default)]
    code: u32,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

/// The plugin of this name, in the first directory that has it.
pub(super) fn find(path: &[PathBuf], name: &str) -> Option<PathBuf> {
    // A name with a slash would be a path.
    let name = Some(name).filter(|name| !name.is_empty() && !name.contains('/'))?;
    path.iter().map(|directory| directory.join(name)).find(|file| file.is_file())
}

impl Attachment {
    /// ADD by each plugin, each with what the one before resulted in. `save` is called after each, so that DEL knows what
    /// there is if this process is killed.
    pub(super) fn add(
        &mut self,
        netns: &Path,
        lock: &OwnedFd,
        mut save: impl FnMut(&Self) -> Result<()>,
    ) -> Result<()> {
        self.result = None;
        for at in 0..self.chain.len() {
            let mut out = self.call(Verb::Add, at, Some(netns), lock);
            // The chains that all published ports of the machine have in common are made by the first who needs them, and the
            // plugin does not expect another to make them in the same moment.
            for _ in 0..3 {
                if out.is_ok() || self.name(at) != "portmap" {
                    break;
                }
                self.call(Verb::Del, at, Some(netns), lock)?;
                out = self.call(Verb::Add, at, Some(netns), lock);
            }
            let out = out?;
            let result: Value = serde_json::from_slice(&out)
                .with_context(|| format!("the result of CNI plugin {} is no JSON", self.name(at)))?;
            self.result = Some(result);
            save(self)?;
        }
        Ok(())
    }

    /// CHECK by each plugin: whether what ADD made is still as it was. But for portmap, which misses its rules for IPv6 where
    /// there are none to be (up to version 1.1 at least).
    pub(super) fn check(&self, netns: &Path, lock: &OwnedFd) -> Result<()> {
        let mut asked = (0..self.chain.len()).filter(|at| self.name(*at) != "portmap");
        asked.try_for_each(|at| self.call(Verb::Check, at, Some(netns), lock).map(drop))
    }

    /// DEL by each plugin, the last one first, all of them whatever happens. The first failure is returned.
    pub(super) fn delete(&self, netns: Option<&Path>, lock: &OwnedFd) -> Result<()> {
        let outcomes = (0..self.chain.len()).rev().map(|at| self.call(Verb::Del, at, netns, lock).map(drop));
        outcomes.collect::<Vec<_>>().into_iter().collect()
    }

    fn name(&self, at: usize) -> &str {
        self.chain[at]["type"].as_str().unwrap_or_default()
    }

    /// The configuration of a call, section 5 "Execution configuration".
    fn configuration(&self, verb: Verb, at: usize) -> Value {
        let mut configuration = self.chain[at].clone();
        let declared = configuration.as_object_mut().and_then(|plugin| plugin.remove("capabilities"));
        configuration["cniVersion"] = json!(VERSION);
        configuration["name"] = json!(self.network);
        for (capability, _) in
            declared.as_ref().and_then(Value::as_object).into_iter().flatten().filter(|(_, on)| **on == true)
        {
            if let Some(argument) = self.capabilities.get(capability) {
                configuration["runtimeConfig"][capability] = argument.clone();
            }
        }
        if let Some(result) = self.result.as_ref().filter(|_| verb != Verb::Add || at > 0) {
            configuration["prevResult"] = result.clone();
        }
        configuration
    }

    /// Calls a plugin and returns what it printed. `lock` is inherited by it and what it starts, so that who takes the lock
    /// after this process was killed knows that nothing is being made any more.
    fn call(&self, verb: Verb, at: usize, netns: Option<&Path>, lock: &OwnedFd) -> Result<Vec<u8>> {
        let name = self.name(at);
        let what = || format!("CNI plugin {name}, {}", verb.name());
        let program = find(&self.path, name).with_context(|| missing(name, &self.path))?;
        let configuration =
            serde_json::to_vec(&self.configuration(verb, at)).context("write a plugin's configuration")?;
        // Files, which take all there is without anybody at the other end.
        let mut input = sys::memfd(c"runx-cni").context("make a file for a plugin")?;
        input.write_all(&configuration).and_then(|()| input.rewind()).context("write a plugin's configuration")?;
        let mut output = sys::memfd(c"runx-cni").context("make a file for a plugin")?;
        let mut errors = sys::memfd(c"runx-cni").context("make a file for a plugin")?;
        let stdio = |file: &File| file.try_clone().map(Stdio::from).context("duplicate a plugin's file");
        let mut command = Command::new(&program);
        command
            .env("CNI_COMMAND", verb.name())
            .env("CNI_CONTAINERID", &self.container)
            .env("CNI_NETNS", netns.unwrap_or(Path::new("")))
            .env("CNI_IFNAME", &self.interface)
            .env("CNI_ARGS", "")
            .env("CNI_PATH", std::env::join_paths(&self.path).context("join the plugins' directories")?)
            .env("PATH", with_system_programs())
            .stdin(input)
            .stdout(stdio(&output)?)
            .stderr(stdio(&errors)?);
        sys::set_cloexec(lock.as_fd(), false).context("let a plugin inherit a lock")?;
        let spawned = command.spawn();
        sys::set_cloexec(lock.as_fd(), true).context("keep a lock from others")?;
        let mut child = spawned.with_context(|| format!("start {}", program.display()))?;
        let ended = i32::try_from(child.id()).ok().and_then(|pid| pidfd::open(pid).ok());
        let in_time = ended.map(|ended| pidfd::wait_ended(ended.as_fd(), PATIENCE_MS));
        if !matches!(in_time, None | Some(Ok(true))) {
            let _ = child.kill();
            let _ = child.wait();
            bail!("{}: it did not end within {} seconds and was killed", what(), PATIENCE_MS / 1000);
        }
        let status = child.wait().with_context(|| format!("wait for {}", program.display()))?;
        let read = |file: &mut File| -> Result<Vec<u8>> {
            let mut text = Vec::new();
            file.rewind().and_then(|()| file.read_to_end(&mut text)).context("read what a plugin printed")?;
            Ok(text)
        };
        let (out, err) = (read(&mut output)?, read(&mut errors)?);
        if status.success() {
            return Ok(out);
        }
        let failed = match serde_json::from_slice::<Failed>(&out) {
            Ok(failed) if !failed.msg.is_empty() => failed,
            // One that was killed, or is no plugin.
            _ => bail!(
                "{}: {status}: {}",
                what(),
                String::from_utf8_lossy(if err.is_empty() { &out } else { &err }).trim()
            ),
        };
        let details = if failed.details.is_empty() { String::new() } else { format!(" ({})", failed.details.trim()) };
        let code = if failed.code == 0 { String::new() } else { format!(", error {}", failed.code) };
        Err(anyhow!("{}{code}: {}{details}", what(), failed.msg.trim()))
    }
}

/// What to do about a plugin that is not there.
pub(super) fn missing(name: &str, path: &[PathBuf]) -> String {
    let directories: Vec<_> = path.iter().map(|directory| directory.display().to_string()).collect();
    format!(
        "the CNI plugin {name:?} is in none of {}: install the distribution's plugins (Debian and Ubuntu: apt install \
         containernetworking-plugins; Fedora: dnf install containernetworking-plugins), or set network.plugins in the \
         config file",
        directories.join(", ")
    )
}

/// The caller's PATH, and where iptables is.
pub(super) fn with_system_programs() -> std::ffi::OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    if !path.is_empty() {
        path.push(":");
    }
    path.push("/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin");
    path
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn attachment(directory: &Path, plugins: &[(&str, &str)]) -> Attachment {
        for (name, script) in plugins {
            let file = directory.join(name);
            std::fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        Attachment {
            network: "n".into(),
            chain: plugins
                .iter()
                .map(|(name, _)| json!({"type": name, "capabilities": {"portMappings": *name == "b"}}))
                .collect(),
            capabilities: json!({"portMappings": [1], "bandwidth": 2}),
            path: vec![PathBuf::from("/no/such"), directory.to_owned()],
            container: "c".into(),
            interface: "eth0".into(),
            result: None,
        }
    }

    fn directory(name: &str) -> PathBuf {
        let directory = std::env::temp_dir().join(format!("runx-cni-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        directory
    }

    fn lock() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn results_are_chained_and_capabilities_go_to_those_who_declare_them() {
        let configured = attachment(Path::new("/no"), &[]);
        let mut configured = Attachment {
            chain: vec![json!({"type": "a"}), json!({"type": "b", "capabilities": {"portMappings": true}})],
            ..configured
        };
        configured.result = Some(json!({"ips": []}));
        let first = configured.configuration(Verb::Add, 0);
        assert_eq!(first, json!({"type": "a", "cniVersion": "1.0.0", "name": "n"}));
        let second = configured.configuration(Verb::Add, 1);
        assert_eq!(second["prevResult"], json!({"ips": []}));
        assert_eq!(second["runtimeConfig"], json!({"portMappings": [1]}));
        assert!(second.get("capabilities").is_none());
        // What is to be removed is told to all of them.
        assert_eq!(configured.configuration(Verb::Del, 0)["prevResult"], json!({"ips": []}));
    }

    #[test]
    fn plugins_are_called_in_order_and_removed_in_reverse_whatever_fails() {
        let directory = directory("order");
        let log = directory.join("log");
        let line =
            |name: &str| format!("cat >/dev/null; echo {name} $CNI_COMMAND $CNI_NETNS $CNI_IFNAME >>{}", log.display());
        let a = format!("{}; echo '{{\"r\": 1}}'", line("a"));
        let b = format!("{}; [ $CNI_COMMAND != DEL ] || exit 3; echo '{{\"r\": 2}}'", line("b"));
        let mut made = attachment(&directory, &[("a", &a), ("b", &b)]);
        let mut saved = Vec::new();
        made.add(Path::new("/ns"), &lock(), |so_far| {
            saved.push(so_far.result.clone().unwrap());
            Ok(())
        })
        .unwrap();
        assert_eq!(saved, [json!({"r": 1}), json!({"r": 2})]);
        assert!(made.delete(None, &lock()).unwrap_err().to_string().contains("CNI plugin b, DEL"));
        let log = std::fs::read_to_string(&log).unwrap();
        std::fs::remove_dir_all(&directory).unwrap();
        assert_eq!(log, "a ADD /ns eth0\nb ADD /ns eth0\nb DEL eth0\na DEL eth0\n");
    }

    #[test]
    fn a_plugins_own_words_are_told() {
        let directory = directory("words");
        let json = "cat >/dev/null; echo '{\"cniVersion\": \"1.0.0\", \"code\": 7, \"msg\": \"no room\", \"details\": \"at all\"}'; exit 1";
        let error = |script: &str| {
            let mut made = attachment(&directory, &[("a", script)]);
            format!("{:#}", made.add(Path::new("/ns"), &lock(), |_| Ok(())).unwrap_err())
        };
        assert_eq!(error(json), "CNI plugin a, ADD, error 7: no room (at all)");
        assert_eq!(error("echo oops >&2; exit 5"), "CNI plugin a, ADD: exit status: 5: oops");
        assert!(error("echo '{'").contains("is no JSON"));
        let mut gone = attachment(&directory, &[("a", "exit 0")]);
        std::fs::remove_dir_all(&directory).unwrap();
        let error = format!("{:#}", gone.add(Path::new("/ns"), &lock(), |_| Ok(())).unwrap_err());
        assert!(error.contains("containernetworking-plugins"), "{error}");
    }

    #[test]
    fn names_are_no_paths() {
        assert!(find(&[PathBuf::from("/usr")], "bin/true").is_none());
        assert!(find(&[PathBuf::from("/")], "../bin/true").is_none());
    }
}
