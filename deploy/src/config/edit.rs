//! A block of tables in somebody else's file: put there, and taken away without a trace.

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

/// A text without the block, and whether there was one. A line feed that had to be added before it stays away too.
fn without_block(text: &str, had_line_feed: bool) -> Option<String> {
    let begin = text.find(BEGIN)?;
    let end = begin + text[begin..].find(END)? + END.len();
    let rest = text[end..].strip_prefix('\n').unwrap_or(&text[end..]);
    let mut before = &text[..begin];
    if !had_line_feed && rest.is_empty() {
        before = before.strip_suffix('\n').unwrap_or(before);
    }
    Some(format!("{before}{rest}"))
}

/// A document as it is without us. `original` is what it was before, if that is known: then a line feed that was missing
/// at its end is missing again.
///
/// # Errors
/// When the handler is in it in a form that cannot be taken out.
pub(crate) fn remove(path: &str, text: &str, original: Option<&str>, tables: &[(i64, &str)]) -> Result<String, Error> {
    let had_line_feed = original.is_none_or(|original| original.is_empty() || original.ends_with('\n'));
    if let Some(rest) = without_block(text, had_line_feed) {
        return Ok(rest);
    }
    let (mut document, version) = parse(path, text)?;
    let mut changed = false;
    for (of, name) in tables {
        if *of == version {
            changed |= take_out(&mut document, version, name);
        }
    }
    Ok(if changed { document.to_string() } else { text.to_owned() })
}

fn take_out(document: &mut DocumentMut, version: i64, name: &str) -> bool {
    let table = document
        .get_mut("plugins")
        .and_then(|item| item.get_mut(super::plugin(version)))
        .and_then(|item| item.get_mut("containerd"))
        .and_then(|item| item.get_mut("runtimes"))
        .and_then(Item::as_table_like_mut);
    table.is_some_and(|table| table.remove(name).is_some())
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
            assert_eq!(remove("c", &with, original, &[]).unwrap(), text);
            // Somebody else's lines after it stay.
            let more = format!("{with}[debug]\n  level = 'info'\n");
            let left = remove("c", &more, original, &[]).unwrap();
            assert!(left.starts_with(text) && left.ends_with("[debug]\n  level = 'info'\n") && !left.contains("runx"));
        }
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
            let left = remove("c", &with, None, &[(2, "runx")]).unwrap();
            assert!(!left.contains("runx") && left.contains("runc"), "{left}");
        }
    }

    #[test]
    fn what_is_in_the_way_is_named() {
        let error = with_block("c", "version = 2\nplugins = 7\n", &block()).unwrap_err();
        assert!(error.to_string().contains("plugins is no table"), "{error}");
    }
}
