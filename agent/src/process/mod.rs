//! Processes: how they are started, what they write, how they end.

pub mod commands;
pub mod confine;
pub mod environment;
pub mod freeze;
pub mod input;
pub mod interactive;
pub mod lines;
pub mod live;
pub mod managed;
pub mod output;
pub mod pty;
pub mod reaper;
pub mod ring;
pub mod session;
pub mod spawn;
pub mod store;
pub mod users;
