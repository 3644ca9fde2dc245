//! WASM modules as containers: through the command and through containerd.

use std::fs;
use std::os::unix::fs::MetadataExt;

use runx_tests::bundle::Bundle;
use runx_tests::containerd::{Containerd, RUNTIME};
use runx_tests::wasm::{Forget, artifacts, show_everything};
use runx_tests::{needs_containerd, needs_root};
use serde_json::json;

/// A bundle whose program is a module.
fn module_bundle(name: &str, module: &[u8]) -> Bundle {
    let mut bundle = Bundle::new(&[name]);
    fs::write(bundle.rootfs().join(name.trim_start_matches('/')), module).unwrap();
    fs::write(bundle.rootfs().join("etc/marker"), "from the rootfs\n").unwrap();
    bundle.config["process"]["env"] = json!(["PATH=/bin", "MARK=here", "HOME=/root"]);
    bundle
}

#[test]
fn a_module_gets_its_arguments_environment_files_and_streams() {
    needs_root!();
    let mut bundle = module_bundle("/app.wat", b"");
    let module = show_everything(bundle.id());
    let _forget = Forget(module.clone().into());
    fs::write(bundle.rootfs().join("app.wat"), &module).unwrap();
    bundle.config["process"]["args"] = json!(["/app.wat", "one", "two words"]);
    let done = bundle.run_with("from stdin");
    let out = done.stdout.replace('\0', "|");
    assert_eq!(
        out, "/app.wat|one|two words|\nPATH=/bin|MARK=here|HOME=/root|\nfrom the rootfs\nfrom stdin",
        "{}",
        done.stderr
    );
    assert_eq!(done.code, 3);
    bundle.assert_nothing_left();
}

#[test]
fn the_second_start_does_not_compile() {
    needs_root!();
    let bundle = module_bundle("/app.wat", b"");
    let module = show_everything(bundle.id());
    let _forget = Forget(module.clone().into());
    fs::write(bundle.rootfs().join("app.wat"), &module).unwrap();
    assert_eq!(artifacts(module.as_bytes()).len(), 0);
    assert_eq!(bundle.run().code, 1);
    let [artifact] = artifacts(module.as_bytes()).try_into().expect("one artifact");
    let before = fs::metadata(&artifact).unwrap();
    assert_eq!(before.mode() & 0o077, 0, "the cache is for root only");
    assert_eq!(bundle.run().code, 1);
    let after = fs::metadata(&artifact).unwrap();
    assert_eq!((before.ino(), before.mtime_nsec()), (after.ino(), after.mtime_nsec()));
    // What somebody changed is not run, but made again.
    fs::write(&artifact, "broken").unwrap();
    let again = bundle.run();
    assert_eq!(again.code, 1, "{}", again.stderr);
    assert!(again.stderr.contains("is not what was compiled"), "{}", again.stderr);
    assert_eq!(fs::metadata(&artifact).unwrap().len(), before.len());
    bundle.assert_nothing_left();
}

#[test]
fn the_layer_of_an_artifact_is_the_program() {
    needs_containerd!();
    let containerd = Containerd::start();
    let empty = containerd.path().join("empty");
    fs::create_dir_all(empty.join("etc")).unwrap();
    fs::write(empty.join("etc/marker"), "from the rootfs\n").unwrap();
    let text = show_everything(containerd.namespace());
    let module = wat::parse_str(&text).unwrap();
    let _forget = Forget(module.clone());
    let kinds = [
        ("application/vnd.wasm.config.v0+json", "application/wasm"),
        ("application/vnd.oci.image.config.v1+json", "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm"),
    ];
    for (number, kinds) in kinds.into_iter().enumerate() {
        let (image, id) = (format!("test.invalid/artifact{number}:1"), format!("artifact{number}"));
        // The container is made from an ordinary image, which this version can unpack; then its name is the artifact's.
        containerd.import(&image, &empty, &[]);
        let runtime = ["container", "create", "--runtime", RUNTIME, &image, &id, "/hello.wasm", "one"];
        containerd.ctr(&runtime).ok();
        containerd.import_artifact(&image, &module, kinds, &["--no-unpack"]);
        let done = containerd.ctr_with(&["task", "start", &id], "from stdin");
        assert_eq!(done.code, 2, "{done:?}");
        assert!(done.stdout.starts_with("/hello.wasm\0one\0\n"), "{done:?}");
        assert!(done.stdout.ends_with("\nfrom the rootfs\nfrom stdin"), "{done:?}");
        assert_eq!(artifacts(&module).len(), 1);
        containerd.ctr(&["container", "rm", &id]).ok();
    }
    // Of an ordinary image it is the program that is missing.
    let done = containerd.run(&[], "ordinary", &["/hello.wasm"]).fails(1, &["/hello.wasm", "no such file"]);
    assert_eq!(done.stdout, "");
    // What is no module says so.
    containerd.import("test.invalid/broken:1", &empty, &[]);
    containerd
        .ctr(&["container", "create", "--runtime", RUNTIME, "test.invalid/broken:1", "broken", "/hello.wasm"])
        .ok();
    containerd.import_artifact("test.invalid/broken:1", b"\0asm\x01\0\0\0 rubbish", kinds[0], &["--no-unpack"]);
    containerd.ctr(&["task", "start", "broken"]).fails(1, &["/hello.wasm"]);
    containerd.ctr(&["container", "rm", "broken"]).ok();
    containerd.assert_nothing_left();
}

#[test]
fn a_module_runs_inside_the_containers_boundary() {
    needs_root!();
    let mut bundle = module_bundle("/app.wat", b"");
    // Tries to open a file for writing on the read-only root, and /proc: both fail, and it says so by its
    // exit code.
    let module = format!(
        r#"(module
  (import "wasi_snapshot_preview1" "path_open"
    (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (memory (export "memory") 1)
  (data (i32.const 64) "etc/new")
  (data (i32.const 80) "proc/self/mem")
  (data (i32.const 120) "{}")
  (func (export "_start") (local $code i32)
    (if (call $path_open (i32.const 3) (i32.const 0) (i32.const 64) (i32.const 7) (i32.const 1)
          (i64.const 64) (i64.const 0) (i32.const 0) (i32.const 28))
      (then (local.set $code (i32.or (local.get $code) (i32.const 1)))))
    (if (call $path_open (i32.const 3) (i32.const 0) (i32.const 80) (i32.const 13) (i32.const 0)
          (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 28))
      (then (local.set $code (i32.or (local.get $code) (i32.const 2)))))
    (call $proc_exit (local.get $code))))"#,
        bundle.id()
    );
    let _forget = Forget(module.clone().into());
    fs::write(bundle.rootfs().join("app.wat"), &module).unwrap();
    assert_eq!(bundle.run().code, 3);
    // With a writable root the first succeeds, so the test can tell.
    bundle.config["root"]["readonly"] = json!(false);
    assert_eq!(bundle.run().code, 2);
    assert!(bundle.rootfs().join("etc/new").exists());
    bundle.assert_nothing_left();
}

#[test]
fn an_ordinary_user_without_capabilities_runs_a_module_under_a_filter() {
    needs_root!();
    let mut bundle = module_bundle("/app.wat", b"");
    let module = show_everything(bundle.id());
    let _forget = Forget(module.clone().into());
    fs::write(bundle.rootfs().join("app.wat"), &module).unwrap();
    bundle.config["process"]["user"] = json!({"uid": 1000, "gid": 100});
    bundle.config["process"]["capabilities"] = json!({});
    bundle.config["process"]["rlimits"] = json!([{"type": "RLIMIT_AS", "soft": 2_u64 << 30, "hard": 2_u64 << 30}]);
    bundle.config["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mount", "ptrace"], "action": "SCMP_ACT_ERRNO"}]
    });
    let done = bundle.run();
    assert_eq!(done.code, 1, "{done:?}");
    assert!(done.stdout.contains("from the rootfs"), "{done:?}");
    bundle.assert_nothing_left();
}

#[test]
fn what_is_wrong_with_a_module_is_named() {
    needs_root!();
    let refused = |name: &str, module: &[u8], words: &[&str]| {
        let bundle = module_bundle(name, module);
        let done = bundle.run().fails(1, words);
        assert_eq!(done.stdout, "");
        bundle.assert_nothing_left();
    };
    refused("/app.wasm", b"", &["/app.wasm", "empty"]);
    refused("/app.wasm", b"\x7fELF no module", &["/app.wasm"]);
    refused("/app.wat", b"(module (func", &["/app.wat"]);
    refused("/app.wasm", b"\0asm\x01\0\0\0 rubbish", &["/app.wasm"]);
    refused("/app.wasm", b"\0asm\x0d\0\x01\0 rubbish", &["/app.wasm", "invalid component"]);
}

#[test]
fn a_trap_is_told_and_has_its_exit_code() {
    needs_root!();
    let bundle = module_bundle("/app.wat", b"");
    let module = format!(
        r#"(module (memory (export "memory") 1) (data (i32.const 0) "{}") (func (export "_start") unreachable))"#,
        bundle.id()
    );
    let _forget = Forget(module.clone().into());
    fs::write(bundle.rootfs().join("app.wat"), &module).unwrap();
    bundle.run().fails(134, &["unreachable"]);
    bundle.assert_nothing_left();
}

#[test]
fn containerd_runs_a_module_image_twice_and_compiles_it_once() {
    needs_containerd!();
    let containerd = Containerd::start();
    let module = show_everything(containerd.namespace());
    let _forget = Forget(module.clone().into());
    let rootfs = containerd.path().join("module");
    fs::create_dir_all(rootfs.join("etc")).unwrap();
    fs::write(rootfs.join("app.wat"), &module).unwrap();
    fs::write(rootfs.join("etc/marker"), "from the image\n").unwrap();
    containerd.import("runx.test/module:1", &rootfs, &["/app.wat"]);
    let run = |id: &str| {
        let args = ["run", "--rm", "--runtime", RUNTIME, "--env", "MARK=here", "runx.test/module:1", id];
        containerd.ctr(&args)
    };
    let first = run("w1");
    assert_eq!(first.code, 1, "{}", first.stderr);
    assert!(first.stdout.contains("/app.wat\0\n") && first.stdout.contains("MARK=here"), "{}", first.stdout);
    assert!(first.stdout.contains("from the image"), "{}", first.stdout);
    let [artifact] = artifacts(module.as_bytes()).try_into().expect("one artifact");
    let before = fs::metadata(&artifact).unwrap();
    let second = run("w2");
    assert_eq!((second.code, second.stdout), (1, first.stdout));
    let after = fs::metadata(&artifact).unwrap();
    assert_eq!((before.ino(), before.mtime_nsec()), (after.ino(), after.mtime_nsec()));
    // Something that is no module, and one that traps.
    fs::write(rootfs.join("app.wat"), "no module").unwrap();
    containerd.import("runx.test/broken:1", &rootfs, &["/app.wat"]);
    containerd.ctr(&["run", "--rm", "--runtime", RUNTIME, "runx.test/broken:1", "w3"]).fails(1, &["/app.wat"]);
    containerd.ctr(&["container", "rm", "w3"]);
    containerd.assert_nothing_left();
}

#[test]
fn a_trap_is_left_for_the_kubelet_where_it_has_mounted_a_file() {
    needs_root!();
    let module = format!(";; {}\n(module (func (export \"_start\") unreachable))", Bundle::new(&["x"]).id());
    let _forget = Forget(module.clone().into());
    let mut bundle = module_bundle("/app.wat", module.as_bytes());
    let told = bundle.path().join("told");
    for (before, after) in [("", "unreachable"), ("its own words", "its own words")] {
        fs::write(&told, before).unwrap();
        bundle.config["mounts"] = json!([
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/dev/termination-log", "type": "bind", "source": told, "options": ["bind", "rw"]}
        ]);
        let done = bundle.run();
        assert_eq!(done.code, 134, "{}", done.stderr);
        assert!(done.stderr.contains("unreachable"), "{}", done.stderr);
        let text = fs::read_to_string(&told).unwrap();
        assert!(text.contains(after) && text.contains(before), "{text:?}");
    }
    // A file of the image's is no message to anybody.
    bundle.config["mounts"] = json!([]);
    fs::create_dir_all(bundle.rootfs().join("dev")).unwrap();
    fs::write(bundle.rootfs().join("dev/termination-log"), "").unwrap();
    assert_eq!(bundle.run().code, 134);
    assert_eq!(fs::read(bundle.rootfs().join("dev/termination-log")).unwrap(), b"");
    bundle.assert_nothing_left();
}

#[test]
fn a_component_is_a_containers_program() {
    needs_root!();
    let mut bundle = module_bundle("/app.wasm", b"");
    let bytes = runx_tests::wasm::component(&show_everything(bundle.id()));
    let _forget = Forget(bytes.clone());
    fs::write(bundle.rootfs().join("app.wasm"), &bytes).unwrap();
    bundle.config["process"]["args"] = json!(["/app.wasm", "one"]);
    bundle.config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let done = bundle.run_with("from stdin");
    let out = done.stdout.replace('\0', "|");
    assert_eq!(out, "/app.wasm|one|\nPATH=/bin|MARK=here|HOME=/root|\nfrom the rootfs\nfrom stdin", "{}", done.stderr);
    // wasi:cli/run tells success from failure and nothing more.
    assert_eq!(done.code, 1);
    assert_eq!(artifacts(&bytes).len(), 1);
    bundle.assert_nothing_left();
}

#[test]
fn a_component_for_http_serves_in_its_containers_network() {
    needs_root!();
    let mut bundle = module_bundle("/teapot.wat", runx_tests::wasm::TEAPOT.as_bytes());
    bundle.config["process"]["env"] = json!(["RUNX_HTTP_ADDR=127.0.0.1:8123"]);
    bundle.create().ok();
    bundle.runx(&["start", bundle.id()]).ok();
    let log = || fs::read_to_string(bundle.output()).unwrap_or_default();
    runx_tests::command::eventually("it listens", || log().contains("Serving HTTP on http://127.0.0.1:8123/"));
    let pid = bundle.state()["pid"].to_string();
    // From the host its network is another one.
    assert!(std::net::TcpStream::connect("127.0.0.1:8123").is_err());
    let ask = "exec 3<>/dev/tcp/127.0.0.1/8123
               printf 'GET / HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n' >&3; cat <&3";
    let mut inside = std::process::Command::new("nsenter");
    let answer = runx_tests::command::run(inside.args(["--net", "--target", &pid, "bash", "-c", ask]));
    assert!(answer.stdout.starts_with("HTTP/1.1 418 "), "{answer:?}");
    bundle.runx(&["kill", bundle.id(), "TERM"]).ok();
    runx_tests::command::eventually("it ends", || bundle.state()["status"] == "stopped");
    bundle.runx(&["delete", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn a_module_fails_in_its_own_words_before_its_containers_limits_are_met() {
    needs_root!();
    // It grows as far as it can, and its exit code is how many times 8 MiB that were.
    let grows = r#"(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32))) (memory (export "memory") 0)
        (func (export "_start") (local $n i32)
          (block $full (loop $more
            (br_if $full (i32.eq (memory.grow (i32.const 128)) (i32.const -1)))
            (memory.fill (i32.shl (i32.mul (local.get $n) (i32.const 128)) (i32.const 16)) (i32.const 1)
              (i32.const 8388608))
            (local.set $n (i32.add (local.get $n) (i32.const 1)))
            (br $more)))
          (call $exit (local.get $n))))"#;
    let mut bundle = module_bundle("/grows.wat", grows.as_bytes());
    let _forget = Forget(grows.as_bytes().to_vec());
    bundle.config["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
    // 64 MiB less the margin of 16.
    assert_eq!(bundle.run().code, 6);
    bundle.assert_nothing_left();
}

#[test]
fn annotations_bound_a_module_or_call_another_function_of_it() {
    needs_root!();
    let spin = "(module (func (export \"_start\") (loop $l (br $l))) (func (export \"half\") (param i32) (result i32)
        (i32.div_s (local.get 0) (i32.const 2))))";
    let component = r#"(component
        (core module $m (func (export "f") (result i32) (loop $l (br $l)) (i32.const 0)))
        (core instance $i (instantiate $m))
        (func $run (result (result)) (canon lift (core func $i "f")))
        (component $c (import "f" (func $f (result (result)))) (export "run" (func $f)))
        (instance $made (instantiate $c (with "f" (func $run))))
        (export "wasi:cli/run@0.2.0" (instance $made)))"#;
    for (name, text) in [("/spin.wat", spin), ("/component.wat", component)] {
        let mut bundle = module_bundle(name, text.as_bytes());
        let _forget = Forget(text.as_bytes().to_vec());
        let mut with = |key: &str, value: &str| {
            bundle.config["annotations"] = json!({key: value});
            bundle.run()
        };
        with("runx.dev/wasm.fuel", "100000").fails(134, &["all fuel consumed"]);
        with("runx.dev/wasm.timeout", "300ms").fails(124, &["time", "over"]);
        with("runx.dev/wasm.timeout", "soon").fails(1, &["annotation runx.dev/wasm.timeout", "soon"]);
        if text == spin {
            assert_eq!(with("runx.dev/wasm.invoke", "half(84)").ok().stdout, "42\n");
        }
        with("runx.dev/wasm.invoke", "none").fails(126, &["exports no function \"none\""]);
        bundle.assert_nothing_left();
    }
}
