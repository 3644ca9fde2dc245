//! `runx storage pull`: from a real registry, through a network that does what networks do.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use runx_tests::command::{Done, eventually, run};
use runx_tests::needs_registry;
use runx_tests::registry::{Fault, Proxy, Registry, USER};
use runx_tests::storage::{Layout, Storage, content};

/// A registry with an image, a proxy before it, and a store.
struct Field {
    storage: Storage,
    proxy: Proxy,
    layout: Layout,
    // After the proxy: it ends last.
    _registry: Registry,
}

impl Field {
    fn new() -> Self {
        let storage = Storage::new();
        let registry = Registry::plain();
        let layout = Layout::make(storage.scratch());
        registry.push(&layout.name(), "team/tool:v1", &[]);
        Self { proxy: Proxy::before(&registry), storage, layout, _registry: registry }
    }

    fn name(&self) -> String {
        format!("{}/team/tool:v1", self.proxy.address())
    }

    #[track_caller]
    fn pull(&self) -> Done {
        self.storage.run(&["pull", &self.name()])
    }

    /// A pull fails so, and the store is as it was.
    #[track_caller]
    fn fails(&self, words: &[&str]) {
        let before = self.storage.content();
        let failed = self.pull().fails(1, words);
        assert!(failed.stdout.is_empty(), "{failed:?}");
        assert_eq!(self.storage.content(), before);
        assert!(self.storage.images().is_empty());
        self.storage.assert_clean();
    }

    /// What is in the store is the image, completely and alone.
    #[track_caller]
    fn is_right(&self) {
        assert_eq!(self.storage.listing(&self.name()), self.layout.listing());
        let layers = self.storage.images()[0]["layers"].as_array().unwrap().len();
        let blobs = fs::read_dir(self.storage.root().join("storage/blobs/sha256")).unwrap().count();
        assert_eq!(blobs, layers + 2, "the layers, the configuration and the manifest");
        self.storage.assert_clean();
    }
}

#[test]
fn what_is_pulled_with_tls_and_a_password_is_what_was_pushed() {
    needs_registry!();
    let (storage, registry) = (Storage::new(), Registry::secure());
    let layout = Layout::make(storage.scratch());
    registry.push(&layout.name(), "tool:v1", &[]);
    registry.push(&layout.name(), "docker:v2", &["--format", "v2s2"]);
    let [auth, ca] = ["auth.json", "ca.crt"].map(|name| registry.path(name).display().to_string());
    for name in ["tool:v1", "docker:v2"] {
        let name = format!("{}/{name}", registry.address());
        let pulled = storage.run(&["pull", "--authfile", &auth, "--ca-file", &ca, &name]).ok();
        let image = storage.images().into_iter().find(|image| image["names"][0] == *name).expect("it is listed");
        assert_eq!(pulled.stdout.trim(), image["id"], "the id is printed");
        assert_eq!(storage.listing(&name), layout.listing());
        let said = registry.inspect(name.split_once('/').unwrap().1, &["--format", "{{.Digest}}"]).ok();
        assert_eq!(image["digest"], said.stdout.trim());
        assert_eq!(image["repoDigests"][0], format!("{}@{}", name.rsplit_once(':').unwrap().0, said.stdout.trim()));
        // By its digest alone it is the same.
        let by_digest = image["repoDigests"][0].as_str().unwrap();
        let again = storage.run(&["pull", "-q", "--authfile", &auth, "--ca-file", &ca, by_digest]).ok();
        assert_eq!((again.stdout, again.stderr.as_str()), (pulled.stdout, ""));
    }
    storage.assert_clean();
}

#[test]
fn who_may_not_pull_learns_what_to_do_and_no_secret() {
    needs_registry!();
    let (storage, registry) = (Storage::new(), Registry::secure());
    let layout = Layout::make(storage.scratch());
    registry.push(&layout.name(), "tool:v1", &[]);
    let name = format!("{}/tool:v1", registry.address());
    let [wrong, auth, ca] = ["wrong.json", "auth.json", "ca.crt"].map(|name| registry.path(name).display().to_string());
    let before = storage.content();
    storage.run(&["pull", "--ca-file", &ca, &name]).fails(1, &["log in", "podman login", "--authfile"]);
    let refused = storage.run(&["pull", "-v", "--ca-file", &ca, "--authfile", &wrong, &name]);
    let refused = refused.fails(1, &["does not accept the stored credentials", "log in again"]);
    assert!(!refused.stderr.contains("another secret"), "{}", refused.stderr);
    storage.run(&["pull", "--ca-file", &ca, "--authfile", "/nonexistent", &name]).fails(1, &["/nonexistent"]);
    // The certificate is nobody's who is known.
    storage.run(&["pull", "--authfile", &auth, &name]).fails(1, &["cannot connect", "certificate", "--ca-file"]);
    assert_eq!(storage.content(), before);
    storage.assert_clean();
    let insecure = storage.run(&["pull", "--authfile", &auth, "--tls-verify=false", &name]).ok();
    assert!(insecure.stderr.contains("is not checked"), "{}", insecure.stderr);
    // Certificates and credentials are also found where docker and podman have them.
    storage.run(&["rm", &name]).ok();
    let certs = storage.scratch().join(".config/containers/certs.d").join(registry.address());
    fs::create_dir_all(&certs).unwrap();
    fs::copy(&ca, certs.join("ca.crt")).unwrap();
    fs::create_dir(storage.scratch().join(".docker")).unwrap();
    fs::copy(&auth, storage.scratch().join(".docker/config.json")).unwrap();
    storage.run(&["pull", &name]).ok();
}

#[test]
fn a_credential_helper_is_asked_as_docker_asks() {
    needs_registry!();
    let (storage, registry) = (Storage::new(), Registry::secure());
    let layout = Layout::make(storage.scratch());
    registry.push(&layout.name(), "tool:v1", &[]);
    let bin = storage.scratch().join("bin");
    fs::create_dir(&bin).unwrap();
    let helper = bin.join("docker-credential-runxtest");
    let answer = serde_json::json!({"ServerURL": "x", "Username": USER.0, "Secret": USER.1});
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = get ] && [ \"$(cat)\" = '{}' ] || exit 1\necho '{answer}'\n",
        registry.address()
    );
    fs::write(&helper, script).unwrap();
    run(Command::new("chmod").arg("755").arg(&helper)).ok();
    let file = storage.scratch().join("helpers.json");
    fs::write(&file, serde_json::json!({"credHelpers": {registry.address(): "runxtest"}}).to_string()).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let [ca, file] = [registry.path("ca.crt"), file].map(|path| path.display().to_string());
    let name = format!("{}/tool:v1", registry.address());
    run(storage.command(&["pull", "--ca-file", &ca, "--authfile", &file, &name]).env("PATH", path)).ok();
    storage.run(&["rm", &name]).ok();
    // Without it, and its word, nothing.
    storage.run(&["pull", "--ca-file", &ca, "--authfile", &file, &name]).fails(1, &["docker-credential-runxtest"]);
}

#[test]
fn what_is_not_there_is_said_and_leaves_nothing() {
    needs_registry!();
    let (storage, registry) = (Storage::new(), Registry::plain());
    let before = storage.content();
    let name = |path: &str| format!("{}/{path}", registry.address());
    storage.run(&["pull", &name("nothing:v1")]).fails(1, &["has no image", "nothing:v1"]);
    storage.run(&["pull", "127.0.0.1:1/x"]).fails(1, &["cannot connect to 127.0.0.1:1"]);
    storage.run(&["pull", "Upper/Case"]).fails(1, &["invalid image name"]);
    storage.run(&["pull", "a@sha256:12"]).fails(1, &["invalid digest"]);
    let layout = Layout::make(storage.scratch());
    registry.push(&layout.name(), "tool:v1", &[]);
    // One image without a platform of its own is nobody's but this machine's.
    storage.run(&["pull", "--platform", "linux", &name("tool:v1")]).fails(1, &["OS/ARCHITECTURE"]);
    assert_eq!(storage.content(), before);
    storage.assert_clean();
}

#[test]
fn a_corrupt_layer_is_refused_and_leaves_nothing() {
    needs_registry!();
    let field = Field::new();
    field.proxy.set(Some(Fault::Corrupt));
    field.fails(&["layer sha256:", "the downloaded blob is corrupt", "was promised"]);
    field.proxy.set(None);
    field.pull().ok();
    field.is_right();
}

#[test]
fn a_layer_that_is_not_what_the_configuration_says_is_refused() {
    needs_registry!();
    let field = Field::new();
    // The same layers, and a configuration that promises another one; the digests of the documents are right.
    let mutated = field.storage.scratch().join("mutated");
    run(Command::new("cp").arg("-r").arg(field.layout.path()).arg(&mutated)).ok();
    change_diff_id(&mutated);
    let from = format!("oci:{}:v1", mutated.display());
    field._registry.push(&from, "team/tool:v1", &[]);
    field.fails(&["decompressed layer is corrupt", "was promised"]);
}

/// Rewrites a layout's image with another first diff id.
fn change_diff_id(layout: &Path) {
    use sha2::{Digest, Sha256};
    let blob = |digest: &str| layout.join("blobs/sha256").join(digest.strip_prefix("sha256:").unwrap());
    let read = |path: &Path| -> serde_json::Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let store = |value: &serde_json::Value| {
        let text = value.to_string();
        let digest = format!("sha256:{:x}", Sha256::digest(&text));
        fs::write(blob(&digest), &text).unwrap();
        (digest, text.len())
    };
    let mut index = read(&layout.join("index.json"));
    let mut manifest = read(&blob(index["manifests"][0]["digest"].as_str().unwrap()));
    let mut config = read(&blob(manifest["config"]["digest"].as_str().unwrap()));
    config["rootfs"]["diff_ids"][0] = format!("sha256:{}", "0".repeat(64)).into();
    let (digest, size) = store(&config);
    manifest["config"]["digest"] = digest.into();
    manifest["config"]["size"] = size.into();
    let (digest, size) = store(&manifest);
    index["manifests"][0]["digest"] = digest.into();
    index["manifests"][0]["size"] = size.into();
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
}

#[test]
fn a_connection_that_breaks_is_made_again_and_the_rest_asked_for() {
    needs_registry!();
    let field = Field::new();
    field.proxy.set(Some(Fault::Cut { after: 50_000, times: 3 }));
    field.pull().ok();
    let ranges: Vec<_> = field.proxy.blobs().into_iter().filter_map(|request| request.range).collect();
    assert!(ranges.iter().any(|range| range == "bytes=50000-"), "{ranges:?}");
    field.is_right();
}

#[test]
fn a_registry_without_ranges_is_asked_for_the_whole_again() {
    needs_registry!();
    let field = Field::new();
    field.proxy.set(Some(Fault::NoRanges { after: 50_000 }));
    field.pull().ok();
    field.is_right();
}

#[test]
fn a_connection_that_always_breaks_is_an_error_and_leaves_nothing() {
    needs_registry!();
    let field = Field::new();
    field.proxy.set(Some(Fault::Cut { after: 0, times: usize::MAX }));
    field.fails(&["layer sha256:", field.proxy.address()]);
}

#[test]
fn two_pulls_at_once_download_each_blob_once() {
    needs_registry!();
    let field = Field::new();
    field.proxy.set(Some(Fault::Slow(Duration::from_millis(30))));
    let pulls: Vec<Done> = thread::scope(|scope| {
        let both = [(); 3].map(|()| scope.spawn(|| field.pull()));
        both.into_iter().map(|pull| pull.join().unwrap().ok()).collect()
    });
    assert!(pulls.iter().all(|pull| pull.stdout == pulls[0].stdout));
    let layers = field.storage.images()[0]["layers"].as_array().unwrap().clone();
    let counts = field.proxy.counts();
    for layer in layers {
        let path = format!("GET /v2/team/tool/blobs/{}", layer["digest"].as_str().unwrap());
        assert_eq!(counts.get(&path), Some(&1), "{counts:?}");
    }
    assert_eq!(field.storage.images().len(), 1);
    field.is_right();
}

/// A command that runs. It ends with this.
struct Running(Child);

impl Running {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().cast_signed()), signal).unwrap();
    }

    /// How it ended, and what it said on standard error.
    #[track_caller]
    fn end(&mut self) -> (Option<i32>, String) {
        let mut status = None;
        eventually("it ends", || {
            status = self.0.try_wait().unwrap();
            status.is_some()
        });
        let mut said = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (status.unwrap().code(), said)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_pull_that_fails_does_not_wait_for_the_layers_that_another_one_brings() {
    needs_registry!();
    let field = Field::new();
    // The first one has one layer's lock until the test is at its end.
    field.proxy.set(Some(Fault::Slow(Duration::from_secs(3600))));
    let ingest = field.storage.root().join("storage/ingest");
    let files = |kind: &str| {
        let entries = fs::read_dir(&ingest).into_iter().flatten().flatten().map(|entry| entry.path());
        entries.filter(|path| path.extension().is_some_and(|found| found == kind)).collect::<Vec<_>>()
    };
    let pull = |flags: &[&str]| {
        let name = field.name();
        let mut command = field.storage.command(&[&["pull"], flags, &[name.as_str()]].concat());
        Running(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap())
    };
    let mut first = pull(&["--parallel", "1"]);
    // Its connection is a slow one from its first bytes on, whatever others get.
    let begun = || files("partial").iter().any(|path| fs::metadata(path).is_ok_and(|found| found.len() > 0));
    eventually("the first one has a layer", || files("lock").len() == 1 && begun());
    let (lock, partial) = (files("lock"), files("partial"));
    field.proxy.set(Some(Fault::Cut { after: 0, times: usize::MAX }));
    let (code, said) = pull(&[]).end();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("layer sha256:") && said.contains(field.proxy.address()), "{said}");
    assert!(first.0.try_wait().unwrap().is_none(), "the first one still pulls");
    assert_eq!((files("lock"), files("partial")), (lock, partial), "only what is the first one's is there");
    first.signal(Signal::SIGINT);
    assert_eq!(first.end().0, Some(130));
    field.proxy.set(None);
    field.pull().ok();
    field.is_right();
}

#[test]
fn a_pull_that_waits_for_another_one_ends_at_a_signal_and_leaves_the_other_alone() {
    needs_registry!();
    let field = Field::new();
    // Nothing more comes: who waits for the first one waits until the test is at its end.
    field.proxy.set(Some(Fault::Slow(Duration::from_secs(3600))));
    let ingest = field.storage.root().join("storage/ingest");
    let locks = || {
        let entries = fs::read_dir(&ingest).into_iter().flatten().flatten();
        entries.filter(|entry| entry.path().extension().is_some_and(|kind| kind == "lock")).map(|entry| entry.path())
    };
    let pull = || {
        let mut command = field.storage.command(&["pull", &field.name()]);
        Running(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap())
    };
    let mut first = pull();
    eventually("the first one has a layer", || locks().next().is_some());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut second = pull();
        let pid = second.0.id();
        // It is in what it waits for when it has opened the lock that the first one holds.
        eventually("the second one waits", || {
            let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            let open: Vec<_> = open.filter_map(|fd| fs::read_link(fd.path()).ok()).collect();
            locks().any(|lock| open.contains(&lock))
        });
        second.signal(signal);
        let (code, said) = second.end();
        assert!(first.0.try_wait().unwrap().is_none(), "the first one still pulls");
        assert_eq!(code, Some(128 + signal as i32), "{said}");
        assert!(said.contains("interrupted"), "{said}");
        assert!(locks().next().is_some(), "the first one's lock is still there");
    }
    first.signal(Signal::SIGINT);
    assert_eq!(first.end().0, Some(130));
    assert!(locks().next().is_none(), "{:?}", locks().collect::<Vec<_>>());
    field.proxy.set(None);
    field.pull().ok();
    field.is_right();
}

#[test]
fn a_pull_that_was_killed_is_gone_on_with_and_comes_out_right() {
    needs_registry!();
    let field = Field::new();
    for (signal, code) in [(Signal::SIGTERM, Some(143)), (Signal::SIGKILL, None), (Signal::SIGKILL, None)] {
        field.proxy.set(Some(Fault::Slow(Duration::from_millis(200))));
        let mut pull = field.storage.command(&["pull", &field.name()]);
        let mut pull = pull.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // Something of a layer is there.
        let ingest = field.storage.root().join("storage/ingest");
        let partial = || {
            let entries = fs::read_dir(&ingest).into_iter().flatten().flatten();
            entries
                .filter(|entry| entry.path().extension().is_some_and(|kind| kind == "partial"))
                .any(|entry| entry.metadata().is_ok_and(|m| m.len() >= 1 << 16))
        };
        eventually("a part of a layer is there", partial);
        kill(Pid::from_raw(pull.id().cast_signed()), signal).unwrap();
        assert_eq!(pull.wait().unwrap().code(), code, "{signal}");
        assert!(partial(), "what came is kept after {signal}");
        assert!(field.storage.images().is_empty(), "nothing half-made is used");
    }
    field.proxy.set(None);
    field.proxy.forget();
    field.pull().ok();
    let ranges: Vec<_> = field.proxy.blobs().into_iter().filter_map(|request| request.range).collect();
    assert!(ranges.iter().any(|range| range != "bytes=0-"), "nothing was gone on with: {ranges:?}");
    field.is_right();
    // What a kill leaves is also taken away without another pull.
    field.storage.run(&["rm", &field.name()]).ok();
    assert!(field.storage.content().is_empty(), "{:?}", field.storage.content());
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing() {
    needs_registry!();
    let field = Field::new();
    let small = field.storage.scratch().join("small");
    fs::create_dir(&small).unwrap();
    // Room for the blobs, and not for what is in them.
    run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=2500k", "runx-test", small.to_str().unwrap()])).ok();
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut command = field.storage.command_in(&small, &["ls"]);
        run(&mut command).ok();
        let before = content(&small);
        let failed = run(&mut field.storage.command_in(&small, &["pull", &field.name()]));
        failed.fails(1, &["No space left on device"]);
        assert_eq!(content(&small), before);
    }));
    run(Command::new("umount").arg(&small)).ok();
    if let Err(panic) = done {
        std::panic::resume_unwind(panic);
    }
    field.storage.assert_clean();
}
