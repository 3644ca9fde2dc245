//! What people ask about this machine and this program.

pub(crate) mod check;
pub(crate) mod info;
pub(crate) mod man;
mod probe;
pub(crate) mod ps;
