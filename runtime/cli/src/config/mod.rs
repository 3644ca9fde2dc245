//! The config file.

use crate::network;

/// What it may say, with the defaults of what it does not.
#[derive(Clone, Debug, Default)]
pub(crate) struct Config {
    /// `[network]`.
    pub(crate) network: network::Settings,
}
