//! What goes in and out of containers: logs, being attached, and terminals.

use std::io::{Read, Write};
use std::process::{Command, Stdio};

use nix::sys::termios::LocalFlags;
use runx_tests::command::{eventually, run};
use runx_tests::container::{Containers, Terminal};
use runx_tests::needs_root;

/// What a command that copies its input to its output is given comes back, while both are much more than a pipe holds.
#[track_caller]
fn assert_comes_back(mut command: Command) {
    let input: String = (0..200_000).map(|number| format!("line {number}\n")).collect();
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let expected = input.clone();
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let mut text = String::new();
    stdout.read_to_string(&mut text).unwrap();
    writer.join().unwrap().unwrap();
    assert!(child.wait().unwrap().success());
    assert!(text == expected, "{} bytes of {} came back", text.len(), expected.len());
}

#[test]
fn input_and_output_pass_through_whole_and_in_order() {
    needs_root!();
    let containers = Containers::new();
    assert_comes_back(containers.run_command(&["--rm", "-i"], &["cat"]));
    // Without -i there is no input.
    assert_eq!(containers.run_with(&["--rm"], &["cat"], "nobody reads this").ok().stdout, "");
    containers.assert_nothing_left();
}

#[test]
fn a_reader_that_is_slow_gets_everything_as_from_a_pipe() {
    needs_root!();
    let containers = Containers::new();
    let mut command = containers.run_command(&["--rm"], &["seq", "1", "300000"]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(700));
    let mut text = String::new();
    out.read_to_string(&mut text).unwrap();
    assert!(child.wait().unwrap().success());
    let expected: String = (1..=300_000).map(|number| format!("{number}\n")).collect();
    assert!(text == expected, "{} bytes of {}", text.len(), expected.len());
    containers.assert_nothing_left();
}

/// Waits until a container that prints and prints is held up.
fn until_held_up(containers: &Containers, id: &str) {
    let size = || std::fs::metadata(containers.directory_of(id).join("container.log")).map_or(0, |log| log.len());
    let mut before = 0;
    eventually("it is held up", || {
        std::thread::sleep(std::time::Duration::from_millis(200));
        let now = size();
        std::mem::replace(&mut before, now) == now && now > 0
    });
}

#[test]
fn nobody_who_does_not_read_keeps_a_container_from_its_end() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.id("a");
    let mut command = containers.run_command(&["--name", &id], &["seq", "1", "3000000"]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    until_held_up(&containers, &id);
    containers.container(&["rm", "-f", &id]).ok();
    assert_eq!(containers.container(&["ls", "-aq"]).ok().stdout, "");
    drop(child.stdout.take());
    child.wait().unwrap();
    containers.assert_nothing_left();
}

#[test]
fn what_was_written_before_the_end_is_there_for_who_reads_after_it() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.id("a");
    let script = "seq 1 3000000 & while ! [ -e /tmp/end ]; do sleep 0.05; done; exit 7";
    let mut command = containers.run_command(&["--name", &id], &["sh", "-c", script]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    until_held_up(&containers, &id);
    std::fs::write(containers.rootfs().join("tmp/end"), "").unwrap();
    containers.until(&id, "exited");
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(7));
    let logged = containers.container(&["logs", &id]).ok().stdout;
    assert!(text == logged && text.len() > 200_000, "{} bytes of {}", text.len(), logged.len());
    containers.container(&["rm", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn logs_have_all_lines_by_stream_tail_and_time() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background(
        "a",
        &[],
        "for i in 1 2 3 4 5; do echo out $i; echo err $i >&2; done; sleep 0.2; printf end",
    );
    assert_eq!(containers.container(&["wait", &id]).ok().stdout, "0\n");
    let logs = |flags: &[&str]| containers.container(&[&["logs"], flags, &[&id]].concat()).ok();
    assert_eq!(logs(&[]).stdout, "out 1\nout 2\nout 3\nout 4\nout 5\nend");
    assert_eq!(logs(&[]).stderr, "err 1\nerr 2\nerr 3\nerr 4\nerr 5\n");
    let tail = logs(&["--tail", "3"]);
    assert_eq!(tail.stdout.lines().count() + tail.stderr.lines().count(), 3, "{tail:?}");
    assert!(tail.stdout.ends_with("end"));
    assert_eq!(logs(&["--tail", "0"]).stdout, "");
    let stamped = logs(&["-t", "-n", "1"]).stdout;
    let (time, text) = stamped.split_once(' ').unwrap();
    assert!(time.ends_with('Z') && time.len() == 30 && text == "end", "{stamped}");
    assert_eq!(logs(&["--since", "1h"]).stdout, logs(&[]).stdout);
    assert_eq!(logs(&["--until", "1h"]).stdout, "");
    assert_eq!(logs(&["--since", time]).stdout, "end");
    containers.container(&["rm", &id]).ok();
}

#[test]
fn logs_follow_until_the_end_also_through_rotation() {
    needs_root!();
    let containers = Containers::new();
    let flags = ["--log-opt", "max-size=64k", "--log-opt", "max-file=3"];
    let id = containers.background("a", &flags, "read x; seq 1 20000; sleep 0.2; seq 20001 20010");
    // It had no input to wait for, so what follows may begin anywhere; the end is what counts.
    let followed = containers.container(&["logs", "-f", &id]).ok().stdout;
    assert!(followed.ends_with("20008\n20009\n20010\n"), "{}", &followed[followed.len().saturating_sub(50)..]);
    let directory = containers.directory_of(&id);
    let mut files: Vec<_> = std::fs::read_dir(&directory).unwrap().flatten().collect();
    files.retain(|file| file.file_name().to_string_lossy().starts_with("container.log"));
    assert_eq!(files.len(), 3, "{files:?}");
    for file in &files {
        assert!(file.metadata().unwrap().len() <= (64 << 10) + 100, "{file:?}");
    }
    // What is kept is the newest, without a gap.
    let kept = containers.container(&["logs", &id]).ok().stdout;
    let numbers: Vec<u32> = kept.lines().map(|line| line.parse().unwrap()).collect();
    assert!(numbers.len() > 1000 && numbers.last() == Some(&20010), "{} lines", numbers.len());
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1));
    containers.container(&["rm", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn following_logs_sees_lines_as_they_come_and_ends_when_the_container_removes_itself() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background("a", &["--rm", "-i"], "echo ready; read line; echo got $line; read line; exit 0");
    let mut follow = containers.command(&["container", "logs", "-f", &id]);
    let mut follow = follow.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut attach = containers.command(&["container", "attach", &id]);
    let mut attach = attach.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = attach.stdin.take().unwrap();
    stdin.write_all(b"one\n").unwrap();
    let mut out = follow.stdout.take().unwrap();
    let mut seen = Vec::new();
    eventually("the line is followed", || {
        let mut buffer = [0; 64];
        let n = out.read(&mut buffer).unwrap();
        seen.extend(&buffer[..n]);
        String::from_utf8_lossy(&seen).contains("got one")
    });
    stdin.write_all(b"two\n").unwrap();
    assert!(attach.wait().unwrap().success());
    assert!(follow.wait().unwrap().success());
    containers.assert_nothing_left();
}

#[test]
fn a_shell_on_a_terminal_has_its_size_and_signals_and_gives_the_terminal_back() {
    needs_root!();
    let containers = Containers::new();
    let mut terminal = Terminal::start(containers.run_command(&["-it", "--rm"], &["sh"]), 31, 97);
    let before = terminal.initial_attributes();
    terminal.expect("# ");
    assert!(!terminal.attributes().local_flags.contains(LocalFlags::ICANON), "raw while it runs");
    terminal.write("stty size; tty\n");
    terminal.expect("31 97\r\n");
    terminal.expect("/dev/pts/0");
    terminal.resize(40, 120);
    // The signal that tells of it comes from the kernel.
    eventually_shows(&mut terminal, "stty size\n", "40 120");
    terminal.write("trap 'echo interrupted' INT; sleep 60\n");
    terminal.expect("sleep 60\r\n");
    std::thread::sleep(std::time::Duration::from_millis(300));
    terminal.write("\x03");
    terminal.expect("interrupted");
    terminal.write("exit 9\n");
    let (code, _) = terminal.wait();
    assert_eq!(code, 9);
    assert_eq!(terminal.attributes(), before);
    containers.assert_nothing_left();
}

#[track_caller]
fn eventually_shows(terminal: &mut Terminal, ask: &str, text: &str) {
    for _ in 0..100 {
        terminal.write(ask);
        terminal.expect("\r\n");
        if terminal.expect("# ").contains(text) {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    panic!("{text:?} is never shown");
}

#[test]
fn keys_leave_a_container_alone_and_it_can_be_attached_again() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.id("a");
    let mut terminal = Terminal::start(containers.run_command(&["-it", "--name", &id], &["sh"]), 24, 80);
    let before = terminal.initial_attributes();
    terminal.expect("# ");
    terminal.write("x=kept\n");
    terminal.expect("# ");
    terminal.write("\x10\x11");
    let (code, said) = terminal.wait();
    assert!(code == 0 && said.contains("runx container attach"), "{code} {said}");
    assert_eq!(terminal.attributes(), before);
    assert_eq!(containers.status(&id), "running");
    // With other keys, the usual ones are keys as all others.
    let attach = containers.command(&["container", "attach", "--detach-keys", "ctrl-a,d", &id]);
    let mut terminal = Terminal::start(attach, 50, 60);
    terminal.write("\n");
    terminal.expect("# ");
    terminal.write("echo $x; stty size\n");
    terminal.expect("kept\r\n50 60");
    terminal.expect("# ");
    terminal.write("\x01d");
    assert_eq!(terminal.wait().0, 0);
    let mut terminal = Terminal::start(containers.command(&["container", "attach", &id]), 24, 80);
    terminal.write("exit 4\n");
    assert_eq!(terminal.wait().0, 4);
    containers.container(&["rm", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn a_terminal_is_given_back_also_when_a_signal_ends_the_command() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.id("a");
    let flags = ["-it", "--rm", "--sig-proxy=false", "--name", &id];
    let mut terminal = Terminal::start(containers.run_command(&flags, &["sh"]), 24, 80);
    let before = terminal.initial_attributes();
    terminal.expect("# ");
    // SAFETY: the child has not been waited for, so the pid is its own.
    unsafe { libc::kill(terminal.pid(), libc::SIGTERM) };
    assert_eq!(terminal.wait().0, 128 + 15);
    assert_eq!(terminal.attributes(), before);
    assert_eq!(containers.status(&id), "running");
    containers.container(&["rm", "-f", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn signals_to_the_command_are_the_containers() {
    needs_root!();
    let containers = Containers::new();
    let mut command = containers
        .run_command(&["--rm"], &["sh", "-c", "trap 'echo got; exit 5' USR1; echo on; while :; do sleep 0.1; done"]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut three = [0; 3];
    out.read_exact(&mut three).unwrap();
    // SAFETY: the child has not been waited for, so the pid is its own.
    unsafe { libc::kill(child.id() as i32, libc::SIGUSR1) };
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert_eq!((rest.as_str(), child.wait().unwrap().code()), ("got\n", Some(5)));
    containers.assert_nothing_left();
}

#[test]
fn a_signal_comes_through_while_input_waits() {
    needs_root!();
    let containers = Containers::new();
    let mut command = containers
        .run_command(&["--rm", "-i"], &["sh", "-c", "trap 'exit 6' TERM; echo on; while :; do sleep 0.1; done"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut on = [0; 3];
    child.stdout.take().unwrap().read_exact(&mut on).unwrap();
    let writer = std::thread::spawn(move || while stdin.write_all(&[b'x'; 65536]).is_ok() {});
    std::thread::sleep(std::time::Duration::from_millis(500));
    // SAFETY: the child has not been waited for, so the pid is its own.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    assert_eq!(child.wait().unwrap().code(), Some(6));
    writer.join().unwrap();
    containers.assert_nothing_left();
}

#[test]
fn one_who_is_attached_and_does_not_read_delays_nobody() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background("a", &["-i"], "read x; seq 1 200000; echo all; sleep 600");
    let attach = |stdin: Stdio| {
        let mut command = containers.command(&["container", "attach", &id]);
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let mut idle = attach(Stdio::null());
    let mut starter = attach(Stdio::piped());
    starter.stdin.take().unwrap().write_all(b"go\n").unwrap();
    // Neither of them reads what it gets, and all of it comes into the log.
    containers.until_logged(&id, "\nall\n");
    let log = containers.container(&["logs", &id]).ok().stdout;
    let expected: String = (1..=200_000).map(|number| format!("{number}\n")).collect();
    assert!(log == expected + "all\n", "{} bytes", log.len());
    containers.container(&["kill", &id]).ok();
    for child in [&mut idle, &mut starter] {
        let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let errors = std::thread::spawn(move || {
            let mut text = String::new();
            err.read_to_string(&mut text).map(|_| text)
        });
        let mut text = String::new();
        out.read_to_string(&mut text).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(137));
        let errors = errors.join().unwrap().unwrap();
        assert!(text.len() < expected_len() && errors.contains("are left out here"), "{} bytes, {errors}", text.len());
    }
    containers.container(&["rm", &id]).ok();
    containers.assert_nothing_left();
}

fn expected_len() -> usize {
    (1..=200_000).map(|number: u32| number.to_string().len() + 1).sum()
}

#[test]
fn several_who_are_attached_see_the_same() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background("a", &["-i"], "while read line; do echo $line; done");
    let attach = || {
        let mut command = containers.command(&["container", "attach", &id]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
    };
    let (mut one, mut other) = (attach(), attach());
    let (mut one_in, mut other_in) = (one.stdin.take().unwrap(), other.stdin.take().unwrap());
    let (mut one_out, mut other_out) = (one.stdout.take().unwrap(), other.stdout.take().unwrap());
    // Each has been heard once both see its line, so both are attached then.
    let read = |text: &str, out: &mut dyn Read| {
        let mut buffer = vec![0; text.len()];
        out.read_exact(&mut buffer).unwrap();
        assert_eq!(String::from_utf8_lossy(&buffer), text);
    };
    std::thread::sleep(std::time::Duration::from_millis(500));
    one_in.write_all(b"from one\n").unwrap();
    read("from one\n", &mut one_out);
    read("from one\n", &mut other_out);
    other_in.write_all(b"from other\n").unwrap();
    read("from other\n", &mut one_out);
    read("from other\n", &mut other_out);
    // An end of theirs is not the container's.
    drop(one_in);
    other_in.write_all(b"again\n").unwrap();
    read("again\n", &mut one_out);
    containers.container(&["kill", &id]).ok();
    assert_eq!((one.wait().unwrap().code(), other.wait().unwrap().code()), (Some(137), Some(137)));
    containers.container(&["rm", &id]).ok();
}

#[test]
fn a_program_can_be_executed_on_a_terminal_and_without() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background("a", &["-e", "X=1"], "sleep 600");
    let exec = |args: &[&str]| containers.container(&[&["exec"], args].concat());
    assert_eq!(exec(&[&id, "sh", "-c", "echo $X$Y; exit 3"]).stdout, "1\n");
    assert_eq!(exec(&[&id, "sh", "-c", "exit 3"]).code, 3);
    assert_eq!(exec(&["-e", "Y=2", "-w", "/tmp", &id, "sh", "-c", "echo $X$Y; pwd"]).ok().stdout, "12\n/tmp\n");
    assert_eq!(
        exec(&["-u", "user", &id, "sh", "-c", "id -u; grep CapEff /proc/self/status"]).ok().stdout,
        "1000\nCapEff:\t0000000000000000\n"
    );
    assert_eq!(exec(&["--id", &id, "-c", "echo", "-a", "a b"]).ok().stdout, "a b\n");
    exec(&[&id, "nope"]).fails(127, &["nope"]);
    exec(&[&id, "/etc/passwd"]).fails(126, &["permission denied"]);
    exec(&["-u", "nobody", &id, "true"]).fails(1, &["no such user"]);
    let input =
        runx_tests::command::run_with(&mut containers.command(&["container", "exec", "-i", &id, "cat"]), "typed").ok();
    assert_eq!(input.stdout, "typed");
    exec(&["-it", &id, "sh"]).fails(1, &["leave -t out"]);
    exec(&["-d", &id, "sh", "-c", "echo x > /tmp/detached"]).ok();
    eventually("it has run", || containers.rootfs().join("tmp/detached").exists());
    let mut terminal = Terminal::start(containers.command(&["container", "exec", "-it", &id, "sh"]), 33, 88);
    let before = terminal.initial_attributes();
    terminal.expect("# ");
    terminal.write("stty size; echo $TERM\n");
    terminal.expect("33 88\r\nxterm\r\n");
    terminal.write("exit 8\n");
    assert_eq!(terminal.wait().0, 8);
    assert_eq!(terminal.attributes(), before);
    containers.container(&["rm", "-f", &id]).ok();
    exec(&[&id, "true"]).fails(1, &["no such container", "runx container ls --all"]);
    containers.assert_nothing_left();
}

#[test]
fn a_terminal_asked_for_without_one_is_refused() {
    needs_root!();
    let containers = Containers::new();
    containers.run(&["-it", "--rm"], &["sh"]).fails(125, &["leave -t out"]);
    // Only its output may be a terminal's.
    assert_eq!(containers.run(&["-t", "--rm"], &["tty"]).ok().stdout, "/dev/pts/0\r\n");
    containers.assert_nothing_left();
}

#[test]
fn what_a_container_says_at_its_start_is_seen_by_who_starts_it_attached() {
    needs_root!();
    let containers = Containers::new();
    let (id, rootfs) = (containers.id("a"), containers.rootfs());
    let create =
        ["create", "-i", "--network", "none", "--id", &id, "--rootfs", rootfs.to_str().unwrap(), "--", "sh", "-c"];
    containers.container(&[&create[..], &["echo first; cat; exit 2"]].concat()).ok();
    assert_eq!(containers.status(&id), "created");
    for _ in 0..2 {
        let mut start = containers.command(&["container", "start", "-ai", &id]);
        let done = runx_tests::command::run_with(&mut start, "typed\n");
        assert_eq!((done.code, done.stdout.as_str()), (2, "first\ntyped\n"), "{}", done.stderr);
    }
    assert_eq!(run(&mut containers.command(&["container", "logs", &id])).ok().stdout, "first\ntyped\n".repeat(2));
    containers.container(&["rm", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn a_program_that_is_executed_gets_none_of_our_own_streams() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background("a", &[], "echo on; while :; do sleep 0.1; done");
    containers.until_logged(&id, "on");
    // A file of ours stays ours, and what is in it is not the program's to read.
    let path = containers.scratch().join("report");
    std::fs::write(&path, "secret\n").unwrap();
    let file = std::fs::OpenOptions::new().append(true).read(true).open(&path).unwrap();
    // A file could be opened again by this name, to be read from its beginning; there is nothing to be read in a pipe.
    let script = "exec 3>&1; { timeout 1 head -c 6 /proc/self/fd/3 >&3; } 2>/dev/null; id -u";
    let mut command = containers.command(&["container", "exec", "-u", "1000", &id, "sh", "-c", script]);
    assert!(command.stdout(file.try_clone().unwrap()).stderr(file).status().unwrap().success());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "secret\n1000\n");
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(&path).unwrap()), 0);
    // All of the input and output passes, both at once.
    assert_comes_back(containers.command(&["container", "exec", "-i", &id, "cat"]));
    // A program that takes nothing does not hold it up, nor does a process that is left behind.
    let mut command =
        containers.command(&["container", "exec", "-i", &id, "sh", "-c", "sleep 100 & echo done; exit 4"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || {
        let _ = stdin.write_all(&[b'x'; 1 << 20]);
    });
    assert_eq!(child.wait().unwrap().code(), Some(4));
    writer.join().unwrap();
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "done\n");
    // Nor does a reader of ours who does not read keep signals out.
    let mut command = containers.command(&["container", "exec", &id, "seq", "1", "1000000"]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let ended = || {
        // SAFETY: kill takes numbers; the process is this test's, and has not been waited for.
        unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
        child.try_wait().unwrap().is_some()
    };
    eventually("it has ended", ended);
    containers.container(&["rm", "-f", &id]).ok();
    containers.assert_nothing_left();
}
