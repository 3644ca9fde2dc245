//! What the commands of `runx container` are told.

use super::tables::Syntax;

/// All of them.
pub(super) const COMMANDS: &[Syntax] = &[];
