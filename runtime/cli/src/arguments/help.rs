//! What `--help` prints.

use super::scan::Flag;
use super::tables::{COMMANDS, GLOBAL, GROUP_NAMES, Syntax, groups};

/// What the help is about.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Topic {
    /// All commands.
    All,
    /// The commands of a group.
    Group(&'static str),
    /// A command.
    Command(&'static Syntax),
}

impl Topic {
    /// The one of these words of a command line, as far as they name one.
    pub(crate) fn find(words: &[&str]) -> Option<Self> {
        match words {
            [] => Some(Self::All),
            [group] if GROUP_NAMES.contains(group) => {
                GROUP_NAMES.iter().find(|name| *name == group).map(|name| Self::Group(name))
            }
            _ => {
                let name = words.join(" ");
                all().find(|syntax| syntax.name == name).map(Self::Command)
            }
        }
    }
}

/// All commands, those of groups, too.
pub(crate) fn all() -> impl Iterator<Item = &'static Syntax> {
    COMMANDS.iter().chain(groups())
}

/// The commands of a group, and their names in it.
pub(crate) fn of_group(group: &str) -> impl Iterator<Item = (&'static str, &'static Syntax)> {
    groups().filter_map(move |syntax| {
        let (of, verb) = syntax.name.split_once(' ')?;
        (of == group).then_some((verb, syntax))
    })
}

/// What a group is for.
pub(crate) fn about_group(group: &str) -> &'static str {
    match group {
        "container" => "containers of images: run, stop, look into and remove them",
        "storage" => "images: pull, list, import, export and remove them",
        "network" => "networks of containers: what they were given, and to clean up",
        "wasm" => "WASM modules and components, without a container or from the store",
        "process" => "native programs in the background, without an image",
        "pool" => "warm sandboxes for short programs",
        _ => "",
    }
}

/// The commands and groups in the order in which somebody needs them.
pub(crate) const SECTIONS: &[(&str, &[&str])] = &[
    ("Containers and images", &["container", "storage", "network"]),
    ("Modules and programs", &["wasm", "process", "pool", "agent"]),
    ("This machine", &["ps", "check", "info", "version", "completion", "man"]),
    (
        "A container from a bundle, in runc's commands, as engines call them",
        &[
            "spec",
            "create",
            "run",
            "start",
            "exec",
            "state",
            "list",
            "kill",
            "pause",
            "resume",
            "update",
            "events",
            "checkpoint",
            "restore",
            "delete",
            "features",
        ],
    ),
];

/// What a word of [`SECTIONS`] does.
pub(crate) fn about(name: &str) -> &'static str {
    let command = COMMANDS.iter().find(|syntax| syntax.name == name);
    command.map_or_else(|| about_group(name), |syntax| syntax.about)
}

/// A flag as it is written, with its letter and the name of its value.
pub(crate) fn written(flag: &Flag) -> String {
    let short = flag.short.map_or("    ".to_owned(), |short| format!("-{short}, "));
    format!("{short}--{}{}", flag.long, flag.value.map(|value| format!(" {value}")).unwrap_or_default())
}

/// The flags that people are told of.
pub(crate) fn shown<'a>(flags: &'a [&'static [Flag]]) -> impl Iterator<Item = &'static Flag> + 'a {
    flags.iter().flat_map(|table| table.iter()).filter(|flag| !flag.help.is_empty())
}

fn describe(out: &mut String, flags: &[&'static [Flag]]) {
    let width = shown(flags).map(|flag| written(flag).chars().count()).max().unwrap_or(0);
    for flag in shown(flags) {
        out.push_str(&format!("  {:width$}  {}\n", written(flag), flag.help));
    }
}

fn list<'a>(out: &mut String, lines: impl Iterator<Item = (&'a str, &'a str)> + Clone) {
    let width = lines.clone().map(|(name, _)| name.chars().count()).max().unwrap_or(0).max(12);
    for (name, about) in lines {
        out.push_str(&format!("  {name:width$}  {about}\n"));
    }
}

/// The text.
pub(crate) fn help(of: Topic) -> String {
    let mut out = String::new();
    match of {
        Topic::Command(syntax) => {
            let gap = if syntax.words.is_empty() { "" } else { " " };
            out.push_str(&format!("runx {}: {}\n\n", syntax.name, syntax.about));
            out.push_str(&format!("Usage: runx [FLAGS] {} [FLAGS]{gap}{}\n", syntax.name, syntax.words));
            if !syntax.flags.is_empty() {
                out.push_str("\nFlags:\n");
                describe(&mut out, syntax.flags);
            }
        }
        Topic::Group(group) => {
            out.push_str(&format!(
                "runx {group}: {}\n\nUsage: runx [FLAGS] {group} COMMAND [FLAGS]\n\nCommands:\n",
                about_group(group)
            ));
            list(&mut out, of_group(group).map(|(verb, syntax)| (verb, syntax.about)).collect::<Vec<_>>().into_iter());
            out.push_str(&format!("\n\"runx help {group} COMMAND\" tells a command's flags.\n"));
        }
        Topic::All => {
            out.push_str("runx: containers, images and WASM modules, and an OCI runtime for engines\n\n");
            out.push_str("Usage: runx [FLAGS] COMMAND [FLAGS]\n\n");
            out.push_str("To begin with: runx container run -it IMAGE sh\n");
            for (title, names) in SECTIONS {
                out.push_str(&format!("\n{title}:\n"));
                list(&mut out, names.iter().map(|name| (*name, about(name))));
            }
            out.push_str("\n\"runx help COMMAND\" tells a command's flags, and of a group its commands.\n");
        }
    }
    out.push_str("\nGlobal flags:\n");
    describe(&mut out, &[GLOBAL]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_and_group_is_in_one_section() {
        let sections: Vec<_> = SECTIONS.iter().flat_map(|(_, names)| names.iter().copied()).collect();
        let commands = COMMANDS.iter().map(|syntax| syntax.name);
        for name in commands.chain(GROUP_NAMES.iter().copied()) {
            assert_eq!(sections.iter().filter(|known| **known == name).count(), 1, "{name}");
            assert!(!about(name).is_empty(), "{name}");
        }
        assert_eq!(sections.len(), COMMANDS.len() + GROUP_NAMES.len());
    }

    #[test]
    fn the_help_names_every_command_and_flag() {
        let text = help(Topic::All);
        for syntax in COMMANDS {
            assert!(text.contains(&format!("  {} ", syntax.name)), "{}", syntax.name);
        }
        for group in GROUP_NAMES {
            let text = help(Topic::Group(group));
            for (verb, syntax) in of_group(group) {
                assert!(text.contains(&format!("  {verb} ")) && text.contains(syntax.about), "{group} {verb}");
            }
        }
        for syntax in all() {
            let one = help(Topic::Command(syntax));
            for flag in shown(syntax.flags) {
                assert!(one.contains(&format!("--{}", flag.long)), "{}", flag.long);
            }
        }
    }

    #[test]
    fn words_name_a_topic() {
        assert!(matches!(Topic::find(&["container"]), Some(Topic::Group("container"))));
        assert!(
            matches!(Topic::find(&["container", "run"]), Some(Topic::Command(syntax)) if syntax.name == "container run")
        );
        assert!(matches!(Topic::find(&["run"]), Some(Topic::Command(syntax)) if syntax.name == "run"));
        assert!(Topic::find(&["nope"]).is_none() && Topic::find(&["container", "nope"]).is_none());
    }
}
