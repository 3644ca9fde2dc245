//! `runx storage pull` with an identity token: what a registry's token service gave at a login, instead of a password.

use std::fs;
use std::process::Command;

use runx_tests::command::{Done, run};
use runx_tests::needs_registry;
use runx_tests::registry::{Fault, Proxy, Registry};
use runx_tests::storage::{Layout, Storage};
use serde_json::{Value, json};

const SECRET: &str = "an-identity-that-is-secret";

/// A store, and a registry that lets nobody in who has no access token.
struct Place {
    storage: Storage,
    _registry: Registry,
    proxy: Proxy,
    name: String,
}

impl Place {
    fn new() -> Self {
        let (storage, registry) = (Storage::new(), Registry::plain());
        let layout = Layout::make(storage.scratch());
        registry.push(&layout.name(), "team/tool:v1", &[]);
        let proxy = Proxy::before(&registry);
        let name = format!("{}/team/tool:v1", proxy.address());
        Self { storage, _registry: registry, proxy, name }
    }

    fn write(&self, file: &Value) -> String {
        let path = self.storage.scratch().join("login.json");
        fs::write(&path, file.to_string()).unwrap();
        path.display().to_string()
    }

    /// A login as docker writes it.
    fn login(&self, token: &str) -> String {
        // The name is one of nobody, and there is no password.
        let auth = "MDAwMDAwMDAtMDAwMC0wMDAwLTAwMDAtMDAwMDAwMDAwMDAwOg==";
        self.write(&json!({"auths": {self.proxy.address(): {"auth": auth, "identitytoken": token}}}))
    }

    #[track_caller]
    fn pull(&self, file: &str) -> Done {
        let done = self.storage.run(&["pull", "-v", "--authfile", file, &self.name]);
        assert!(!done.stderr.contains(SECRET) && !done.stderr.contains("access-1"), "{}", done.stderr);
        done
    }
}

#[test]
fn an_identity_token_is_traded_for_access_to_the_repository() {
    needs_registry!();
    let place = Place::new();
    place.proxy.guard(SECRET, 300);
    let file = place.login(SECRET);
    place.pull(&file).ok();
    let (given, form) = place.proxy.given();
    assert_eq!(given, 1, "it is good for all of it");
    let said = |key: &str| form.get(key).map(String::as_str);
    assert_eq!((said("grant_type"), said("client_id")), (Some("refresh_token"), Some("runx")));
    assert_eq!((said("scope"), said("service")), (Some("repository:team/tool:pull"), Some("tests")));
    assert_eq!(said("refresh_token"), Some(SECRET));
    place.storage.run(&["rm", &place.name]).ok();
    // The service does not know it any more: it has given another one.
    let refused =
        place.pull(&file).fails(1, &["does not accept the stored identity token", "log in again", "invalid_grant"]);
    assert!(!refused.stderr.contains("is nobody"), "{}", refused.stderr);
    place.storage.assert_clean();
    // Nobody is asked where everybody is let in.
    let open = Place::new();
    open.pull(&open.login(SECRET)).ok();
}

#[test]
fn access_that_has_ended_is_asked_for_again_with_the_token_that_came_last() {
    needs_registry!();
    let place = Place::new();
    place.proxy.guard(SECRET, 0);
    place.proxy.set(Some(Fault::Cut { after: 1000, times: 2 }));
    place.pull(&place.login(SECRET)).ok();
    let (given, form) = place.proxy.given();
    assert!(given > 3, "{given}");
    assert_eq!(form["refresh_token"], format!("identity-{}", given - 1));
}

#[test]
fn a_helpers_identity_token_is_one_as_well() {
    needs_registry!();
    let place = Place::new();
    place.proxy.guard(SECRET, 300);
    let bin = place.storage.scratch().join("bin");
    fs::create_dir(&bin).unwrap();
    let helper = bin.join("docker-credential-runxtest");
    let answer = json!({"ServerURL": "x", "Username": "<token>", "Secret": SECRET});
    fs::write(&helper, format!("#!/bin/sh\n[ \"$1\" = get ] && cat > /dev/null && echo '{answer}'\n")).unwrap();
    run(Command::new("chmod").arg("755").arg(&helper)).ok();
    let file = place.write(&json!({"credsStore": "runxtest"}));
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    run(place.storage.command(&["pull", "--authfile", &file, &place.name]).env("PATH", path)).ok();
    assert_eq!(place.proxy.given().1["refresh_token"], SECRET);
}
