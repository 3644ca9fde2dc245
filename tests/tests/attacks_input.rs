//! Attacks by what is read: configurations, images and modules made to confuse whoever reads them.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};

use runx_tests::attack::{DOORS, Target};
use runx_tests::command::run;
use runx_tests::needs_root;
use runx_tests::wasm::{Forget, artifacts};
use serde_json::{Value, json};

#[test]
fn a_configuration_that_is_too_deep_too_long_or_no_text_is_refused() {
    needs_root!();
    let deep = |open: &str, close: &str| format!("{{\"x\": {}{}}}", open.repeat(200_000), close.repeat(200_000));
    let good = Target::script(DOORS[0], "echo it ran").bundle.config.to_string();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("deep lists", deep("[", "]").into()),
        ("deep objects", deep("{\"x\":", "}").replace("}}", "1}").into()),
        ("never ending", "[".repeat(5_000_000).into()),
        ("no text", vec![0xff; 4096]),
        ("NULs", vec![0; 4096]),
        ("a NUL after it", [good.as_bytes(), b"\0"].concat()),
        ("two of them", [good.as_bytes(), good.as_bytes()].concat()),
        ("a number that is none", good.replacen("\"uid\":0", "\"uid\":1e999", 1).into()),
        ("nothing", vec![]),
    ];
    for (what, text) in cases {
        let mut target = Target::script(DOORS[0], "echo it ran");
        target.bundle.config = Value::Null;
        fs::write(target.bundle.path().join("config.json"), text).unwrap();
        let done = target.bundle.run();
        assert_eq!((done.code, done.stdout.as_str()), (1, ""), "{what}: {}", done.stderr);
        assert!(done.stderr.contains("config.json") && done.stderr.len() < 4096, "{what}: {}", done.stderr);
        target.bundle.config = json!({});
        target.bundle.assert_nothing_left();
    }
    // More than any configuration is, of which not all is read.
    let target = Target::script(DOORS[0], "echo it ran");
    let path = target.bundle.path().join("config.json");
    File::create(&path).unwrap().set_len(3 << 30).unwrap();
    let mut command = std::process::Command::new("sh");
    // Less memory than the file is long.
    command.args(["-c", "ulimit -v 1000000; exec \"$0\" \"$@\""]).arg(runx_tests::dist().join("runx"));
    command
        .arg("--root")
        .arg(target.bundle.state_root())
        .args(["run", target.bundle.id()])
        .current_dir(target.bundle.path());
    run(&mut command).fails(1, &["config.json"]);
    target.bundle.assert_nothing_left();
}

#[test]
fn a_nul_in_any_text_is_refused() {
    needs_root!();
    let places = [
        "/process/args/0",
        "/process/cwd",
        "/process/env/0",
        "/root/path",
        "/mounts/0/destination",
        "/mounts/1/source",
        "/mounts/1/options/0",
        "/hostname",
        "/linux/cgroupsPath",
        "/linux/maskedPaths/0",
        "/linux/readonlyPaths/0",
    ];
    for door in DOORS {
        for place in places {
            let mut target = Target::script(door, "echo it ran");
            target.bundle.config["linux"]["cgroupsPath"] = json!("/runx-tests/nul");
            let text = target.bundle.config.pointer(place).and_then(Value::as_str).unwrap_or_else(|| panic!("{place}"));
            let text = format!("{text}\0evil");
            *target.bundle.config.pointer_mut(place).unwrap() = json!(text);
            // The shim's root and cgroup are the test's own.
            if door == DOORS[1] && matches!(place, "/root/path" | "/linux/cgroupsPath") {
                continue;
            }
            target.run().refused(&["NUL"]);
            target.end();
        }
        let mut target = Target::script(door, "echo it ran");
        target.bundle.config["process"]["args"] = json!(["sh", "-c", "echo it ran", "a\0b"]);
        target.run().refused(&["NUL"]);
        target.end();
    }
}

#[test]
fn ten_thousand_mounts_are_made_or_refused_and_leave_nothing() {
    needs_root!();
    for door in DOORS {
        let mut target = Target::script(door, "wc -l </proc/self/mounts");
        for n in 0..10_000 {
            target
                .bundle
                .add_mount(json!({"destination": format!("/tmp/m{}", n % 50), "type": "tmpfs", "source": "x"}));
        }
        let done = target.run();
        let count = done.output.trim().parse::<u32>().unwrap_or_default();
        assert!(count > 10_000 || !done.error.is_empty(), "{door:?}: {done:?}");
        target.end();
    }
}

#[test]
fn an_image_whose_user_files_are_traps_does_not_catch_anybody() {
    needs_root!();
    let target = Target::script(DOORS[0], "true");
    let secret = target.bundle.scratch().join("secret");
    fs::write(&secret, "user:x:0:0::/:/bin/sh\n").unwrap();
    for door in DOORS {
        let traps: [&dyn Fn(&std::path::Path); 5] = [
            // Who opens it waits for ever.
            &|path| {
                nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
                // The container's user has to be able to.
                fs::set_permissions(path, PermissionsExt::from_mode(0o644)).unwrap();
            },
            &|path| symlink(&secret, path).unwrap(),
            &|path| symlink("/proc/self/mem", path).unwrap(),
            &|path| File::create(path).unwrap().set_len(8 << 30).unwrap(),
            &|path| symlink("passwd", path).unwrap(),
        ];
        for (n, trap) in traps.iter().enumerate() {
            for name in ["passwd", "group"] {
                let mut target = Target::script(door, "echo $HOME; echo began");
                let path = target.bundle.rootfs().join("etc").join(name);
                fs::remove_file(&path).unwrap();
                trap(&path);
                target.bundle.config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
                let done = target.run();
                assert!(!done.error.is_empty() || done.output.ends_with("began\n"), "trap {n} {name}: {done:?}");
                target.end();
            }
        }
    }
}

#[test]
fn a_module_that_is_broken_huge_or_no_file_harms_nobody() {
    needs_root!();
    let header = b"\0asm\x01\0\0\0".to_vec();
    // A section of code whose length is a lie.
    let lie = [header.clone(), vec![10, 0xff, 0xff, 0xff, 0xff, 0x0f, 1]].concat();
    let locals = [
        header.clone(),
        vec![1, 4, 1, 0x60, 0, 0, 3, 2, 1, 0, 10, 10, 1, 8, 1, 0xff, 0xff, 0xff, 0xff, 0x0f, 0x7f, 0x0b],
    ]
    .concat();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("only its beginning", header.clone()),
        ("cut off", b"\0asm\x01".to_vec()),
        ("a lie", lie),
        ("locals", locals),
        ("zeros", [header, vec![0; 1 << 20]].concat()),
    ];
    for door in DOORS {
        for (what, bytes) in &cases {
            let mut target = Target::script(door, "x");
            let _forget = Forget(bytes.clone());
            fs::write(target.bundle.rootfs().join("app.wasm"), bytes).unwrap();
            target.bundle.config["process"]["args"] = json!(["/app.wasm"]);
            let done = target.run();
            assert_ne!(done.code, 0, "{what}: {done:?}");
            assert!(!done.error.is_empty() || !done.output.is_empty(), "{what}: {done:?}");
            target.end();
        }
        // Names that are no files: of the host's, of devices, of nothing that ends.
        for (kind, trap) in [("a link", 0), ("a FIFO", 1), ("a hole", 2)] {
            let mut target = Target::script(door, "x");
            let secret = target.bundle.scratch().join("secret.wasm");
            // Nobody else has compiled this one.
            let text = format!("(module (func (export \"_start\")) (; {} ;))", secret.display());
            fs::write(&secret, &text).unwrap();
            let path = target.bundle.rootfs().join("app.wasm");
            match trap {
                0 => symlink(&secret, &path).unwrap(),
                1 => nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap(),
                _ => File::create(&path).unwrap().set_len(20 << 30).unwrap(),
            }
            target.bundle.config["process"]["args"] = json!(["/app.wasm"]);
            let done = target.run();
            assert!(!done.error.is_empty(), "{kind}: {done:?}");
            assert!(artifacts(text.as_bytes()).is_empty(), "{kind}: the host's file was compiled");
            target.end();
        }
    }
}
