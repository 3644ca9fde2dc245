//! `logs`: what a container has printed.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Seek};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context as _, Result};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::attach::write_all;
use super::log::{self, Line, Stream};
use super::record::{Containers, Record};
use super::status::Seen;
use crate::arguments::Logs;
use crate::{Context, Failure};

/// How long a change in the directory is waited for. A monitor that was killed changes nothing any more.
const PATIENCE_MS: i32 = 1000;

/// `runx container logs`.
pub(super) fn logs(context: &Context, logs: &Logs) -> Result<u8, Failure> {
    let containers = Containers::of(context);
    let record = containers.find(&logs.id)?;
    let directory = containers.directory(&record.id);
    let mut printer = Printer { logs, last_whole: [true, true] };
    let done = if logs.follow {
        follow(context, &directory, &mut printer)
    } else {
        print_all(&directory, &mut printer).map(drop)
    };
    match done {
        // Who reads has read enough.
        Err(e) if e.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) => Ok(0),
        other => other.map(|()| 0).map_err(Into::into),
    }
}

/// Prints lines as they were written.
struct Printer<'a> {
    logs: &'a Logs,
    /// Whether the last line of each stream was whole.
    last_whole: [bool; 2],
}

impl Printer<'_> {
    /// Whether a line is among those that are asked for.
    fn wants(&self, line: &Line<'_>) -> bool {
        if self.logs.since.is_none() && self.logs.until.is_none() {
            return true;
        }
        let Ok(time) = humantime::parse_rfc3339(line.time) else { return true };
        self.logs.since.is_none_or(|since| time >= since) && self.logs.until.is_none_or(|until| time <= until)
    }

    fn print(&mut self, line: &Line<'_>) -> Result<()> {
        if !self.wants(line) {
            return Ok(());
        }
        let (number, index) = match line.stream {
            Stream::Output => (1, 0),
            Stream::Error => (2, 1),
        };
        let mut out = Vec::with_capacity(line.text.len() + 40);
        if self.logs.timestamps && self.last_whole[index] {
            out.extend(line.time.as_bytes());
            out.push(b' ');
        }
        out.extend(line.text);
        if line.whole {
            out.push(b'\n');
        }
        self.last_whole[index] = line.whole;
        write_all(number, &out)?;
        Ok(())
    }

    /// Whether nothing that comes from now on is asked for.
    fn is_done(&self) -> bool {
        self.logs.until.is_some_and(|until| SystemTime::now() > until)
    }
}

/// Opens the log's files, the oldest first; what is renamed in this moment is opened all the same.
fn open_all(directory: &Path) -> Result<Vec<File>> {
    for _ in 0..10 {
        let mut opened: Vec<File> = Vec::new();
        let mut inodes = Vec::new();
        let mut complete = true;
        for path in log::files(directory) {
            match File::open(&path) {
                Ok(file) => {
                    let inode = file.metadata().context("look at the log")?.ino();
                    complete &= !inodes.contains(&inode);
                    inodes.push(inode);
                    opened.push(file);
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e).with_context(|| format!("open {}", path.display())),
            }
        }
        if complete {
            return Ok(opened);
        }
    }
    anyhow::bail!("the log is rotated faster than it can be read")
}

/// Prints what is there, and returns the newest file where that ended.
fn print_all(directory: &Path, printer: &mut Printer<'_>) -> Result<Option<File>> {
    let mut kept: VecDeque<Vec<u8>> = VecDeque::new();
    let mut newest = None;
    let mut lines = 0usize;
    for file in open_all(directory)? {
        let mut reader = BufReader::with_capacity(64 * 1024, file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let n = reader.read_until(b'\n', &mut line).context("read the log")?;
            if n == 0 || line.last() != Some(&b'\n') {
                // Half a line is being written; it is read again.
                let _ = reader.seek_relative(-(line.len() as i64));
                break;
            }
            line.pop();
            let Some(parsed) = Line::parse(&line) else { continue };
            let Some(tail) = printer.logs.tail else {
                printer.print(&parsed)?;
                continue;
            };
            if printer.wants(&parsed) {
                lines += usize::from(parsed.whole);
                kept.push_back(line.clone());
                // A part that comes last is a line of its own.
                while lines > tail || lines == tail && tail > 0 && !parsed.whole && count(&kept) > tail {
                    if let Some(first) = kept.pop_front()
                        && Line::parse(&first).is_some_and(|line| line.whole)
                    {
                        lines -= 1;
                    }
                }
                if tail == 0 {
                    kept.clear();
                    lines = 0;
                }
            }
        }
        newest = Some(reader);
    }
    for line in kept {
        if let Some(line) = Line::parse(&line) {
            printer.print(&line)?;
        }
    }
    let newest = newest.map(|mut reader| -> Result<File> {
        let position = reader.stream_position().context("read the log")?;
        let mut file = reader.into_inner();
        file.seek(io::SeekFrom::Start(position)).context("read the log")?;
        Ok(file)
    });
    newest.transpose()
}

/// How many lines these are, a last one that has no end yet included.
fn count(kept: &VecDeque<Vec<u8>>) -> usize {
    let whole = |line: &Vec<u8>| Line::parse(line).is_some_and(|line| line.whole);
    kept.iter().filter(|line| whole(line)).count() + usize::from(kept.back().is_some_and(|line| !whole(line)))
}

/// Prints what is there and what comes, until the container's end.
fn follow(context: &Context, directory: &Path, printer: &mut Printer<'_>) -> Result<()> {
    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).context("watch the log")?;
    let events = AddWatchFlags::IN_MODIFY
        | AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_MOVE_SELF;
    watch.add_watch(directory, events).with_context(|| format!("watch {}", directory.display()))?;
    let mut file = print_all(directory, printer)?;
    let path = directory.join(log::FILE);
    loop {
        // Asked first: what is written before its end is read below.
        let ended = match Record::read(directory) {
            Ok(record) => Seen::look(context, record)?.status.is_down(),
            Err(_) => true,
        };
        loop {
            if let Some(file) = &mut file {
                rest(file, printer)?;
            }
            let Ok(there) = std::fs::metadata(&path) else { break };
            let same =
                |file: &File| file.metadata().is_ok_and(|ours| (ours.dev(), ours.ino()) == (there.dev(), there.ino()));
            if file.as_ref().is_some_and(same) {
                break;
            }
            // It was rotated; what was written to the old one last is read.
            if let Some(file) = &mut file {
                rest(file, printer)?;
            }
            file = next(directory, file.as_ref())?;
        }
        if ended || printer.is_done() {
            return Ok(());
        }
        runx_core::sys::poll(watch.as_fd(), libc::POLLIN, PATIENCE_MS).context("watch the log")?;
        while watch.read_events().is_ok_and(|events| !events.is_empty()) {}
        if !directory.exists() {
            // It removed itself; what it wrote last is read from the file that is open.
            if let Some(file) = &mut file {
                rest(file, printer)?;
            }
            return Ok(());
        }
    }
}

/// The file after the one that was read.
fn next(directory: &Path, read: Option<&File>) -> Result<Option<File>> {
    let inode = read.and_then(|file| file.metadata().ok()).map(|found| found.ino());
    let all = open_all(directory)?;
    let at = all.iter().position(|file| file.metadata().is_ok_and(|found| Some(found.ino()) == inode));
    Ok(all.into_iter().nth(at.map_or(0, |at| at + 1)))
}

/// Prints the whole lines that were added to a file.
fn rest(file: &mut File, printer: &mut Printer<'_>) -> Result<()> {
    let mut reader = BufReader::with_capacity(64 * 1024, &mut *file);
    let mut line = Vec::new();
    let mut unread = 0;
    loop {
        line.clear();
        reader.read_until(b'\n', &mut line).context("read the log")?;
        if line.last() != Some(&b'\n') {
            unread += line.len();
            break;
        }
        line.pop();
        if let Some(parsed) = Line::parse(&line) {
            printer.print(&parsed)?;
        }
    }
    if unread > 0 {
        file.seek(io::SeekFrom::Current(-(unread as i64))).context("read the log")?;
    }
    Ok(())
}
