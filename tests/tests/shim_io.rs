//! Standard streams through the shim: FIFOs, files, loggers and terminals, and clients that misbehave.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use runx_tests::command::{eventually, run};
use runx_tests::needs_root;
use runx_tests::shim::{Host, Make, Shim, refused};
use serde_json::{Value, json};

/// Both ends, so that opening waits for nobody.
fn open(fifo: &Path) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(fifo).unwrap()
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Reads what is there; a FIFO that somebody holds open has no end.
fn read_until(file: &mut File, end: &str) -> String {
    let mut bytes = Vec::new();
    eventually("output comes", || {
        let _ = file.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).contains(end)
    });
    String::from_utf8_lossy(&bytes).into_owned()
}

struct Streams<'a> {
    stdin: &'a str,
    stdout: &'a str,
    stderr: &'a str,
}

fn start(host: &Host, id: &str, script: &str, streams: &Streams<'_>, terminal: bool) -> Shim {
    host.make_bundle(id, &["/bin/sh", "-c", script], |config| config["process"]["terminal"] = json!(terminal));
    let shim = host.shim(id);
    let mut request = host.create_request(id);
    request.terminal = terminal;
    request.stdin = streams.stdin.into();
    request.stdout = streams.stdout.into();
    request.stderr = streams.stderr.into();
    shim.create(&request).unwrap();
    shim.start(id, "").unwrap();
    shim
}

fn end(shim: &Shim, id: &str) -> u32 {
    let status = shim.wait(id, "").unwrap().exit_status;
    shim.delete(id, "").unwrap();
    let _ = shim.shutdown(id);
    status
}

fn kill_and_end(shim: &Shim, id: &str) {
    shim.kill(id, "", libc::SIGKILL, false).unwrap();
    assert_eq!(end(shim, id), 137);
}

fn sh(script: &str) -> Value {
    json!({"user": {"uid": 0, "gid": 0}, "args": ["sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"]})
}

#[test]
fn streams_are_fifos_and_input_ends_when_it_is_closed() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let (stdin, stdout, stderr) = (host.fifo("in"), host.fifo("out"), host.fifo("err"));
    let (mut out, mut err) = (open(&stdout), open(&stderr));
    let mut input = open(&stdin);
    let streams = Streams { stdin: &text(&stdin), stdout: &text(&stdout), stderr: &text(&stderr) };
    let shim = start(&host, "a", "cat; echo end; echo problem >&2; exit 4", &streams, false);
    input.write_all(b"some input\n").unwrap();
    assert_eq!(read_until(&mut out, "\n"), "some input\n");
    // A client's end goes, and another one comes: the process does not notice.
    drop(input);
    let mut input = open(&stdin);
    input.write_all(b"more input\n").unwrap();
    assert_eq!(read_until(&mut out, "\n"), "more input\n");
    shim.close_stdin("a", "").unwrap();
    shim.close_stdin("a", "").unwrap();
    // Only now that all ends are closed.
    drop(input);
    assert_eq!(read_until(&mut out, "end"), "end\n");
    assert_eq!(read_until(&mut err, "problem"), "problem\n");
    assert_eq!(end(&shim, "a"), 4);
    host.assert_nothing_left();
}

#[test]
fn output_outlives_its_readers() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let stdout = host.fifo("out");
    let mut out = open(&stdout);
    let script = "echo one; until test -e /tmp/go; do sleep 0.02; done; echo two; exit 5";
    let streams = Streams { stdin: "", stdout: &text(&stdout), stderr: "" };
    let shim = start(&host, "a", script, &streams, false);
    assert_eq!(read_until(&mut out, "one"), "one\n");
    // As while containerd restarts.
    drop(out);
    let pid = shim.state("a", "").unwrap().pid;
    fs::write(format!("/proc/{pid}/root/tmp/go"), "").unwrap();
    assert_eq!(shim.wait("a", "").unwrap().exit_status, 5, "nobody dies of a reader that went");
    let mut out = open(&stdout);
    assert_eq!(read_until(&mut out, "two"), "two\n");
    end(&shim, "a");
    host.assert_nothing_left();
}

#[test]
fn a_client_that_never_reads_stops_its_own_process_and_nothing_else() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let (stdout, other) = (host.fifo("out"), host.fifo("other"));
    let (_never_read, mut out) = (open(&stdout), open(&other));
    let streams = Streams { stdin: "", stdout: &text(&stdout), stderr: "" };
    let shim = start(&host, "a", "yes", &streams, false);
    let daemon = shim.connect_task("a").unwrap().shim_pid;
    let used = |pid: u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap().to_owned();
        line.split_ascii_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let time = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_ascii_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let before = used(daemon);
    for n in 0..20 {
        let exec = format!("e{n}");
        shim.exec("a", &exec, &sh("echo answer"), |request| request.stdout = text(&other)).unwrap();
        shim.start("a", &exec).unwrap();
        assert_eq!(read_until(&mut out, "answer"), "answer\n");
        shim.wait("a", &exec).unwrap();
        shim.delete("a", &exec).unwrap();
    }
    // Nothing is collected in the shim, and it does not spin.
    assert!(used(daemon) < before + 1024, "{} KiB after {before}", used(daemon));
    let spent = time(daemon);
    thread::sleep(Duration::from_millis(500));
    assert!(time(daemon) - spent < 10, "the shim is busy");
    kill_and_end(&shim, "a");
    host.assert_nothing_left();
}

/// Reads a FIFO from some moment on, as containerd does. Its opening ends when there is a writer.
fn read_later(fifo: &Path) -> Receiver<String> {
    let (fifo, (sender, text)) = (fifo.to_owned(), channel());
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        let _ = sender.send(fs::read_to_string(fifo).unwrap());
    });
    text
}

#[test]
fn readers_that_come_late_find_all_output_and_its_end() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let (stdout, stderr) = (host.fifo("out"), host.fifo("err"));
    let heard = |text: Receiver<String>| text.recv_timeout(Duration::from_secs(60)).expect("the end of the output");
    for (a, b, script, printed) in [("a", "b", "true", ""), ("c", "d", "echo printed", "printed\n")] {
        let texts = [read_later(&stdout), read_later(&stderr)];
        let streams = Streams { stdin: "", stdout: &text(&stdout), stderr: &text(&stderr) };
        let shim = start(&host, a, script, &streams, false);
        assert_eq!(shim.wait(a, "").unwrap().exit_status, 0);
        assert_eq!(texts.map(heard), [printed, ""]);
        end(&shim, a);
        let shim = start(&host, b, "sleep 1000", &Streams { stdin: "", stdout: "", stderr: "" }, false);
        let texts = [read_later(&stdout), read_later(&stderr)];
        shim.exec(b, "e", &sh(script), |request| {
            request.stdout = text(&stdout);
            request.stderr = text(&stderr);
        })
        .unwrap();
        shim.start(b, "e").unwrap();
        assert_eq!(shim.wait(b, "e").unwrap().exit_status, 0);
        assert_eq!(texts.map(heard), [printed, ""]);
        shim.delete(b, "e").unwrap();
        kill_and_end(&shim, b);
    }
    host.assert_nothing_left();
}

#[test]
fn output_waits_for_readers_that_do_not_come_for_long() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let stdout = host.fifo("out");
    let shim = start(&host, "a", "echo printed", &Streams { stdin: "", stdout: &text(&stdout), stderr: "" }, false);
    assert_eq!(shim.wait("a", "").unwrap().exit_status, 0);
    assert_eq!(fs::read_to_string(&stdout).unwrap(), "printed\n");
    end(&shim, "a");
    host.assert_nothing_left();
}

#[test]
fn more_output_than_any_buffer_holds_arrives_whole() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let stdout = host.fifo("out");
    let mut out = open(&stdout);
    let streams = Streams { stdin: "", stdout: &text(&stdout), stderr: "" };
    let shim = start(&host, "a", "seq 1 300000", &streams, false);
    let expected: String = (1..=300_000).map(|n| format!("{n}\n")).collect();
    let mut bytes = Vec::new();
    eventually("all of it", || {
        let _ = out.read_to_end(&mut bytes);
        bytes.len() >= expected.len()
    });
    assert!(bytes == expected.as_bytes(), "it was changed");
    end(&shim, "a");
    host.assert_nothing_left();
}

#[test]
fn files_take_both_streams_and_are_appended_to() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let log = host.path().join("logs/deep/log");
    for round in 1..=2 {
        let id = format!("a{round}");
        let uri = format!("file://{}", log.display());
        let streams = Streams { stdin: "", stdout: &uri, stderr: &uri };
        let shim = start(&host, &id, &format!("echo out{round}; echo err{round} >&2"), &streams, false);
        end(&shim, &id);
    }
    let mut lines: Vec<String> = fs::read_to_string(&log).unwrap().lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(lines, ["err1", "err2", "out1", "out2"]);
    host.assert_nothing_left();
}

#[test]
fn a_container_that_writes_without_a_pause_starves_nobody() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let disk = Small::mount(host.path().join("disk"));
    // Whatever is written where there is no room is gone, as fast as it comes.
    let uri = format!("file://{}", disk.0.join("a%20log").display());
    let shim = start(&host, "a", "exec yes", &Streams { stdin: "", stdout: &uri, stderr: "" }, false);
    let other = host.fifo("other");
    let mut out = open(&other);
    for n in 0..5 {
        let exec = format!("e{n}");
        shim.exec("a", &exec, &sh("echo answer"), |request| request.stdout = text(&other)).unwrap();
        shim.start("a", &exec).unwrap();
        assert_eq!(read_until(&mut out, "answer"), "answer\n");
        shim.wait("a", &exec).unwrap();
        shim.delete("a", &exec).unwrap();
    }
    assert!(fs::metadata(disk.0.join("a log")).unwrap().len() > 0, "the name of the file is encoded");
    kill_and_end(&shim, "a");
    drop(disk);
    host.assert_nothing_left();
}

#[test]
fn a_path_that_is_no_fifo_does_not_become_a_file() {
    needs_root!();
    let host = Host::new(Make::Runx);
    host.make_bundle("a", &["/bin/true"], |_| ());
    let shim = host.shim("a");
    let mut request = host.create_request("a");
    let gone = host.file("gone");
    request.stdout = text(&gone);
    let (_, told) = refused(shim.create(&request));
    assert!(told.contains(&text(&gone)), "{told}");
    assert!(!gone.exists());
    host.delete_command("a").ok();
    let _ = shim.shutdown("a");
    host.assert_nothing_left();
}

/// A small filesystem, which is unmounted when this goes.
struct Small(PathBuf);

impl Small {
    fn mount(path: PathBuf) -> Self {
        fs::create_dir(&path).unwrap();
        run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "none"]).arg(&path)).ok();
        Self(path)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[test]
fn a_full_disk_loses_output_and_no_process() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let disk = Small::mount(host.path().join("disk"));
    let log = disk.0.join("log");
    let uri = format!("file://{}", log.display());
    let streams = Streams { stdin: "", stdout: &uri, stderr: &uri };
    let script = "seq 1 100000; until test -e /tmp/go; do echo again; sleep 0.02; done; exit 6";
    let shim = start(&host, "a", script, &streams, false);
    let mut told = String::new();
    eventually("the shim says so", || {
        told.push_str(&host.log("a"));
        told.contains("No space left on device")
    });
    assert_eq!(told.matches("No space left").count(), 1, "once is enough: {told}");
    // Room again.
    eventually("output comes again", || {
        let text = fs::read_to_string(&log).unwrap();
        if !text.ends_with("again\n") {
            File::create(&log).unwrap();
        }
        text.ends_with("again\n")
    });
    let pid = shim.state("a", "").unwrap().pid;
    fs::write(format!("/proc/{pid}/root/tmp/go"), "").unwrap();
    assert_eq!(end(&shim, "a"), 6);
    drop(disk);
    host.assert_nothing_left();
}

#[test]
fn a_logger_gets_the_streams_and_ends_with_them() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let log = host.path().join("logged");
    let program = host.script(
        "logger",
        &format!(
            "#!/bin/sh\nexec >>{} 2>&1\necho \"$CONTAINER_ID in $CONTAINER_NAMESPACE: $# $1 $2 $3\"\nenv | grep -c '^PATH='\n\
             echo x >&5; exec 5>&-\nsed 's/^/out: /' <&3\nsed 's/^/err: /' <&4\necho bye\n",
            log.display()
        ),
    );
    for scheme in ["binary", "binary-v2"] {
        let _ = fs::remove_file(&log);
        let uri = format!("{scheme}://{}?--key=a%20value&flag", program.display());
        let streams = Streams { stdin: "", stdout: &uri, stderr: &uri };
        let shim = start(&host, "a", "echo one; echo two >&2; echo three", &streams, false);
        end(&shim, "a");
        let text = fs::read_to_string(&log).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        // The flag has a value that is empty.
        let first = format!("a in {}: 4 --key a value flag", host.namespace());
        // A shell makes a PATH for itself, but there is none in its environment.
        assert_eq!(lines, [&first, "0", "out: one", "out: three", "err: two", "bye"], "{scheme}");
        eventually("the shim has ended", || host.daemons().is_empty());
        fs::remove_dir_all(host.bundle("a")).unwrap();
    }
    // Of an exec, and on a terminal.
    let _ = fs::remove_file(&log);
    let uri = format!("binary://{}", program.display());
    let shim = start(&host, "t", "echo terminal; tty", &Streams { stdin: "", stdout: &uri, stderr: "" }, true);
    shim.wait("t", "").unwrap();
    end(&shim, "t");
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.contains("out: terminal") && text.contains("out: /dev/pts/0") && text.ends_with("bye\n"), "{text}");
    host.assert_nothing_left();
}

#[test]
fn loggers_that_fail_are_told_of_and_leave_nothing() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let refused_create = |id: &str, uri: &str, words: &[&str]| {
        host.make_bundle(id, &["/bin/true"], |_| ());
        let shim = host.shim(id);
        let mut request = host.create_request(id);
        request.stdout = uri.into();
        let (_, text) = refused(shim.create(&request));
        for word in words {
            assert!(text.contains(word), "{word:?} is not in {text:?}");
        }
        host.delete_command(id).ok();
        let _ = shim.shutdown(id);
        host.assert_nothing_left();
    };
    refused_create("a", "binary:///no/such/logger", &["/no/such/logger", "No such file"]);
    refused_create("b", "binary://relative", &["relative", "absolute"]);
    refused_create("c", "nats://somewhere", &["nats", "binary"]);
    let early = host.script("early", "#!/bin/sh\nexit 3\n");
    refused_create("d", &format!("binary-v2://{}", early.display()), &["early", "ready"]);
    // Without the need to say so, an early end is as good as being ready.
    let uri = format!("binary://{}", early.display());
    let shim = start(&host, "e", "exit 2", &Streams { stdin: "", stdout: &uri, stderr: "" }, false);
    end(&shim, "e");
    host.assert_nothing_left();
}

#[test]
fn a_logger_that_does_not_end_by_itself_is_asked_to() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let log = host.path().join("logged");
    let program = host.script(
        "logger",
        &format!(
            "#!/bin/sh\nexec >{} 2>&1\ntrap 'echo asked; exit' TERM\nexec 5>&-\nwhile :; do sleep 0.1; done\n",
            log.display()
        ),
    );
    let uri = format!("binary://{}", program.display());
    let shim = start(&host, "a", "true", &Streams { stdin: "", stdout: &uri, stderr: "" }, false);
    end(&shim, "a");
    assert_eq!(fs::read_to_string(&log).unwrap(), "asked\n");
    host.assert_nothing_left();
}

#[test]
fn a_terminal_is_copied_and_resized() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let (stdin, stdout) = (host.fifo("in"), host.fifo("out"));
    let (mut input, mut out) = (open(&stdin), open(&stdout));
    let streams = Streams { stdin: &text(&stdin), stdout: &text(&stdout), stderr: "" };
    let shim = start(&host, "a", "read -r line; echo \"<$line>\"; stty size; read -r line", &streams, true);
    shim.resize("a", "", 91, 31).unwrap();
    input.write_all(b"hello\n").unwrap();
    let shown = read_until(&mut out, "31 91");
    assert!(shown.contains("<hello>\r\n"), "{shown:?}");
    // An exec with a terminal of its own.
    let other = host.fifo("other");
    let mut second = open(&other);
    shim.exec("a", "e", &sh("tty; sleep 0.2; stty size"), |request| {
        request.terminal = true;
        request.stdout = text(&other);
    })
    .unwrap();
    shim.start("a", "e").unwrap();
    shim.resize("a", "e", 77, 17).unwrap();
    let shown = read_until(&mut second, "17 77");
    assert!(shown.contains("/dev/pts/"), "{shown:?}");
    shim.wait("a", "e").unwrap();
    shim.delete("a", "e").unwrap();
    input.write_all(b"\n").unwrap();
    assert_eq!(end(&shim, "a"), 0);
    host.assert_nothing_left();
}

#[test]
fn a_grandchild_that_holds_the_output_open_delays_the_delete_and_no_more() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let stdout = host.fifo("out");
    let _out = open(&stdout);
    let shim = start(&host, "a", "sleep 1000", &Streams { stdin: "", stdout: "", stderr: "" }, false);
    // What it leaves behind belongs to the container, not to the exec.
    shim.exec("a", "e", &sh("sleep 1000 & echo gone"), |request| request.stdout = text(&stdout)).unwrap();
    shim.start("a", "e").unwrap();
    assert_eq!(shim.wait("a", "e").unwrap().exit_status, 0);
    shim.delete("a", "e").unwrap();
    assert_eq!(shim.pids("a").unwrap().processes.len(), 2);
    kill_and_end(&shim, "a");
    host.assert_nothing_left();
}

#[test]
fn a_terminal_ends_with_its_process_whoever_still_holds_it() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let stdout = host.fifo("out");
    let mut out = open(&stdout);
    let shim = start(&host, "a", "sleep 1000", &Streams { stdin: "", stdout: "", stderr: "" }, false);
    // A background job that keeps the terminal, and writes to it for ever.
    let job = "trap '' HUP; while :; do echo noise; sleep 0.01; done & echo said";
    shim.exec("a", "e", &sh(job), |request| {
        request.terminal = true;
        request.stdout = text(&stdout);
    })
    .unwrap();
    shim.start("a", "e").unwrap();
    assert_eq!(shim.wait("a", "e").unwrap().exit_status, 0);
    // The test's own limit for a call is shorter than the job.
    shim.delete("a", "e").unwrap();
    assert!(read_until(&mut out, "said").contains("said"));
    assert!(!host.log("a").contains("cut off"), "it was waited for");
    kill_and_end(&shim, "a");
    host.assert_nothing_left();
}

#[test]
fn nobody_inherits_the_shims_limit_on_open_files() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let logged = host.path().join("logged");
    let hooked = host.path().join("hooked");
    let of_logger = format!("#!/bin/sh\nexec 5>&-\nulimit -Sn >{}\ncat <&3 >/dev/null\n", logged.display());
    let logger = host.script("logger", &of_logger);
    let hook = host.script("hook", &format!("#!/bin/sh\nulimit -Sn >{}\n", hooked.display()));
    let inside = host.file("inside");
    host.make_bundle("a", &["/bin/sh", "-c", "ulimit -Sn >/out/inside; exec sleep 1000"], |config| {
        config["hooks"] = json!({"prestart": [{"path": text(&hook)}]});
        config["mounts"].as_array_mut().unwrap().push(json!({
            "destination": "/out", "type": "bind", "source": text(host.path()), "options": ["bind", "rw"]
        }));
    });
    let soft = "ulimit -Sn 333; exec \"$@\"";
    let plain = host.command("a", &["start"]);
    let mut command = Command::new("/bin/sh");
    command.args(["-c", soft, "sh"]).arg(plain.get_program()).args(plain.get_args());
    command.current_dir(host.bundle("a")).envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let (address, version) = runx_tests::shim::read_reply(&run(&mut command).ok().stdout);
    let shim = Shim::connect(&address, version);
    let daemon = shim.connect_task("a").unwrap().shim_pid;
    let limits = fs::read_to_string(format!("/proc/{daemon}/limits")).unwrap();
    let own = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert!(!own.contains(" 333 "), "it has room for many containers: {own}");
    let mut request = host.create_request("a");
    request.stdout = format!("binary://{}", logger.display());
    shim.create(&request).unwrap();
    shim.start("a", "").unwrap();
    for file in [&logged, &hooked, &inside] {
        eventually("it is written", || fs::read_to_string(file).is_ok_and(|text| text.ends_with('\n')));
        assert_eq!(fs::read_to_string(file).unwrap(), "333\n", "{}", file.display());
    }
    kill_and_end(&shim, "a");
    host.assert_nothing_left();
}
