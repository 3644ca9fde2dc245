//! Completion in real shells, and the manual, both made of the tables that command lines are read by.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use runx_tests::command::{Done, run};
use runx_tests::container::Terminal;
use runx_tests::{dist, needs_root, skip};
use tempfile::TempDir;

fn runx(args: &[&str]) -> Done {
    run(Command::new(dist().join("runx")).args(args))
}

/// Where a program is that not every machine has. Says so if it is missing.
fn found(name: &str, package: &str) -> Option<PathBuf> {
    let found = ["/usr/bin", "/bin"].iter().map(|bin| Path::new(bin).join(name)).find(|path| path.exists());
    if found.is_none() {
        skip(&format!("it needs {name} (package {package})"));
    }
    found
}

/// A root with a detached process, and the directory that the shells work in.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(TempDir::with_prefix("runx-test-").unwrap());
        fs::create_dir(place.0.path().join("subdirectory")).unwrap();
        fs::write(place.0.path().join("subject"), "").unwrap();
        runx(&["--root", place.root(), "process", "run", "-d", "--name", "first-one", "sleep", "100"]).ok();
        place
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn root(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    /// A shell's command, which finds our program and nothing of the user's.
    fn shell(&self, program: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        let path = format!("{}:/usr/bin:/bin", dist().display());
        command.args(args).current_dir(self.path()).env_clear().env("PATH", path);
        command.env("HOME", self.path()).env("TERM", "dumb").env("XDG_CONFIG_HOME", self.path());
        command
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = Command::new(dist().join("runx"))
            .args(["--root", self.root(), "process", "rm", "--force", "first-one"])
            .output();
    }
}

/// Writes a line with Tab keys in it, as somebody does, and has it executed.
fn drive(terminal: &mut Terminal, root: &str) {
    for (line, answer) in [
        // A group, a command, a flag and its value; the line runs as it was completed.
        ("proc\tp\t --form\tj\t", "\"first-one\""),
        ("process ps --format=j\t", "\"first-one\""),
        // An id.
        ("process sta\tfir\t", "\"sleep\""),
        // Of one that is not there the flag's name alone.
        ("process kill fir\tSIGCO\t; echo sent=$?", "sent=0"),
        ("spec --bun\tsubd\t; ls subdirectory", "config.json"),
    ] {
        for part in format!("runx --root {root} {line}").split_inclusive('\t') {
            terminal.write(part);
            // What a key asks for is answered before the next one is pressed.
            std::thread::sleep(std::time::Duration::from_millis(if part.ends_with('\t') { 400 } else { 0 }));
        }
        terminal.write("\r");
        terminal.expect(answer);
        terminal.expect("ready> ");
    }
    terminal.write("exit\r");
    terminal.wait();
}

#[test]
fn bash_completes_a_line_that_then_runs() {
    needs_root!();
    let Some(bash) = found("bash", "bash") else { return };
    let place = Place::new();
    let mut terminal = Terminal::start(place.shell(&bash, &["--norc", "--noprofile", "-i"]), 40, 200);
    terminal.write("PS1='ready''> '; source <(runx completion bash)\r");
    terminal.expect("ready> ");
    drive(&mut terminal, place.root());
}

#[test]
fn zsh_completes_a_line_that_then_runs() {
    needs_root!();
    let Some(zsh) = found("zsh", "zsh") else { return };
    let place = Place::new();
    let mut terminal = Terminal::start(place.shell(&zsh, &["-f", "-i"]), 40, 200);
    terminal.write("unsetopt zle_bracketed_paste; PS1='ready''> '; autoload -Uz compinit && compinit -u -D; source <(runx completion zsh)\r");
    terminal.expect("ready> ");
    drive(&mut terminal, place.root());
}

#[test]
fn fish_is_offered_words_and_what_they_mean() {
    needs_root!();
    let Some(fish) = found("fish", "fish") else { return };
    let place = Place::new();
    let offered = |line: &str| {
        let script = format!("runx completion fish | source; complete -C 'runx --root {} {line}'", place.root());
        run(&mut place.shell(&fish, &["--no-config", "-c", &script])).ok().stdout
    };
    assert!(offered("netw").starts_with("network\tnetworks of containers"));
    assert_eq!(offered("list --format=j").trim(), "--format=json");
    assert_eq!(offered("process rm fir").trim(), "first-one");
    assert!(offered("spec --bundle sub").contains("subdirectory/"));
}

#[test]
fn what_is_offered_is_what_there_is() {
    needs_root!();
    let place = Place::new();
    let asked = |line: &str, breaks: &str| {
        let out = runx(&["__complete", "bash", &format!("runx --root {} {line}", place.root()), breaks]).ok().stdout;
        let word =
            |line: &str| line.strip_prefix("word\t").map(|rest| rest.split('\t').next().unwrap_or("").to_owned());
        (out.lines().filter_map(word).collect::<Vec<_>>(), out)
    };
    assert_eq!(asked("process kill ", ":=").0, ["first-one"]);
    assert!(asked("wasm kill ", ":=").0.is_empty());
    // bash replaces what comes after its own ends of words only.
    assert_eq!(asked("list --format=t", ":=").0, ["table"]);
    assert_eq!(asked("list --format=t", "").0, ["--format=table"]);
    assert!(asked("run --bundle ", ":=").1.contains("directories\n"));
    assert!(asked("checkpoint --", ":=").0.contains(&"--leave-running".to_owned()));
    // A line that is broken, or another user's root, offers nothing and says nothing.
    let none = runx(&["__complete", "bash", "runx --root ", ":="]).ok();
    assert!(none.stderr.is_empty() && none.stdout.contains("directories"));
    runx(&["completion", "tcsh"]).fails(1, &["tcsh", "bash, zsh and fish"]);
}

#[test]
fn the_manual_has_a_page_for_every_command_and_is_well_formed() {
    let directory = TempDir::with_prefix("runx-test-").unwrap();
    runx(&["man", "--output", directory.path().to_str().unwrap()]).ok();
    let page = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    for (name, words) in [
        ("man1/runx.1", "runx\\-container"),
        ("man1/runx-container.1", "runx\\-container\\-run"),
        ("man1/runx-container-run.1", "\\fB\\-\\-publish\\fR"),
        ("man1/runx-exec.1", "\\fB\\-\\-ignore\\-paused\\fR"),
        ("man5/runx-config.5", "#subnet = \"10.87.0.0/16\""),
    ] {
        assert!(page(name).contains(words), "{name}");
    }
    // What help lists has a page.
    let help = runx(&["help"]).ok().stdout;
    let listed = help.split("Global flags").next().unwrap().lines().filter(|line| line.starts_with("  "));
    for name in listed.filter_map(|line| line.split_ascii_whitespace().next()) {
        page(&format!("man1/runx-{name}.1"));
        assert_eq!(runx(&["man", name]).ok().stdout, page(&format!("man1/runx-{name}.1")));
    }
    runx(&["man", "conatiner"]).fails(1, &["container"]);
    runx(&["man", "-o", "/proc/x"]).fails(1, &["/proc/x"]);
    let Some(mandoc) = found("mandoc", "mandoc") else { return };
    for entry in ["man1", "man5"].iter().flat_map(|section| fs::read_dir(directory.path().join(section)).unwrap()) {
        let path = entry.unwrap().path();
        let said = run(Command::new(&mandoc).args(["-T", "lint", "-W", "warning"]).arg(&path)).stdout;
        let other = said.lines().find(|line| !line.contains("missing date"));
        assert_eq!(other, None, "{}", path.display());
    }
}

#[test]
fn near_misses_and_dockers_words_are_told_what_they_are_here() {
    for (line, meant) in [
        (&["conatiner", "ls"][..], "did you mean \"runx container\"?"),
        (&["container", "insepct", "x"], "did you mean \"runx container inspect\"?"),
        (&["stast"], "did you mean \"runx start\"?"),
        (&["images"], "did you mean \"runx storage ls\"?"),
        (&["logs", "x"], "did you mean \"runx container logs\"?"),
        (&["list", "--fromat", "json"], "did you mean --format?"),
    ] {
        runx(line).fails(1, &[meant]);
    }
    let error = runx(&["frobnicate"]).fails(1, &["frobnicate", "runx help"]);
    assert!(!error.stderr.contains("did you mean"), "{}", error.stderr);
    for line in [&["container"][..], &["container", "--help"], &["help", "container"]] {
        let text = runx(line).ok().stdout;
        assert!(text.contains("inspect") && text.contains("\"runx help container COMMAND\""), "{line:?}: {text}");
    }
}
