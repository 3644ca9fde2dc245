//! Containers of users who are not root.

use anyhow::{Result, bail};

use super::options::Options;

/// What an ordinary user cannot have.
pub(super) fn check(_options: &Options) -> Result<()> {
    bail!(
        "containers of ordinary users are made with \"runx run\" and a bundle of \"runx spec --rootless\"; \"runx container\" \
         needs root: sudo runx container …"
    )
}
