//! `runx wasm`: modules and components without a container.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use runx_tests::command::{Done, eventually, run, run_with};
use runx_tests::dist;
use runx_tests::wasm::{Forget, TEAPOT, component, show_everything};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A directory with a root and a cache of its own. What runs from it ends with it.
struct Place(TempDir, Mutex<Vec<Forget>>);

impl Place {
    fn new() -> Self {
        Self(TempDir::with_prefix("runx-wasm-test-").expect("make a directory"), Mutex::default())
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.0.path().join(name);
        fs::write(&path, content.as_ref()).expect("write a file");
        self.1.lock().expect("no panic").push(Forget(content.as_ref().to_vec()));
        path.to_string_lossy().into_owned()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(dist().join("runx"));
        command.arg("--root").arg(self.path("root")).arg("wasm").args(args).env("RUNX_TEST", "of the caller");
        command
    }

    #[track_caller]
    fn wasm(&self, args: &[&str]) -> Done {
        run(&mut self.command(args))
    }

    fn state(&self, id: &str) -> Value {
        serde_json::from_str(&self.wasm(&["state", id]).ok().stdout).expect("state is JSON")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for id in self.wasm(&["ps", "--quiet"]).stdout.lines() {
            self.wasm(&["rm", "--force", id]);
        }
    }
}

/// What a program that shows everything prints, with its NULs as bars.
fn shown(done: &Done) -> String {
    done.stdout.replace('\0', "|")
}

#[test]
fn a_module_and_its_component_get_what_they_are_given_and_nothing_else() {
    let place = Place::new();
    let text = show_everything(&place.0.path().to_string_lossy());
    fs::create_dir_all(place.path("data/etc")).expect("make a directory");
    fs::write(place.path("data/etc/marker"), "seen\n").expect("write a file");
    let directory = format!("{}::/", place.path("data").display());
    for file in [place.file("show.wat", &text), place.file("show.wasm", component(&text))] {
        let args = ["run", "--dir", &directory, "--env", "A=b", "--env", "RUNX_TEST", &file, "one", "--two"];
        let done = run_with(&mut place.command(&args), "from stdin");
        let name = file.rsplit('/').next().expect("it has a name");
        let wanted = format!("{name}|one|--two|\nA=b|RUNX_TEST=of the caller|\nseen\nfrom stdin");
        assert_eq!(shown(&done), wanted, "{}", done.stderr);
        // A component says only whether it failed.
        assert_eq!(done.code, if file.ends_with(".wat") { 3 } else { 1 }, "{}", done.stderr);
        let without = place.wasm(&["run", &file]);
        assert!(!shown(&without).contains("of the caller") && !shown(&without).contains("seen"));
    }
}

const WRITES: &str = r#"(module
  (import "wasi_snapshot_preview1" "path_open"
    (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (data (i32.const 64) "new")
  (func (export "_start")
    (call $exit (call $open (i32.const 3) (i32.const 0) (i32.const 64) (i32.const 3) (i32.const 1)
      (i64.const 64) (i64.const 0) (i32.const 0) (i32.const 0)))))"#;

#[test]
fn a_directory_may_be_read_only() {
    let place = Place::new();
    let file = place.file("writes.wat", WRITES);
    fs::create_dir(place.path("data")).expect("make a directory");
    let directory = format!("{}::/data", place.path("data").display());
    // The errno of preview 1: 69 is EROFS, 63 EPERM.
    let refused = place.wasm(&["run", "--dir", &format!("{directory}:ro"), &file]);
    assert!([63, 69].contains(&refused.code), "{refused:?}");
    assert!(!place.path("data/new").exists());
    place.wasm(&["run", "--dir", &directory, &file]).ok();
    assert!(place.path("data/new").exists());
    place.wasm(&["run", "--dir", "/nowhere::/x", &file]).fails(126, &["open the directory /nowhere"]);
}

const SPIN: &str = "(module (func (export \"_start\") (loop $l (br $l))))";

#[test]
fn fuel_and_time_end_what_does_not_end_by_itself() {
    let place = Place::new();
    let file = place.file("spin.wat", SPIN);
    place.wasm(&["run", "--fuel", "100000", &file]).fails(134, &["spin.wat: ", "all fuel consumed"]);
    place.wasm(&["run", "--timeout", "200ms", &file]).fails(124, &["spin.wat: its time of 200 ms is over"]);
    let short = place.file("short.wat", "(module (func (export \"_start\")))");
    place.wasm(&["run", "--fuel", "100000", "--timeout", "60s", &short]).ok();
}

#[test]
fn memory_beyond_the_limit_is_refused() {
    let place = Place::new();
    let grows = r#"(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32))) (memory 1)
        (func (export "_start") (call $exit (i32.eq (memory.grow (i32.const 255)) (i32.const -1)))))"#;
    let file = place.file("grows.wat", grows);
    place.wasm(&["run", &file]).ok();
    assert_eq!(place.wasm(&["run", "--memory", "1m", &file]).code, 1);
    let large = place.file("large.wat", "(module (memory 100) (func (export \"_start\")))");
    place.wasm(&["run", "--memory", "1m", &large]).fails(126, &["large.wat", "memory minimum size"]);
}

#[test]
fn functions_are_called_by_name() {
    let place = Place::new();
    let text = r#"(module (func (export "add") (param i32 i64) (result i64)
        (i64.add (i64.extend_i32_s (local.get 0)) (local.get 1))))"#;
    let file = place.file("add.wat", text);
    assert_eq!(place.wasm(&["run", "--invoke", "add(-2, 44)", &file]).ok().stdout, "42\n");
    place.wasm(&["run", "--invoke", "add(1)", &file]).fails(126, &["takes 2 argument(s), not 1"]);
    place.wasm(&["run", "--invoke", "sub", &file]).fails(126, &["exports no function \"sub\""]);
    place.wasm(&["run", "--invoke", "add(x, 1)", &file]).fails(126, &["\"x\" is no i32"]);
    let text = r#"(component
        (core module $m (func (export "f") (param i32) (result i32) (i32.mul (local.get 0) (i32.const 2))))
        (core instance $i (instantiate $m))
        (func (export "twice") (param "n" u32) (result u32) (canon lift (core func $i "f"))))"#;
    let file = place.file("twice.wat", text);
    assert_eq!(place.wasm(&["run", "--invoke", "twice(21)", &file]).ok().stdout, "42\n");
    place.wasm(&["run", "--invoke", "twice(true)", &file]).fails(126, &["twice(true)"]);
    place.wasm(&["run", "--invoke", "half(2)", &file]).fails(126, &["exports no function \"half\""]);
}

#[test]
fn what_is_wrong_is_named_and_nothing_is_left() {
    let place = Place::new();
    let trap = "(module (func $deep unreachable) (func $outer call $deep) (func (export \"_start\") call $outer))";
    let truncated = component(&show_everything("x"));
    for (name, content, code, words) in [
        ("none", &b"#!/bin/sh\n"[..], 126, &["none: not a WebAssembly module"][..]),
        ("empty.wasm", b"", 126, &["empty.wasm", "empty"]),
        ("cut.wasm", &truncated[..1000], 126, &["cut.wasm: invalid component"]),
        ("newer.wasm", b"\0asm\x02\0\0\0", 126, &["newer.wasm: invalid module", "version"]),
        ("imports.wat", b"(module (import \"env\" \"f\" (func)) (func (export \"_start\")))", 126, &["env::f"]),
        ("library.wat", b"(module (func (export \"f\")))", 126, &["not a WASI command", "_start"]),
        ("part.wat", b"(component)", 126, &["part.wat: not a command", "wasi:cli/run"]),
        ("trap.wat", trap.as_bytes(), 134, &["trap.wat: wasm trap", "unreachable", "deep", "outer"]),
    ] {
        let file = place.file(name, content);
        place.wasm(&["run", &file]).fails(code, words);
    }
    place.wasm(&["run", "/no/such.wasm"]).fails(126, &["open /no/such.wasm"]);
    place.wasm(&["serve", &place.file("m.wat", SPIN)]).fails(126, &["this is a core module"]);
    place.wasm(&["run", "--fuel", "x", "f"]).fails(1, &["--fuel"]);
    place.wasm(&["run", "--network", "some", "f"]).fails(1, &["--network"]);
    assert_eq!(place.wasm(&["ps", "--quiet"]).ok().stdout, "");
}

#[test]
fn what_a_file_needs_and_offers_is_told() {
    let place = Place::new();
    let inspect = |file: &str| -> Value {
        serde_json::from_str(&place.wasm(&["inspect", file]).ok().stdout).expect("inspect prints JSON")
    };
    let module = inspect(&place.file("m.wat", WRITES));
    assert_eq!((&module["kind"], &module["world"]), (&json!("module"), &json!("wasi_snapshot_preview1 command")));
    assert_eq!(module["imports"][1], json!({"name": "wasi_snapshot_preview1 proc_exit", "type": "func(i32)"}));
    let command = inspect(&place.file("c.wasm", component(&show_everything("c"))));
    assert_eq!((&command["kind"], &command["world"]), (&json!("component"), &json!("wasi:cli/command 0.2")));
    assert_eq!(inspect(&place.file("t.wat", TEAPOT))["world"], "wasi:http/proxy 0.2");
}

#[test]
fn a_detached_module_is_found_killed_and_removed_by_its_own_id() {
    let place = Place::new();
    let file = place.file("spin.wat", SPIN);
    let id = place.wasm(&["run", "--detach", "--name", "spinner", &file, "word"]).ok().stdout;
    assert_eq!(id, "spinner\n");
    place.wasm(&["run", "--detach", "--name", "spinner", &file]).fails(1, &["there is a module \"spinner\" already"]);
    let state = place.state("spinner");
    assert_eq!((&state["status"], &state["command"]), (&json!("running"), &json!([file, "word"])));
    let pid = state["pid"].as_i64().expect("it has a pid");
    assert!(fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with("runx-wasm-host")));
    place.wasm(&["rm", "spinner"]).fails(1, &["is running"]);
    place.wasm(&["kill", "-s", "TERM", "spinner"]).ok();
    eventually("it ends", || place.state("spinner")["exitCode"] == 128 + 15);
    place.wasm(&["kill", "spinner"]).fails(1, &["is not running"]);
    place.wasm(&["rm", "spinner"]).ok();
    place.wasm(&["state", "spinner"]).fails(1, &["there is no module"]);
    let says = show_everything(&place.0.path().to_string_lossy());
    let id = place.wasm(&["run", "-d", &place.file("says.wat", says)]).ok().stdout;
    let id = id.trim();
    eventually("it ends", || place.state(id)["status"] == "stopped" && !place.state(id)["exitCode"].is_null());
    assert_eq!(place.state(id)["exitCode"], 1);
    assert!(place.wasm(&["logs", id]).ok().stdout.contains("says.wat"));
    let listed: Value = serde_json::from_str(&place.wasm(&["ps", "--format", "json"]).ok().stdout).expect("JSON");
    assert_eq!(listed.as_array().map(Vec::len), Some(1));
}

#[test]
fn a_recycled_pid_is_never_taken_for_a_module() {
    let place = Place::new();
    let id = "old";
    let directory = place.path("root").join(".wasm").join(id);
    fs::create_dir_all(&directory).expect("make a directory");
    let mut other = Command::new("sleep").arg("1000").spawn().expect("run sleep");
    let state = json!({"id": id, "pid": other.id(), "startTime": 1, "command": ["x.wasm"],
                       "created": "2026-01-01T00:00:00Z"});
    fs::write(directory.join("state.json"), state.to_string()).expect("write the state");
    let told = (place.state(id), place.wasm(&["kill", id, "KILL"]), place.wasm(&["rm", "--force", id]));
    let alive = other.try_wait().expect("ask for its end").is_none();
    other.kill().and_then(|()| other.wait()).expect("end it");
    assert_eq!((&told.0["status"], &told.0["pid"]), (&json!("stopped"), &json!(0)));
    told.1.fails(1, &["is not running"]);
    told.2.ok();
    assert!(alive, "another process was killed");
}

#[test]
fn what_was_compiled_is_listed_checked_and_pruned() {
    let place = Place::new();
    let mine = |args: &[&str]| {
        let mut command = place.command(args);
        run(command.env("XDG_CACHE_HOME", place.path("cache")))
    };
    let text = format!("(module (func (export \"_start\")) (data \"{}\"))", place.0.path().display());
    let file = place.file("m.wat", &text);
    let entries = || -> Vec<Value> {
        let all: Vec<Value> =
            serde_json::from_str(&mine(&["cache", "ls", "--format", "json"]).ok().stdout).expect("JSON");
        let digest = sha256(&text);
        all.into_iter().filter(|entry| entry["module"] == digest.as_str()).collect()
    };
    let counted =
        || -> Value { serde_json::from_str(&mine(&["cache", "stats", "--format", "json"]).ok().stdout).expect("JSON") };
    let before = counted();
    // Two at once compile once: the second one waits, and finds what the first one made.
    let both = std::thread::scope(|scope| {
        let one = scope.spawn(|| mine(&["run", "--debug", &file]));
        let two = scope.spawn(|| mine(&["run", "--debug", &file]));
        [one.join().expect("no panic").ok().stderr, two.join().expect("no panic").ok().stderr]
    });
    let compiled = both.iter().filter(|log| log.contains("compiling module")).count();
    assert_eq!(compiled, 1, "{both:?}");
    let entry = entries().pop().expect("it is listed");
    let path = PathBuf::from(entry["path"].as_str().expect("it has a path"));
    // Somebody changes it: it is not run, but made again.
    let mut changed = fs::read(&path).expect("read the artifact");
    let last = changed.len() - 1;
    changed[last] ^= 1;
    fs::write(&path, &changed).expect("change the artifact");
    let again = mine(&["run", &file]).ok();
    assert!(again.stderr.contains("is not what was compiled"), "{}", again.stderr);
    assert_ne!(fs::read(&path).expect("read the artifact"), changed);
    mine(&["run", "--fuel", "1000", &file]).ok();
    assert_eq!(entries().len(), 2);
    // Others may use the same cache meanwhile.
    let after = counted();
    for (name, least) in [("hits", 1), ("compiles", 3), ("rejected", 1)] {
        let number = |counted: &Value| counted[name].as_u64().expect("a number");
        assert!(number(&after) >= number(&before) + least, "{name}: {before} {after}");
    }
    let text = mine(&["cache", "stats", "--format", "prometheus"]).ok().stdout;
    assert!(text.contains("# TYPE runx_wasm_compiles_total counter\nrunx_wasm_compiles_total "), "{text}");
    assert!(mine(&["cache", "stats"]).ok().stdout.starts_with("COMPILED"));
    assert!(mine(&["cache", "ls"]).ok().stdout.starts_with("MODULE"));
    mine(&["cache", "prune", "--max-size", "1t"]).ok();
    assert_eq!(entries().len(), 2);
    if !nix::unistd::geteuid().is_root() {
        // Root's is everybody's.
        mine(&["cache", "prune"]).ok();
        assert_eq!(entries().len(), 0);
    }
    mine(&["cache", "empty"]).fails(1, &["none of ls, prune and stats"]);
}

fn sha256(text: &str) -> String {
    use sha2::Digest;
    format!("{:x}", sha2::Sha256::digest(text.as_bytes()))
}

/// A server, ended with this.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start(place: &Place, file: &str, flags: &[&str]) -> Self {
        let args = [&["serve", "--addr", "127.0.0.1:0"], flags, &[file]].concat();
        let mut process = place.command(&args).stderr(Stdio::piped()).spawn().expect("run the server");
        let mut line = String::new();
        let stderr = process.stderr.take().expect("it has a stderr");
        BufReader::new(stderr).read_line(&mut line).expect("read its first line");
        let address = line.trim().strip_prefix("Serving HTTP on http://").and_then(|rest| rest.strip_suffix('/'));
        let address = address.unwrap_or_else(|| panic!("it said {line:?}")).to_owned();
        Self { process, address }
    }

    fn get(&self) -> String {
        let mut stream = TcpStream::connect(&self.address).expect("connect");
        write!(stream, "GET /x HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").expect("ask");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("read the answer");
        answer
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn requests_are_answered_until_the_server_is_told_to_stop() {
    let place = Place::new();
    let file = place.file("teapot.wat", TEAPOT);
    for signal in [nix::sys::signal::Signal::SIGINT, nix::sys::signal::Signal::SIGTERM] {
        let mut server = Server::start(&place, &file, &[]);
        for _ in 0..100 {
            let answer = server.get();
            assert!(answer.starts_with("HTTP/1.1 418 "), "{answer}");
        }
        let pid = nix::unistd::Pid::from_raw(server.process.id() as i32);
        nix::sys::signal::kill(pid, signal).expect("send the signal");
        assert!(server.process.wait().expect("wait for it").success());
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("take a port");
    let address = taken.local_addr().expect("it has an address").to_string();
    place.wasm(&["serve", "--addr", &address, &file]).fails(126, &["listen on", &address]);
}

#[test]
fn a_component_that_fails_costs_its_request_only() {
    let place = Place::new();
    // The same, with a trap instead of an answer for a request that finds no memory left.
    let broken = TEAPOT.replace("(call $drop (local.get $request))", "unreachable");
    assert_ne!(broken, TEAPOT);
    let server = Server::start(&place, &place.file("broken.wat", broken), &[]);
    for _ in 0..20 {
        assert!(server.get().starts_with("HTTP/1.1 500 "), "{}", server.get());
    }
}

#[test]
fn what_runs_modules_holds_no_compiler() {
    for program in ["runx-wasm-host", "runx-wasm-runner"] {
        let bytes = fs::read(dist().join(program)).expect("read the program");
        let found = ["cranelift_codegen", "cranelift-codegen"]
            .iter()
            .any(|trace| bytes.windows(trace.len()).any(|window| window == trace.as_bytes()));
        assert!(!found, "{program} has a compiler");
    }
}

#[test]
fn an_interpreter_runs_the_same_without_executable_memory_of_its_own() {
    let place = Place::new();
    let text = show_everything(&place.0.path().to_string_lossy());
    for file in [place.file("show.wat", &text), place.file("show.wasm", component(&text))] {
        let native = run_with(&mut place.command(&["run", &file, "one"]), "from stdin");
        let interpreted = run_with(&mut place.command(&["run", "--engine", "pulley", &file, "one"]), "from stdin");
        assert_eq!((native.code, native.stdout), (interpreted.code, interpreted.stdout), "{}", interpreted.stderr);
    }
    let spin = place.file("spin.wat", SPIN);
    for (engine, foreign) in [("cranelift", true), ("pulley", false)] {
        place.wasm(&["run", "-d", "--name", engine, "--engine", engine, &spin]).ok();
        let executable = || {
            let maps = fs::read_to_string(format!("/proc/{}/maps", place.state(engine)["pid"])).unwrap_or_default();
            let own = |line: &&str| line.contains("runx-wasm-host") || line.ends_with(']');
            maps.lines().filter(|line| line.contains("r-xp") && !own(line)).count()
        };
        eventually("it runs", || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", place.state(engine)["pid"])).unwrap_or_default();
            // It has used processor time, in ticks, and so is past what it begins with.
            stat.split(' ').nth(13).and_then(|ticks| ticks.parse::<u64>().ok()).is_some_and(|ticks| ticks > 20)
        });
        assert_eq!(executable() > 0, foreign, "{engine}");
        place.wasm(&["rm", "--force", engine]).ok();
    }
    place.wasm(&["run", "--engine", "v8", &spin]).fails(1, &["--engine"]);
}

#[test]
fn a_server_tells_what_it_has_done() {
    let place = Place::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr()).expect("find a port");
    let metrics = port.to_string();
    let server = Server::start(&place, &place.file("teapot.wat", TEAPOT), &["--metrics", &metrics]);
    for _ in 0..7 {
        server.get();
    }
    let told = Server { process: Command::new("true").spawn().expect("run true"), address: metrics }.get();
    for line in [
        "HTTP/1.1 200 OK",
        "runx_wasm_requests_total{code=\"4xx\"} 7",
        "runx_wasm_request_duration_seconds_count 7",
        "runx_wasm_instance_failures_total 0",
    ] {
        assert!(told.lines().any(|have| have == line), "{line} is not in {told}");
    }
}

#[test]
fn one_request_that_never_ends_does_not_keep_others_or_the_end_away() {
    let place = Place::new();
    // It does not answer requests with a body, and computes for ever.
    let loops = TEAPOT.replace("(call $drop (local.get $request))", "(loop $l (br $l))");
    let mut server = Server::start(&place, &place.file("loops.wat", loops), &["--timeout", "300ms"]);
    let busy = std::thread::available_parallelism().map_or(2, usize::from) + 2;
    std::thread::scope(|scope| {
        for _ in 0..busy {
            scope.spawn(|| assert!(server.get().starts_with("HTTP/1.1 500 ")));
        }
    });
    // Clients that keep their connections and say nothing more do not delay the end.
    let _silent = TcpStream::connect(&server.address).expect("connect");
    let mut kept = TcpStream::connect(&server.address).expect("connect");
    write!(kept, "GET / HTTP/1.1\r\nHost: test\r\n\r\n").expect("ask");
    kept.read_exact(&mut [0; 12]).expect("read the answer");
    let pid = nix::unistd::Pid::from_raw(server.process.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("send the signal");
    // They hear of the end while the server is still there to be waited for.
    let mut rest = Vec::new();
    kept.read_to_end(&mut rest).expect("read to the end");
    assert!(server.process.wait().expect("wait for it").success());
}

#[test]
fn variables_are_not_seen_on_the_command_line() {
    let place = Place::new();
    let spin = place.file("spin.wat", SPIN);
    let mut command = place.command(&["run", "-d", "--name", "s", "--env", "TOKEN", "--env", "OTHER=s3cr3t", &spin]);
    run(command.env("TOKEN", "s3cr3t")).ok();
    let words = fs::read(format!("/proc/{}/cmdline", place.state("s")["pid"])).expect("read the command line");
    assert!(!String::from_utf8_lossy(&words).contains("s3cr3t"));
}

#[test]
fn an_ordinary_user_compiles_by_himself() {
    runx_tests::needs_user!(obstacle);
    let bundle = runx_tests::user::OwnBundle::script("");
    bundle.add_file("m.wat", &show_everything(bundle.id()));
    let file = bundle.rootfs().join("m.wat");
    let done = run(&mut bundle.command(&["wasm", "run", &file.to_string_lossy(), "one"]));
    assert_eq!((done.code, shown(&done).starts_with("m.wat|one|")), (2, true), "{}", done.stderr);
}
