//! Completion of command lines: a script for each shell, all of which ask `runx __complete` what can stand next.
//!
//! The answer is a line for each thing, with tabs: `word WORD ABOUT`, or `files`, `directories` and `programs` for what the
//! shell itself completes; before them `lead TEXT`, what of the current word is no part of them, and `current TEXT`, what
//! they begin with.

use std::path::Path;

use runx_image::Store;

use crate::arguments::complete::{Kind, Wanted, global_of, wanted};
use crate::config::Config;
use crate::container::record::Containers;
use crate::{Context, Failure, network, print};

/// `runx completion`.
pub(crate) fn script(shell: &str) -> Result<u8, Failure> {
    match shell {
        "bash" => print(include_str!("runx.bash")),
        "zsh" => print(include_str!("runx.zsh")),
        "fish" => print(include_str!("runx.fish")),
        other => Err(anyhow::anyhow!("there is no completion for {other:?}: it is for bash, zsh and fish").into()),
    }
}

/// `runx __complete SHELL …`: from bash the line up to the cursor and the characters that end words, from others the words.
pub(crate) fn complete(context: &Context, words: &[std::ffi::OsString]) -> Result<u8, Failure> {
    let words: Vec<String> = words.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    let (line, breaks) = match words.split_first() {
        Some((shell, rest)) if shell == "bash" => {
            let line = split(rest.first().map_or("", String::as_str));
            // The program's name, and what is set for it alone.
            let own = line.iter().take_while(|word| word.contains('=') && !word.starts_with('-')).count() + 1;
            (line.into_iter().skip(own).collect(), rest.get(1).cloned().unwrap_or_default())
        }
        Some((shell, rest)) if shell == "zsh" || shell == "fish" => (rest.to_vec(), String::new()),
        _ => return Err(anyhow::anyhow!("completion is asked for by the scripts of \"runx completion\"").into()),
    };
    let line: Vec<String> = line;
    let wanted = wanted(&line);
    let context = as_said(context, &line);
    let found = look(&context, &wanted);
    let keep = kept(&wanted, &breaks);
    let mut out = String::new();
    // zsh is told what comes before; the others take it back in each word.
    let apart = words[0] == "zsh";
    if apart && !wanted.lead.is_empty() {
        out.push_str(&format!("lead\t{}\n", wanted.lead));
    }
    out.push_str(&format!("current\t{}\n", wanted.begun));
    // A word that is complete is followed by a space, which the shell adds.
    for (word, about) in wanted.words.iter().chain(&found) {
        let whole = format!("{}{word}", if apart { "" } else { &wanted.lead });
        let rest = whole.get(keep..).unwrap_or_default();
        let about: String = about.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        out.push_str(&format!("word\t{rest}\t{about}\n"));
    }
    for (kind, name) in [(Kind::Files, "files"), (Kind::Directories, "directories"), (Kind::Programs, "programs")] {
        if wanted.kinds.contains(&kind) {
            out.push_str(&format!("{name}\n"));
        }
    }
    print(&out)
}

/// How much of the current word bash keeps by itself: up to the last character that ends words for it.
fn kept(wanted: &Wanted, breaks: &str) -> usize {
    let word = format!("{}{}", wanted.lead, wanted.begun);
    word.rfind(|c: char| breaks.contains(c) && (c == '=' || c == ':')).map_or(0, |at| at + 1)
}

/// The context that the line's own global flags make.
fn as_said(context: &Context, line: &[String]) -> Context {
    let said = global_of(line).ok().and_then(|mut global| {
        let config = Config::load(global.config_file.as_deref()).ok()?;
        global.complete(&config);
        Some((global, config))
    });
    let (global, config) = said.unwrap_or_else(|| (context.global.clone(), context.config.clone()));
    Context { global, config, executable: context.executable.clone() }
}

/// The names that there are of what is wanted. What cannot be read has none.
fn look(context: &Context, wanted: &Wanted) -> Vec<(String, String)> {
    let root = &context.global.root;
    let mut found = Vec::new();
    for kind in &wanted.kinds {
        match kind {
            Kind::Files | Kind::Directories | Kind::Programs => {}
            Kind::Containers => {
                let all = context.runtime().list().unwrap_or_default();
                found.extend(all.iter().map(|one| (one.state().id.clone(), one.status().to_string())));
            }
            Kind::Own => {
                let all = Containers::of(context).all().unwrap_or_default();
                found.extend(all.into_iter().map(|one| (one.id, one.options.image.unwrap_or_default())));
            }
            Kind::Attached => {
                found.extend(network::all(root).unwrap_or_default().into_iter().map(|id| (id, String::new())))
            }
            Kind::Modules => found.extend(directories(&root.join(".wasm"))),
            Kind::Processes => found.extend(directories(&root.join(".process"))),
            Kind::Images => found.extend(images(&context.global.storage_root())),
        }
    }
    found.retain(|(word, _)| word.starts_with(&wanted.begun));
    found.sort();
    found
}

fn directories(path: &Path) -> Vec<(String, String)> {
    let names = std::fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| !name.starts_with('.')).map(|name| (name, String::new())).collect()
}

fn images(storage: &Path) -> Vec<(String, String)> {
    // One that is not there is not made by the question.
    if !storage.join("storage").is_dir() {
        return Vec::new();
    }
    let images = Store::open(storage).and_then(|store| store.images()).unwrap_or_default();
    images.into_iter().flat_map(|image| image.names.clone()).map(|name| (name, String::new())).collect()
}

/// The words of a line as a shell reads them, as far as they go; the last one is the one that is being written.
fn split(line: &str) -> Vec<String> {
    let (mut words, mut word) = (Vec::new(), String::new());
    let (mut quote, mut begun) = (None, false);
    let mut characters = line.chars();
    while let Some(c) = characters.next() {
        match (quote, c) {
            (None, '\'' | '"') => {
                quote = Some(c);
                begun = true;
            }
            (Some(q), c) if c == q => quote = None,
            (None | Some('"'), '\\') => word.extend(characters.next()),
            (None, c) if c.is_whitespace() => {
                if begun || !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                begun = false;
            }
            (_, c) => word.push(c),
        }
    }
    words.push(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_split_as_shells_do() {
        assert_eq!(split("runx a 'b c' \"d\\\"e\" f\\ g h"), ["runx", "a", "b c", "d\"e", "f g", "h"]);
        assert_eq!(split("runx a "), ["runx", "a", ""]);
        assert_eq!(split("runx '' x"), ["runx", "", "x"]);
        assert_eq!(split("runx 'open"), ["runx", "open"]);
        assert_eq!(split(""), [""]);
    }

    #[test]
    fn bash_keeps_what_comes_before_its_own_ends_of_words() {
        let wanted = |lead: &str, begun: &str| Wanted { lead: lead.into(), begun: begun.into(), ..Wanted::default() };
        assert_eq!(kept(&wanted("--format=", "j"), "\"'><=;|&(:"), 9);
        assert_eq!(kept(&wanted("", "localhost:50"), "\"'><=;|&(:"), 10);
        assert_eq!(kept(&wanted("", "localhost:50"), " "), 0);
        assert_eq!(kept(&wanted("", "abc"), ":="), 0);
    }
}
