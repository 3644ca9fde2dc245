//! Putting an archive's entries into a directory.
//!
//! Every path is looked up below the directory by the kernel (`openat2` with `RESOLVE_IN_ROOT`), and used by descriptor and
//! a single name from there. So nothing that an archive says leads out of it: neither `..` nor an absolute path nor a link.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use runx_image::layer::Form;
use runx_image::rootfs;
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags, chownat, fchmod,
    fchown, fsetxattr, ftruncate, futimens, linkat, lsetxattr, makedev, mkdirat, mknodat, open, openat, openat2,
    statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

use super::Error;
use super::tar::{Archive, Entry, Kind};

const OPAQUE: &[u8] = b".wh..wh..opq";

pub(super) struct Tree {
    root: OwnedFd,
    form: Form,
    /// The directory that the last entry was in: the next one mostly is, too.
    last: Option<(Vec<u8>, OwnedFd)>,
    /// Directories' times are set when nothing more is put into them.
    times: BTreeMap<Vec<u8>, (i64, u32)>,
    implied: BTreeSet<Vec<u8>>,
    size: u64,
    entries: u64,
    buffer: Vec<u8>,
}

/// An entry's place: a directory, and a name in it.
type Place<'a> = (BorrowedFd<'a>, &'a CStr);

impl Tree {
    pub(super) fn open(root: &Path, form: Form) -> Result<Self, Error> {
        let opened = open(root, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        let entry = root.display().to_string();
        let root = opened.map_err(|e| Error::System { operation: "open", entry, source: e.into() })?;
        let buffer = vec![0; 1 << 18];
        Ok(Self {
            root,
            form,
            last: None,
            times: BTreeMap::new(),
            implied: BTreeSet::new(),
            size: 0,
            entries: 0,
            buffer,
        })
    }

    pub(super) fn apply_all<R: Read>(&mut self, archive: &mut Archive<R>) -> Result<(), Error> {
        while let Some(entry) = archive.next().map_err(Error::Archive)? {
            self.apply(archive, &entry)?;
        }
        Ok(())
    }

    fn apply<R: Read>(&mut self, archive: &mut Archive<R>, entry: &Entry) -> Result<(), Error> {
        let path = clean(&entry.path)?;
        if entry.kind == Kind::Other {
            return Ok(());
        }
        let Some((name, parents)) = path.split_last() else {
            // The root directory itself.
            return match entry.kind {
                Kind::Directory => {
                    self.times.insert(Vec::new(), entry.mtime);
                    dress_fd(self.root.as_fd(), entry, self.form)
                }
                _ => Err(hostile(entry, "it is the root directory, and no directory")),
            };
        };
        // What aufs kept for itself, which old images have.
        let is_private = |part: &&[u8]| part.starts_with(b".wh..wh.") && **part != *OPAQUE;
        if path.iter().any(is_private) {
            return Ok(());
        }
        if parents.iter().any(|part| part.starts_with(b".wh.")) {
            return Err(hostile(entry, "it is below something that was removed"));
        }
        self.entries += 1;
        let parent_path = parents.join(&b'/');
        if name.starts_with(b".wh.") && self.is_hidden(&parent_path) {
            return Ok(());
        }
        let parent = self.parent(&parent_path, entry)?;
        let done = if *name == OPAQUE {
            self.hide_below(parent.as_fd()).map_err(|e| failed("hide what is below", entry, e))
        } else if let Some(removed) = name.strip_prefix(b".wh.") {
            self.whiteout(parent.as_fd(), removed, entry)
        } else {
            let name = CString::new(*name).map_err(|_| hostile(entry, "its name has a zero byte"))?;
            self.make(archive, (parent.as_fd(), &name), &path.join(&b'/'), entry)
        };
        // It may have been removed by what was just done.
        if self.last.is_none() {
            self.last = Some((parent_path, parent));
        }
        done
    }

    /// The directory of an entry, made if the archive does not have it.
    fn parent(&mut self, path: &[u8], entry: &Entry) -> Result<OwnedFd, Error> {
        if let Some((_, fd)) = self.last.take_if(|(last, _)| last == path) {
            return Ok(fd);
        }
        self.last = None;
        match look_up(self.root.as_fd(), path) {
            Ok(fd) => return Ok(fd),
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(e) => return Err(failed("find the directory of", entry, e)),
        }
        let mut at = look_up(self.root.as_fd(), b"").map_err(|e| failed("find the directory of", entry, e))?;
        let mut end = 0;
        for part in path.split(|byte| *byte == b'/') {
            end += part.len() + usize::from(end > 0);
            let upto = &path[..end];
            at = match look_up(self.root.as_fd(), upto) {
                Ok(fd) => fd,
                Err(e @ (Errno::NOENT | Errno::NOTDIR)) => {
                    let name = CString::new(part).map_err(|_| hostile(entry, "its path has a zero byte"))?;
                    // Something that this layer removed has come again, and is not what it was.
                    let again = e == Errno::NOTDIR && is_whiteout((at.as_fd(), &name));
                    if again {
                        unlinkat(&at, &name, AtFlags::empty())
                            .map_err(|e| failed("make the directory of", entry, e))?;
                    }
                    match mkdirat(&at, &name, Mode::from_raw_mode(0o755)) {
                        Ok(()) => {}
                        Err(Errno::EXIST) => return Err(hostile(entry, "it is below something that is no directory")),
                        Err(e) => return Err(failed("make the directory of", entry, e)),
                    }
                    let made =
                        look_up(self.root.as_fd(), upto).map_err(|e| failed("find the directory of", entry, e))?;
                    // Whatever the umask is.
                    fchmod(&made, Mode::from_raw_mode(0o755)).map_err(|e| failed("make the directory of", entry, e))?;
                    if again {
                        self.hide_below(made.as_fd()).map_err(|e| failed("make the directory of", entry, e))?;
                    } else {
                        self.implied.insert(upto.to_vec());
                    }
                    made
                }
                Err(e) => return Err(failed("find the directory of", entry, e)),
            };
        }
        Ok(at)
    }

    /// Whether this layer has something at a path, or above it, that is no directory: then nothing of the layers below is to
    /// be seen there, and there is nothing to remove. A link is not followed, for what it leads to is not meant.
    fn is_hidden(&self, path: &[u8]) -> bool {
        matches!(look_up_exactly(self.root.as_fd(), path), Err(Errno::NOTDIR | Errno::LOOP))
    }

    fn hide_below(&self, dir: BorrowedFd<'_>) -> rustix::io::Result<()> {
        fsetxattr(dir, self.form.opaque(), b"y", XattrFlags::empty())
    }

    fn whiteout(&mut self, parent: BorrowedFd<'_>, name: &[u8], entry: &Entry) -> Result<(), Error> {
        if matches!(name, b"" | b"." | b"..") {
            return Err(hostile(entry, "it removes no name"));
        }
        let name = CString::new(name).map_err(|_| hostile(entry, "its name has a zero byte"))?;
        match mknodat(parent, &name, FileType::CharacterDevice, Mode::empty(), 0) {
            Ok(()) => Ok(()),
            // This layer has something there. It stays, without what is below it.
            Err(Errno::EXIST) => match open_dir(parent, &name) {
                Ok(dir) => self.hide_below(dir.as_fd()).map_err(|e| failed("hide what is below", entry, e)),
                Err(_) => Ok(()),
            },
            Err(e) => Err(failed("remove", entry, e)),
        }
    }

    fn make<R: Read>(
        &mut self,
        archive: &mut Archive<R>,
        place: Place<'_>,
        path: &[u8],
        entry: &Entry,
    ) -> Result<(), Error> {
        self.implied.remove(path);
        match entry.kind {
            Kind::Directory => self.directory(place, path, entry),
            Kind::File => self.file(archive, place, entry),
            Kind::HardLink => self.hard_link(place, entry),
            Kind::Symlink => {
                let link =
                    CString::new(entry.link.as_slice()).map_err(|_| hostile(entry, "its link has a zero byte"))?;
                self.once_free(place, || symlinkat(&link, place.0, place.1))
                    .map_err(|e| failed("make the link", entry, e))?;
                dress_name(place, entry, self.form)
            }
            Kind::Character | Kind::Block | Kind::Fifo => self.node(place, entry),
            Kind::Other => Ok(()),
        }
    }

    /// Makes something. If its name is taken, what has it goes first.
    fn once_free<T>(&mut self, place: Place<'_>, make: impl Fn() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
        match make() {
            Err(Errno::EXIST) => {
                // The directory that is remembered may be below it.
                self.last = None;
                remove(place)?;
                make()
            }
            made => made,
        }
    }

    fn directory(&mut self, place: Place<'_>, path: &[u8], entry: &Entry) -> Result<(), Error> {
        let (parent, name) = place;
        let error = |e| failed("make the directory", entry, e);
        let mut hides = false;
        if let Err(e) = mkdirat(parent, name, Mode::RWXU) {
            if e != Errno::EXIST {
                return Err(error(e));
            }
            let there = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(error)?;
            if FileType::from_raw_mode(there.st_mode) != FileType::Directory {
                hides = is_whiteout(place);
                unlinkat(parent, name, AtFlags::empty()).map_err(error)?;
                mkdirat(parent, name, Mode::RWXU).map_err(error)?;
            }
        }
        let dir = open_dir(parent, name).map_err(error)?;
        if hides {
            self.hide_below(dir.as_fd()).map_err(error)?;
        }
        self.times.insert(path.to_vec(), entry.mtime);
        dress_fd(dir.as_fd(), entry, self.form)
    }

    fn file<R: Read>(&mut self, archive: &mut Archive<R>, place: Place<'_>, entry: &Entry) -> Result<(), Error> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = self.once_free(place, || openat(place.0, place.1, flags, Mode::RUSR | Mode::WUSR));
        let mut file = File::from(made.map_err(|e| failed("make the file", entry, e))?);
        let written = match &entry.pieces {
            None => self.copy(archive, &mut file, entry.size),
            Some(pieces) => {
                ftruncate(&file, entry.size).map_err(|e| failed("make the file", entry, e))?;
                pieces.iter().try_for_each(|(offset, length)| {
                    io::Seek::seek(&mut file, io::SeekFrom::Start(*offset)).map_err(Written::There)?;
                    self.copy(archive, &mut file, *length)
                })
            }
        };
        written.map_err(|e| match e {
            Written::Here(e) => Error::Archive(e),
            Written::There(source) => Error::System { operation: "write", entry: show(&entry.path), source },
        })?;
        self.size = self.size.saturating_add(entry.size);
        dress_fd(file.as_fd(), entry, self.form)?;
        futimens(&file, &times(entry.mtime)).map_err(|e| failed("set the times of", entry, e))
    }

    fn copy<R: Read>(&mut self, archive: &mut Archive<R>, file: &mut File, length: u64) -> Result<(), Written> {
        let mut left = length;
        while left > 0 {
            let wanted = self.buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let got = match archive.read(&mut self.buffer[..wanted]) {
                Ok(0) => return Err(Written::Here(io::ErrorKind::UnexpectedEof.into())),
                Ok(got) => got,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(Written::Here(e)),
            };
            file.write_all(&self.buffer[..got]).map_err(Written::There)?;
            left -= got as u64;
        }
        Ok(())
    }

    fn hard_link(&mut self, place: Place<'_>, entry: &Entry) -> Result<(), Error> {
        let target = clean(&entry.link).map_err(|_| hostile(entry, "its link leads out of the layer"))?;
        let Some((name, parents)) = target.split_last() else {
            return Err(hostile(entry, "its link leads to the root directory"));
        };
        let name = CString::new(*name).map_err(|_| hostile(entry, "its link has a zero byte"))?;
        let error = |e| failed("make the hard link", entry, e);
        let dir = look_up(self.root.as_fd(), &parents.join(&b'/')).map_err(error)?;
        let there = statat(&dir, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(error)?;
        if FileType::from_raw_mode(there.st_mode) == FileType::Directory || is_whiteout((dir.as_fd(), &name)) {
            return Err(hostile(entry, "its link leads to a directory, or to what was removed"));
        }
        // A name of itself would be removed before it is made.
        let same = statat(place.0, place.1, AtFlags::SYMLINK_NOFOLLOW);
        if same.is_ok_and(|same| (same.st_dev, same.st_ino) == (there.st_dev, there.st_ino)) {
            return Ok(());
        }
        // The attributes are the file's, which the archive has set already. Links are not followed.
        self.once_free(place, || linkat(&dir, &name, place.0, place.1, AtFlags::empty())).map_err(error)
    }

    fn node(&mut self, place: Place<'_>, entry: &Entry) -> Result<(), Error> {
        let (kind, device) = match entry.kind {
            Kind::Fifo => (FileType::Fifo, 0),
            Kind::Block => (FileType::BlockDevice, makedev(entry.major, entry.minor)),
            _ => (FileType::CharacterDevice, makedev(entry.major, entry.minor)),
        };
        if kind == FileType::CharacterDevice && device == 0 {
            return Err(hostile(entry, "it is how overlay marks what was removed, which archives say otherwise"));
        }
        let made = self.once_free(place, || mknodat(place.0, place.1, kind, Mode::RUSR | Mode::WUSR, device));
        match made {
            // Nobody makes devices in a user namespace, and containers get theirs from the runtime.
            Err(Errno::PERM) if self.form == Form::User && kind != FileType::Fifo => {
                log::warn!("{:?} is left out: an ordinary user cannot make devices", show(&entry.path));
                return Ok(());
            }
            made => made.map_err(|e| failed("make the device", entry, e))?,
        }
        dress_name(place, entry, self.form)
    }

    /// Sets what could not be set before, and gives size, number of entries, and the directories that were implied.
    pub(super) fn finish(mut self) -> Result<(u64, u64, Vec<Vec<u8>>), Error> {
        self.last = None;
        // The deepest first.
        for (path, mtime) in self.times.iter().rev() {
            match look_up_exactly(self.root.as_fd(), path) {
                Ok(dir) => futimens(&dir, &times(*mtime)).map_err(|e| Error::System {
                    operation: "set the times of",
                    entry: show(path),
                    source: e.into(),
                })?,
                // A later entry took its place.
                Err(_) => continue,
            }
        }
        Ok((self.size, self.entries, self.implied.into_iter().collect()))
    }
}

enum Written {
    Here(io::Error),
    There(io::Error),
}

/// Gives directories that a layer implies the attributes that they have in the layers below it, the lowest of which is
/// first.
pub(crate) fn inherit(tree: &Path, implied: &[Vec<u8>], below: &[PathBuf]) -> io::Result<()> {
    let dir = |path: &Path| open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let root = dir(tree)?;
    let below: Vec<OwnedFd> = below.iter().rev().map(|path| dir(path)).collect::<Result<_, _>>()?;
    // The deepest first, since a directory's time changes with what is in it.
    for path in implied.iter().rev() {
        let Ok(to) = look_up_exactly(root.as_fd(), path) else { continue };
        for layer in &below {
            match look_up_exactly(layer.as_fd(), path) {
                Ok(from) => {
                    rootfs::copy_attributes(from.as_fd(), to.as_fd())?;
                    break;
                }
                Err(Errno::NOENT) => {}
                // A file, a link or something removed: then there is no directory below.
                Err(_) => break,
            }
        }
    }
    Ok(())
}

/// The parts of an entry's path. A leading slash means nothing, as other programs have it.
fn clean(path: &[u8]) -> Result<Vec<&[u8]>, Error> {
    let parts: Vec<&[u8]> = path.split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b".")).collect();
    if parts.contains(&&b".."[..]) {
        return Err(Error::Hostile { entry: show(path), reason: "its path leads upwards" });
    }
    if parts.len() > 1024 {
        return Err(Error::Hostile { entry: show(&path[..64]), reason: "its path has more than 1024 parts" });
    }
    Ok(parts)
}

fn look_up(root: BorrowedFd<'_>, path: &[u8]) -> rustix::io::Result<OwnedFd> {
    resolve(root, path, ResolveFlags::IN_ROOT)
}

fn look_up_exactly(root: BorrowedFd<'_>, path: &[u8]) -> rustix::io::Result<OwnedFd> {
    resolve(root, path, ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)
}

fn resolve(root: BorrowedFd<'_>, path: &[u8], how: ResolveFlags) -> rustix::io::Result<OwnedFd> {
    let path = if path.is_empty() { b"." } else { path };
    let how = how | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    loop {
        match openat2(root, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), how) {
            // Something was renamed elsewhere meanwhile, so the kernel is not sure.
            Err(Errno::AGAIN) => {}
            result => return result,
        }
    }
}

fn open_dir(parent: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<OwnedFd> {
    openat(parent, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

fn is_whiteout((parent, name): Place<'_>) -> bool {
    statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|there| FileType::from_raw_mode(there.st_mode) == FileType::CharacterDevice && there.st_rdev == 0)
}

/// Removes what has a name, with all below it.
fn remove((parent, name): Place<'_>) -> rustix::io::Result<()> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => {}
        other => return other,
    }
    let dir = open_dir(parent, name)?;
    for entry in Dir::read_from(&dir)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            remove((dir.as_fd(), entry.file_name()))?;
        }
    }
    unlinkat(parent, name, AtFlags::REMOVEDIR)
}

/// Owner, mode and attributes of a file or directory that is open. Changing the owner takes the mode's special bits and
/// the capabilities away, so it is first.
fn dress_fd(fd: BorrowedFd<'_>, entry: &Entry, form: Form) -> Result<(), Error> {
    fchown(fd, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))
        .map_err(|e| failed("set the owner of", entry, e))?;
    fchmod(fd, Mode::from_raw_mode(entry.mode)).map_err(|e| failed("set the mode of", entry, e))?;
    set_xattrs(entry, form, |name, value| fsetxattr(fd, name, value, XattrFlags::empty()))
}

/// The same, and the times, of what is not opened: links, devices, pipes.
fn dress_name(place: Place<'_>, entry: &Entry, form: Form) -> Result<(), Error> {
    let (parent, name) = place;
    chownat(parent, name, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|e| failed("set the owner of", entry, e))?;
    if entry.kind != Kind::Symlink {
        // It follows links, and this is none: it was just made, where nobody else makes anything.
        rustix::fs::chmodat(parent, name, Mode::from_raw_mode(entry.mode), AtFlags::empty())
            .map_err(|e| failed("set the mode of", entry, e))?;
    }
    if !entry.xattrs.is_empty() {
        let mut path = format!("/proc/self/fd/{}/", parent.as_raw_fd()).into_bytes();
        path.extend_from_slice(name.to_bytes());
        set_xattrs(entry, form, |name, value| lsetxattr(&path[..], name, value, XattrFlags::empty()))?;
    }
    utimensat(parent, name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|e| failed("set the times of", entry, e))
}

fn set_xattrs(entry: &Entry, form: Form, set: impl Fn(&[u8], &[u8]) -> rustix::io::Result<()>) -> Result<(), Error> {
    for (name, value) in &entry.xattrs {
        // Overlay's own would make it show what the layer does not have; a label is the place's, and not the image's.
        let own = [&b"trusted.overlay."[..], b"user.overlay.", b"security.selinux", b"security.evm", b"security.ima"];
        if own.iter().any(|own| name.starts_with(own)) {
            log::debug!("{:?} loses its attribute {:?}", show(&entry.path), show(name));
            continue;
        }
        match set(name, value) {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP) => {
                log::warn!("{:?} loses its attribute {:?}: the filesystem has none", show(&entry.path), show(name));
            }
            Err(Errno::PERM) if form == Form::User || !name.starts_with(b"security.") => {
                log::warn!(
                    "{:?} loses its attribute {:?}: the kernel does not permit it",
                    show(&entry.path),
                    show(name)
                );
            }
            Err(e) => return Err(failed("set an extended attribute of", entry, e)),
        }
    }
    Ok(())
}

fn times((seconds, nanoseconds): (i64, u32)) -> Timestamps {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
    Timestamps { last_access: time, last_modification: time }
}

fn show(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

fn hostile(entry: &Entry, reason: &'static str) -> Error {
    Error::Hostile { entry: show(&entry.path), reason }
}

fn failed(operation: &'static str, entry: &Entry, e: Errno) -> Error {
    // The kernel's word for what lies below a link's loop or a mount of somebody else.
    if e == Errno::LOOP || e == Errno::XDEV {
        return hostile(entry, "its path leads through links that cannot be followed in the layer");
    }
    Error::System { operation, entry: show(&entry.path), source: e.into() }
}
