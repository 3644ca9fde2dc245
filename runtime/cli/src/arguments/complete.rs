//! What can stand next on a command line that is being written, from the same tables as the parser.

use std::ffi::OsString;

use anyhow::Result;

use super::help::{SECTIONS, about, of_group, shown};
use super::scan::{Flag, Order, Words};
use super::tables::{COMMANDS, GLOBAL, GROUP_NAMES, Syntax, groups};
use super::{Global, global};

/// The command that the shells' scripts ask by; people are not told of it.
pub(crate) const NAME: &str = "__complete";

/// Something that is not known before it is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Files; the shell knows how.
    Files,
    /// Directories; the shell knows how.
    Directories,
    /// Programs on the PATH; the shell knows how.
    Programs,
    /// Ids of all containers below the root.
    Containers,
    /// Ids of containers that were made by `runx container`.
    Own,
    /// Ids of containers with a network of ours.
    Attached,
    /// Ids of detached modules.
    Modules,
    /// Ids of detached processes.
    Processes,
    /// Names of images.
    Images,
}

/// What is wanted at the end of a line.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Words and what they mean.
    pub(crate) words: Vec<(String, String)>,
    /// What is to be looked for, too.
    pub(crate) kinds: Vec<Kind>,
    /// What of the word that is being written comes before them: `--format=`.
    pub(crate) lead: String,
    /// What of it they begin with.
    pub(crate) begun: String,
}

impl Wanted {
    fn word(&mut self, word: &str, about: &str) {
        if word.starts_with(&self.begun) {
            self.words.push((word.to_owned(), about.to_owned()));
        }
    }
}

/// Values by command, if it is only that one's, and flag. Those of other flags are known by what they are called.
const VALUES: &[(&str, &str, &[&str])] = &[
    ("storage import", "format", &["oci", "docker", "rootfs"]),
    ("storage export", "format", &["oci-archive", "oci-dir"]),
    ("wasm cache", "format", &["table", "json", "prometheus"]),
    ("pool exec", "format", &["json"]),
    ("", "format", &["table", "json"]),
    ("", "log-format", &["text", "json"]),
    ("", "rootless", &["true", "false", "auto"]),
    ("", "manage-cgroups-mode", &["soft", "full", "strict", "ignore"]),
    ("", "engine", &["cranelift", "pulley"]),
    ("", "tier", &["complete", "wipe", "none"]),
    ("", "pull", &["missing", "always", "never"]),
    ("", "restart", &["no", "on-failure", "always", "unless-stopped"]),
    ("", "network", &["bridge", "none", "host"]),
    ("", "net", &["bridge", "none", "host"]),
];

const SIGNALS: &[&str] =
    &["SIGTERM", "SIGKILL", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGSTOP", "SIGCONT", "SIGWINCH"];

/// What can stand where the last of `line` is, which comes after the program's name.
pub(crate) fn wanted(line: &[String]) -> Wanted {
    let (current, before) = line.split_last().map_or(("", line), |(last, rest)| (last.as_str(), rest));
    let mut state = Line::default();
    let mut before = before.iter();
    while let Some(word) = before.next() {
        if state.ended || !looks_like_a_flag(word) {
            state.other(word);
        } else if word == "--" {
            state.ended = true;
        } else if let Some(flag) = state.flag(word).filter(|flag| flag.value.is_some() && !word.contains('=')) {
            // Its value is the next word, or the one that is being written.
            match before.next() {
                Some(_) => {}
                None => return state.value(flag, "", current),
            }
        }
    }
    if !state.ended && looks_like_a_flag(current) {
        if let Some((name, value)) = current.split_once('=')
            && let Some(flag) = state.flag(name)
        {
            return state.value(flag, &format!("{name}="), value);
        }
        return state.flags(current);
    }
    state.others(current)
}

fn looks_like_a_flag(word: &str) -> bool {
    word.starts_with('-') && word.len() > 1 || word == "-"
}

/// A line up to the word that is being written.
#[derive(Default)]
struct Line {
    /// The group, while its command is not said.
    group: Option<String>,
    command: Option<&'static Syntax>,
    /// How many words follow the command.
    count: usize,
    /// No flags any more.
    ended: bool,
    /// It is no command line of ours.
    unknown: bool,
}

impl Line {
    fn other(&mut self, word: &str) {
        match (&self.command, self.group.take()) {
            (Some(command), _) => {
                self.count += 1;
                let last = match command.order {
                    Order::BeforeFirst => 1,
                    Order::BeforeSecond => 2,
                    Order::Anywhere | Order::KnownAfterFirst => usize::MAX,
                };
                self.ended |= self.count >= last;
            }
            (None, Some(group)) => {
                let name = format!("{group} {word}");
                self.command = groups().find(|syntax| syntax.name == name);
                self.unknown |= self.command.is_none();
            }
            (None, None) if GROUP_NAMES.contains(&word) => self.group = Some(word.to_owned()),
            // Of "help run" the rest is a command's name, too.
            (None, None) if word == "help" => {}
            (None, None) => {
                self.command = COMMANDS.iter().find(|syntax| syntax.name == word);
                self.unknown |= self.command.is_none();
            }
        }
    }

    fn tables(&self) -> impl Iterator<Item = &'static [Flag]> {
        let own: &[&'static [Flag]] = self.command.map_or(&[], |command| command.flags);
        own.iter().copied().chain([GLOBAL])
    }

    /// The flag of this word, or of the last letter in it.
    fn flag(&self, word: &str) -> Option<&'static Flag> {
        let double = word.starts_with("--");
        let name = word.trim_start_matches('-');
        let name = name.split_once('=').map_or(name, |(name, _)| name);
        let mut all = self.tables().flatten();
        all.find(|flag| {
            flag.long == name || !double && name.chars().next_back().is_some_and(|letter| flag.short == Some(letter))
        })
    }

    fn flags(&self, current: &str) -> Wanted {
        let mut wanted = Wanted { begun: current.to_owned(), ..Wanted::default() };
        let tables: Vec<_> = self.tables().collect();
        // Global ones are many and seldom meant.
        let begun = current.trim_start_matches('-');
        for flag in shown(&tables).filter(|flag| flag.long.starts_with(begun)) {
            wanted.word(&format!("--{}", flag.long), flag.help);
        }
        if wanted.words.is_empty() && current.len() == 2 && self.flag(current).is_some() {
            wanted.word(current, self.flag(current).map_or("", |flag| flag.help));
        }
        wanted
    }

    /// The value of a flag.
    fn value(&self, flag: &'static Flag, lead: &str, begun: &str) -> Wanted {
        let mut wanted = Wanted { lead: lead.to_owned(), begun: begun.to_owned(), ..Wanted::default() };
        let Some(name) = flag.value else {
            for word in ["true", "false"] {
                wanted.word(word, "");
            }
            return wanted;
        };
        let command = self.command.map_or("", |command| command.name);
        let of_flag =
            |(of, known, _): &&(&str, &str, &[&str])| *known == flag.long && (of.is_empty() || *of == command);
        match VALUES.iter().find(of_flag) {
            Some((.., values)) => values.iter().for_each(|value| wanted.word(value, "")),
            None => self.placeholder(name, &mut wanted),
        }
        wanted
    }

    /// A word that is neither a flag nor its value.
    fn others(&self, current: &str) -> Wanted {
        let mut wanted = Wanted { begun: current.to_owned(), ..Wanted::default() };
        match (&self.command, &self.group) {
            _ if self.unknown => {}
            (Some(command), _) => {
                if let Some(name) = placeholder(command.words, self.count) {
                    self.placeholder(name, &mut wanted);
                }
                if matches!(command.name, "man") {
                    names(&mut wanted);
                }
            }
            (None, Some(group)) => of_group(group).for_each(|(verb, syntax)| wanted.word(verb, syntax.about)),
            (None, None) => {
                names(&mut wanted);
                wanted.word("help", "tell a command's flags");
            }
        }
        wanted
    }

    /// What a word in capitals stands for; small ones stand for themselves.
    fn placeholder(&self, name: &str, wanted: &mut Wanted) {
        let command = self.command.map_or("", |command| command.name);
        for name in name.split(['|', '=']) {
            let name = name.trim_matches(['[', ']', '…', '(', ')']);
            // Only the first part is somebody else's to know.
            let (name, first) = name.split_once(':').map_or((name, false), |(name, _)| (name, true));
            if first && wanted.begun.contains(':') {
                continue;
            }
            let kind = match name {
                "CONTAINER" if command.starts_with("container ") || command.starts_with("storage ") => Kind::Own,
                "CONTAINER" if matches!(command, "network detach" | "network check") => Kind::Attached,
                "CONTAINER" => Kind::Containers,
                "ID" if command.starts_with("wasm ") => Kind::Modules,
                "ID" if command.starts_with("process ") => Kind::Processes,
                "IMAGE" => Kind::Images,
                "NAME" if command == "storage ls" => Kind::Images,
                "SOURCE" if command == "storage mount" => Kind::Images,
                "FILE" | "PATH" | "SOCKET" | "SOURCE" | "ARCHIVE" => Kind::Files,
                "DIR" | "HOST" | "TARGET" => Kind::Directories,
                "PROGRAM" if matches!(command, "process run" | "pool exec") => Kind::Programs,
                "SIGNAL" => {
                    SIGNALS.iter().for_each(|signal| wanted.word(signal, ""));
                    continue;
                }
                word if !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit()) => {
                    wanted.word(word, "");
                    continue;
                }
                _ => continue,
            };
            wanted.kinds.push(kind);
        }
    }
}

/// The names of commands and groups.
fn names(wanted: &mut Wanted) {
    SECTIONS.iter().flat_map(|(_, names)| names.iter()).for_each(|name| wanted.word(name, about(name)));
}

/// What the word at `at` is called.
fn placeholder(words: &'static str, at: usize) -> Option<&'static str> {
    let mut all = words.split_ascii_whitespace();
    let mut last = None;
    for _ in 0..=at {
        match all.next() {
            Some(word) => last = Some(word),
            // One that may be given several times.
            None => return last.filter(|word| word.trim_end_matches(']').ends_with('…')),
        }
    }
    last
}

/// The global flags of a line that is not finished, as far as they are right.
pub(crate) fn global_of(line: &[String]) -> Result<Global> {
    let mut given = Words::default();
    let mut line = line.iter().take(line.len().saturating_sub(1)).peekable();
    while let Some(word) = line.next() {
        let name = word.trim_start_matches('-').split('=').next().unwrap_or_default();
        let Some(flag) = GLOBAL.iter().find(|flag| flag.long == name && word.starts_with('-')) else { continue };
        let mut words = vec![OsString::from(word)];
        if flag.value.is_some() && !word.contains('=') {
            words.extend(line.next().map(OsString::from));
        }
        // What is wrong with it will be told when the line is executed.
        let _ = given.read(words, &[GLOBAL], Order::Anywhere);
    }
    global(&given)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(line: &str) -> Wanted {
        wanted(&line.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    fn words(line: &str) -> Vec<String> {
        at(line).words.into_iter().map(|(word, _)| word).collect()
    }

    #[test]
    fn commands_groups_and_verbs_are_offered() {
        assert!(words("").contains(&"container".to_owned()) && words("").contains(&"help".to_owned()));
        assert_eq!(words("conta"), ["container"]);
        assert_eq!(words("--root /x --debug conta"), ["container"]);
        assert!(words("network ").contains(&"attach".to_owned()));
        assert_eq!(words("help network att"), ["attach"]);
        assert!(words("nonsense ").is_empty() && at("nonsense ").kinds.is_empty());
    }

    #[test]
    fn flags_and_their_values_are_offered() {
        assert!(words("run --bun").contains(&"--bundle".to_owned()));
        assert_eq!(at("run --bundle ").kinds, [Kind::Directories]);
        assert_eq!(at("run -b ").kinds, [Kind::Directories]);
        assert_eq!(words("list --format j"), ["json"]);
        let json = at("list --format=j");
        assert_eq!((json.lead.as_str(), json.words[0].0.as_str()), ("--format=", "json"));
        assert_eq!(words("network attach --network n"), ["none"]);
        assert_eq!(words("pool exec --format "), ["json"]);
        assert_eq!(at("--log ").kinds, [Kind::Files]);
        // A value is not taken for a command.
        assert_eq!(words("--root list conta"), ["container"]);
    }

    #[test]
    fn values_are_of_flags_that_there_are() {
        for (command, flag, _) in VALUES {
            let of = |syntax: &&Syntax| command.is_empty() || syntax.name == *command;
            let known = super::super::help::all().filter(of).flat_map(|syntax| syntax.flags.iter().copied().flatten());
            let there = super::super::help::all().any(|syntax| of(&syntax));
            assert!(!there || known.chain(GLOBAL).any(|known| known.long == *flag), "{command} --{flag}");
        }
    }

    #[test]
    fn ids_are_those_of_the_commands_kind() {
        for (line, kind) in [
            ("delete ", Kind::Containers),
            ("exec ", Kind::Containers),
            ("container rm a ", Kind::Own),
            ("network detach ", Kind::Attached),
            ("wasm logs ", Kind::Modules),
            ("process kill ", Kind::Processes),
            ("process run ", Kind::Programs),
        ] {
            assert_eq!(at(line).kinds, [kind], "{line}");
        }
        assert_eq!(at("wasm run ").kinds, [Kind::Files, Kind::Images]);
        assert_eq!(words("kill c SIGK"), ["SIGKILL"]);
        // No second container where there is one, and nothing of ours after a program.
        assert!(at("delete a ").kinds.is_empty());
        assert!(at("exec c sh --").words.is_empty());
        assert!(at("container run image --").words.is_empty());
        assert!(!at("container run --").words.is_empty());
    }

    #[test]
    fn global_flags_are_found_wherever_they_are() {
        let line: Vec<_> = "delete --root /x --root".split(' ').map(str::to_owned).collect();
        assert_eq!(global_of(&line).unwrap().root, std::path::Path::new("/x"));
        let line: Vec<_> = "--root=/y delete ".split(' ').map(str::to_owned).collect();
        assert_eq!(global_of(&line).unwrap().root, std::path::Path::new("/y"));
    }
}
