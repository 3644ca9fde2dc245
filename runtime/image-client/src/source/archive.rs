//! An archive as a source. It is looked through once, and its files are then read where they lie.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use runx_image::Store;

use super::Source;
use crate::unpack::tar::{self, Kind};
use crate::unpack::{Compression, Decoder};

/// More files than an image in an archive has.
const MEMBERS_LIMIT: usize = 100_000;
/// Links from link to link that are followed.
const LINKS_LIMIT: usize = 8;

/// A tar archive in a file that can be read anywhere.
pub(crate) struct Archive {
    file: File,
    name: String,
    members: HashMap<String, Member>,
}

enum Member {
    /// Where its data begins, and how much it is.
    File(u64, u64),
    /// Legacy archives share layers by links.
    Link(String),
}

/// An archive's bytes, a file or what comes from standard input, as they are; and the first four of them.
pub(crate) fn open(path: &Path, store: &Store) -> Result<(File, Vec<u8>)> {
    let mut file = if path == Path::new("-") {
        to_file(io::stdin().lock(), store).context("read standard input")?
    } else {
        let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        if file.stream_position().is_err() {
            file = to_file(file, store).with_context(|| format!("read {}", path.display()))?;
        }
        file
    };
    let mut magic = [0; 4];
    let length = read_up_to(&mut file, &mut magic).with_context(|| format!("read {}", path.display()))?;
    file.rewind().with_context(|| format!("read {}", path.display()))?;
    Ok((file, magic[..length].to_vec()))
}

fn read_up_to(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..])? {
            0 => break,
            length => filled += length,
        }
    }
    Ok(filled)
}

/// A file without a name, beside the store: it may be large, and goes by itself.
fn to_file(mut from: impl Read, store: &Store) -> Result<File> {
    let mut file = tempfile::tempfile_in(store.root()).context("make a file")?;
    io::copy(&mut from, &mut file)?;
    file.flush().and_then(|()| file.rewind())?;
    Ok(file)
}

impl Archive {
    /// Looks an archive through. A compressed one is decompressed aside, up to `limit` bytes.
    pub(crate) fn read(path: &Path, file: &File, compression: Compression, store: &Store, limit: u64) -> Result<Self> {
        let name = path.display().to_string();
        let mut file = file.try_clone()?;
        file.rewind()?;
        if compression != Compression::None {
            let mut limited = Decoder::new(file)?.take(limit.saturating_add(1));
            let plain = to_file(&mut limited, store).with_context(|| format!("decompress {name}"))?;
            if limited.limit() == 0 {
                bail!("{name} is larger than {limit} bytes when it is decompressed (--max-layer-size allows more)");
            }
            file = plain;
        }
        let mut members = HashMap::new();
        let mut archive = tar::Archive::new(BufReader::with_capacity(1 << 16, &file));
        while let Some(entry) = archive.next().with_context(|| format!("read {name}"))? {
            let Some(path) = lexical("", &entry.path) else { continue };
            let member = match entry.kind {
                Kind::File if entry.pieces.is_none() => Member::File(archive.data_offset(), entry.size),
                Kind::HardLink => match lexical("", &entry.link) {
                    Some(to) => Member::Link(to),
                    None => continue,
                },
                Kind::Symlink => match lexical(path.rsplit_once('/').map_or("", |(dir, _)| dir), &entry.link) {
                    Some(to) => Member::Link(to),
                    None => continue,
                },
                _ => continue,
            };
            members.insert(path, member);
            if members.len() > MEMBERS_LIMIT {
                bail!("{name} has more than {MEMBERS_LIMIT} files: it is no archive of images");
            }
        }
        Ok(Self { file, name, members })
    }

    /// Whether it has a file.
    pub(crate) fn has(&self, path: &str) -> bool {
        self.members.contains_key(path)
    }
}

/// A path without `.` and `..`; nothing if it leads out, or is no text.
fn lexical(dir: &str, path: &[u8]) -> Option<String> {
    let path = std::str::from_utf8(path).ok()?;
    let mut parts: Vec<&str> = dir.split('/').filter(|part| !part.is_empty()).collect();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

impl Source for Archive {
    fn open(&self, path: &str) -> Result<Option<Box<dyn Read + Send + '_>>> {
        let Some(mut path) = lexical("", path.as_bytes()) else { return Ok(None) };
        for _ in 0..LINKS_LIMIT {
            match self.members.get(&path) {
                Some(Member::File(offset, length)) => {
                    return Ok(Some(Box::new(Range { file: &self.file, offset: *offset, left: *length })));
                }
                Some(Member::Link(to)) => path.clone_from(to),
                None => return Ok(None),
            }
        }
        bail!("{path} of {} is a link from link to link", self.name)
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}

struct Range<'a> {
    file: &'a File,
    offset: u64,
    left: u64,
}

impl Read for Range<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let got = self.file.read_at(&mut buffer[..length], self.offset)?;
        if got == 0 && length > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.offset += got as u64;
        self.left -= got as u64;
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_leads_out_of_an_archive() {
        assert_eq!(lexical("", b"./a//b").as_deref(), Some("a/b"));
        assert_eq!(lexical("a", b"../b/layer.tar").as_deref(), Some("b/layer.tar"));
        assert_eq!(lexical("", b"/etc/passwd").as_deref(), Some("etc/passwd"));
        for bad in [&b".."[..], b"a/../..", b"", b"/", b"\xff"] {
            assert_eq!(lexical("", bad), None);
        }
    }
}
