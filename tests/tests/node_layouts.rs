//! `runx-node` on nodes whose distribution has containerd's files and programs elsewhere.

use std::fs;
use std::os::unix::fs::symlink;

use runx_tests::machine::{Machine, newer_packages, serves, usual};
use runx_tests::needs_machine;
use serde_json::Value;

#[test]
fn on_rke2_the_program_is_where_its_link_leads() {
    needs_machine!();
    let base = "var/lib/rancher/rke2";
    let directory = format!("{base}/agent/etc/containerd");
    for package in newer_packages() {
        let imports = format!("imports = [\"/{directory}/config-v3.toml.d/*.toml\"]\n");
        let machine = Machine::prepare(&package, None);
        machine.write(&format!("{directory}/config.toml"), &usual(3, &imports));
        fs::write(machine.path().join("config"), format!("/{directory}/config.toml")).expect("write a file");
        let programs = machine.root().join(base).join("data/v1.36.4-rke2r1-0123456789ab/bin");
        fs::create_dir_all(&programs).expect("make a directory");
        fs::rename(machine.root().join("usr/local/bin/containerd"), programs.join("containerd")).expect("move it");
        symlink("/var/lib/rancher/rke2/bin/containerd", machine.root().join("usr/local/bin/containerd")).expect("link");
        symlink("data/v1.36.4-rke2r1-0123456789ab/bin", machine.root().join(base).join("bin")).expect("make a link");
        machine.set_programs("one");
        machine.restart();
        let words = ["--socket", "/run/containerd/containerd.sock"];
        let before = machine.files("var/lib/rancher");
        machine.node(&[&["install"], &words[..]].concat()).ok();
        serves(&machine, true);
        assert_eq!(status_of(&machine, &words)["distribution"], "rke2");
        machine.node(&[&["uninstall"], &words[..]].concat()).ok();
        assert_eq!(machine.files("var/lib/rancher"), before);
    }
}

fn status_of(machine: &Machine, words: &[&str]) -> Value {
    let done = machine.node(&[&["status", "--format", "json"], words].concat());
    serde_json::from_str(&done.stdout).expect("it is JSON")
}

#[test]
fn on_k0s_a_drop_in_that_it_merges_into_its_own_file_is_not_somebody_elses() {
    needs_machine!();
    let (main, drop_in) = ("etc/k0s/containerd.toml", "etc/k0s/containerd.d/runx.toml");
    let words = ["--containerd", "/usr/local/bin/containerd", "--socket", "/run/containerd/containerd.sock"];
    for package in newer_packages() {
        let imports = "imports = [\"/etc/k0s/containerd.d/*.toml\"]\n";
        let managed = format!("# k0s_managed=true\n{}\n", usual(3, imports));
        let machine = Machine::prepare(&package, None);
        machine.write(main, &managed);
        fs::write(machine.path().join("config"), format!("/{main}")).expect("write a file");
        machine.set_programs("one");
        machine.restart();
        machine.node(&[&["install"], &words[..]].concat()).ok();
        serves(&machine, true);
        let text = machine.read(drop_in);
        // As k0s does with what is of CRI.
        machine.write(main, &(managed.clone() + &text[text.find('[').expect("it has tables")..]));
        let restarts = machine.restarts();
        machine.node(&[&["install"], &words[..]].concat()).ok();
        assert_eq!((machine.read(drop_in), machine.restarts()), (text, restarts));
        machine.write(main, &managed);
        machine.node(&[&["uninstall"], &words[..]].concat()).ok();
        assert_eq!(machine.read(main), managed);
        assert!(!machine.root().join(drop_in).exists());
        // A handler that is there without us is another one's.
        machine.write(
            main,
            &(managed.clone()
                + "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runx]\nruntime_type = 'x'\n"),
        );
        machine.node(&[&["install"], &words[..]].concat()).fails(1, &["not by runx-node"]);
        // A file that k0s does not make imports what its owner says.
        machine.write(main, &usual(3, ""));
        machine
            .node(&[&["install"], &words[..]].concat())
            .fails(1, &["k0s_managed=true", "/etc/k0s/containerd.d/*.toml"]);
        assert_eq!(machine.read(main), usual(3, ""));
        assert!(!machine.root().join(drop_in).exists());
    }
}
