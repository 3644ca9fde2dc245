//! The newest output of an interactive program, under the offsets that it had from the beginning. Whoever reads it keeps an
//! offset of his own, so that nobody waits for anybody.

use std::collections::VecDeque;

/// How much is kept unless somebody says otherwise, in bytes.
pub const CAPACITY: usize = 1 << 20;

/// Which stream a part comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Standard output, or a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// See the module.
#[derive(Debug)]
pub struct Ring {
    capacity: usize,
    bytes: VecDeque<u8>,
    /// The offset after the last byte.
    end: u64,
    /// Runs of bytes of one source: it, and the offset after it.
    runs: VecDeque<(Source, u64)>,
}

impl Default for Ring {
    fn default() -> Self {
        Self::new(CAPACITY)
    }
}

impl Ring {
    /// That keeps so many bytes.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, bytes: VecDeque::new(), end: 0, runs: VecDeque::new() }
    }

    /// The offset after the last byte.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// The offset of the first byte that is kept.
    pub fn start(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }

    /// Adds to it.
    pub fn push(&mut self, source: Source, bytes: &[u8]) {
        self.bytes.extend(bytes);
        self.end += bytes.len() as u64;
        match self.runs.back_mut() {
            Some((last, end)) if *last == source => *end = self.end,
            _ => self.runs.push_back((source, self.end)),
        }
        let excess = self.bytes.len().saturating_sub(self.capacity);
        self.bytes.drain(..excess);
        let start = self.start();
        while self.runs.front().is_some_and(|(_, end)| *end <= start) {
            self.runs.pop_front();
        }
    }

    /// All that is kept from an offset on, whatever it comes from, and the offset of its first byte.
    pub fn since(&self, offset: u64) -> (u64, Vec<u8>) {
        let from = offset.clamp(self.start(), self.end);
        (from, self.bytes.range((from - self.start()) as usize..).copied().collect())
    }

    /// The next part of one source from an offset on, at most `most` bytes; `None` when there is nothing new, and `Err` with
    /// the offset to go on from when what would be next is not kept any more.
    pub fn next(&self, offset: u64, most: usize) -> Result<Option<(Source, Vec<u8>)>, u64> {
        if offset < self.start() {
            return Err(self.start());
        }
        let at = self.runs.partition_point(|(_, end)| *end <= offset);
        let Some((source, end)) = self.runs.get(at) else { return Ok(None) };
        let from = (offset - self.start()) as usize;
        let length = ((end - offset) as usize).min(most);
        Ok(Some((*source, self.bytes.range(from..from + length).copied().collect())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_keep_their_source_and_their_order() {
        let mut ring = Ring::default();
        ring.push(Source::Stdout, b"out");
        ring.push(Source::Stdout, b"put");
        ring.push(Source::Stderr, b"err");
        assert_eq!(ring.next(0, 4), Ok(Some((Source::Stdout, b"outp".to_vec()))));
        assert_eq!(ring.next(4, 100), Ok(Some((Source::Stdout, b"ut".to_vec()))));
        assert_eq!(ring.next(6, 100), Ok(Some((Source::Stderr, b"err".to_vec()))));
        assert_eq!(ring.next(9, 100), Ok(None));
        assert_eq!(ring.since(5), (5, b"terr".to_vec()));
        assert_eq!(ring.since(99), (9, Vec::new()));
    }

    #[test]
    fn the_oldest_goes_and_whoever_is_late_is_told() {
        let mut ring = Ring::default();
        for number in 0..300_u32 {
            let source = if number % 2 == 0 { Source::Stdout } else { Source::Stderr };
            ring.push(source, &vec![number as u8; 10_000]);
        }
        assert_eq!((ring.end(), ring.start()), (3_000_000, 3_000_000 - CAPACITY as u64));
        assert_eq!(ring.next(5, 10), Err(ring.start()));
        assert_eq!(ring.since(0).0, ring.start());
        let (source, bytes) = ring.next(2_990_000, 100).unwrap().unwrap();
        assert_eq!((source, bytes), (Source::Stderr, vec![299_u32 as u8; 100]));
    }
}
