//! What a background command has written: the newest part of it, under the offsets that it had from the beginning.
//!
//! A little is kept in memory. More goes to a file without a name, of which the oldest part is given back as it grows; so
//! nothing is left behind, whatever becomes of the daemon.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How much stays in memory, in bytes.
const IN_MEMORY: usize = 16 << 10;

/// What is given back is a multiple of this, in bytes.
const BLOCK: u64 = 1 << 20;

#[derive(Debug)]
enum Place {
    Memory(Vec<u8>),
    File(File),
}

#[derive(Debug)]
struct State {
    place: Place,
    /// The offset of the file's beginning.
    base: u64,
    /// The offset of the first byte that is kept.
    start: u64,
    /// The offset after the last one.
    end: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Store {
    state: Mutex<State>,
    limit: u64,
}

impl Store {
    /// An empty one that keeps about `limit` bytes.
    pub fn new(limit: u64) -> Self {
        let state = State { place: Place::Memory(Vec::new()), base: 0, start: 0, end: 0 };
        Self { state: Mutex::new(state), limit: limit.max(2 * BLOCK) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds to it.
    ///
    /// # Errors
    /// When the disk is full, say. What was kept so far stays.
    pub fn append(&self, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        let State { place, base, start, end } = &mut *state;
        if let Place::Memory(held) = place {
            if held.len() + bytes.len() <= IN_MEMORY {
                held.extend_from_slice(bytes);
                *end += bytes.len() as u64;
                return Ok(());
            }
            let file = nameless()?;
            file.write_all_at(held, 0)?;
            *place = Place::File(file);
        }
        if let Place::File(file) = place {
            file.write_all_at(bytes, *end - *base)?;
            *end += bytes.len() as u64;
            if *end - *start > self.limit + BLOCK {
                let keep_from = (*end - self.limit) / BLOCK * BLOCK;
                if give_back(file, keep_from - *base).is_err() {
                    // Not every filesystem has holes.
                    *file = moved(file, keep_from - *base)?;
                    *base = keep_from;
                }
                *start = keep_from;
            }
        }
        Ok(())
    }

    /// The offset after what was written last.
    pub fn end(&self) -> u64 {
        self.state().end
    }

    /// What was written from `offset` on, at most `most` bytes of it, and the offset after that. What is not kept any more
    /// is left out.
    ///
    /// # Errors
    /// Those of reading.
    pub fn read(&self, offset: u64, most: usize) -> io::Result<(Vec<u8>, u64)> {
        let state = self.state();
        if offset >= state.end {
            return Ok((Vec::new(), offset));
        }
        let from = offset.max(state.start);
        let length = usize::try_from(state.end - from).unwrap_or(usize::MAX).min(most);
        let bytes = match &state.place {
            Place::Memory(held) => held[from as usize..from as usize + length].to_vec(),
            Place::File(file) => {
                let mut bytes = vec![0; length];
                file.read_exact_at(&mut bytes, from - state.base)?;
                bytes
            }
        };
        Ok((bytes, from + length as u64))
    }
}

/// A file that nobody else can find: on disk, or in memory where no directory for it can be written.
///
/// # Errors
/// When there is no place at all.
pub fn nameless() -> io::Result<File> {
    let directory =
        std::env::var_os("TMPDIR").filter(|name| !name.is_empty()).map_or_else(|| "/tmp".into(), PathBuf::from);
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE);
    if let Ok(file) = options.open(&directory) {
        return Ok(file);
    }
    // Not every filesystem has such files.
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let path = directory.join(format!(".runx-agent-{}", crate::ids::hex()));
    match options.open(&path) {
        Ok(file) => {
            fs::remove_file(&path)?;
            Ok(file)
        }
        Err(_) => {
            // SAFETY: the name is a string with its NUL; the descriptor is new and nobody else's.
            unsafe {
                match libc::memfd_create(c"runx-agent-output".as_ptr(), libc::MFD_CLOEXEC) {
                    -1 => Err(io::Error::last_os_error()),
                    fd => Ok(File::from_raw_fd(fd)),
                }
            }
        }
    }
}

/// Frees what a file holds before an offset.
fn give_back(file: &File, before: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: takes numbers.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, 0, before as i64) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A new file with what another one holds from an offset on.
fn moved(file: &File, from: u64) -> io::Result<File> {
    let new = nameless()?;
    let mut buffer = vec![0; 64 << 10];
    let (mut at, mut written) = (from, 0);
    loop {
        match file.read_at(&mut buffer, at)? {
            0 => return Ok(new),
            length => {
                new.write_all_at(&buffer[..length], written)?;
                at += length as u64;
                written += length as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn it_is_read_from_any_offset() {
        let store = Store::new(4 << 20);
        store.append(b"hello ").unwrap();
        store.append(b"world").unwrap();
        assert_eq!(store.read(0, 100).unwrap(), (b"hello world".to_vec(), 11));
        assert_eq!(store.read(6, 3).unwrap(), (b"wor".to_vec(), 9));
        assert_eq!(store.read(11, 100).unwrap(), (Vec::new(), 11));
        assert_eq!(store.read(99, 100).unwrap(), (Vec::new(), 99));
    }

    #[test]
    fn without_holes_the_newest_is_moved() {
        let file = nameless().unwrap();
        file.write_all_at(&[7; 200_000], 0).unwrap();
        file.write_all_at(b"end", 200_000).unwrap();
        let moved = moved(&file, 150_000).unwrap();
        assert_eq!(moved.metadata().unwrap().len(), 50_003);
        let mut end = [0; 4];
        moved.read_exact_at(&mut end, 49_999).unwrap();
        assert_eq!(&end, b"\x07end");
    }

    #[test]
    fn the_newest_stays_and_the_disk_is_given_back() {
        let store = Store::new(4 << 20);
        let block: Vec<u8> = (0..100_000_u32).map(|n| n as u8).collect();
        for _ in 0..200 {
            store.append(&block).unwrap();
        }
        assert_eq!(store.end(), 20_000_000);
        let (bytes, next) = store.read(0, usize::MAX).unwrap();
        assert!(bytes.len() >= 4 << 20 && bytes.len() <= 6 << 20, "{}", bytes.len());
        assert_eq!(next, 20_000_000);
        assert_eq!(bytes[bytes.len() - 1], block[block.len() - 1]);
        let (bytes, _) = store.read(19_900_000, 4).unwrap();
        assert_eq!(bytes, block[..4]);
        let state = store.state();
        let Place::File(file) = &state.place else { panic!("it is in memory") };
        assert!(file.metadata().unwrap().blocks() * 512 < 8 << 20, "{}", file.metadata().unwrap().blocks());
    }
}
