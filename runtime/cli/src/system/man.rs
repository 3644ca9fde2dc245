//! `runx man`: pages for man(1), made of the tables that command lines are read by.

use std::fs;
use std::path::Path;

use anyhow::Context as _;

use crate::arguments::help::{SECTIONS, Topic, about, about_group, all, of_group, shown};
use crate::arguments::{Flag, GLOBAL, GROUP_NAMES, Syntax};
use crate::{Failure, print};

/// `runx man`.
pub(crate) fn man(of: Topic, output: Option<&Path>) -> Result<u8, Failure> {
    let Some(output) = output else { return print(&page(of)) };
    if !matches!(of, Topic::All) {
        return Err(anyhow::anyhow!("--output writes all pages: leave out the command, or --output").into());
    }
    let groups = GROUP_NAMES.iter().map(|group| Topic::Group(group));
    let topics = std::iter::once(Topic::All).chain(groups).chain(all().map(Topic::Command));
    let write = |section: u8, name: &str, text: &str| {
        let directory = output.join(format!("man{section}"));
        let path = directory.join(format!("{name}.{section}"));
        fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    };
    for topic in topics {
        write(1, &name(topic), &page(topic))?;
    }
    write(5, "runx-config", &config())?;
    Ok(0)
}

/// The page's name, without a section.
fn name(of: Topic) -> String {
    match of {
        Topic::All => "runx".to_owned(),
        Topic::Group(group) => format!("runx-{group}"),
        Topic::Command(syntax) => format!("runx-{}", syntax.name.replace(' ', "-")),
    }
}

/// Text that means itself: a backslash is one, a dash can be searched for and copied, and no line is a request.
fn plain(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-").replace('…', "\\&...");
    let quoted =
        text.lines().map(|line| if line.starts_with(['.', '\'']) { format!("\\&{line}") } else { line.to_owned() });
    quoted.collect::<Vec<_>>().join("\n")
}

fn head(name: &str, section: u8, about: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let title = name.to_ascii_uppercase();
    format!(
        ".TH \"{}\" \"{section}\" \"\" \"runx {version}\" \"runx\"\n.SH NAME\n{} \\- {}\n",
        plain(&title),
        plain(name),
        plain(about)
    )
}

fn flags(out: &mut String, title: &str, flags: impl Iterator<Item = &'static Flag>) {
    let mut flags = flags.peekable();
    if flags.peek().is_none() {
        return;
    }
    out.push_str(&format!(".SH {title}\n"));
    for flag in flags {
        let short = flag.short.map(|letter| format!("\\fB\\-{letter}\\fR, ")).unwrap_or_default();
        let value = flag.value.map(|value| format!(" \\fI{}\\fR", plain(value))).unwrap_or_default();
        out.push_str(&format!(
            ".TP\n{short}\\fB\\-\\-{}\\fR{value}\n{}.\n",
            plain(flag.long),
            plain(&sentence(flag.help))
        ));
    }
}

/// With a capital letter.
fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}

fn commands(out: &mut String, commands: impl Iterator<Item = (String, &'static str)>) {
    for (name, about) in commands {
        out.push_str(&format!(".TP\n\\fB{}\\fR(1)\n{}.\n", plain(&name), plain(&sentence(about))));
    }
}

fn page(of: Topic) -> String {
    match of {
        Topic::All => overview(),
        Topic::Group(group) => {
            let mut out = head(&name(of), 1, about_group(group));
            out.push_str(&format!(
                ".SH SYNOPSIS\n\\fBrunx\\fR [\\fIFLAGS\\fR] \\fB{group}\\fR \\fICOMMAND\\fR [\\fIFLAGS\\fR]\n"
            ));
            out.push_str(".SH COMMANDS\n");
            commands(&mut out, of_group(group).map(|(_, syntax)| (name(Topic::Command(syntax)), syntax.about)));
            out.push_str(".SH SEE ALSO\n\\fBrunx\\fR(1)\n");
            out
        }
        Topic::Command(syntax) => of_command(syntax),
    }
}

fn of_command(syntax: &'static Syntax) -> String {
    let mut out = head(&name(Topic::Command(syntax)), 1, syntax.about);
    let words = if syntax.words.is_empty() { String::new() } else { format!(" \\fI{}\\fR", plain(syntax.words)) };
    let own = if syntax.flags.is_empty() { "" } else { " [\\fIFLAGS\\fR]" };
    out.push_str(&format!(".SH SYNOPSIS\n\\fBrunx\\fR [\\fIFLAGS\\fR] \\fB{}\\fR{own}{words}\n", plain(syntax.name)));
    out.push_str(&format!(".SH DESCRIPTION\n{}.\n", plain(&sentence(syntax.about))));
    flags(&mut out, "FLAGS", shown(syntax.flags));
    out.push_str(
        ".SH EXIT STATUS\n0 on success, and 1 with a word of what failed and why.\n\
         Commands that wait for a program end with its exit status,\nor with 128 and the number of the signal that ended it.\n",
    );
    out.push_str(".SH SEE ALSO\n\\fBrunx\\fR(1), for flags of all commands");
    if let Some((group, _)) = syntax.name.split_once(' ') {
        out.push_str(&format!("; \\fBrunx\\-{group}\\fR(1)"));
    }
    out.push('\n');
    out
}

fn overview() -> String {
    let mut out = head("runx", 1, "containers, images and WASM modules, and an OCI runtime for engines");
    out.push_str(".SH SYNOPSIS\n\\fBrunx\\fR [\\fIFLAGS\\fR] \\fICOMMAND\\fR [\\fIFLAGS\\fR]\n");
    out.push_str(
        ".SH DESCRIPTION\nrunx runs containers of images and WASM modules on one machine, without a daemon, and is an OCI \
         runtime that engines call in runc\\(aqs place.\n",
    );
    for (title, names) in SECTIONS {
        out.push_str(&format!(".SS {title}\n"));
        commands(&mut out, names.iter().map(|name| (format!("runx-{name}"), about(name))));
    }
    flags(&mut out, "FLAGS", shown(&[GLOBAL]));
    out.push_str(".SH FILES\n");
    for (path, about) in [
        ("/etc/runx/config.toml", "The config file, \\fBrunx\\-config\\fR(5)."),
        ("~/.config/runx/config.toml", "That of somebody who is not root, over the first one."),
        ("/run/runx", "State of containers; of somebody who is not root, $XDG_RUNTIME_DIR/runx."),
        ("/var/lib/runx", "Images, and what containers keep; of somebody who is not root, ~/.local/share/runx."),
    ] {
        out.push_str(&format!(".TP\n\\fI{}\\fR\n{about}\n", plain(path)));
    }
    out.push_str(".SH EXAMPLES\n");
    for (line, about) in [
        ("runx container run -it alpine sh", "A shell in a new container."),
        (
            "runx container run -d --name web -p 8080:80 nginx",
            "A web server in the background, with a port of the host.",
        ),
        ("runx wasm run module.wasm", "A WASM module of this machine."),
        ("runx check", "What this machine offers, and how to get what is missing."),
    ] {
        out.push_str(&format!(".TP\n.B {}\n{about}\n", plain(line)));
    }
    out.push_str(".SH SEE ALSO\n\\fBrunx\\-config\\fR(5)\n");
    out
}

/// The page about the config file: the documented example.
fn config() -> String {
    let mut out = head("runx-config", 5, "the config file of runx");
    out.push_str(".SH SYNOPSIS\n/etc/runx/config.toml, ~/.config/runx/config.toml\n.SH DESCRIPTION\n.nf\n");
    out.push_str(&plain(include_str!("../../../../docs/config.toml")));
    out.push_str("\n.fi\n.SH SEE ALSO\n\\fBrunx\\fR(1)\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_text_is_a_request() {
        assert_eq!(plain(".TH x\n'b \\n-"), "\\&.TH x\n\\&'b \\en\\-");
    }

    #[test]
    fn every_command_and_flag_has_its_place() {
        for syntax in all() {
            let text = of_command(syntax);
            for flag in shown(syntax.flags) {
                assert!(text.contains(&format!("\\fB\\-\\-{}\\fR", plain(flag.long))), "{} {}", syntax.name, flag.long);
            }
        }
        let text = overview();
        assert!(GROUP_NAMES.iter().all(|group| text.contains(&format!("runx\\-{group}\\fR(1)"))));
    }
}
