//! The environment of what is started: the daemon's own, then the file that `EXECD_ENVS` names, then the request's.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;

/// The variable that names the file.
pub const FILE: &str = "EXECD_ENVS";

/// The largest file that is read, in bytes.
const LIMIT: u64 = 1 << 20;

/// Variables of the daemon that are nobody else's business.
const SECRETS: &[&str] = &["EXECD_ACCESS_TOKEN", "JUPYTER_TOKEN", "RUNX_AGENT_TOKEN"];

/// Names and values.
pub type Variables = BTreeMap<String, String>;

/// The daemon's environment with the file's over it. The file is read anew each time; what is wrong with it is logged.
pub fn current() -> Variables {
    let mut out = own();
    if let Some(path) = out.get(FILE).filter(|path| !path.is_empty()).cloned() {
        match read(&path) {
            Ok(bytes) => overlay(&mut out, &String::from_utf8_lossy(&bytes)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => log::warn!("read {FILE} {path}: {e}"),
        }
    }
    out
}

/// An ordinary file, to a limit: whoever may write it must not have the daemon wait for it, or swallow it.
fn read(path: &str) -> io::Result<Vec<u8>> {
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not an ordinary file"));
    }
    let mut bytes = Vec::new();
    file.take(LIMIT + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LIMIT {
        return Err(io::Error::other(format!("it has more than {LIMIT} bytes")));
    }
    Ok(bytes)
}

/// The daemon's own environment, without its secrets. What is not UTF-8 gets replacement characters.
pub fn own() -> Variables {
    env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
        .filter(|(name, _)| !SECRETS.contains(&name.as_str()))
        .collect()
}

/// Adds the variables of a file: `KEY=VALUE` lines, where a value may be in single quotes (literal, over several lines) or
/// in double ones (`\n`, `\t`, `\r`, `\\`, `\"`). Outside single quotes `$NAME` is the variable's value so far.
fn overlay(variables: &mut Variables, text: &str) {
    let mut rest = text;
    while !rest.is_empty() {
        let (line, after) = rest.split_once('\n').unwrap_or((rest, ""));
        let trimmed = line.trim();
        let start = rest;
        rest = after;
        if trimmed.is_empty() || trimmed.starts_with('#') {
            continue;
        }
        let assignment = trimmed.strip_prefix("export ").unwrap_or(trimmed);
        let Some((name, value)) = assignment.split_once('=') else {
            log::warn!("{FILE}: a line without = was skipped");
            continue;
        };
        let name = name.trim();
        if name.is_empty() || name.contains('\0') {
            log::warn!("{FILE}: a line without a name was skipped");
            continue;
        }
        let quote = value.trim_start().chars().next();
        let value = match quote {
            Some(mark @ ('\'' | '"')) => {
                // From the original text: it may go on over the end of the line.
                let at =
                    start.find('=').and_then(|at| start[at..].find(mark).map(|q| at + q + 1)).unwrap_or(start.len());
                match quoted(&start[at..], mark, variables) {
                    Some((value, used)) => {
                        let after = &start[at + used..];
                        rest = after.split_once('\n').map_or("", |(_, rest)| rest);
                        value
                    }
                    // A quote that never ends is a character.
                    None => expand(value.trim(), |name| variables.get(name).cloned()).0,
                }
            }
            _ => expand(value.trim(), |name| variables.get(name).cloned()).0,
        };
        if !value.contains('\0') {
            variables.insert(name.to_owned(), value);
        }
    }
}

/// The value up to the closing quote, and how much of the text it took.
fn quoted(text: &str, mark: char, variables: &Variables) -> Option<(String, usize)> {
    if mark == '\'' {
        let end = text.find('\'')?;
        return Some((text[..end].to_owned(), end + 1));
    }
    let mut raw = String::new();
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => {
                escaped = false;
                match c {
                    'n' => raw.push('\n'),
                    'r' => raw.push('\r'),
                    't' => raw.push('\t'),
                    // Kept from being expanded.
                    '$' => raw.push('\u{1}'),
                    other => raw.push(other),
                }
            }
            '\\' => escaped = true,
            '"' => {
                let value = expand(&raw, |name| variables.get(name).cloned()).0.replace('\u{1}', "$");
                return Some((value, at + 1));
            }
            other => raw.push(other),
        }
    }
    None
}

/// Replaces `$NAME` and `${NAME}`. Returns the names that nobody knows as well; they are replaced by nothing.
pub fn expand(text: &str, value: impl Fn(&str) -> Option<String>) -> (String, Vec<String>) {
    let mut out = String::with_capacity(text.len());
    let mut unknown = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let (name, next) = match after.strip_prefix('{') {
            Some(braced) => match braced.split_once('}') {
                Some((name, next)) => (name, next),
                None => ("", after),
            },
            None => {
                let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
                let end = if after.starts_with(|c: char| c.is_ascii_digit()) { 0 } else { end };
                after.split_at(end)
            }
        };
        if name.is_empty() {
            out.push('$');
            rest = after;
            continue;
        }
        match value(name) {
            Some(value) => out.push_str(&value),
            None => unknown.push(name.to_owned()),
        }
        rest = next;
    }
    out.push_str(rest);
    unknown.sort();
    unknown.dedup();
    (out, unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_read_in_all_its_forms() {
        let mut variables = Variables::from([("HOME".into(), "/root".into())]);
        overlay(
            &mut variables,
            "# comment\n\nA=1\nexport B = two words \nC='lit $HOME\nnext line'\nD=\"x\\ty $A \\$A \\\"q\\\"\"\nnonsense\nE=${HOME}/e\n\
             A=later\nF='a'\nG=it's\n",
        );
        for (name, value) in [
            ("A", "later"),
            ("B", "two words"),
            ("C", "lit $HOME\nnext line"),
            ("D", "x\ty 1 $A \"q\""),
            ("E", "/root/e"),
            ("F", "a"),
            ("G", "it's"),
        ] {
            assert_eq!(variables.get(name).map(String::as_str), Some(value), "{name}");
        }
    }

    #[test]
    fn names_that_nobody_knows_are_told() {
        let known = |name: &str| (name == "A").then(|| "x".to_owned());
        assert_eq!(expand("$A/${A}b$B-${C}$", known), ("x/xb-$".into(), vec!["B".into(), "C".into()]));
        assert_eq!(expand("$1 ${A", known), ("$1 ${A".into(), vec![]));
    }
}
