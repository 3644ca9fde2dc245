//! Honest archives come out as they were, and hostile ones touch nothing outside.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use ::tar::{Builder, EntryType, Header};
use runx_image::Digest;
use runx_image::layer::Form;
use rustix::fs::lgetxattr;
use tempfile::TempDir;

use super::*;

/// A place to unpack into, with neighbours that nothing may touch.
struct Place {
    dir: TempDir,
    before: Vec<String>,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        fs::create_dir(dir.path().join("diff")).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        fs::write(dir.path().join("outside/secret"), "secret").unwrap();
        fs::write(dir.path().join("victim"), "untouched").unwrap();
        let mut place = Self { dir, before: Vec::new() };
        place.before = place.outside();
        place
    }

    fn diff(&self) -> PathBuf {
        self.dir.path().join("diff")
    }

    /// All that is beside the tree: names, kinds, owners, modes, numbers of names, content.
    fn outside(&self) -> Vec<String> {
        fn below(dir: &Path, list: &mut Vec<String>) {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let m = fs::symlink_metadata(&path).unwrap();
                let content = if m.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
                // A directory's own time may change with the tree in it.
                let time = if m.is_dir() { 0 } else { m.mtime_nsec() + m.mtime() * 1_000_000_000 };
                list.push(format!(
                    "{} {:o} {}:{} {} {time} {content:?}",
                    path.display(),
                    m.mode(),
                    m.uid(),
                    m.gid(),
                    m.nlink()
                ));
                if m.is_dir() && path.file_name().unwrap() != "diff" {
                    below(&path, list);
                }
            }
        }
        let mut list = Vec::new();
        below(self.dir.path(), &mut list);
        list.retain(|line| !line.starts_with(&self.diff().display().to_string()));
        list.sort();
        list
    }

    fn unpack(&self, archive: &[u8]) -> Result<Unpacked, Error> {
        let done = unpack(archive, &self.diff(), Limit::Bytes(1 << 30));
        assert_eq!(self.outside(), self.before, "something outside was touched");
        done
    }

    fn has(&self, path: &str) -> bool {
        fs::symlink_metadata(self.diff().join(path)).is_ok()
    }
}

/// Builds archives, also such as no honest program writes.
struct Tar(Vec<u8>);

impl Tar {
    fn new() -> Self {
        Self(Vec::new())
    }

    fn add(mut self, kind: EntryType, path: &str, link: &str, data: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        let name = &mut header.as_mut_bytes()[..100];
        name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(if kind == EntryType::Directory { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        header.set_size(data.len() as u64);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, path: &str) -> Self {
        self.add(EntryType::Regular, path, "", b"data")
    }

    fn dir(self, path: &str) -> Self {
        self.add(EntryType::Directory, path, "", b"")
    }

    fn symlink(self, path: &str, to: &str) -> Self {
        self.add(EntryType::Symlink, path, to, b"")
    }

    fn hard_link(self, path: &str, to: &str) -> Self {
        self.add(EntryType::Link, path, to, b"")
    }

    /// The next entry's extended header.
    fn pax(self, records: &[(&str, &str)]) -> Self {
        let mut content = Vec::new();
        for (key, value) in records {
            let rest = format!(" {key}={value}\n");
            let mut length = rest.len() + 1;
            while format!("{length}{rest}").len() != length {
                length += 1;
            }
            content.extend_from_slice(format!("{length}{rest}").as_bytes());
        }
        self.add(EntryType::XHeader, "pax", "", &content)
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("SKIPPED: only root can give files to others");
    }
    root
}

fn refused(archive: Vec<u8>) -> String {
    let place = Place::new();
    let e = place.unpack(&archive).unwrap_err();
    assert!(matches!(e, Error::Hostile { .. }), "{e}");
    e.to_string()
}

#[test]
fn a_path_that_leads_upwards_is_refused() {
    for path in ["../victim", "a/../../victim", "..", "a/..", "/../victim", "./../outside/secret"] {
        assert!(refused(Tar::new().dir("a").file(path).end()).contains("upwards"), "{path}");
        refused(Tar::new().dir("a").dir(path).end());
        refused(Tar::new().dir("a").symlink(path, "x").end());
    }
}

#[test]
fn an_absolute_path_is_one_in_the_layer() {
    let place = Place::new();
    let inside = place.dir.path().join("victim");
    place.unpack(&Tar::new().file(inside.to_str().unwrap()).file("//etc///x").end()).unwrap();
    assert!(place.has(inside.strip_prefix("/").unwrap().to_str().unwrap()));
    assert!(place.has("etc/x"));
}

#[test]
fn a_link_to_the_outside_is_not_followed() {
    let outside = |place: &Place| place.dir.path().join("outside").display().to_string();
    // By an absolute and a relative link, of one and of two steps, to a directory and to a file.
    let place = Place::new();
    let absolute = outside(&place);
    for (link, to) in [("l", "../outside"), ("l", absolute.as_str()), ("l", ".."), ("l", "/")] {
        let place = Place::new();
        // In the layer that place does not exist, or is in the layer.
        let _ = place.unpack(&Tar::new().symlink(link, to).file("l/secret").end());
        let _ = place.unpack(&Tar::new().symlink("m", to).symlink(link, "m").file("l/victim").end());
        let _ = place.unpack(&Tar::new().symlink(link, to).dir("l").file("l/new").end());
        let _ = place.unpack(&Tar::new().symlink(link, to).add(EntryType::Fifo, "l/pipe", "", b"").end());
        let _ = place.unpack(&Tar::new().symlink(link, to).file("l/.wh.secret").end());
        let _ = place.unpack(&Tar::new().symlink(link, to).file("l/.wh..wh..opq").end());
    }
    // A file in a link's place takes it, and does not go through it.
    let place = Place::new();
    let victim = place.dir.path().join("victim").display().to_string();
    place.unpack(&Tar::new().symlink("f", &victim).file("f").end()).unwrap();
    assert!(fs::symlink_metadata(place.diff().join("f")).unwrap().is_file());
    place.unpack(&Tar::new().symlink("g", "../victim").file("g").end()).unwrap();
    place.unpack(&Tar::new().symlink("d", "../outside").dir("d").end()).unwrap();
    assert!(fs::symlink_metadata(place.diff().join("d")).unwrap().is_dir());
}

#[test]
fn links_within_the_layer_are_followed_in_it() {
    let place = Place::new();
    let archive = Tar::new().dir("usr").dir("usr/lib").symlink("lib", "/usr/lib").file("lib/x").end();
    place.unpack(&archive).unwrap();
    assert!(place.has("usr/lib/x"));
    let place = Place::new();
    assert!(place.unpack(&Tar::new().symlink("a", "b").symlink("b", "a").file("a/x").end()).is_err());
}

#[test]
fn a_hard_link_to_the_outside_is_refused() {
    let place = Place::new();
    for to in ["../victim", "/../victim", "..", "."] {
        refused(Tar::new().hard_link("h", to).end());
    }
    let victim = place.dir.path().join("victim").display().to_string();
    assert!(place.unpack(&Tar::new().hard_link("h", &victim).end()).is_err());
    let place = Place::new();
    assert!(place.unpack(&Tar::new().symlink("l", "../outside").hard_link("h", "l/secret").end()).is_err());
    // One to a link is to the link itself.
    let place = Place::new();
    let victim = place.dir.path().join("victim").display().to_string();
    place.unpack(&Tar::new().symlink("l", &victim).hard_link("h", "l").file("h").end()).unwrap();
    // Neither to a directory, nor to what was removed.
    refused(Tar::new().dir("d").hard_link("h", "d").end());
    refused(Tar::new().file(".wh.gone").hard_link("h", "gone").end());
}

#[test]
fn whiteouts_remove_names_and_nothing_else() {
    if !is_root() {
        return;
    }
    for path in [".wh...", ".wh..", ".wh.", "a/.wh..."] {
        refused(Tar::new().dir("a").file(path).end());
    }
    refused(Tar::new().file(".wh.a/b").end());
    let place = Place::new();
    let archive = Tar::new().dir("a").file("a/.wh.gone").file("b/.wh..wh..opq").file(".wh..wh.plnk/x").end();
    let unpacked = place.unpack(&archive).unwrap();
    let gone = fs::symlink_metadata(place.diff().join("a/gone")).unwrap();
    assert_eq!((gone.mode() & 0o170000, gone.rdev()), (0o020000, 0));
    let opaque = |path: &str| {
        lgetxattr(place.diff().join(path), Form::current().opaque(), &mut [0_u8; 4][..]).is_ok_and(|length| length == 1)
    };
    assert!(opaque("b") && !opaque("a"));
    assert!(!place.has(".wh..wh.plnk"));
    assert_eq!(unpacked.implied, [b"b".to_vec()]);
}

#[test]
fn what_is_removed_and_comes_again_hides_what_was_below() {
    if !is_root() {
        return;
    }
    let orders = [
        Tar::new().file(".wh.a").dir("a").file("a/x").end(),
        Tar::new().dir("a").file("a/x").file(".wh.a").end(),
        Tar::new().file(".wh.a").file("a/x").end(),
    ];
    for archive in orders {
        let place = Place::new();
        place.unpack(&archive).unwrap();
        let opaque = lgetxattr(place.diff().join("a"), Form::current().opaque(), &mut [0_u8; 4][..]);
        assert_eq!(opaque, Ok(1));
        assert!(place.has("a/x"));
    }
    // Below what is no directory any more there is nothing to remove.
    let place = Place::new();
    let archive = Tar::new().dir("d").file("d/kept").symlink("l", "d").file("l/.wh.kept").file("f").file("f/.wh.x");
    place.unpack(&archive.file("f/.wh..wh..opq").file("l/.wh..wh..opq").end()).unwrap();
    assert!(fs::metadata(place.diff().join("d/kept")).unwrap().is_file() && place.has("f"));
    assert!(lgetxattr(place.diff().join("d"), Form::current().opaque(), &mut [0_u8; 4][..]).is_err());
    let place = Place::new();
    place.unpack(&Tar::new().file("f").file(".wh.f").end()).unwrap();
    assert!(fs::symlink_metadata(place.diff().join("f")).unwrap().is_file());
}

#[test]
fn overlays_own_marks_cannot_be_smuggled_in() {
    if !is_root() {
        return;
    }
    let mut device = Header::new_gnu();
    device.set_path("d").unwrap();
    device.set_entry_type(EntryType::Char);
    device.set_mode(0);
    device.set_uid(0);
    device.set_gid(0);
    device.set_mtime(0);
    device.set_size(0);
    device.set_device_major(0).unwrap();
    device.set_device_minor(0).unwrap();
    device.set_cksum();
    let mut archive = device.as_bytes().to_vec();
    archive.resize(2048, 0);
    refused(archive);
    let place = Place::new();
    let attributes = [
        ("SCHILY.xattr.trusted.overlay.redirect", "/outside"),
        ("SCHILY.xattr.trusted.overlay.metacopy", "y"),
        ("SCHILY.xattr.user.overlay.opaque", "y"),
        ("SCHILY.xattr.user.kept", "1"),
    ];
    place.unpack(&Tar::new().pax(&attributes).dir("d").end()).unwrap();
    let has = |name: &str| lgetxattr(place.diff().join("d"), name, &mut [0_u8; 16][..]).is_ok();
    assert!(has("user.kept"));
    for name in ["trusted.overlay.redirect", "trusted.overlay.metacopy", "user.overlay.opaque"] {
        assert!(!has(name), "{name}");
    }
}

#[test]
fn an_entry_in_another_ones_place_takes_it() {
    let place = Place::new();
    let archive = Tar::new()
        .dir("a")
        .file("a/x")
        .file("a")
        .file("b")
        .dir("b")
        .file("b/x")
        .symlink("c", "b")
        .symlink("c", "a")
        .dir("e")
        .file("e/x")
        .file("e/y")
        .symlink("e", "b")
        .file("e/z")
        .end();
    place.unpack(&archive).unwrap();
    assert!(fs::metadata(place.diff().join("a")).unwrap().is_file());
    assert!(place.has("b/x") && place.has("b/z") && !place.has("b/y"));
    assert_eq!(fs::read_link(place.diff().join("c")).unwrap(), Path::new("a"));
}

#[test]
fn damaged_and_endless_archives_are_refused() {
    let good = Tar::new().dir("a").file("a/x").end();
    for length in [1, 511, 513, 1000, 1536 + 100] {
        let place = Place::new();
        let done = place.unpack(&good[..length]);
        assert!(done.is_err(), "{length}");
    }
    let mut wrong = good.clone();
    wrong[100] ^= 1;
    assert!(matches!(Place::new().unpack(&wrong), Err(Error::Archive(_))));
    // Headers that claim what would not fit anywhere.
    let mut huge = Header::new_gnu();
    huge.set_entry_type(EntryType::GNULongName);
    huge.set_size(1 << 40);
    huge.set_cksum();
    assert!(matches!(Place::new().unpack(huge.as_bytes()), Err(Error::Archive(_))));
    for record in
        [("size", "-1"), ("uid", "x"), ("mtime", "1.x"), ("size", "99999999999999999999"), ("uid", "4294967296")]
    {
        assert!(Place::new().unpack(&Tar::new().pax(&[record]).file("f").end()).is_err(), "{record:?}");
    }
    assert!(Place::new().unpack(&Tar::new().add(EntryType::XHeader, "p", "", b"9999 a=b\n").file("f").end()).is_err());
    assert!(Place::new().unpack(&Tar::new().pax(&[("path", "x")]).end()).is_err());
    let deep = "d/".repeat(2000);
    assert!(Place::new().unpack(&Tar::new().pax(&[("path", &deep)]).dir("d").end()).is_err());
}

#[test]
fn what_decompresses_to_more_than_is_allowed_is_refused() {
    // 4 MiB of zeros are some 4 KiB with gzip, and much less with zstd.
    let plain = {
        let mut builder = Builder::new(Vec::new());
        let mut header = Header::new_gnu();
        header.set_path("zeros").unwrap();
        header.set_size(4 << 20);
        header.set_mode(0o644);
        header.set_mtime(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_cksum();
        builder.append(&header, std::io::repeat(0).take(4 << 20)).unwrap();
        builder.into_inner().unwrap()
    };
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(&plain).unwrap();
    let zstd = zstd::encode_all(plain.as_slice(), 3).unwrap();
    // Behind an archive's end, too.
    let mut behind = Tar::new().file("f").end();
    behind.extend(std::iter::repeat_n(0, 4 << 20));
    let zeros = |place: &Place| fs::metadata(place.diff().join("zeros")).map_or(0, |m| m.len());
    let gzip = gzip.finish().unwrap();
    for archive in [&gzip, &zstd, &plain, &behind] {
        let place = Place::new();
        let e = unpack(archive.as_slice(), &place.diff(), Limit::Bytes(1 << 20)).unwrap_err();
        assert!(matches!(e, Error::TooLarge { limit } if limit == 1 << 20), "{e}");
        assert!(zeros(&place) <= 1 << 20);
    }
    // While it comes, it is what came that counts.
    for archive in [&gzip, &zstd] {
        let place = Place::new();
        let e = unpack(archive.as_slice(), &place.diff(), Limit::Growing { least: 1 << 20 }).unwrap_err();
        let expected = 200 * archive.len() as u64;
        assert!(matches!(e, Error::TooSoon { limit, .. } if limit <= expected.max(1 << 20)), "{e}");
        assert!(zeros(&place) <= expected.max(1 << 20));
    }
    unpack(plain.as_slice(), &Place::new().diff(), Limit::Growing { least: 1 << 20 }).unwrap();
}

#[test]
fn all_that_an_archive_says_is_kept() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(150));
    let capability: Vec<u8> = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0].to_vec();
    let mut builder = Builder::new(Vec::new());
    let header = |mode: u32, kind: EntryType, size: u64| {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(3_000_000);
        header.set_gid(7);
        header.set_mtime(1_234_567_890);
        header.set_size(size);
        header
    };
    builder.append_data(&mut header(0o1777, EntryType::Directory, 0), "tmp/", &[][..]).unwrap();
    builder.append_data(&mut header(0o4755, EntryType::Regular, 3), "tmp/suid", &b"abc"[..]).unwrap();
    builder
        .append_pax_extensions([("SCHILY.xattr.security.capability", capability.as_slice()), ("mtime", b"-1.25")])
        .unwrap();
    builder.append_data(&mut header(0o755, EntryType::Regular, 0), "tmp/capable", &[][..]).unwrap();
    builder.append_data(&mut header(0o644, EntryType::Regular, 1), &long, &b"x"[..]).unwrap();
    builder.append_link(&mut header(0o777, EntryType::Symlink, 0), "link", "l".repeat(200)).unwrap();
    builder.append_link(&mut header(0o644, EntryType::Link, 0), "again", "tmp/suid").unwrap();
    builder.append_data(&mut header(0o600, EntryType::Fifo, 0), "fifo", &[][..]).unwrap();
    let mut device = header(0o666, EntryType::Char, 0);
    device.set_device_major(1).unwrap();
    device.set_device_minor(5).unwrap();
    builder.append_data(&mut device, "zero", &[][..]).unwrap();
    let archive = builder.into_inner().unwrap();
    let digest = Digest::of(&archive);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&archive).unwrap();
    let unpacked = place.unpack(&gzip.finish().unwrap()).unwrap();
    assert_eq!(unpacked.diff_id, digest);
    assert_eq!((unpacked.size, unpacked.entries), (4, 8));
    let look = |path: &str| fs::symlink_metadata(place.diff().join(path)).unwrap();
    let tmp = look("tmp");
    assert_eq!((tmp.mode() & 0o7777, tmp.uid(), tmp.gid(), tmp.mtime()), (0o1777, 3_000_000, 7, 1_234_567_890));
    let suid = look("tmp/suid");
    assert_eq!((suid.mode() & 0o7777, suid.nlink(), suid.ino()), (0o4755, 2, look("again").ino()));
    let mut value = [0; 64];
    let length = lgetxattr(place.diff().join("tmp/capable"), "security.capability", &mut value[..]).unwrap();
    assert_eq!(value[..length], capability);
    assert_eq!((look("tmp/capable").mtime(), look("tmp/capable").mtime_nsec()), (-2, 750_000_000));
    assert_eq!(look(&long).len(), 1);
    assert_eq!((look("link").uid(), look("link").mtime()), (3_000_000, 1_234_567_890));
    assert_eq!(look("fifo").mode(), 0o010600);
    assert_eq!((look("zero").mode(), look("zero").rdev()), (0o020666, rustix::fs::makedev(1, 5)));
}

/// What GNU tar makes of a directory comes out as it was, in every form that it knows.
#[test]
fn archives_of_gnu_tar_come_out_as_they_were() {
    let from = tempfile::tempdir_in("/var/tmp").unwrap();
    let sparse = File::create(from.path().join("sparse")).unwrap();
    for at in [0_u64, 1 << 20, 3 << 20, 50 << 20] {
        std::os::unix::fs::FileExt::write_all_at(&sparse, &[7; 8192], at).unwrap();
    }
    // More pieces than one header has room for.
    let many = File::create(from.path().join("many")).unwrap();
    for number in 0..60_u64 {
        std::os::unix::fs::FileExt::write_all_at(&many, b"x", number << 16).unwrap();
    }
    many.set_len(8 << 20).unwrap();
    fs::write(from.path().join("n".repeat(200)), "long").unwrap();
    fs::write(from.path().join("\u{e4}\u{20ac}"), "name").unwrap();
    symlink("t".repeat(180), from.path().join("link")).unwrap();
    fs::set_permissions(from.path().join("link").with_file_name("many"), fs::Permissions::from_mode(0o640)).unwrap();
    let forms: [&[&str]; 6] = [
        &["--format=gnu"],
        &["--format=gnu", "--sparse"],
        &["--format=pax", "--sparse", "--sparse-version=0.0"],
        &["--format=pax", "--sparse", "--sparse-version=0.1"],
        &["--format=pax", "--sparse", "--sparse-version=1.0"],
        &["--format=posix", "--xattrs"],
    ];
    for form in forms {
        let packed =
            std::process::Command::new("tar").args(form).arg("-cf-").arg("-C").arg(from.path()).arg(".").output();
        let Ok(packed) = packed else {
            println!("SKIPPED: tar is not installed");
            return;
        };
        assert!(packed.status.success(), "{form:?}");
        let place = Place::new();
        place.unpack(&packed.stdout).unwrap();
        for entry in fs::read_dir(from.path()).unwrap() {
            let name = entry.unwrap().file_name();
            let (was, is) = (from.path().join(&name), place.diff().join(&name));
            let (before, after) = (fs::symlink_metadata(&was).unwrap(), fs::symlink_metadata(&is).unwrap());
            assert_eq!(
                (before.mode(), before.len(), before.mtime()),
                (after.mode(), after.len(), after.mtime()),
                "{form:?} {name:?}"
            );
            if before.is_file() {
                assert!(fs::read(&was).unwrap() == fs::read(&is).unwrap(), "{form:?} {name:?}");
            } else {
                assert_eq!(fs::read_link(&was).unwrap(), fs::read_link(&is).unwrap());
            }
            if form.contains(&"--sparse") && name == "sparse" {
                assert!(after.blocks() * 512 < after.len() / 2, "{form:?}: holes were filled");
            }
        }
    }
}

#[test]
fn a_directory_packed_and_unpacked_is_the_same() {
    if !is_root() {
        return;
    }
    let from = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = |name: &str| from.path().join(name);
    fs::create_dir(path("dir")).unwrap();
    fs::set_permissions(path("dir"), fs::Permissions::from_mode(0o2750)).unwrap();
    fs::write(path("dir/file"), "content").unwrap();
    std::os::unix::fs::lchown(path("dir/file"), Some(1000), Some(100)).unwrap();
    fs::set_permissions(path("dir/file"), fs::Permissions::from_mode(0o4711)).unwrap();
    fs::hard_link(path("dir/file"), path("dir/other")).unwrap();
    symlink("/outside", path("link")).unwrap();
    rustix::fs::lsetxattr(path("dir"), "user.x", b"y", rustix::fs::XattrFlags::empty()).unwrap();
    let mut packed = Vec::new();
    crate::pack::directory(from.path(), &mut packed).unwrap();
    let mut again = Vec::new();
    crate::pack::directory(from.path(), &mut again).unwrap();
    assert!(packed == again, "the same directory is not the same archive");
    let place = Place::new();
    place.unpack(&packed).unwrap();
    for name in ["dir", "dir/file", "dir/other", "link"] {
        let (was, is) =
            (fs::symlink_metadata(path(name)).unwrap(), fs::symlink_metadata(place.diff().join(name)).unwrap());
        assert_eq!(
            (was.mode(), was.uid(), was.gid(), was.mtime(), was.mtime_nsec(), was.nlink()),
            (is.mode(), is.uid(), is.gid(), is.mtime(), is.mtime_nsec(), is.nlink()),
            "{name}"
        );
    }
    assert!(lgetxattr(place.diff().join("dir"), "user.x", &mut [0_u8; 4][..]).is_ok());
    fs::write(path(".wh.file"), "").unwrap();
    assert!(crate::pack::directory(from.path(), &mut Vec::new()).is_err());
}

#[test]
fn directories_that_are_implied_get_what_they_had_below() {
    if !is_root() {
        return;
    }
    let (lower, upper) = (Place::new(), Place::new());
    fs::create_dir_all(lower.diff().join("a/b")).unwrap();
    fs::set_permissions(lower.diff().join("a"), fs::Permissions::from_mode(0o711)).unwrap();
    std::os::unix::fs::lchown(lower.diff().join("a/b"), Some(5), Some(6)).unwrap();
    symlink("/outside", lower.diff().join("l")).unwrap();
    let unpacked = upper.unpack(&Tar::new().file("a/b/x").file("l/x").file("new/x").end()).unwrap();
    assert_eq!(unpacked.implied.len(), 4);
    inherit(&upper.diff(), &unpacked.implied, &[lower.diff()]).unwrap();
    let look = |path: &str| fs::metadata(upper.diff().join(path)).unwrap();
    assert_eq!(look("a").mode() & 0o7777, 0o711);
    assert_eq!((look("a/b").uid(), look("a/b").gid()), (5, 6));
    assert_eq!(look("l").mode() & 0o7777, 0o755);
    assert_eq!(lower.outside(), lower.before);
}

/// Whatever bytes come, nothing outside is touched, and nothing panics.
#[test]
fn archives_of_any_form_stay_inside() {
    let rounds = std::env::var("RUNX_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(400_u64);
    let seed = std::env::var("RUNX_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1_u64);
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below as u64).unwrap()
    };
    let names = [
        "a",
        "a/b",
        "../victim",
        "l",
        "l/x",
        ".wh.a",
        "a/.wh..wh..opq",
        "/",
        "l/../x",
        "a/b/c",
        ".wh..",
        "..",
        "l/secret",
    ];
    let links = ["a", "..", "../outside", "/", "l", "a/b", "../victim", "/a", "../../.."];
    let kinds = [
        EntryType::Regular,
        EntryType::Directory,
        EntryType::Symlink,
        EntryType::Link,
        EntryType::Fifo,
        EntryType::XHeader,
        EntryType::GNULongName,
        EntryType::GNUSparse,
        EntryType::Continuous,
    ];
    let place = Place::new();
    for round in 0..rounds {
        let mut tar = Tar::new();
        for _ in 0..1 + random(8) {
            let kind = kinds[random(kinds.len())];
            let data = if kind == EntryType::XHeader { &b"16 path=../../x\n"[..] } else { &b"../victim"[..] };
            tar = tar.add(kind, names[random(names.len())], links[random(links.len())], data);
        }
        let mut bytes = tar.end();
        if round % 4 == 0 {
            let at = random(bytes.len());
            bytes[at] ^= 1 << random(8);
        }
        // What it says does not matter; it may be right.
        let _ = place.unpack(&bytes);
    }
}
