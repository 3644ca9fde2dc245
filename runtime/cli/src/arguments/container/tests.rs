use super::*;
use crate::arguments::Command;
use crate::container::options::MountKind;

fn parse(line: &[&str]) -> Result<Container> {
    match crate::arguments::parse(line.iter().map(OsString::from)).1? {
        Command::Container(container) => Ok(*container),
        other => bail!("{other:?}"),
    }
}

fn run(line: &[&str]) -> Make {
    match parse(&[&["container", "run"], line].concat()).unwrap() {
        Container::Run(make) => *make,
        other => panic!("{other:?}"),
    }
}

fn refused(line: &[&str], words: &str) {
    let error = format!("{:#}", parse(&[&["container"], line].concat()).unwrap_err());
    assert!(error.contains(words), "{line:?}: {error}");
}

#[test]
fn an_image_and_a_command_are_named_in_three_ways() {
    for line in [
        &["--name", "x", "alpine", "ls", "-l"][..],
        &["--id", "x", "--image", "alpine", "--", "ls", "-l"],
        &["--id", "x", "-m", "alpine", "-c", "ls", "-a", "-l"],
    ] {
        let make = run(line);
        assert_eq!((make.id.as_deref(), make.options.image.as_deref()), (Some("x"), Some("alpine")), "{line:?}");
        assert_eq!(make.options.command, ["ls", "-l"], "{line:?}");
    }
    assert_eq!(run(&["--rootfs", "/r", "ls"]).options.command, ["ls"]);
    refused(&["run"], "--rootfs DIR");
    refused(&["run", "--image", "a", "--rootfs", "/r"], "exclude each other");
}

#[test]
fn a_lone_i_is_interactive_and_one_that_looks_like_a_name_is_refused() {
    let make = run(&["-i", "alpine", "cat"]);
    assert!(make.options.interactive && make.options.image.as_deref() == Some("alpine"));
    assert!(run(&["-it", "alpine"]).options.tty);
    refused(&["run", "-i", "web", "-m", "alpine", "-c", "sh"], "--id web");
    refused(&["create", "-i", "web", "--rootfs", "/r"], "--id web");
    match parse(&["container", "delete", "-i", "web"]).unwrap() {
        Container::Delete { ids, .. } => assert_eq!(ids, ["web"]),
        other => panic!("{other:?}"),
    }
}

#[test]
fn memory_has_no_short_form_and_who_uses_dockers_is_told() {
    refused(&["run", "-m", "64m", "alpine", "true"], "--memory 64m alpine");
    refused(&["create", "-m=1.5g", "alpine"], "--memory 1.5g alpine");
    // Names of images may be like these.
    for image in ["64m", "4096"] {
        assert_eq!(run(&["-m", image]).options.image.as_deref(), Some(image));
    }
    assert_eq!(run(&["-m", "3proxy", "true"]).options.image.as_deref(), Some("3proxy"));
}

#[test]
fn volumes_are_paths_or_names() {
    let mounts = run(&["-v", "/h:/c:ro", "-v", "data:/d", "-v", "/anon", "--tmpfs", "/t:size=1m", "a"]).options.mounts;
    let found: Vec<_> = mounts.iter().map(|mount| (mount.kind, mount.source.as_str(), mount.target.as_str())).collect();
    assert_eq!(
        found,
        [
            (MountKind::Bind, "/h", "/c"),
            (MountKind::Volume, "data", "/d"),
            (MountKind::Volume, "", "/anon"),
            (MountKind::Tmpfs, "", "/t")
        ]
    );
    assert_eq!(mounts[0].options, ["rbind", "ro", "rprivate"]);
    let one = &run(&["--mount", "type=bind,src=/h,dst=/c,ro", "a"]).options.mounts[0];
    assert_eq!((one.options.clone(), one.make), (vec!["rbind".into(), "ro".into(), "rprivate".into()], false));
    for bad in ["../x:/c:what", "a b:/c", "x:rel", "/h:/", "/h:/a/../b", ":/c", "/a:/b:ro:x", "~/x:/c"] {
        assert!(parse(&["container", "run", "-v", bad, "a"]).is_err(), "{bad}");
    }
    for bad in [
        "type=bind,dst=/c",
        "type=tmpfs,src=/x,dst=/c",
        "type=what,dst=/c",
        "dst=/c,what=1",
        "type=bind,src=/h,dst=/c,tmpfs-size=1m",
    ] {
        assert!(parse(&["container", "run", "--mount", bad, "a"]).is_err(), "{bad}");
    }
    refused(&["run", "-v", "/a:/c", "-v", "/b:/c/", "a"], "two mounts");
}

#[test]
fn mistakes_are_named_with_what_would_be_right() {
    for (line, words) in [
        (&["run", "--restart", "often", "a"][..], "unless-stopped"),
        (&["run", "--rm", "--restart", "always", "a"], "exclude each other"),
        (&["run", "--network", "what", "a"], "container:ID"),
        (&["run", "--network", "none", "-p", "80", "a"], "--network bridge"),
        (&["run", "--cap-add", "FLY", "a"], "capabilities(7)"),
        (&["run", "--cpus", "0", "a"], "at least"),
        (&["run", "--memory", "0", "a"], "above 0"),
        (&["run", "--memory", "2m", "--memory-swap", "1m", "a"], "together"),
        (&["run", "--ulimit", "nofile=2:1", "a"], "soft limit"),
        (&["run", "--security-opt", "what", "a"], "no-new-privileges"),
        (&["run", "--log-opt", "max-size=1", "a"], "at least 4k"),
        (&["run", "--log-opt", "max-file=0", "a"], "1 to 1000"),
        (&["run", "--hostname", "a b", "a"], "host's name"),
        (&["run", "--dns", "x", "a"], "IP address"),
        (&["run", "--pull", "x", "a"], "missing"),
        (&["run", "--stop-signal", "NOPE", "a"], "NOPE"),
        (&["run", "--detach-keys", "ctrl-?", "a"], "ctrl-"),
        (&["run", "--init", "a"], "--init"),
        (&["run", "--health-cmd", "x", "a"], "--health-cmd"),
        (&["start"], "ls --all"),
        (&["update", "a"], "no limit"),
        (&["logs", "--tail", "x", "a"], "--tail"),
        (&["ls", "--filter", "x=y"], "label"),
        (&["ls", "--filter", "status=x"], "running"),
        (&["exec", "a"], "needs a command"),
    ] {
        refused(line, words);
    }
}

#[test]
fn policies_networks_and_keys_are_read() {
    assert_eq!(run(&["--restart", "on-failure:3", "a"]).options.restart, Restart::OnFailure(3));
    assert_eq!(run(&["--network", "container:web", "a"]).options.network, Network::Container("web".into()));
    assert_eq!(run(&["--detach-keys", "ctrl-a,d", "a"]).streams.detach_keys, DetachKeys(vec![1, b'd']));
    assert_eq!(run(&["--entrypoint", "", "a"]).options.entrypoint, Some(vec![]));
    assert_eq!(run(&["--cpus", "1.5", "a"]).options.limits.cpus, Some(1500));
    assert!(!run(&["--sig-proxy=false", "a"]).streams.sig_proxy);
}

#[test]
fn several_values_of_a_filter_widen_it_and_labels_narrow_it() {
    let ls = |filters: &[&str]| {
        let flags: Vec<&str> = filters.iter().flat_map(|filter| ["--filter", filter]).collect();
        match parse(&[&["container", "ls"], &flags[..]].concat()).unwrap() {
            Container::Ls(ls) => ls,
            other => panic!("{other:?}"),
        }
    };
    let found =
        |key: &str, value: &str| matches!((key, value), ("status", "running") | ("label", "a") | ("label", "b=1"));
    assert!(ls(&["status=exited", "status=running"]).selection.selects(found));
    assert!(ls(&["label=a", "label=b=1"]).selection.selects(found));
    assert!(!ls(&["label=a", "label=c"]).selection.selects(found));
    assert!(!ls(&["status=running", "id=x"]).selection.selects(found));
}
