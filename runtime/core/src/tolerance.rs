//! Documents that break the parser and not the runtime-spec, or that every other runtime takes.
//!
//! Looked at only when a document could not be parsed, so that the others pay nothing for it.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::capability;

/// Names of scheduler flags, as the runtime-spec has them and as the parser wants them.
const SCHEDULER_FLAGS: &[(&str, &str)] =
    &[("SCHED_FLAG_RESET_ON_FORK", "SCHED_RESET_ON_FORK"), ("SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_D_L_OVERRUN")];

/// Corrects a config.json or the description of a process. Returns whether there was anything to correct.
pub(crate) fn correct(document: &mut Value) -> bool {
    // A process description is the document itself, and has arguments.
    let process = if document.get("args").is_some() { Some(document) } else { document.get_mut("process") };
    let Some(process) = process.and_then(Value::as_object_mut) else { return false };
    let user = add_user(process);
    let flags = rename_scheduler_flags(process);
    remove_unknown_capabilities(process) || user || flags
}

/// A process without a user is root's.
fn add_user(process: &mut Map<String, Value>) -> bool {
    let missing = !process.contains_key("user");
    process.entry("user").or_insert_with(|| json!({"uid": 0, "gid": 0}));
    missing
}

fn rename_scheduler_flags(process: &mut Map<String, Value>) -> bool {
    let mut renamed = false;
    let flags = process.get_mut("scheduler").and_then(|scheduler| scheduler.get_mut("flags"));
    for flag in flags.and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some((_, parsers)) = SCHEDULER_FLAGS.iter().find(|(name, _)| flag.as_str() == Some(name)) {
            *flag = (*parsers).into();
            renamed = true;
        }
    }
    renamed
}

/// Capabilities may come from a newer kernel; they are to leave a warning and not to fail (config.md, "Linux
/// Process").
fn remove_unknown_capabilities(process: &mut Map<String, Value>) -> bool {
    let mut unknown = BTreeSet::new();
    let sets = process.get_mut("capabilities").and_then(Value::as_object_mut);
    for set in sets.into_iter().flat_map(Map::values_mut).filter_map(Value::as_array_mut) {
        set.retain(|entry| match entry.as_str() {
            Some(name) if capability::bit(name).is_none() => {
                unknown.insert(name.to_owned());
                false
            }
            _ => true,
        });
    }
    if !unknown.is_empty() {
        let names: Vec<&str> = unknown.iter().map(String::as_str).collect();
        log::warn!("ignoring unknown or unavailable capabilities: [{}]", names.join(" "));
    }
    !unknown.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_capabilities_are_taken_out_and_others_stay() {
        let sets = json!({"bounding": ["CAP_CHOWN", "CAP_NO_SUCH"], "effective": ["CAP_KILL"]});
        let mut document = json!({"process": {"user": {"uid": 1, "gid": 1}, "capabilities": sets}});
        assert!(correct(&mut document));
        let expected = json!({"bounding": ["CAP_CHOWN"], "effective": ["CAP_KILL"]});
        assert_eq!(document["process"]["capabilities"], expected);
        assert!(!correct(&mut document));
    }

    #[test]
    fn a_process_description_gets_a_user_and_the_parsers_names_of_flags() {
        let mut document = json!({"args": ["x"], "scheduler": {"flags": ["SCHED_FLAG_DL_OVERRUN", "OTHER"]}});
        assert!(correct(&mut document));
        assert_eq!(document["user"], json!({"uid": 0, "gid": 0}));
        assert_eq!(document["scheduler"]["flags"], json!(["SCHED_FLAG_D_L_OVERRUN", "OTHER"]));
    }

    #[test]
    fn every_renamed_flag_is_one_of_the_parsers() {
        for (_, name) in SCHEDULER_FLAGS {
            let parsed = serde_json::from_value::<oci_spec::runtime::LinuxSchedulerFlag>(json!(name));
            assert!(parsed.is_ok(), "{name}");
        }
    }
}
