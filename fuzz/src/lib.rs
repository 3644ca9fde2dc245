//! Inputs for parsers: good ones, changed at random, as many as `RUNX_ROUNDS` says. They need no other toolchain than the
//! tests, and a seed repeats them.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{SystemTime, UNIX_EPOCH};

/// Bytes; no parser here takes more than a few of these to be confused, and shorter ones are faster.
const LONGEST: usize = 64 << 10;

/// Words that mean something to most parsers.
const WORDS: [&[u8]; 24] = [
    b"\"",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b"\\u0000",
    b"null",
    b"-1",
    b"1e999",
    b"0.5",
    b"18446744073709551616",
    b"4294967296",
    b"-9223372036854775808",
    b"/",
    b"..",
    b"../../",
    b"=",
    b"\n",
    b"\0",
    b"\xff\xff\xff\xff\x0f",
    b"\xf0\x9f\x98\x80",
    b"%",
];

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) as usize % limit.max(1)
    }
}

/// Feeds a parser with changed forms of good inputs: `sample` of them, or as many as `RUNX_ROUNDS` says. `RUNX_SEED` repeats
/// a run.
///
/// # Panics
/// When the parser does, with the input that made it.
pub fn feed(what: &str, good: &[&[u8]], sample: usize, parser: impl Fn(&[u8])) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    let seed = number("RUNX_SEED").unwrap_or(now) | 1;
    let rounds = number("RUNX_ROUNDS").map_or(sample, |rounds| rounds as usize);
    eprintln!("{what}: {rounds} inputs, RUNX_SEED={seed}");
    let mut random = Random(seed);
    for round in 0..rounds {
        let mut input = good[random.below(good.len())].to_vec();
        for _ in 0..=random.below(8) {
            change(&mut input, good, &mut random);
        }
        input.truncate(LONGEST);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| parser(&input))) {
            eprintln!("{what}: input {round} of RUNX_SEED={seed}: {:?}", String::from_utf8_lossy(&input));
            resume_unwind(panic);
        }
    }
}

fn change(input: &mut Vec<u8>, good: &[&[u8]], random: &mut Random) {
    let at = random.below(input.len() + 1);
    let end = (at + 1 + random.below(16)).min(input.len());
    match random.below(8) {
        0 if at < input.len() => input[at] ^= 1 << random.below(8),
        1 if at < input.len() => input[at] = random.below(256) as u8,
        2 => drop(input.drain(at.min(end)..end)),
        3 => drop(input.splice(at..at, WORDS[random.below(WORDS.len())].iter().copied())),
        4 => drop(input.splice(at.min(end)..end, WORDS[random.below(WORDS.len())].iter().copied())),
        // A part of another, or of itself.
        5 => {
            let other = good[random.below(good.len())];
            let from = random.below(other.len());
            let part = &other[from..(from + random.below(64)).min(other.len())];
            drop(input.splice(at..at, part.iter().copied()));
        }
        6 => input.truncate(at),
        // The same again and again, which nests what nests.
        _ => {
            let part: Vec<u8> = input[at.min(end)..end].to_vec();
            let many = 1 << random.below(10);
            drop(input.splice(at..at, part.iter().copied().cycle().take(part.len() * many)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_not_lost() {
        let found = catch_unwind(|| feed("x", &[b"abc"], 10_000, |input| assert!(!input.contains(&b'%'))));
        assert!(found.is_err());
    }
}
