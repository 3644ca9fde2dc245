//! `runx-node` where others write containerd's files, too: what they wrote is never lost, and never undone.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

use runx_tests::command::{Done, run};
use runx_tests::machine::{
    CONFIG, IMPORTS, Killed, Machine, every_package, head, newer_packages, one_package, run_until, serves, started,
    status, usual,
};
use runx_tests::needs_machine;

/// A handler of somebody else's.
fn kata() -> String {
    let (_, cri) = head(2);
    format!("[plugins.\"{cri}\".containerd.runtimes.kata]\n  runtime_type = \"io.containerd.runc.v2\"\n")
}

/// What comes before the node's programs, and does something after containerd has read a configuration: once.
fn after_a_dump(machine: &Machine, what: &str) -> String {
    let (hook, once) = (machine.path().join("hook.sh"), machine.path().join("once"));
    fs::write(&once, "").expect("write a file");
    let text = format!(
        "#!/bin/sh\n{} \"$@\"\ncode=$?\ncase \"$*\" in *' dump') if rm '{}' 2>/dev/null; then {what}; fi;; esac\nexit $code\n",
        machine.enter().join(" "),
        once.display()
    );
    fs::write(&hook, text).expect("write a script");
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).expect("let it be executed");
    hook.to_string_lossy().into_owned()
}

/// The installer with directories of the node mounted otherwise, as a pod has them.
fn in_a_pod(machine: &Machine, mounts: &str, words: &[&str]) -> Done {
    let command = machine.command(words);
    let mut pod = Command::new("unshare");
    pod.args(["--mount", "--propagation", "private", "sh", "-ec"]);
    pod.arg(format!("cd '{}'; {mounts}; exec \"$@\"", machine.root().display())).arg("sh");
    run(pod.arg(command.get_program()).args(command.get_args()))
}

#[test]
fn a_file_that_somebody_writes_meanwhile_keeps_that() {
    needs_machine!();
    for package in every_package() {
        let machine = started(&package, "written meanwhile", Some(&usual(2, "")));
        let file = machine.root().join(CONFIG).display().to_string();
        let hook = after_a_dump(&machine, &format!("printf '\\n%s' '{}' >>'{file}'", kata()));
        let with = format!("{}\n{}", usual(2, ""), kata().trim_end());
        machine.node(&["install", "--enter", &hook]).ok();
        serves(&machine, true);
        assert!(machine.handlers().is_some_and(|handlers| handlers.contains(&"kata".to_owned())));
        assert!(machine.read(CONFIG).starts_with(&with), "{}", machine.read(CONFIG));
        assert_eq!(machine.restarts(), 2);
        let hook = after_a_dump(&machine, &format!("echo '# more' >>'{file}'"));
        machine.node(&["uninstall", "--enter", &hook]).ok();
        assert_eq!(machine.read(CONFIG), format!("{with}\n# more\n"));
        assert!(machine.handlers().is_some_and(|handlers| handlers.contains(&"kata".to_owned())));
        // Who writes all the time is not overwritten either.
        let hook =
            after_a_dump(&machine, &format!("echo '# again' >>'{file}'; touch '{}/once'", machine.path().display()));
        let restarts = machine.restarts();
        machine.node(&["install", "--enter", &hook]).fails(1, &["4 times", "nothing was changed"]);
        assert_eq!(machine.restarts(), restarts);
        assert!(!machine.read(CONFIG).contains("runtimes.runx"));
    }
}

#[test]
fn lines_above_below_and_between_ours_stay_and_nothing_is_restarted_for_them() {
    needs_machine!();
    for package in every_package() {
        let machine = started(&package, "edited around", Some(&usual(2, "")));
        machine.node(&["install"]).ok();
        let restarts = machine.restarts();
        let above = "[debug]\n  level = \"info\"\n";
        let edits: [(String, &str); 3] = [
            (machine.read(CONFIG).replacen("# The node's own.\n", "# The node's own.\noom_score = -998\n", 1), ""),
            (machine.read(CONFIG) + above, above),
            (machine.read(CONFIG).replace("# END runx-node", &format!("{}# END runx-node", kata())), "runtimes.kata"),
        ];
        for (text, word) in edits {
            machine.write(CONFIG, &text);
            assert!(status(&machine)["drift"].as_str().is_some_and(|drift| drift.contains("was changed")));
            machine.node(&["install"]).ok();
            assert_eq!(machine.read(CONFIG), text, "it is right as it is");
            assert_eq!(status(&machine)["drift"], serde_json::Value::Null, "{}", status(&machine));
            assert_eq!(machine.node(&["status"]).code, 0);
            assert_eq!(machine.restarts(), restarts);
            assert!(machine.read(CONFIG).contains(word));
        }
        machine.restart();
        machine.node(&["uninstall"]).ok();
        let left = machine.read(CONFIG);
        assert!(
            left.contains("runtimes.kata]") && !left.contains("runtimes.runx") && !left.contains("runx-node"),
            "{left}"
        );
        assert!(machine.handlers().is_some_and(|handlers| handlers.contains(&"kata".to_owned())));
    }
}

#[test]
fn the_file_that_was_installed_into_is_the_one_that_it_is_taken_out_of() {
    needs_machine!();
    let other = format!("{}\n# A mirror's.\n", usual(2, ""));
    for link in [false, true] {
        let machine = Machine::prepare(&one_package(), Some(&usual(2, "")));
        machine.set_programs("one");
        machine.write("etc/containerd/a.toml", &other);
        fs::write(machine.path().join("config"), "/etc/containerd/a.toml").expect("write a file");
        machine.restart();
        if link {
            let config = machine.root().join(CONFIG);
            fs::remove_file(&config).expect("remove a file");
            symlink("a.toml", &config).expect("make a link");
            machine.node(&["install"]).ok();
            // It leads elsewhere from now on.
            fs::remove_file(&config).expect("remove a link");
            machine.write("etc/containerd/b.toml", &usual(2, ""));
            symlink("b.toml", &config).expect("make a link");
        } else {
            machine.node(&["install", "--containerd-config", "/etc/containerd/a.toml"]).ok();
        }
        serves(&machine, true);
        machine.node(&["uninstall"]).ok();
        assert_eq!(machine.read("etc/containerd/a.toml"), other);
        assert_eq!(machine.read(CONFIG), usual(2, ""));
        serves(&machine, false);
    }
}

#[test]
fn where_the_place_of_the_handler_changes_it_leaves_the_former_one_with_one_restart() {
    needs_machine!();
    let drop_in = "etc/containerd/conf.d/runx.toml";
    for package in newer_packages() {
        let machine = started(&package, "another place", Some(&usual(2, "")));
        machine.node(&["install"]).ok();
        // Somebody has drop-ins read from now on.
        machine.write(CONFIG, &machine.read(CONFIG).replacen("version = 2\n", &format!("version = 2\n{IMPORTS}"), 1));
        let restarts = machine.restarts();
        machine.node(&["install"]).ok();
        assert_eq!(machine.restarts(), restarts + 1);
        assert_eq!(machine.read(CONFIG).trim_end(), usual(2, IMPORTS), "the block is gone");
        assert!(machine.read(drop_in).contains("runtimes.runx"));
        serves(&machine, true);
        assert_eq!(status(&machine)["drift"], serde_json::Value::Null);
        // And no more.
        machine.write(CONFIG, &usual(2, ""));
        machine.node(&["install"]).ok();
        assert_eq!(machine.restarts(), restarts + 2);
        assert!(!machine.root().join("etc/containerd/conf.d").exists());
        serves(&machine, true);
        machine.node(&["uninstall"]).ok();
        assert_eq!(machine.read(CONFIG), usual(2, ""));
        serves(&machine, false);
        assert_eq!(machine.restarts(), restarts + 3);
    }
}

#[test]
fn a_change_of_place_that_is_killed_at_any_step_is_completed_and_one_that_fails_is_taken_back() {
    needs_machine!();
    for package in newer_packages() {
        let machine = started(&package, "killed between two places", Some(&usual(2, "")));
        let import = |machine: &Machine| {
            machine
                .write(CONFIG, &machine.read(CONFIG).replacen("version = 2\n", &format!("version = 2\n{IMPORTS}"), 1));
        };
        let stride = std::env::var_os("RUNX_ROUNDS").map_or(19, |_| 1);
        for nth in (std::process::id() as usize % stride..).step_by(stride) {
            machine.write(CONFIG, &usual(2, ""));
            machine.node(&["install"]).ok();
            import(&machine);
            let killed = run_until(&mut machine.command(&["install"]), nth).expect("follow the installer");
            machine.node(&["install"]).ok();
            serves(&machine, true);
            assert_eq!(machine.read(CONFIG).trim_end(), usual(2, IMPORTS), "{killed:?} at {nth}");
            assert_eq!(machine.node(&["status"]).code, 0, "{killed:?} at {nth}: {}", status(&machine));
            let left: Vec<_> = machine.changeable().into_keys().collect();
            assert!(
                !left.iter().any(|path| path.to_string_lossy().contains(".runx-new")),
                "{killed:?} at {nth}: {left:?}"
            );
            machine.node(&["uninstall"]).ok();
            assert_eq!(machine.read(CONFIG).trim_end(), usual(2, IMPORTS), "{killed:?} at {nth}");
            assert!(
                !machine.root().join("var/lib/runx").exists() && !machine.root().join("etc/containerd/conf.d").exists()
            );
            if let Killed::Ended(code) = killed {
                assert_eq!(code, 0);
                break;
            }
        }
        // containerd does not come up with the drop-in.
        machine.write(CONFIG, &usual(2, ""));
        machine.node(&["install"]).ok();
        import(&machine);
        let before = machine.files("etc");
        let script = machine.path().join("no-drop-in.sh");
        let text = format!(
            "[ -e '{}/etc/containerd/conf.d/runx.toml' ] && exit 1\nexec '{}/restart.sh'\n",
            machine.root().display(),
            machine.path().display()
        );
        fs::write(&script, text).expect("write a script");
        let restart = format!("sh '{}'", script.display());
        machine.node(&["install", "--restart-command", &restart]).fails(1, &["its configuration was restored"]);
        assert_eq!(machine.files("etc"), before);
        serves(&machine, true);
        machine.node(&["uninstall"]).ok();
        serves(&machine, false);
        assert!(!machine.read(CONFIG).contains("runtimes.runx"));
    }
}

#[test]
fn a_former_configuration_that_does_not_come_up_is_tried_twice_and_its_repair_is_not_undone() {
    needs_machine!();
    for package in every_package() {
        // It is read, and does not start: somebody has not restarted containerd since.
        let machine = started(&package, "a former fault", Some(&usual(2, "")));
        let broken = usual(2, "").replacen("version = 2\n", "version = 2\nstate = \"/proc/1/nosuch\"\n", 1);
        machine.write(CONFIG, &broken);
        let install = ["install", "--timeout", "2"];
        machine.node(&install).fails(1, &["former configuration either"]);
        assert_eq!(machine.read(CONFIG), broken);
        machine.node(&install).fails(1, &["former configuration either"]);
        let restarts = machine.restarts();
        for _ in 0..2 {
            machine.node(&install).fails(1, &["2 times in vain"]);
            assert_eq!(machine.restarts(), restarts, "it is left alone");
        }
        let repaired = format!("{}\n# Repaired.\n", usual(2, ""));
        machine.write(CONFIG, &repaired);
        machine.node(&install).fails(1, &["2 times in vain"]);
        assert_eq!((machine.read(CONFIG), machine.restarts()), (repaired.clone(), restarts));
        machine.restart();
        machine.node(&install).ok();
        assert!(machine.read(CONFIG).starts_with(&repaired));
        serves(&machine, true);
        machine.node(&["uninstall"]).ok();
        assert_eq!(machine.read(CONFIG), repaired);
    }
}

#[test]
fn what_somebody_writes_while_a_change_is_taken_back_stays() {
    needs_machine!();
    let machine = started(&one_package(), "written while taken back", Some(&usual(2, "")));
    machine.sabotage(true);
    // Just before containerd is restarted with the new file, and does not come up.
    let script = machine.path().join("edit.sh");
    let (file, once) = (machine.root().join(CONFIG).display().to_string(), machine.path().join("once"));
    fs::write(&once, "").expect("write a file");
    let text = format!(
        "if rm '{}' 2>/dev/null; then echo '# Mine.' >>'{file}'; fi\nexec '{}/restart.sh'\n",
        once.display(),
        machine.path().display()
    );
    fs::write(&script, text).expect("write a script");
    let restart = format!("sh '{}'", script.display());
    machine
        .node(&["install", "--timeout", "2", "--restart-command", &restart])
        .fails(1, &["its configuration was restored"]);
    assert_eq!(machine.read(CONFIG), format!("{}\n# Mine.\n", usual(2, "")));
    serves(&machine, false);
}

#[test]
fn what_is_there_and_was_never_served_is_taken_back_to_the_files_without_us() {
    needs_machine!();
    let machine = started(&one_package(), "never served", Some(&usual(2, "")));
    machine.node(&["install"]).ok();
    let ours = machine.read(CONFIG);
    let install = ["install", "--timeout", "2"];
    for journal in [true, false] {
        // Somebody puts the file back that has runx in it, and containerd has not read it.
        if journal {
            machine.write(CONFIG, &usual(2, ""));
            machine.restart();
        } else {
            machine.node(&["uninstall"]).ok();
        }
        machine.write(CONFIG, &ours);
        serves(&machine, false);
        machine.sabotage(true);
        let restarts = machine.restarts();
        machine.node(&install).fails(1, &["its configuration was restored"]);
        // Where nobody knows how it ended, a line's end is right.
        let end = if journal { "" } else { "\n" };
        assert_eq!(machine.read(CONFIG), format!("{}{end}", usual(2, "")));
        serves(&machine, false);
        assert_eq!(status(&machine)["state"], "failed");
        assert_eq!(machine.restarts(), restarts + 2);
        machine.node(&install).fails(1, &["its configuration was restored"]);
        machine.node(&install).fails(1, &["2 times", "--force"]);
        assert_eq!(machine.restarts(), restarts + 4, "it ends");
        machine.sabotage(false);
        machine.node(&["install", "--force"]).ok();
        serves(&machine, true);
    }
    machine.node(&["uninstall"]).ok();
    assert_eq!(machine.read(CONFIG).trim_end(), usual(2, ""));
}

#[test]
fn an_edit_after_a_kill_stays_and_what_nobody_has_tried_goes_when_it_is_taken_back() {
    needs_machine!();
    let machine = started(&one_package(), "edited after a kill", Some(&usual(2, "")));
    let killed = machine.node(&["install", "--restart-command", "kill -9 $PPID"]);
    assert!(machine.read(CONFIG).contains("runtimes.runx"), "{killed:?}");
    machine.write(CONFIG, &format!("{}# Mine.\n", machine.read(CONFIG)));
    machine.sabotage(true);
    machine.node(&["install", "--timeout", "2"]).fails(1, &["its configuration was restored"]);
    let left = machine.read(CONFIG);
    assert!(
        left.starts_with(&usual(2, "")) && left.ends_with("# Mine.\n") && !left.contains("runtimes.runx"),
        "{left}"
    );
    serves(&machine, false);
    // Without an edit it is taken back to what was there before.
    machine.write(CONFIG, &usual(2, ""));
    machine.node(&["install", "--restart-command", "kill -9 $PPID"]);
    assert!(machine.read(CONFIG).contains("runtimes.runx"));
    machine.node(&["install", "--timeout", "2"]).fails(1, &["its configuration was restored"]);
    assert_eq!(machine.read(CONFIG), usual(2, ""));
}

#[test]
fn a_drop_in_that_somebody_removes_meanwhile_is_not_written_again() {
    needs_machine!();
    let drop_in = "etc/containerd/conf.d/runx.toml";
    for package in newer_packages() {
        let machine = started(&package, "removed meanwhile", Some(&usual(2, IMPORTS)));
        machine.node(&["install"]).ok();
        assert!(machine.read(drop_in).contains("runtimes.runx"));
        machine.write(CONFIG, &usual(2, ""));
        let root = machine.root().display().to_string();
        let what = format!(
            "echo '# again' >>'{root}/{CONFIG}'; rm -f '{root}/{drop_in}'; touch '{}/once'",
            machine.path().display()
        );
        let hook = after_a_dump(&machine, &what);
        machine.node(&["install", "--enter", &hook]).fails(1, &["4 times", "nothing was changed"]);
        assert!(!machine.root().join(drop_in).exists());
        assert!(!machine.read(CONFIG).contains("runtimes.runx"));
        machine.node(&["install"]).ok();
        serves(&machine, true);
        machine.node(&["uninstall"]).ok();
        serves(&machine, false);
    }
}

#[test]
fn a_main_file_that_cannot_be_seen_is_not_one_that_is_not_there() {
    needs_machine!();
    let machine = started(&one_package(), "not seen", Some(&usual(2, "")));
    let config = machine.root().join(CONFIG);
    fs::create_dir_all(machine.root().join("data/containerd")).expect("make a directory");
    fs::rename(&config, machine.root().join("data/containerd/config.toml")).expect("rename a file");
    symlink("/data/containerd/config.toml", &config).expect("make a link");
    let before = machine.files("etc");
    in_a_pod(&machine, "mount -t tmpfs none data", &["install"]).fails(1, &["is a link", "mount /data/containerd"]);
    assert_eq!((machine.files("etc"), machine.restarts()), (before, 1));
    machine.node(&["install"]).ok();
    assert!(fs::symlink_metadata(&config).is_ok_and(|found| found.is_symlink()));
    serves(&machine, true);
    // Somebody is writing it anew.
    let real = machine.root().join("data/containerd/config.toml");
    let aside = real.with_extension("old");
    fs::rename(&real, &aside).expect("rename a file");
    machine.node(&["install"]).fails(1, &["is a link"]);
    fs::remove_file(&config).expect("remove a link");
    machine.node(&["install"]).fails(1, &["put it back"]);
    machine.node(&["uninstall"]).fails(1, &["put it back", "/var/lib/runx/node/original"]);
    assert!(!config.exists() && machine.restarts() == 2);
    assert_eq!(machine.read("var/lib/runx/node/original"), usual(2, ""));
    fs::rename(&aside, &real).expect("rename a file");
    symlink("/data/containerd/config.toml", &config).expect("make a link");
    assert_eq!(machine.node(&["status"]).code, 0);
    machine.node(&["uninstall"]).ok();
    assert_eq!(machine.read("data/containerd/config.toml"), usual(2, ""));
}

#[test]
fn a_file_that_cannot_be_written_restarts_nothing() {
    needs_machine!();
    for package in every_package() {
        let machine = started(&package, "not writable", Some(&usual(2, "")));
        let before = machine.files("etc");
        let read_only = "mount --bind etc/containerd etc/containerd; mount -o remount,bind,ro etc/containerd";
        in_a_pod(&machine, read_only, &["install"]).fails(1, &["write into /etc/containerd", "read-only"]);
        // It shows only when it is tried.
        fs::create_dir(machine.root().join("etc/containerd/.config.toml.runx-new")).expect("make a directory");
        machine.node(&["install"]).fails(1, &["write /etc/containerd/config.toml", "it was not restarted"]);
        assert_ne!(status(&machine)["state"], "rolling-back");
        fs::remove_dir(machine.root().join("etc/containerd/.config.toml.runx-new")).expect("remove it");
        assert_eq!((machine.files("etc"), machine.restarts()), (before.clone(), 1));
        machine.node(&["install"]).ok();
        machine.node(&["uninstall"]).ok();
        assert_eq!(machine.files("etc"), before);
    }
}

#[test]
fn imports_that_cannot_be_seen_are_named() {
    needs_machine!();
    for package in every_package() {
        let imports = "imports = [\"/data/*.toml\"]\n";
        let machine = Machine::prepare(&package, Some(&usual(2, imports)));
        machine.set_programs("one");
        machine.write("data/more.toml", "version = 2\n[metrics]\n  grpc_histogram = true\n");
        machine.restart();
        let before = machine.files("etc");
        // As a pod that mounts only what it was told to: a root of its own with directories of the node's in it.
        let pod = "mkdir -p '../pod/etc' ../pod/run ../pod/usr ../pod/var/lib ../pod/opt; \
                   for name in etc run usr var/lib opt; do mount --rbind $name ../pod/$name; done";
        let command = machine.command(&["install"]);
        let words: Vec<String> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
        let at = words.iter().position(|word| *word == machine.root().to_string_lossy()).expect("it has a root");
        let mut words = words;
        words[at] = machine.path().join("pod").to_string_lossy().into_owned();
        let mut run_pod = Command::new("unshare");
        run_pod.args(["--mount", "--propagation", "private", "sh", "-ec"]);
        run_pod.arg(format!(
            "cd '{}'; {pod}; mount --rbind ../pod ../pod; mount -o remount,bind,ro ../pod; exec \"$@\"",
            machine.root().display()
        ));
        let done = run(run_pod.arg("sh").arg(command.get_program()).args(&words));
        done.fails(1, &["mount", "/data", "othing was changed"]);
        assert_eq!((machine.files("etc"), machine.restarts()), (before, 1));
        machine.node(&["install"]).ok();
        assert_eq!(machine.root().join("data/runx.toml").exists(), package.version >= (2, 0));
        machine.node(&["uninstall"]).ok();
    }
}

#[test]
fn without_a_journal_nobody_says_that_it_is_gone() {
    needs_machine!();
    for (package, imports) in every_package().into_iter().flat_map(|it| [(it.clone(), ""), (it, IMPORTS)]) {
        if package.version < (2, 0) && !imports.is_empty() {
            continue;
        }
        let machine = started(&package, "no journal", Some(&usual(2, imports)));
        let before = machine.changeable();
        machine.node(&["install"]).ok();
        fs::remove_dir_all(machine.root().join("var/lib/runx")).expect("remove the journal");
        let restarts = machine.restarts();
        machine.node(&["uninstall"]).fails(1, &["no journal", "install again"]);
        assert_eq!(machine.restarts(), restarts);
        machine.node(&["install"]).ok();
        assert_eq!(machine.restarts(), restarts, "it was taken over");
        machine.node(&["uninstall"]).ok();
        serves(&machine, false);
        let left = machine.changeable();
        let text = |file: Option<&(u32, Vec<u8>)>| file.map(|it| String::from_utf8_lossy(&it.1).trim_end().to_owned());
        let config = machine.root().join(CONFIG);
        assert_eq!(text(left.get(&config)), text(before.get(&config)));
        assert!(!left.keys().any(|path| path.to_string_lossy().contains("runx.toml")));
        assert!(!machine.root().join("opt/runx").exists());
    }
}

#[test]
fn a_block_that_nobody_has_noted_goes_when_the_handler_comes_to_a_file_beside() {
    needs_machine!();
    for package in newer_packages() {
        let machine = started(&package, "unnoted block", Some(&usual(2, "")));
        machine.node(&["install"]).ok();
        fs::remove_dir_all(machine.root().join("var/lib/runx")).expect("remove the journal");
        let imported = machine.read(CONFIG).replacen(&usual(2, ""), &usual(2, IMPORTS), 1);
        assert!(imported.contains("conf.d") && imported.contains("runtimes.runx]"), "{imported}");
        machine.write(CONFIG, &imported);
        machine.node(&["install"]).ok();
        serves(&machine, true);
        assert!(!machine.read(CONFIG).contains("runtimes.runx]"), "{}", machine.read(CONFIG));
        machine.node(&["uninstall"]).ok();
        serves(&machine, false);
        assert_eq!(machine.read(CONFIG).trim_end(), usual(2, IMPORTS).trim_end());
        assert!(!machine.root().join("etc/containerd/conf.d/runx.toml").exists());
    }
}

#[test]
fn lines_in_our_drop_in_stay_when_it_is_upgraded_and_taken_away() {
    needs_machine!();
    let drop_in = "etc/containerd/conf.d/runx.toml";
    for package in newer_packages() {
        let machine = started(&package, "lines in the drop-in", Some(&usual(2, IMPORTS)));
        machine.node(&["install"]).ok();
        let text = machine.read(drop_in) + &kata();
        machine.write(drop_in, &text);
        machine.node(&["install"]).ok();
        assert_eq!(machine.read(drop_in), text);
        machine.restart();
        machine.node(&["uninstall"]).ok();
        let left = machine.read(drop_in);
        assert!(
            left.contains("runtimes.kata]") && left.contains("version = 2") && !left.contains("runtimes.runx"),
            "{left}"
        );
        assert!(machine.handlers().is_some_and(|handlers| handlers.contains(&"kata".to_owned())));
        serves(&machine, false);
    }
}

#[test]
fn a_handler_that_is_served_still_after_it_was_taken_away_is_told_and_not_restarted_for_without_end() {
    needs_machine!();
    let machine = started(&one_package(), "served still", Some(&usual(2, "")));
    machine.node(&["install"]).ok();
    // Somebody has copied our tables.
    machine.write("etc/other.toml", &machine.read(CONFIG));
    fs::write(machine.path().join("config"), "/etc/other.toml").expect("write a file");
    let uninstall = ["uninstall", "--timeout", "1"];
    for _ in 0..2 {
        machine.node(&uninstall).fails(1, &["serves the handler \"runx\" still"]);
    }
    let restarts = machine.restarts();
    machine.node(&uninstall).fails(1, &["2 times in vain"]);
    assert_eq!(machine.restarts(), restarts);
    assert_eq!(machine.read(CONFIG), usual(2, ""));
    fs::remove_file(machine.path().join("config")).expect("remove a file");
    machine.restart();
    machine.node(&uninstall).ok();
    assert_eq!(machine.restarts(), restarts + 1, "by the test alone");
    assert!(!machine.root().join("opt/runx").exists());
}
