//! Reading a command line as runc's does: flags before and after the other words, with one dash or two,
//! their values after a space or a `=`.
//!
//! A table for each command and no library: the scripts and engines that call an OCI runtime rely on forms
//! such as `-no-subreaper` and `--debug=true`, and every start of a container pays for the parsing twice.

use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

/// One flag.
#[derive(Debug)]
pub(crate) struct Flag {
    /// Its name, without dashes.
    pub(crate) long: &'static str,
    /// A letter that means the same.
    pub(crate) short: Option<char>,
    /// What its value is called in the help. A flag without one is on or off.
    pub(crate) value: Option<&'static str>,
    /// What it does; flags without a text are not in the help.
    pub(crate) help: &'static str,
}

/// A flag that is on or off.
pub(super) const fn switch(long: &'static str, short: Option<char>, help: &'static str) -> Flag {
    Flag { long, short, value: None, help }
}

/// A flag with a value.
pub(super) const fn option(long: &'static str, short: Option<char>, value: &'static str, help: &'static str) -> Flag {
    Flag { long, short, value: Some(value), help }
}

/// Where flags may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Anywhere.
    Anywhere,
    /// Anywhere; after the first other word, what only looks like a flag is no flag.
    KnownAfterFirst,
    /// As [`Self::KnownAfterFirst`], up to the second other word, the name of a program.
    BeforeSecond,
    /// Before the first other word.
    BeforeFirst,
}

/// What was read.
#[derive(Debug, Default)]
pub(crate) struct Words {
    flags: Vec<(&'static str, OsString)>,
    /// The words that are neither flags nor their values.
    pub(crate) others: Vec<OsString>,
}

impl Words {
    /// Reads `args`, whose flags are those in `tables`.
    pub(crate) fn read(
        &mut self,
        args: impl IntoIterator<Item = OsString>,
        tables: &[&'static [Flag]],
        order: Order,
    ) -> Result<()> {
        let mut args = args.into_iter();
        while let Some(word) = args.next() {
            if word == "--" {
                break;
            }
            let first = self.others.is_empty();
            // As with Go's flags, what begins with a dash and a digit is a number.
            let looks_like_a_flag =
                matches!(word.as_bytes(), [b'-', next, ..] if *next == b'-' || next.is_ascii_alphabetic());
            if looks_like_a_flag {
                let lenient = !first && order != Order::Anywhere;
                if self.flag(&word, &mut args, tables, lenient)? {
                    continue;
                }
            }
            self.others.push(word);
            match (order, self.others.len()) {
                (Order::BeforeFirst, 1) | (Order::BeforeSecond, 2) => break,
                _ => {}
            }
        }
        self.others.extend(args);
        Ok(())
    }

    /// Reads one flag, or several letters after one dash. Returns `false` if there is no such flag and that is
    /// fine.
    fn flag(
        &mut self,
        word: &OsStr,
        args: &mut impl Iterator<Item = OsString>,
        tables: &[&'static [Flag]],
        lenient: bool,
    ) -> Result<bool> {
        let all = || tables.iter().flat_map(|table| table.iter());
        let bytes = word.as_bytes();
        let double = bytes.starts_with(b"--");
        let body = &bytes[if double { 2 } else { 1 }..];
        let (name, value) = match body.iter().position(|byte| *byte == b'=') {
            Some(at) => (&body[..at], Some(OsString::from_vec(body[at + 1..].to_vec()))),
            None => (body, None),
        };
        let is_letter = |flag: &Flag, letter: u8| flag.short.is_some_and(|short| short == char::from(letter));
        let named = all().find(|flag| {
            flag.long.as_bytes() == name || matches!(name, [letter] if !double && is_letter(flag, *letter))
        });
        if let Some(flag) = named {
            self.set(flag, value, args)?;
            return Ok(true);
        }
        let mut letters = Vec::new();
        if !double && value.is_none() {
            letters.extend(name.iter().map_while(|letter| all().find(|flag| is_letter(flag, *letter))));
        }
        let only_the_last_has_a_value = letters.iter().rev().skip(1).all(|flag| flag.value.is_none());
        if letters.is_empty() || letters.len() != name.len() || !only_the_last_has_a_value {
            if lenient {
                return Ok(false);
            }
            let meant = super::suggest::flag(&String::from_utf8_lossy(name), tables);
            let meant = meant.map(|meant| format!("; did you mean --{meant}?")).unwrap_or_default();
            bail!("flag provided but not defined: {}{meant}", word.display());
        }
        for flag in letters {
            self.set(flag, None, args)?;
        }
        Ok(true)
    }

    fn set(
        &mut self,
        flag: &'static Flag,
        value: Option<OsString>,
        args: &mut impl Iterator<Item = OsString>,
    ) -> Result<()> {
        let value = match (flag.value, value) {
            (Some(_), Some(value)) => value,
            (Some(name), None) => {
                args.next().with_context(|| format!("flag needs an argument: --{} {name}", flag.long))?
            }
            (None, value) => boolean(flag.long, value)?.into(),
        };
        self.flags.push((flag.long, value));
        Ok(())
    }

    /// Whether a flag was given, even with an empty value.
    pub(crate) fn given(&self, name: &str) -> bool {
        self.flags.iter().any(|(flag, _)| *flag == name)
    }

    /// The value of a flag, the last one given; an empty one counts as none.
    pub(crate) fn value(&self, name: &str) -> Option<&OsStr> {
        self.last(name).filter(|value| !value.is_empty())
    }

    fn last(&self, name: &str) -> Option<&OsStr> {
        self.flags.iter().rev().find(|(flag, _)| *flag == name).map(|(_, value)| value.as_os_str())
    }

    /// Whether a switch is on.
    pub(crate) fn on(&self, name: &str) -> bool {
        self.last(name).is_some_and(|value| value == "true")
    }

    /// The value of a flag as a path.
    pub(crate) fn path(&self, name: &str) -> Option<PathBuf> {
        self.value(name).map(PathBuf::from)
    }

    /// The value of a flag as text.
    pub(crate) fn text(&self, name: &str) -> Result<Option<&str>> {
        self.value(name).map(|value| utf8(name, value)).transpose()
    }

    /// All values of a flag that can be given several times, as they are.
    pub(crate) fn values(&self, name: &str) -> impl Iterator<Item = &OsStr> {
        self.flags.iter().filter(move |(flag, _)| *flag == name).map(|(_, value)| value.as_os_str())
    }

    /// All values of a flag that can be given several times.
    pub(crate) fn texts(&self, name: &str) -> Result<Vec<String>> {
        let values = self.flags.iter().filter(|(flag, _)| *flag == name);
        values.map(|(_, value)| utf8(name, value).map(str::to_owned)).collect()
    }

    /// The value of a flag as a number.
    pub(crate) fn number<N: FromStr<Err: Display>>(&self, name: &str) -> Result<Option<N>> {
        self.text(name)?.map(|text| parse_number(name, text)).transpose()
    }

    /// All values of a flag as numbers.
    pub(crate) fn numbers<N: FromStr<Err: Display>>(&self, name: &str) -> Result<Vec<N>> {
        self.texts(name)?.iter().map(|text| parse_number(name, text)).collect()
    }
}

fn parse_number<N: FromStr<Err: Display>>(name: &str, text: &str) -> Result<N> {
    text.parse().map_err(|e| anyhow::anyhow!("invalid value {text:?} for --{name}: {e}"))
}

fn utf8<'a>(name: &str, value: &'a OsStr) -> Result<&'a str> {
    value.to_str().with_context(|| format!("invalid value {value:?} for --{name}: it is not UTF-8"))
}

/// The value of a switch as Go writes it.
fn boolean(name: &str, value: Option<OsString>) -> Result<&'static str> {
    let Some(value) = value else { return Ok("true") };
    match value.to_str().unwrap_or("?") {
        "" | "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok("true"),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok("false"),
        _ => bail!("invalid boolean value {value:?} for --{name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[Flag] = &[
        switch("detach", Some('d'), "x"),
        switch("tty", Some('t'), "x"),
        option("env", Some('e'), "X", "x"),
        option("pid-file", None, "X", "x"),
        switch("d-long", None, "x"),
    ];

    fn read(line: &[&str], order: Order) -> Result<Words> {
        let mut words = Words::default();
        words.read(line.iter().map(OsString::from), &[TABLE], order).map(|()| words)
    }

    #[test]
    fn flags_are_found_in_every_form_and_place() {
        let line = ["-d", "id", "--env=A=b", "-e", "B=", "-pid-file", "/p", "--tty=false", "more"];
        let words = read(&line, Order::Anywhere).unwrap();
        assert!(words.on("detach") && !words.on("tty") && words.given("tty"));
        assert_eq!(words.texts("env").unwrap(), ["A=b", "B="]);
        assert_eq!(words.path("pid-file"), Some(PathBuf::from("/p")));
        assert_eq!(words.others, ["id", "more"]);
    }

    #[test]
    fn letters_can_share_a_dash_where_that_is_no_other_flags_name() {
        let words = read(&["-tde", "A=b", "-d-long"], Order::Anywhere).unwrap();
        assert!(words.on("tty") && words.on("detach") && words.on("d-long"));
        assert_eq!(words.texts("env").unwrap(), ["A=b"]);
        for bad in ["-detahc", "-tx", "--d", "-tet", "--Tty"] {
            assert!(read(&[bad, "x"], Order::Anywhere).is_err(), "{bad}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (line, words) in
            [(["id", "--nope"], "--nope"), (["id", "--pid-file"], "--pid-file"), (["id", "--tty=maybe"], "maybe")]
        {
            let error = read(&line, Order::Anywhere).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn a_programs_own_flags_are_left_alone() {
        let words = read(&["-t", "id", "-d", "ls", "-e", "--", "--tty"], Order::BeforeSecond).unwrap();
        assert!(words.on("tty") && words.on("detach"));
        assert_eq!(words.others, ["id", "ls", "-e", "--", "--tty"]);
        let words = read(&["id", "--", "-d"], Order::BeforeSecond).unwrap();
        assert_eq!(words.others, ["id", "-d"]);
        let words = read(&["-d", "id", "-t", "-ef"], Order::BeforeFirst).unwrap();
        assert_eq!(words.others, ["id", "-t", "-ef"]);
        let words = read(&["id", "-KILL", "-t"], Order::KnownAfterFirst).unwrap();
        assert!(words.on("tty"));
        assert_eq!(words.others, ["id", "-KILL"]);
    }

    #[test]
    fn numbers_and_a_lone_dash_are_no_flags() {
        let words = read(&["-9", "-", "--env", "-1"], Order::Anywhere).unwrap();
        assert_eq!(words.others, ["-9", "-"]);
        assert_eq!(words.number::<i64>("env").unwrap(), Some(-1));
        assert!(words.number::<u32>("env").is_err());
    }
}
