//! AppArmor, on a kernel that has it.

use std::fs;
use std::process::Command;

use runx_tests::bundle::Bundle;
use runx_tests::command::run;
use runx_tests::needs_apparmor;
use serde_json::json;

/// A profile that lets everything through but one file. Unloaded when the test ends.
struct Profile {
    name: String,
    path: std::path::PathBuf,
}

impl Profile {
    fn load(bundle: &Bundle) -> Self {
        let name = format!("{}-profile", bundle.id());
        let path = bundle.scratch().join("profile");
        let text = format!(
            "profile \"{name}\" flags=(attach_disconnected) {{\n  file,\n  capability,\n  network,\n  mount,\n  signal,\n  \
             ptrace,\n  deny /tmp/denied w,\n}}\n"
        );
        fs::write(&path, text).unwrap();
        run(Command::new("apparmor_parser").args(["-K", "-r"]).arg(&path)).ok();
        Self { name, path }
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        let _ = Command::new("apparmor_parser").arg("-R").arg(&self.path).output();
    }
}

const SCRIPT: &str = "cat /proc/self/attr/current; echo x > /tmp/allowed && echo allowed; \
                      echo x > /tmp/denied || echo denied";

// covers: process.apparmorProfile
#[test]
fn a_container_and_its_execs_are_confined_by_their_profile() {
    needs_apparmor!();
    let mut bundle = Bundle::script("sleep 100");
    bundle.config["root"]["readonly"] = json!(false);
    let profile = Profile::load(&bundle);
    bundle.set("/process", "apparmorProfile", json!(profile.name));
    let expected = format!("{} (enforce)\nallowed\ndenied\n", profile.name);
    bundle.create().ok();
    bundle.runx(&["start", bundle.id()]).ok();
    let pid = bundle.state()["pid"].clone();
    let current = fs::read_to_string(format!("/proc/{pid}/attr/current")).unwrap();
    assert_eq!(current, format!("{} (enforce)\n", profile.name));
    // An exec gets the container's, unless its description names another.
    assert_eq!(bundle.exec(SCRIPT).ok().stdout, expected);
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

// covers: process.apparmorProfile process.noNewPrivileges process.user.uid
#[test]
fn an_ordinary_user_without_new_privileges_is_confined_too() {
    needs_apparmor!();
    for namespace in [false, true] {
        let mut bundle = Bundle::script(SCRIPT);
        bundle.config["root"]["readonly"] = json!(false);
        let profile = Profile::load(&bundle);
        bundle.set("/process", "apparmorProfile", json!(profile.name));
        bundle.set("/process", "user", json!({"uid": 1000, "gid": 1000}));
        bundle.add_mount(json!({"destination": "/tmp", "type": "tmpfs", "source": "x", "options": ["mode=1777"]}));
        if namespace {
            bundle.config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
            let mapping = json!([{"containerID": 0, "hostID": 0, "size": 65536}]);
            bundle.set("/linux", "uidMappings", mapping.clone());
            bundle.set("/linux", "gidMappings", mapping);
        }
        let expected = format!("{} (enforce)\nallowed\ndenied\n", profile.name);
        assert_eq!(bundle.run().ok().stdout, expected, "user namespace: {namespace}");
        bundle.assert_nothing_left();
    }
}

// covers: process.apparmorProfile
#[test]
fn a_profile_that_is_not_loaded_fails_the_container() {
    needs_apparmor!();
    let mut bundle = Bundle::script("echo it ran");
    bundle.set("/process", "apparmorProfile", json!("no-such-profile"));
    let done = bundle.run().fails(1, &["AppArmor", "no-such-profile"]);
    assert_eq!(done.stdout, "");
    bundle.assert_nothing_left();
}

// covers: process.apparmorProfile
#[test]
fn unconfined_is_a_profile() {
    needs_apparmor!();
    let mut bundle = Bundle::script("cat /proc/self/attr/current");
    bundle.set("/process", "apparmorProfile", json!("unconfined"));
    assert_eq!(bundle.run().ok().stdout, "unconfined\n");
    bundle.assert_nothing_left();
}
