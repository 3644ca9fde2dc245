//! Seccomp profiles: the usual one, or one that the user names, in the runtime-spec's form or docker's.

use anyhow::{Context as _, Result};
use runx_core::spec::{LinuxSeccomp, Spec};
use serde_json::{Value, json};

use super::security;
use crate::container::options::{Options, Seccomp};
use crate::container_defaults::seccomp::default_profile;

/// Adds the profile.
pub(super) fn add(options: &Options, spec: &mut Spec) -> Result<()> {
    let profile = match &options.security.seccomp {
        Seccomp::Unconfined => None,
        Seccomp::Default if options.privileged => None,
        Seccomp::Default => {
            let capabilities = security::wanted(options)?;
            let capabilities: Vec<&str> = capabilities.iter().map(String::as_str).collect();
            Some(default_profile(&capabilities))
        }
        Seccomp::Profile(profile) => {
            let profile = in_spec_form(profile.clone(), &security::wanted(options)?);
            let parsed: LinuxSeccomp = serde_json::from_value(profile).context("--security-opt seccomp")?;
            Some(parsed)
        }
    };
    if let Some(linux) = spec.linux_mut() {
        linux.set_seccomp(profile);
    }
    Ok(())
}

/// Docker's files have architectures with their relatives, and rules that are there for some capabilities or
/// architectures only.
fn in_spec_form(mut profile: Value, capabilities: &[String]) -> Value {
    let Some(fields) = profile.as_object_mut() else { return profile };
    if let Some(Value::Array(map)) = fields.remove("archMap") {
        let own = |entry: &&Value| entry["architecture"] == architecture();
        let mut all = Vec::new();
        for entry in map.iter().filter(own) {
            all.push(entry["architecture"].clone());
            all.extend(entry["subArchitectures"].as_array().into_iter().flatten().cloned());
        }
        fields.entry("architectures").or_insert(Value::Array(all));
    }
    let holds = |condition: &Value, excluding: bool| {
        let names = |key: &str| condition[key].as_array().cloned().unwrap_or_default();
        let (caps, arches) = (names("caps"), names("arches"));
        let has = |cap: &Value| capabilities.iter().any(|name| cap == name);
        let ours = |arch: &Value| arch == docker_architecture();
        if excluding {
            caps.iter().any(has) || arches.iter().any(ours)
        } else {
            caps.iter().all(has) && (arches.is_empty() || arches.iter().any(ours)) && is_new_enough(condition)
        }
    };
    if let Some(rules) = fields.get_mut("syscalls").and_then(Value::as_array_mut) {
        rules.retain(|rule| holds(&rule["includes"], false) && !holds(&rule["excludes"], true));
        for rule in rules.iter_mut().filter_map(Value::as_object_mut) {
            for docker in ["includes", "excludes", "comment"] {
                rule.remove(docker);
            }
            if let Some(name) = rule.remove("name") {
                rule.insert("names".into(), json!([name]));
            }
            if rule.get("args").is_some_and(Value::is_null) {
                rule.remove("args");
            }
        }
    }
    profile
}

fn is_new_enough(condition: &Value) -> bool {
    let numbers = |text: &str| -> Vec<u32> {
        text.split(|c: char| !c.is_ascii_digit()).take(2).map(|part| part.parse().unwrap_or(0)).collect()
    };
    let Some(least) = condition["minKernel"].as_str() else { return true };
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    numbers(&release) >= numbers(least)
}

fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") { "SCMP_ARCH_AARCH64" } else { "SCMP_ARCH_X86_64" }
}

fn docker_architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_of_docker_profiles_are_there_for_their_capabilities_only() {
        let profile = json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "archMap": [
                {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
                {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
            ],
            "syscalls": [
                {"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": null, "comment": "", "includes": {}, "excludes": {}},
                {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
                {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
                {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "99.0"}},
            ],
        });
        let names = |capabilities: &[String]| {
            let profile = in_spec_form(profile.clone(), capabilities);
            let parsed: LinuxSeccomp = serde_json::from_value(profile).unwrap();
            assert_eq!(parsed.architectures().as_ref().map(Vec::len), Some(2));
            let rules = parsed.syscalls().clone().unwrap_or_default();
            rules.iter().flat_map(|rule| rule.names().clone()).collect::<Vec<_>>()
        };
        assert_eq!(names(&[]), ["read", "clone"]);
        assert_eq!(names(&["CAP_SYS_ADMIN".to_owned()]), ["read", "mount"]);
    }
}
