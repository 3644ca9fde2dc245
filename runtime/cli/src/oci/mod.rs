//! The commands of an OCI runtime.

pub(crate) mod create;
pub(crate) mod exec;
pub(crate) mod manage;
pub(crate) mod spec;

mod console;
mod foreground;
mod pid_file;
