//! How large an archive may become when it is decompressed.
//!
//! It follows the bytes that are really there, and never a length that somebody claims: a manifest is as hostile as the
//! layers that it names.

use super::Error;

/// What every archive may become in bytes, if nothing is said.
const LEAST: u64 = 1 << 30;

/// What a byte of an archive may become. Whatever is compressed better was made to fill disks.
const RATIO: u64 = 200;

/// What an archive may become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limit {
    /// So many bytes.
    Bytes(u64),
    /// What is usual for its bytes that are there already, but `least` bytes in any case. An honest layer may begin with
    /// a long run of zeros, so while it comes, more than that is no verdict: that is for who has the whole of it.
    Growing {
        /// In bytes.
        least: u64,
    },
}

impl Limit {
    /// What the user said in bytes, or else what is usual.
    pub(crate) fn new(said: Option<u64>) -> Self {
        said.map_or(Self::Growing { least: LEAST }, Self::Bytes)
    }

    /// What an archive may become of which all bytes are there: so many.
    pub(crate) fn of_whole(self, compressed: u64) -> u64 {
        match self {
            Self::Bytes(limit) => limit,
            Self::Growing { least } => compressed.saturating_mul(RATIO).max(least),
        }
    }

    /// Whether `length` decompressed bytes are fine, of an archive of which `received` bytes are there.
    pub(super) fn check(self, length: u64, received: u64) -> Result<(), Error> {
        let limit = self.of_whole(received);
        match self {
            _ if length <= limit => Ok(()),
            Self::Bytes(_) => Err(Error::TooLarge { limit }),
            Self::Growing { .. } => Err(Error::TooSoon { received, limit }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_follows_what_is_there() {
        let usual = Limit::new(None);
        assert_eq!(usual.of_whole(0), 1 << 30);
        assert_eq!(usual.of_whole(1 << 30), 200 << 30);
        assert_eq!(usual.of_whole(u64::MAX), u64::MAX);
        let growing = Limit::Growing { least: 1000 };
        for (length, received, fine) in [(1000, 0, true), (1001, 5, false), (1001, 6, true), (1201, 6, false)] {
            assert_eq!(growing.check(length, received).is_ok(), fine, "{length} of {received}");
        }
    }

    #[test]
    fn what_the_user_says_is_exact() {
        let said = Limit::new(Some(10));
        assert!(said.check(10, 0).is_ok());
        assert!(matches!(said.check(11, 1000), Err(Error::TooLarge { limit: 10 })));
        assert_eq!(said.of_whole(1 << 30), 10);
    }
}
