//! `--volume`, `--mount` and `--tmpfs`.

use std::path::{Component, Path};

use anyhow::{Result, bail};

use crate::container::options::{Mount, MountKind};

/// Options of a bind mount that mean the same in config.json.
const PASSED_ON: [&str; 14] = [
    "ro", "rw", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "private", "rprivate", "slave", "rslave", "shared",
    "rshared",
];

/// `-v [SOURCE:]PATH[:OPTION,…]`.
pub(super) fn volume(text: &str) -> Result<Mount> {
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, options) = match parts[..] {
        [target] => ("", target, ""),
        [source, target] => (source, target, ""),
        [source, target, options] => (source, target, options),
        _ => bail!("--volume {text:?} is not SOURCE:PATH[:OPTION,…]"),
    };
    if parts.len() > 1 && source.is_empty() {
        bail!("--volume {text:?}: what is to be mounted is missing before the colon");
    }
    let is_path = source.starts_with('/') || source.starts_with('.') || source.starts_with('~');
    let mut mount = Mount {
        kind: if is_path { MountKind::Bind } else { MountKind::Volume },
        source: source.to_owned(),
        target: target.to_owned(),
        options: Vec::new(),
        make: true,
        fill: true,
    };
    if is_path {
        mount.source = absolute(source)?;
        mount.options.push("rbind".to_owned());
    } else {
        check_volume(source)?;
        mount.options.push("bind".to_owned());
    }
    let mut propagation = false;
    for option in options.split(',').filter(|option| !option.is_empty()) {
        propagation |= is_propagation(option);
        match option {
            // Without SELinux there is nothing to relabel, and with it the label of the process can be said.
            "z" | "Z" if Path::new("/sys/fs/selinux/enforce").exists() => {
                bail!("--volume {text:?}: files are not relabelled here; use chcon(1), or --security-opt label=LABEL")
            }
            "z" | "Z" | "cached" | "consistent" | "delegated" => {}
            "nocopy" => mount.fill = false,
            option if PASSED_ON.contains(&option) => mount.options.push(option.to_owned()),
            other => bail!("--volume {text:?}: there is no option {other:?}"),
        }
    }
    if !propagation {
        mount.options.push("rprivate".to_owned());
    }
    check_target(text, target)?;
    Ok(mount)
}

fn is_propagation(option: &str) -> bool {
    ["private", "slave", "shared"].iter().any(|kind| option.trim_start_matches('r') == *kind)
}

fn absolute(source: &str) -> Result<String> {
    let path = match source.strip_prefix('~') {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => {
            bail!("the shell did not replace ~ in {source:?}: say $HOME{rest}")
        }
        _ => std::path::absolute(source)?,
    };
    match path.into_os_string().into_string() {
        Ok(path) => Ok(path),
        Err(path) => bail!("{path:?} is not UTF-8"),
    }
}

/// A volume's name becomes that of a directory.
fn check_volume(name: &str) -> Result<()> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if name.starts_with(['.', '-', '_']) || name.len() > 128 || !name.bytes().all(good) {
        bail!("{name:?} is neither a volume's name (letters, digits and _.-) nor a path that begins with / or ./");
    }
    Ok(())
}

fn check_target(text: &str, target: &str) -> Result<()> {
    let path = Path::new(target);
    if !path.is_absolute() {
        bail!("{text:?}: the path in the container, {target:?}, is not absolute");
    }
    if !path.components().any(|part| matches!(part, Component::Normal(_))) {
        bail!("{text:?}: nothing can be mounted over the container's root");
    }
    if path.components().any(|part| matches!(part, Component::ParentDir)) {
        bail!("{text:?}: the path in the container, {target:?}, contains \"..\"");
    }
    Ok(())
}

/// `--mount type=…,src=…,dst=…`.
pub(super) fn mount(text: &str) -> Result<Mount> {
    let (mut kind, mut source, mut target) = (MountKind::Volume, String::new(), String::new());
    let (mut options, mut fill, mut recursive) = (Vec::new(), true, true);
    for field in text.split(',').filter(|field| !field.is_empty()) {
        let (key, value) = field.split_once('=').unwrap_or((field, ""));
        let on = || match value {
            "" | "true" | "1" => Ok(true),
            "false" | "0" => Ok(false),
            _ => Err(anyhow::anyhow!("--mount {text:?}: {key} is true or false, not {value:?}")),
        };
        match key {
            "type" => {
                kind = match value {
                    "bind" => MountKind::Bind,
                    "volume" => MountKind::Volume,
                    "tmpfs" => MountKind::Tmpfs,
                    _ => bail!("--mount {text:?}: the type is bind, volume or tmpfs, not {value:?}"),
                }
            }
            "source" | "src" => source = value.to_owned(),
            "target" | "dst" | "destination" => target = value.to_owned(),
            "readonly" | "ro" => options.push(if on()? { "ro" } else { "rw" }.to_owned()),
            "volume-nocopy" => fill = !on()?,
            "bind-nonrecursive" => recursive = !on()?,
            "bind-propagation" if is_propagation(value) => options.push(value.to_owned()),
            "tmpfs-size" => options.push(format!("size={}", crate::arguments::units::bytes(value)?)),
            "tmpfs-mode" if u32::from_str_radix(value, 8).is_ok() => options.push(format!("mode={value}")),
            _ => bail!("--mount {text:?}: {field:?} is not known"),
        }
    }
    check_target(text, &target)?;
    let propagation = options.iter().any(|option| is_propagation(option));
    match kind {
        MountKind::Tmpfs => {
            if !source.is_empty() {
                bail!("--mount {text:?}: a tmpfs has no source");
            }
            options.splice(0..0, ["nosuid", "nodev"].map(str::to_owned));
        }
        MountKind::Bind | MountKind::Volume => {
            if kind == MountKind::Volume {
                check_volume(&source)?;
            } else if source.is_empty() {
                bail!("--mount {text:?}: src= is missing");
            } else {
                source = absolute(&source)?;
            }
            let tmpfs = |option: &String| option.starts_with("size=") || option.starts_with("mode=");
            if options.iter().any(tmpfs) {
                bail!("--mount {text:?}: only a tmpfs has a size and a mode");
            }
            options.insert(0, if recursive && kind == MountKind::Bind { "rbind" } else { "bind" }.to_owned());
            if !propagation {
                options.push("rprivate".to_owned());
            }
        }
    }
    Ok(Mount { kind, source, target, options, make: false, fill })
}

/// `--tmpfs PATH[:OPTION,…]`.
pub(super) fn tmpfs(text: &str) -> Result<Mount> {
    let (target, given) = text.split_once(':').unwrap_or((text, ""));
    check_target(text, target)?;
    let mut options = ["nosuid", "nodev", "noexec"].map(str::to_owned).to_vec();
    options.extend(given.split(',').filter(|option| !option.is_empty()).map(str::to_owned));
    Ok(Mount {
        kind: MountKind::Tmpfs,
        source: String::new(),
        target: target.to_owned(),
        options,
        make: false,
        fill: false,
    })
}

/// Two mounts at one place are a mistake.
pub(super) fn check(mounts: &[Mount]) -> Result<()> {
    for (at, mount) in mounts.iter().enumerate() {
        let clean = |mount: &Mount| Path::new(&mount.target).components().collect::<std::path::PathBuf>();
        if mounts[..at].iter().any(|before| clean(before) == clean(mount)) {
            bail!("two mounts at {:?}: one would hide the other", mount.target);
        }
    }
    Ok(())
}
