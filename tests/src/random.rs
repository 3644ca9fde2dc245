//! Numbers that nobody can guess and everybody can repeat.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A sequence of numbers that its seed decides.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of `RUNX_SEED`, or of a seed that is printed.
    ///
    /// # Panics
    /// When `RUNX_SEED` is no number.
    pub fn seeded(what: &str) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        let seed = std::env::var("RUNX_SEED").map_or(now, |seed| seed.parse().expect("RUNX_SEED is a number"));
        eprintln!("{what}: RUNX_SEED={seed}");
        Self(seed | 1)
    }

    /// The next number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % limit
    }

    /// A time of up to `limit`.
    pub fn moment(&mut self, limit: Duration) -> Duration {
        Duration::from_micros(self.below(limit.as_micros() as u64 + 1))
    }
}
