//! Output in lines, as events carry it.

/// How lines are told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LineMode {
    /// A line ends with `\n`, `\r` or `\r\n` and is told without it; an empty line is told as `\n`. So do released daemons.
    #[default]
    Legacy,
    /// A line is told with its end: what is told, put together, is what was written.
    Preserving,
}

/// The longest line that is held back until its end comes, in bytes. A longer one is told in parts.
pub const LIMIT: usize = 16 << 20;

/// Splits a stream into lines.
#[derive(Debug, Default)]
pub struct Lines {
    mode: LineMode,
    /// The beginning of a line whose end has not come.
    held: Vec<u8>,
    /// The last byte was a carriage return, which a newline may belong to.
    after_return: bool,
}

impl Lines {
    /// For one stream.
    pub fn new(mode: LineMode) -> Self {
        Self { mode, ..Self::default() }
    }

    /// Takes what was written, and tells the lines that have an end.
    pub fn push(&mut self, bytes: &[u8], mut tell: impl FnMut(&[u8])) {
        let mut rest = bytes;
        if self.after_return && !rest.is_empty() {
            self.after_return = false;
            match self.mode {
                LineMode::Legacy => rest = rest.strip_prefix(b"\n").unwrap_or(rest),
                LineMode::Preserving => {
                    if let Some(after) = rest.strip_prefix(b"\n") {
                        self.held.push(b'\n');
                        rest = after;
                    }
                    tell(&self.held);
                    self.held.clear();
                }
            }
        }
        while let Some(at) = rest.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
            let mut end = at + 1;
            if rest[at] == b'\r' {
                match rest.get(end) {
                    Some(b'\n') => end += 1,
                    Some(_) => {}
                    None => self.after_return = true,
                }
            }
            let line = match self.mode {
                LineMode::Legacy => &rest[..at],
                LineMode::Preserving => &rest[..end],
            };
            if self.after_return && self.mode == LineMode::Preserving {
                // Whether it has all of its end is known by the next byte.
                self.held.extend_from_slice(line);
                return;
            }
            if self.held.is_empty() {
                tell(if line.is_empty() { b"\n" } else { line });
            } else {
                self.held.extend_from_slice(line);
                tell(&self.held);
                self.held = Vec::new();
            }
            rest = &rest[end..];
        }
        self.held.extend_from_slice(rest);
        while self.held.len() > LIMIT {
            // Not within a character.
            let cut = (LIMIT - 3..=LIMIT).rev().find(|at| self.held[*at] & 0xc0 != 0x80).unwrap_or(LIMIT);
            tell(&self.held[..cut]);
            self.held.drain(..cut);
        }
    }

    /// Tells what has no end, at the end of the stream.
    pub fn finish(&mut self, mut tell: impl FnMut(&[u8])) {
        if !self.held.is_empty() {
            tell(&std::mem::take(&mut self.held));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All ways to cut the input in two give the same.
    fn lines(mode: LineMode, input: &[u8]) -> Vec<String> {
        let of = |parts: &[&[u8]]| {
            let mut out = Vec::new();
            let mut lines = Lines::new(mode);
            let mut tell = |line: &[u8]| out.push(String::from_utf8_lossy(line).into_owned());
            for part in parts {
                lines.push(part, &mut tell);
            }
            lines.finish(&mut tell);
            out
        };
        let whole = of(&[input]);
        for at in 0..=input.len() {
            assert_eq!(of(&[&input[..at], &input[at..]]), whole, "{mode:?}, cut at {at}");
        }
        whole
    }

    #[test]
    fn released_daemons_drop_ends_and_keep_empty_lines() {
        assert_eq!(lines(LineMode::Legacy, b"a\n\nb\n\n\nc\n"), ["a", "\n", "b", "\n", "\n", "c"]);
        assert_eq!(lines(LineMode::Legacy, b"a\r\nb\rc\r\r\nd"), ["a", "b", "c", "\n", "d"]);
        assert_eq!(lines(LineMode::Legacy, b""), Vec::<String>::new());
    }

    #[test]
    fn preserved_lines_are_what_was_written() {
        let input = b"a\n\nb\r\nc\rd\r\r\n\ntail";
        assert_eq!(lines(LineMode::Preserving, input), ["a\n", "\n", "b\r\n", "c\r", "d\r", "\r\n", "\n", "tail"]);
        assert_eq!(lines(LineMode::Preserving, input).concat().as_bytes(), input);
        assert_eq!(lines(LineMode::Preserving, b"x\r"), ["x\r"]);
    }

    #[test]
    fn a_line_without_end_does_not_grow_without_end() {
        let mut lines = Lines::new(LineMode::Legacy);
        let mut told = 0;
        for _ in 0..40 {
            lines.push("ä".repeat(500_000).as_bytes(), |line| {
                assert!(std::str::from_utf8(line).is_ok());
                told += line.len();
            });
        }
        assert!(told >= 2 * (LIMIT - 3) && lines.held.len() <= LIMIT, "{told}");
    }
}
