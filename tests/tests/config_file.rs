//! The config file: what it sets, who comes over whom, and mistakes in it.

use std::fs;
use std::path::Path;
use std::process::Command;

use runx_tests::bundle::Bundle;
use runx_tests::command::{Done, run};
use runx_tests::{dist, needs_root, needs_user, user};
use tempfile::TempDir;

fn with(file: &Path, args: &[&str]) -> Done {
    run(Command::new(dist().join("runx")).arg("--config-file").arg(file).args(args))
}

#[test]
fn roots_and_the_form_of_the_log_come_from_the_file_unless_flags_say_otherwise() {
    needs_root!();
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.create().ok();
    let file = bundle.scratch().join("config.toml");
    fs::write(&file, format!("root = {:?}\nlog-format = \"json\"\n", bundle.state_root())).unwrap();
    let shown = with(&file, &["list", "-q"]).ok().stdout;
    assert_eq!(shown, format!("{}\n", bundle.id()));
    let told = with(&file, &["state", "no-such"]).fails(1, &[]).stderr;
    assert!(told.starts_with("{\"level\":\"error\""), "{told}");
    let elsewhere = bundle.scratch().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let elsewhere = elsewhere.to_str().unwrap();
    assert_eq!(with(&file, &["--root", elsewhere, "list", "-q"]).ok().stdout, "");
    let told = with(&file, &["--log-format", "text", "state", "no-such"]).fails(1, &[]).stderr;
    assert!(told.starts_with("time="), "{told}");
    // The log may be a file, and then what failed is told to people as well.
    let log = bundle.scratch().join("log");
    fs::write(&file, format!("root = {:?}\nlog = {log:?}\n", bundle.state_root())).unwrap();
    let told = with(&file, &["state", "no-such"]).fails(1, &["no-such"]).stderr;
    assert!(!told.contains("level="), "{told}");
    assert!(fs::read_to_string(&log).unwrap().contains("level=error"));
    bundle.runx(&["delete", "-f", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn mistakes_stop_every_command_but_help_and_version() {
    let directory = TempDir::with_prefix("runx-test-").unwrap();
    let file = directory.path().join("config.toml");
    fs::write(&file, "# a comment\n[network]\nbrigde = \"x\"\n").unwrap();
    let path = file.to_str().unwrap();
    with(&file, &["list"]).fails(1, &[path, "line 3", "brigde"]);
    with(&file, &["--version"]).ok();
    with(&file, &["list", "--help"]).ok();
    with(&directory.path().join("none.toml"), &["list"]).fails(1, &["none.toml", "No such file"]);
    with(Path::new(""), &["list"]).fails(1, &["--config-file"]);
    // A word that is wrong on the command line is told first.
    with(&file, &["lisst"]).fails(1, &["lisst"]);
}

#[test]
fn a_user_has_a_file_of_his_own() {
    needs_user!(obstacle);
    use std::os::unix::process::CommandExt;
    let directory = TempDir::with_prefix("runx-test-").unwrap();
    std::os::unix::fs::chown(directory.path(), Some(user::ID), Some(user::ID)).unwrap();
    let program = directory.path().join("runx");
    fs::copy(dist().join("runx"), &program).unwrap();
    let own = directory.path().join("conf/runx");
    fs::create_dir_all(&own).unwrap();
    fs::write(own.join("config.toml"), "nope = 1\n").unwrap();
    let his = |variable: &str, value: &Path| {
        let mut command = Command::new(&program);
        command.arg("list").env_clear().env(variable, value).uid(user::ID).gid(user::ID);
        run(&mut command)
    };
    let file = own.join("config.toml");
    his("XDG_CONFIG_HOME", &directory.path().join("conf")).fails(1, &[file.to_str().unwrap(), "line 1", "nope"]);
    fs::create_dir(directory.path().join("home")).unwrap();
    fs::rename(directory.path().join("conf"), directory.path().join("home/.config")).unwrap();
    his("HOME", &directory.path().join("home")).fails(1, &["home/.config/runx/config.toml", "line 1"]);
}
