//! Reading tar archives as a stream: ustar, GNU's and pax's extensions, and sparse files in all their forms.
//!
//! The archive is somebody else's. Whatever a header claims is bounded before memory is taken for it.

use std::collections::BTreeMap;
use std::io::{self, Read};

/// The largest extended header: what other readers take, too.
const EXTENSION_LIMIT: u64 = 1 << 20;
/// The most pieces that a sparse file may have.
const PIECES_LIMIT: usize = 1 << 20;

/// One entry, with all extensions applied.
#[derive(Debug, Default)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) kind: Kind,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds and nanoseconds since 1970.
    pub(crate) mtime: (i64, u32),
    pub(crate) major: u32,
    pub(crate) minor: u32,
    /// The length of the file, with its holes.
    pub(crate) size: u64,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Where the data lies in a sparse file: offsets and lengths.
    pub(crate) pieces: Option<Vec<(u64, u64)>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Kind {
    #[default]
    File,
    HardLink,
    Symlink,
    Character,
    Block,
    Directory,
    Fifo,
    /// Something that is no file, to be passed over: a volume's label.
    Other,
}

/// An archive that is read from its beginning to its end.
#[derive(Debug)]
pub(crate) struct Archive<R> {
    from: R,
    /// What of the present entry's data was not read, and the padding behind it.
    left: u64,
    padding: u64,
    /// How many bytes of it were taken.
    offset: u64,
}

fn bad(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the archive is damaged: {}", reason.into()))
}

impl<R: Read> Archive<R> {
    pub(crate) fn new(from: R) -> Self {
        Self { from, left: 0, padding: 0, offset: 0 }
    }

    /// Where the present entry's data begins.
    pub(crate) fn data_offset(&self) -> u64 {
        self.offset
    }

    /// The next entry; nothing at the archive's end.
    pub(crate) fn next(&mut self) -> io::Result<Option<Entry>> {
        let mut long = Long::default();
        loop {
            self.skip_rest()?;
            let Some(block) = self.header()? else {
                return if long.is_empty() { Ok(None) } else { Err(bad("it ends after an extended header")) };
            };
            let size = number(&block[124..136]).ok_or_else(|| bad("a size is no number"))?;
            let kind = block[156];
            match kind {
                b'L' | b'K' | b'x' | b'g' => {
                    let content = self.extension(size)?;
                    match kind {
                        b'L' => long.path = Some(until_zero(&content).to_vec()),
                        b'K' => long.link = Some(until_zero(&content).to_vec()),
                        b'x' => long.pax = pax(&content)?,
                        // A global one tells of the archive; no image's tool gives it to entries.
                        _ => {}
                    }
                }
                _ => return self.entry(&block, size, long).map(Some),
            }
        }
    }

    fn entry(&mut self, block: &[u8; 512], size: u64, long: Long) -> io::Result<Entry> {
        let field = |from: usize, to: usize, what: &str| {
            number(&block[from..to]).ok_or_else(|| bad(format!("a {what} is no number")))
        };
        let gnu = &block[257..265] == b"ustar  \0";
        let ustar = &block[257..263] == b"ustar\0";
        let mut entry = Entry {
            path: name(block, ustar),
            link: until_zero(&block[157..257]).to_vec(),
            mode: (field(100, 108, "mode")? & 0o7777) as u32,
            mtime: (signed_number(&block[136..148]).ok_or_else(|| bad("a time is no number"))?, 0),
            size,
            ..Entry::default()
        };
        let (mut uid, mut gid) = (field(108, 116, "user id")?, field(116, 124, "group id")?);
        if ustar || gnu {
            entry.major = u32::try_from(field(329, 337, "device")?).map_err(|_| bad("a device is too large"))?;
            entry.minor = u32::try_from(field(337, 345, "device")?).map_err(|_| bad("a device is too large"))?;
        }
        let mut sparse = Sparse::default();
        let mut stored = size;
        if let Some(path) = long.path {
            entry.path = path;
        }
        if let Some(link) = long.link {
            entry.link = link;
        }
        for (key, value) in &long.pax {
            match key.as_slice() {
                b"path" => entry.path.clone_from(value),
                b"linkpath" => entry.link.clone_from(value),
                b"size" => stored = decimal(value)?,
                b"uid" => uid = decimal(value)?,
                b"gid" => gid = decimal(value)?,
                b"mtime" => entry.mtime = time(value)?,
                b"GNU.sparse.major"
                | b"GNU.sparse.minor"
                | b"GNU.sparse.name"
                | b"GNU.sparse.realsize"
                | b"GNU.sparse.size"
                | b"GNU.sparse.map" => sparse.read(key, value)?,
                other => {
                    if let Some(attribute) = other.strip_prefix(b"SCHILY.xattr.") {
                        entry.xattrs.insert(attribute.to_vec(), value.clone());
                    }
                }
            }
        }
        entry.size = stored;
        entry.uid = u32::try_from(uid).map_err(|_| bad("a user id is too large"))?;
        entry.gid = u32::try_from(gid).map_err(|_| bad("a group id is too large"))?;
        entry.kind = kind(block[156], &entry.path)?;
        if matches!(entry.kind, Kind::HardLink | Kind::Symlink) && entry.link.is_empty() {
            return Err(bad("a link goes nowhere"));
        }
        if entry.path.contains(&0) || entry.link.contains(&0) {
            return Err(bad("a name has a zero byte"));
        }
        // Only files have data, whatever the header says; other readers agree.
        let has_data = matches!(entry.kind, Kind::File | Kind::Other);
        self.left = if has_data { stored } else { 0 };
        self.padding = (512 - self.left % 512) % 512;
        if block[156] == b'S' {
            self.old_sparse(block, &mut entry)?;
        } else if entry.kind == Kind::File {
            self.pax_sparse(sparse, &mut entry)?;
        }
        if !has_data {
            entry.size = 0;
        }
        Ok(entry)
    }

    /// GNU's old form: four pieces in the header, and more in blocks behind it.
    fn old_sparse(&mut self, block: &[u8; 512], entry: &mut Entry) -> io::Result<()> {
        let mut pieces = Vec::new();
        sparse_fields(&block[386..482], &mut pieces)?;
        let mut more = block[482] != 0;
        while more {
            let mut extended = [0; 512];
            self.from.read_exact(&mut extended).map_err(cut)?;
            self.offset += 512;
            sparse_fields(&extended[..504], &mut pieces)?;
            more = extended[504] != 0;
        }
        let size = number(&block[483..495]).ok_or_else(|| bad("a sparse file's size is no number"))?;
        set_pieces(entry, pieces, size, self.left)
    }

    /// The three forms that pax headers have.
    fn pax_sparse(&mut self, sparse: Sparse, entry: &mut Entry) -> io::Result<()> {
        if let Some(name) = sparse.name {
            entry.path = name;
        }
        let pieces = if (sparse.major, sparse.minor) == (Some(1), Some(0)) {
            self.sparse_map()?
        } else if let Some(map) = sparse.map {
            map
        } else {
            return Ok(());
        };
        let size = sparse.size.ok_or_else(|| bad("a sparse file has no size"))?;
        set_pieces(entry, pieces, size, self.left)
    }

    /// Version 1.0: the map stands before the data, in decimal lines, padded to blocks.
    fn sparse_map(&mut self) -> io::Result<Vec<(u64, u64)>> {
        let mut reader = MapReader { archive: self, block: [0; 512], at: 512 };
        let count = usize::try_from(reader.line()?).unwrap_or(usize::MAX);
        if count > PIECES_LIMIT {
            return Err(bad("a sparse file has too many pieces"));
        }
        let mut pieces = Vec::new();
        for _ in 0..count {
            pieces.push((reader.line()?, reader.line()?));
        }
        Ok(pieces)
    }

    /// Reads the present entry's data.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if length == 0 {
            return Ok(0);
        }
        let got = self.from.read(&mut buffer[..length])?;
        if got == 0 {
            return Err(cut(io::ErrorKind::UnexpectedEof.into()));
        }
        self.left -= got as u64;
        self.offset += got as u64;
        Ok(got)
    }

    fn extension(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > EXTENSION_LIMIT {
            return Err(bad("an extended header is longer than 1 MiB"));
        }
        (self.left, self.padding) = (size, (512 - size % 512) % 512);
        let mut content = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            match self.read(&mut buffer)? {
                0 => return Ok(content),
                length => content.extend_from_slice(&buffer[..length]),
            }
        }
    }

    fn skip_rest(&mut self) -> io::Result<()> {
        let mut rest = self.left.checked_add(self.padding).ok_or_else(|| bad("a size is too large"))?;
        self.offset += rest;
        (self.left, self.padding) = (0, 0);
        let mut buffer = [0; 8192];
        while rest > 0 {
            let length = buffer.len().min(usize::try_from(rest).unwrap_or(usize::MAX));
            match self.from.read(&mut buffer[..length]) {
                Ok(0) => return Err(cut(io::ErrorKind::UnexpectedEof.into())),
                Ok(got) => rest -= got as u64,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// The next header, or nothing where the archive ends: at blocks of zeros, or where nothing comes any more.
    fn header(&mut self) -> io::Result<Option<[u8; 512]>> {
        let mut block = [0; 512];
        let mut filled = 0;
        while filled < block.len() {
            match self.from.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(cut(io::ErrorKind::UnexpectedEof.into())),
                Ok(got) => filled += got,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        self.offset += 512;
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let expected = number(&block[148..156]).ok_or_else(|| bad("a header has no checksum"))?;
        let sum = |signed: bool| -> i64 {
            let bytes = block.iter().enumerate().map(|(at, byte)| if (148..156).contains(&at) { b' ' } else { *byte });
            bytes.map(|byte| if signed { i64::from(byte.cast_signed()) } else { i64::from(byte) }).sum()
        };
        // Some old programs added signed bytes.
        if ![sum(false), sum(true)].contains(&expected.cast_signed()) {
            return Err(bad("a header's checksum is wrong"));
        }
        Ok(Some(block))
    }

    /// What the archive is read from.
    pub(crate) fn into_inner(self) -> R {
        self.from
    }
}

#[derive(Default)]
struct Long {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pax: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Long {
    fn is_empty(&self) -> bool {
        self.path.is_none() && self.link.is_none() && self.pax.is_empty()
    }
}

/// What pax headers say of a sparse file.
#[derive(Default)]
struct Sparse {
    major: Option<u64>,
    minor: Option<u64>,
    name: Option<Vec<u8>>,
    size: Option<u64>,
    map: Option<Vec<(u64, u64)>>,
}

impl Sparse {
    fn read(&mut self, key: &[u8], value: &[u8]) -> io::Result<()> {
        match key {
            b"GNU.sparse.major" => self.major = Some(decimal(value)?),
            b"GNU.sparse.minor" => self.minor = Some(decimal(value)?),
            b"GNU.sparse.name" => self.name = Some(value.to_vec()),
            b"GNU.sparse.realsize" | b"GNU.sparse.size" => self.size = Some(decimal(value)?),
            _ => {
                let numbers = value.split(|byte| *byte == b',').map(decimal).collect::<io::Result<Vec<u64>>>()?;
                if numbers.len() % 2 != 0 || numbers.len() / 2 > PIECES_LIMIT {
                    return Err(bad("a sparse file's map is wrong"));
                }
                self.map = Some(numbers.chunks(2).map(|pair| (pair[0], pair[1])).collect());
            }
        }
        Ok(())
    }
}

struct MapReader<'a, R> {
    archive: &'a mut Archive<R>,
    block: [u8; 512],
    at: usize,
}

impl<R: Read> MapReader<'_, R> {
    fn line(&mut self) -> io::Result<u64> {
        let mut digits = Vec::new();
        loop {
            if self.at == 512 {
                let mut filled = 0;
                while filled < 512 {
                    match self.archive.read(&mut self.block[filled..])? {
                        0 => return Err(bad("a sparse file's map ends early")),
                        got => filled += got,
                    }
                }
                self.at = 0;
            }
            let byte = self.block[self.at];
            self.at += 1;
            if byte == b'\n' {
                return decimal(&digits);
            }
            digits.push(byte);
            if digits.len() > 20 {
                return Err(bad("a sparse file's map is wrong"));
            }
        }
    }
}

/// Pieces must be in order, end within the file, and have as much data as is there.
fn set_pieces(entry: &mut Entry, pieces: Vec<(u64, u64)>, size: u64, stored: u64) -> io::Result<()> {
    let mut end = 0_u64;
    let mut sum = 0_u64;
    for (offset, length) in &pieces {
        if *offset < end {
            return Err(bad("a sparse file's pieces overlap"));
        }
        end = offset.checked_add(*length).ok_or_else(|| bad("a sparse file's piece is too long"))?;
        sum += length;
    }
    if end > size || sum != stored || size > i64::MAX as u64 {
        return Err(bad("a sparse file's pieces are not those of the file"));
    }
    entry.size = size;
    entry.pieces = Some(pieces);
    Ok(())
}

fn sparse_fields(fields: &[u8], pieces: &mut Vec<(u64, u64)>) -> io::Result<()> {
    for field in fields.chunks_exact(24).filter(|field| field[0] != 0) {
        let (offset, length) = (number(&field[..12]), number(&field[12..]));
        pieces.push(offset.zip(length).ok_or_else(|| bad("a sparse file's map is wrong"))?);
        if pieces.len() > PIECES_LIMIT {
            return Err(bad("a sparse file has too many pieces"));
        }
    }
    Ok(())
}

fn kind(flag: u8, path: &[u8]) -> io::Result<Kind> {
    Ok(match flag {
        // The oldest archives mark directories by the slash alone.
        0 | b'0' if path.ends_with(b"/") => Kind::Directory,
        0 | b'0' | b'7' | b'S' => Kind::File,
        b'1' => Kind::HardLink,
        b'2' => Kind::Symlink,
        b'3' => Kind::Character,
        b'4' => Kind::Block,
        b'5' => Kind::Directory,
        b'6' => Kind::Fifo,
        b'V' => Kind::Other,
        other => return Err(bad(format!("an entry is of the unknown type {:?}", char::from(other)))),
    })
}

fn name(block: &[u8; 512], ustar: bool) -> Vec<u8> {
    let name = until_zero(&block[..100]);
    let prefix = until_zero(&block[345..500]);
    if ustar && !prefix.is_empty() { [prefix, b"/", name].concat() } else { name.to_vec() }
}

fn until_zero(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or(field)
}

/// A number of a header: octal digits, or base 256 where the first bit is set.
fn number(field: &[u8]) -> Option<u64> {
    signed_number(field).and_then(|number| u64::try_from(number).ok())
}

fn signed_number(field: &[u8]) -> Option<i64> {
    if field.first()? & 0x80 != 0 {
        let negative = field[0] & 0x40 != 0;
        // The first bit only marks the form; the second one is the sign. 12 bytes at most are far from overflowing.
        let first = if negative { i128::from(field[0].cast_signed()) } else { i128::from(field[0] & 0x7f) };
        let value = field[1..].iter().fold(first, |value, byte| value * 256 + i128::from(*byte));
        return i64::try_from(value).ok();
    }
    let digits: Vec<u8> = until_zero(field).iter().copied().filter(|byte| *byte != b' ').collect();
    if digits.is_empty() {
        return Some(0);
    }
    i64::from_str_radix(std::str::from_utf8(&digits).ok()?, 8).ok().filter(|value| *value >= 0)
}

fn decimal(value: &[u8]) -> io::Result<u64> {
    let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    let number = std::str::from_utf8(value).ok().filter(|_| digits).and_then(|text| text.parse().ok());
    number.ok_or_else(|| bad("a number of an extended header is none"))
}

/// `SECONDS[.FRACTION]`, which may be before 1970.
fn time(value: &[u8]) -> io::Result<(i64, u32)> {
    let wrong = || bad("a time of an extended header is none");
    let text = std::str::from_utf8(value).map_err(|_| wrong())?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().map_err(|_| wrong())?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return Err(wrong());
    }
    let nanoseconds = format!("{fraction:0<9.9}").parse().map_err(|_| wrong())?;
    if whole.starts_with('-') && nanoseconds > 0 {
        return Ok((seconds.checked_sub(1).ok_or_else(wrong)?, 1_000_000_000 - nanoseconds));
    }
    Ok((seconds, nanoseconds))
}

/// Records of the form `LENGTH KEY=VALUE\n`.
fn pax(mut content: &[u8]) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let wrong = || bad("an extended header is no list of records");
    let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    // Version 0.0 of sparse files repeats keys instead of listing pieces in one.
    let mut map: Vec<u8> = Vec::new();
    while !content.is_empty() && content[0] != 0 {
        let space = content.iter().take(20).position(|byte| *byte == b' ').ok_or_else(wrong)?;
        let length = usize::try_from(decimal(&content[..space])?).map_err(|_| wrong())?;
        let record = content.get(space + 1..length).ok_or_else(wrong)?;
        let record = record.strip_suffix(b"\n").ok_or_else(wrong)?;
        let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(wrong)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        if key == b"GNU.sparse.offset" || key == b"GNU.sparse.numbytes" {
            if !map.is_empty() {
                map.push(b',');
            }
            map.extend_from_slice(value);
        } else {
            records.push((key.to_vec(), value.to_vec()));
        }
        content = &content[length..];
    }
    if !map.is_empty() {
        records.push((b"GNU.sparse.map".to_vec(), map));
    }
    Ok(records)
}

fn cut(e: io::Error) -> io::Error {
    if e.kind() == io::ErrorKind::UnexpectedEof { bad("it ends in the middle") } else { e }
}
