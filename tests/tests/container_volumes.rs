//! Volumes that are filled with what the image has at their places, by commands that may be killed and are not alone.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Command, Stdio};

use runx_tests::command::{eventually, run};
use runx_tests::container::Containers;
use runx_tests::needs_root;

const FILES: usize = 3000;

/// Containers whose root filesystem has many files at /data.
fn with_many_files() -> Containers {
    let containers = Containers::new();
    let data = containers.rootfs().join("data");
    fs::create_dir(&data).unwrap();
    for number in 0..FILES {
        fs::write(data.join(format!("file{number}")), "content").unwrap();
    }
    containers
}

/// A container that counts what it finds in the volume.
fn count(containers: &Containers) -> Command {
    containers.run_command(&["--rm", "-v", "store:/data"], &["sh", "-c", "find /data -type f -size +0 | wc -l"])
}

#[test]
fn a_kill_while_a_volume_is_filled_is_mended_by_the_next_start() {
    needs_root!();
    let containers = with_many_files();
    let volume = containers.storage_root().join("volumes/store");
    let mut child = count(&containers).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    eventually("the volume is being filled", || {
        let parts = fs::read_dir(&volume).into_iter().flatten().flatten();
        parts.map(|part| fs::read_dir(part.path()).map_or(0, Iterator::count)).any(|files| files > 0)
    });
    child.kill().unwrap();
    child.wait().unwrap();
    containers.container(&["rm", "-f", "--all"]).ok();
    assert_eq!(run(&mut count(&containers)).ok().stdout.trim(), FILES.to_string());
    let names: Vec<_> = fs::read_dir(&volume).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert!(names.iter().all(|name| name == "_data" || name == ".filled"), "{names:?}");
    // It is the user's from here on.
    fs::remove_file(volume.join("_data/file7")).unwrap();
    assert_eq!(run(&mut count(&containers)).ok().stdout.trim(), (FILES - 1).to_string());
    fs::remove_dir_all(volume).unwrap();
    containers.assert_nothing_left();
}

#[test]
fn two_who_fill_a_volume_at_once_both_see_all_of_it() {
    needs_root!();
    let containers = with_many_files();
    let children: Vec<_> = (0..4).map(|_| count(&containers).stdout(Stdio::piped()).spawn().unwrap()).collect();
    for child in children {
        let out = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&out.stdout).trim(), FILES.to_string());
    }
    fs::remove_dir_all(containers.storage_root().join("volumes/store")).unwrap();
    containers.assert_nothing_left();
}

/// Something mounted, until this is dropped.
struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn what_an_administrator_has_put_in_the_place_of_a_volume_is_filled_and_stays() {
    needs_root!();
    let containers = Containers::new();
    let (rootfs, scratch) = (containers.rootfs(), containers.scratch().to_owned());
    fs::create_dir(rootfs.join("data")).unwrap();
    fs::write(rootfs.join("data/seed"), "seed").unwrap();
    let volume = |name: &str| containers.storage_root().join("volumes").join(name).join("_data");
    let prepare = |name: &str| {
        fs::create_dir_all(volume(name).parent().unwrap()).unwrap();
        let target = scratch.join(name);
        fs::create_dir(&target).unwrap();
        (volume(name), target)
    };
    let (link, target) = prepare("linked");
    symlink(&target, &link).unwrap();
    assert_eq!(containers.run(&["--rm", "-v", "linked:/data"], &["cat", "/data/seed"]).ok().stdout, "seed");
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(fs::read_to_string(target.join("seed")).unwrap(), "seed");

    let (place, target) = prepare("mounted");
    fs::create_dir(&place).unwrap();
    let bind = nix::mount::MsFlags::MS_BIND;
    nix::mount::mount(Some(&target), &place, None::<&str>, bind, None::<&str>).unwrap();
    let mounted = Mounted(place.clone());
    assert_eq!(containers.run(&["--rm", "-v", "mounted:/data"], &["cat", "/data/seed"]).ok().stdout, "seed");
    assert_eq!(fs::read_to_string(target.join("seed")).unwrap(), "seed");
    drop(mounted);
    assert_eq!(fs::read_dir(&place).unwrap().count(), 0);

    // The rest of a fill that was killed is no content of somebody's.
    let (link, target) = prepare("killed");
    symlink(&target, &link).unwrap();
    fs::write(target.join("seed"), "se").unwrap();
    fs::write(link.with_file_name(".filling"), "").unwrap();
    assert_eq!(containers.run(&["--rm", "-v", "killed:/data"], &["cat", "/data/seed"]).ok().stdout, "seed");
    assert!(!link.with_file_name(".filling").exists());

    // Where the image has nothing, nothing is changed.
    let (place, _) = prepare("owned");
    fs::create_dir(&place).unwrap();
    std::os::unix::fs::chown(&place, Some(1234), Some(5678)).unwrap();
    fs::set_permissions(&place, fs::Permissions::from_mode(0o2770)).unwrap();
    let shown = containers.run(&["--rm", "-v", "owned:/nothing"], &["stat", "-c", "%u %g %a", "/nothing"]).ok().stdout;
    assert_eq!(shown.trim(), "1234 5678 2770");
    fs::remove_dir_all(containers.storage_root().join("volumes")).unwrap();
    containers.assert_nothing_left();
}
