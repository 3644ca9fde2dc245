//! What the commands of `runx storage` are told.

use super::tables::Syntax;

/// All of them.
pub(super) const COMMANDS: &[Syntax] = &[];
