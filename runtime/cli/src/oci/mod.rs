//! The commands of an OCI runtime.

pub(crate) mod agent;
pub(crate) mod checkpoint;
pub(crate) mod create;
pub(crate) mod events;
pub(crate) mod exec;
pub(crate) mod list;
pub(crate) mod manage;
pub(crate) mod ps;
pub(crate) mod spec;
pub(crate) mod update;

pub(crate) mod console;
pub(crate) mod foreground;
pub(crate) mod notify;
mod pid_file;
mod pidfd_socket;
pub(crate) mod signal;
mod stats;
