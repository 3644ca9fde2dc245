//! Decompressing what may be gzip, zstd or plain, by how it begins.

use std::io::{self, BufReader, Chain, Cursor, Read};

use flate2::bufread::MultiGzDecoder;

/// How an archive is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// By its first bytes.
    pub(crate) fn of(magic: &[u8]) -> Self {
        if magic.starts_with(&[0x1f, 0x8b]) {
            Self::Gzip
        } else if magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || is_skippable(magic) {
            Self::Zstd
        } else {
            Self::None
        }
    }

    /// The end of a layer's media type.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Gzip => "+gzip",
            Self::Zstd => "+zstd",
        }
    }
}

/// zstd's frames without content, which seekable archives begin with.
fn is_skippable(magic: &[u8]) -> bool {
    matches!(magic, [first, 0x2a, 0x4d, 0x18, ..] if first & 0xf0 == 0x50)
}

/// The largest window in its logarithm that a zstd frame may ask for: 128 MiB, as much as the program zstd takes unasked.
const WINDOW: u32 = 27;

/// Decompresses a stream.
pub(crate) enum Decoder<R: Read> {
    None(Whole<R>),
    Gzip(Box<MultiGzDecoder<BufReader<Whole<R>>>>),
    Zstd(Box<zstd::Decoder<'static, BufReader<Whole<R>>>>),
}

/// What was looked at, and the rest.
type Whole<R> = Chain<Cursor<Vec<u8>>, R>;

impl<R: Read> Decoder<R> {
    pub(crate) fn new(mut from: R) -> io::Result<Self> {
        let mut magic = Vec::new();
        while magic.len() < 4 {
            let mut byte = [0; 4];
            let wanted = 4 - magic.len();
            match from.read(&mut byte[..wanted]) {
                Ok(0) => break,
                Ok(length) => magic.extend_from_slice(&byte[..length]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        let compression = Compression::of(&magic);
        let whole = Cursor::new(magic).chain(from);
        let buffered = |whole| BufReader::with_capacity(1 << 17, whole);
        Ok(match compression {
            Compression::None => Self::None(whole),
            Compression::Gzip => Self::Gzip(Box::new(MultiGzDecoder::new(buffered(whole)))),
            Compression::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(buffered(whole))?;
                decoder.window_log_max(WINDOW)?;
                Self::Zstd(Box::new(decoder))
            }
        })
    }
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::None(from) => from.read(buffer),
            Self::Gzip(from) => from.read(buffer),
            Self::Zstd(from) => from.read(buffer),
        }
    }
}
