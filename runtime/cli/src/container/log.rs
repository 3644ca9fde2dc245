//! A container's log: `TIME stdout|stderr F|P TEXT` a line, as the Kubernetes CRI has it, in files that are bounded.
//! A line that came in parts is marked `P` but for its last part.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::options::LogOptions;

/// Its name in a container's directory; older files have a number behind.
pub(crate) const FILE: &str = "container.log";

/// Which stream a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Standard output, or the terminal.
    Output,
    /// Standard error.
    Error,
}

impl Stream {
    fn name(self) -> &'static str {
        match self {
            Self::Output => "stdout",
            Self::Error => "stderr",
        }
    }
}

/// The log's files, the oldest first.
pub(crate) fn files(directory: &Path) -> Vec<PathBuf> {
    let older = (1..1000).map(|number| directory.join(format!("{FILE}.{number}"))).take_while(|path| path.exists());
    let mut files: Vec<PathBuf> = older.collect();
    files.reverse();
    files.push(directory.join(FILE));
    files
}

/// Writes a log.
#[derive(Debug)]
pub(crate) struct Writer {
    directory: PathBuf,
    options: LogOptions,
    file: Option<File>,
    size: u64,
    /// Lines are put together here, to be written at once.
    buffer: Vec<u8>,
}

impl Writer {
    /// Goes on with the log in `directory`.
    pub(crate) fn open(directory: &Path, options: LogOptions) -> io::Result<Self> {
        let mut this = Self { directory: directory.to_owned(), options, file: None, size: 0, buffer: Vec::new() };
        this.reopen()?;
        Ok(this)
    }

    fn path(&self, number: u32) -> PathBuf {
        self.directory.join(if number == 0 { FILE.to_owned() } else { format!("{FILE}.{number}") })
    }

    fn reopen(&mut self) -> io::Result<()> {
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(self.path(0))?;
        self.size = file.metadata()?.len();
        self.file = Some(file);
        Ok(())
    }

    /// Writes what a stream gave. The text is cut into lines; what has no end yet is a part of one.
    pub(crate) fn write(&mut self, stream: Stream, data: &[u8]) -> io::Result<()> {
        let time = humantime::format_rfc3339_nanos(SystemTime::now()).to_string();
        for line in data.split_inclusive(|byte| *byte == b'\n') {
            let (text, whole) = line.strip_suffix(b"\n").map_or((line, "P"), |text| (text, "F"));
            self.buffer.extend(format!("{time} {} {whole} ", stream.name()).as_bytes());
            self.buffer.extend(text);
            self.buffer.push(b'\n');
            if self.size + self.buffer.len() as u64 >= self.options.max_size {
                self.flush()?;
                self.rotate()?;
            }
        }
        self.flush()
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.file.is_none() {
            self.reopen()?;
        }
        let written = match &mut self.file {
            Some(file) => file.write_all(&self.buffer),
            None => Ok(()),
        };
        self.size += self.buffer.len() as u64;
        self.buffer.clear();
        self.buffer.shrink_to(16 * 1024);
        written
    }

    fn rotate(&mut self) -> io::Result<()> {
        self.file = None;
        let last = self.options.max_file - 1;
        let _ = fs::remove_file(self.path(last));
        for number in (0..last).rev() {
            match fs::rename(self.path(number), self.path(number + 1)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        self.reopen()
    }
}

/// A line of a log, as it is in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Line<'a> {
    pub(crate) time: &'a str,
    pub(crate) stream: Stream,
    /// Whether the line that its program wrote ends here.
    pub(crate) whole: bool,
    pub(crate) text: &'a [u8],
}

impl<'a> Line<'a> {
    /// Reads a line, without its end. `None` for what is none.
    pub(crate) fn parse(line: &'a [u8]) -> Option<Self> {
        let mut fields = line.splitn(4, |byte| *byte == b' ');
        let time = std::str::from_utf8(fields.next()?).ok()?;
        let stream = match fields.next()? {
            b"stdout" => Stream::Output,
            b"stderr" => Stream::Error,
            _ => return None,
        };
        let whole = match fields.next()? {
            b"F" => true,
            b"P" => false,
            _ => return None,
        };
        Some(Self { time, stream, whole, text: fields.next()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(name: &str) -> PathBuf {
        let directory = std::env::temp_dir().join(format!("runx-log-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).unwrap();
        directory
    }

    #[test]
    fn lines_and_parts_of_lines_are_told_apart() {
        let directory = directory("parts");
        let mut log = Writer::open(&directory, LogOptions::default()).unwrap();
        log.write(Stream::Output, b"one\n\ntwo ").unwrap();
        log.write(Stream::Error, b"x\n").unwrap();
        log.write(Stream::Output, b"parts\n").unwrap();
        let text = fs::read(directory.join(FILE)).unwrap();
        let lines: Vec<_> = text.split(|byte| *byte == b'\n').filter_map(Line::parse).collect();
        let found: Vec<_> = lines.iter().map(|line| (line.stream, line.whole, line.text)).collect();
        let expected: [(Stream, bool, &[u8]); 5] = [
            (Stream::Output, true, b"one"),
            (Stream::Output, true, b""),
            (Stream::Output, false, b"two "),
            (Stream::Error, true, b"x"),
            (Stream::Output, true, b"parts"),
        ];
        assert_eq!(found, expected);
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn files_are_bounded_and_the_newest_lines_are_kept() {
        let directory = directory("bounds");
        let options = LogOptions { max_size: 4096, max_file: 3 };
        let mut log = Writer::open(&directory, options).unwrap();
        for number in 0..1000 {
            log.write(Stream::Output, format!("line {number}\n").as_bytes()).unwrap();
        }
        let files = files(&directory);
        assert_eq!(files.len(), 3);
        let mut text = Vec::new();
        for file in &files {
            let part = fs::read(file).unwrap();
            assert!(part.len() < 4096 + 100, "{}", part.len());
            text.extend(part);
        }
        let numbers: Vec<_> = text
            .split(|byte| *byte == b'\n')
            .filter_map(Line::parse)
            .map(|line| std::str::from_utf8(line.text).unwrap()[5..].parse::<i32>().unwrap())
            .collect();
        assert_eq!(numbers.last(), Some(&999));
        assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1));
        fs::remove_dir_all(directory).unwrap();
    }
}
