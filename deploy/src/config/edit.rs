//! A block of tables in somebody else's file: put there, and taken away without a trace.

use serde_json::Value;
use toml_edit::{DocumentMut, Item, Table, TableLike};

use super::{Error, parse};

const BEGIN: &str = "# BEGIN runx-node: made by runx-node install, taken away by runx-node uninstall.";
const END: &str = "# END runx-node";

/// A document with the tables of `block`. They are at its end, between two comments, where TOML lets them; where the
/// file has their parent in one line, they are put in there.
///
/// # Errors
/// When neither is possible.
pub(crate) fn with_block(path: &str, text: &str, block: &str) -> Result<String, Error> {
    let line = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    let appended = format!("{text}{line}{BEGIN}\n{}\n{END}\n", block.trim_end());
    if parse(path, &appended).is_ok() {
        return Ok(appended);
    }
    let (mut document, _) = parse(path, text)?;
    let (ours, _) = parse(path, block)?;
    merge(document.as_table_mut(), ours.as_table()).map_err(|why| Error::Shape { path: path.into(), why })?;
    let merged = document.to_string();
    parse(path, &merged)?;
    Ok(merged)
}

fn merge(into: &mut dyn TableLike, from: &Table) -> Result<(), String> {
    for (key, item) in from {
        match (into.get_mut(key), item) {
            (None, item) => {
                // Inside of a line everything is.
                let value = match item.clone().into_value() {
                    Ok(value) => Item::Value(value),
                    Err(item) => item,
                };
                into.insert(key, value);
            }
            (Some(there), Item::Table(table)) => {
                let Some(there) = there.as_table_like_mut() else { return Err(format!("{key} is no table")) };
                merge(there, table)?;
            }
            (Some(_), _) => return Err(format!("{key} is there already")),
        }
    }
    Ok(())
}

/// What is ours in a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ours<'a> {
    /// The handler.
    pub(crate) handler: &'a str,
    /// Tables of handlers that had to be written down beside it. They are somebody else's as soon as they are otherwise.
    pub(crate) copies: &'a [String],
    /// Whether a handler of that name outside of a block is ours, too.
    pub(crate) noted: bool,
}

/// Whether there is a block.
pub(crate) fn has_block(text: &str) -> bool {
    text.contains(BEGIN)
}

/// Whether two documents say the same.
pub(crate) fn are_equal(one: &str, other: &str) -> bool {
    let tree = |text: &str| toml_edit::de::from_str::<Value>(text).ok();
    tree(one).is_some_and(|one| Some(one) == tree(other))
}

/// A text without the block. A line feed that had to be added before it stays away too, and what somebody else has put
/// into the block stays where it is.
fn without_block(path: &str, text: &str, had_line_feed: bool, ours: &Ours<'_>) -> Result<Option<String>, Error> {
    let Some(begin) = text.find(BEGIN) else { return Ok(None) };
    let inside = begin + BEGIN.len();
    let Some(length) = text[inside..].find(END) else { return Ok(None) };
    let (inner, rest) = (&text[inside..inside + length], &text[inside + length + END.len()..]);
    let rest = rest.strip_prefix('\n').unwrap_or(rest);
    let (mut document, _) = parse(path, inner)?;
    // Also where the file's version was changed since.
    for version in 1..=3 {
        take_out(&mut document, version, ours);
    }
    let left = document.to_string();
    let left = if are_equal(&left, "") { String::new() } else { format!("{}\n", left.trim_matches('\n')) };
    let mut before = &text[..begin];
    if !had_line_feed && rest.is_empty() && left.is_empty() {
        before = before.strip_suffix('\n').unwrap_or(before);
    }
    Ok(Some(format!("{before}{left}{rest}")))
}

/// A document as it is without us. `original` is what it was before, if that is known: then a line feed that was missing
/// at its end is missing again.
///
/// # Errors
/// When it is no TOML.
pub(crate) fn remove(path: &str, text: &str, original: Option<&str>, ours: &Ours<'_>) -> Result<String, Error> {
    let had_line_feed = original.is_none_or(|original| original.is_empty() || original.ends_with('\n'));
    let (mut document, version) = parse(path, text)?;
    if let Some(rest) = without_block(path, text, had_line_feed, ours)? {
        return Ok(rest);
    }
    Ok(if ours.noted && take_out(&mut document, version, ours) { document.to_string() } else { text.to_owned() })
}

fn take_out(document: &mut DocumentMut, version: i64, ours: &Ours<'_>) -> bool {
    // As they are there, whatever the text looks like.
    let tree: Value = toml_edit::de::from_str(&document.to_string()).unwrap_or_default();
    let of = |tree: &Value| {
        tree.get("plugins")?.get(super::plugin(version))?.get("containerd")?.get("runtimes")?.as_object().cloned()
    };
    let there = of(&tree).unwrap_or_default();
    let copies = ours.copies.iter().filter_map(|text| toml_edit::de::from_str(text).ok()).filter_map(|tree| of(&tree));
    let untouched = copies.flatten().filter(|(name, copy)| there.get(name) == Some(copy)).map(|(name, _)| name);
    let names: Vec<String> = untouched.chain([ours.handler.to_owned()]).collect();
    // Not by an item's own get_mut, which makes what is not there.
    let mut table: &mut dyn TableLike = document.as_table_mut();
    for key in ["plugins", super::plugin(version), "containerd", "runtimes"] {
        let Some(next) = table.get_mut(key).and_then(Item::as_table_like_mut) else { return false };
        table = next;
    }
    names.iter().filter(|name| table.remove(name).is_some()).count() > 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Handler, Options, runtimes, tables};

    fn block() -> String {
        let (runtime_type, shim) = ("io.containerd.runx.v1".into(), "/s".into());
        tables(&Handler { name: "runx".into(), runtime_type, shim, options: Options::SystemdCgroup }, 2)
    }

    #[test]
    fn blocks_come_and_go_byte_for_byte() {
        for text in [
            "",
            "version = 2",
            "version = 2\n",
            "version = 2\r\n# a comment\r\n[plugins]\r\n",
            "version = 2\n\n\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = 'x'   # why\n\n",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n  runtime_type = 'x'",
        ] {
            let with = with_block("c", text, &block()).unwrap();
            assert!(with.starts_with(text), "{with}");
            let original = Some(text);
            let ours = Ours { handler: "runx", copies: &[], noted: false };
            assert_eq!(remove("c", &with, original, &ours).unwrap(), text);
            // Somebody else's lines after it stay.
            let more = format!("{with}[debug]\n  level = 'info'\n");
            let left = remove("c", &more, original, &ours).unwrap();
            assert!(left.starts_with(text) && left.ends_with("[debug]\n  level = 'info'\n") && !left.contains("runx"));
            // Also those that tools put between the comments, behind the last handler.
            let kata = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.kata]\n  runtime_type = 'k'\n";
            let within = with.replace(END, &format!("{kata}{END}")) + "[debug]\n";
            let left = remove("c", &within, original, &ours).unwrap();
            let gap = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
            assert_eq!(left, format!("{text}{gap}{kata}[debug]\n"));
        }
    }

    #[test]
    fn copies_of_defaults_go_as_long_as_nobody_has_changed_them() {
        let runc = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n  runtime_type = 'r'\n";
        let copies = [runc.to_owned()];
        let ours = Ours { handler: "runx", copies: &copies, noted: true };
        let with = with_block("c", "version = 2\n", &format!("{}\n{runc}", block())).unwrap();
        assert_eq!(remove("c", &with, None, &ours).unwrap(), "version = 2\n");
        let changed = with.replace("'r'", "'s'");
        let left = remove("c", &changed, None, &ours).unwrap();
        assert!(left.contains("runtimes.runc]\n  runtime_type = 's'") && !left.contains("runx"), "{left}");
    }

    #[test]
    fn documents_are_compared_by_what_they_say() {
        assert!(are_equal("a = 1 # x\n[b]\nc = 'd'\n", "b.c = \"d\"\na = 1"));
        assert!(!are_equal("a = 1", "a = 2") && !are_equal("a =", "a ="));
    }

    #[test]
    fn files_in_one_line_take_the_tables_too() {
        for text in [
            "version = 2\nplugins = {\"io.containerd.grpc.v1.cri\" = {containerd = {runtimes = {runc = {runtime_type = 'x'}}}}} # c\n",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\ncontainerd.runtimes.runc.runtime_type = 'x'\nsandbox_image = 'y' # z\n",
        ] {
            let with = with_block("c", text, &block()).unwrap();
            let (document, _) = parse("c", &with).unwrap();
            let found = runtimes(&document, 2).unwrap();
            assert_eq!(found["runx"]["options"]["SystemdCgroup"].as_bool(), Some(true), "{with}");
            assert_eq!(found["runc"]["runtime_type"].as_str(), Some("x"));
            let left = remove("c", &with, None, &Ours { handler: "runx", copies: &[], noted: true }).unwrap();
            assert!(!left.contains("runx") && left.contains("runc"), "{left}");
        }
    }

    #[test]
    fn what_is_in_the_way_is_named() {
        let error = with_block("c", "version = 2\nplugins = 7\n", &block()).unwrap_err();
        assert!(error.to_string().contains("plugins is no table"), "{error}");
    }
}
