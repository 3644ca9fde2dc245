//! The daemon inside a sandbox. It runs commands, keeps sessions, executes code and moves files for those who have its
//! token, in the protocols that agent platforms speak.
//!
//! A core ([`process`], [`fs`], [`code`], [`metrics`]) knows nothing of protocols; [`api`] puts them on top of it. Nothing
//! here calls libc's name service: the program is static, and runs in images that hold nothing else.

pub mod api;
pub mod code;
pub mod config;
pub mod forward;
pub mod fs;
pub mod ids;
pub mod logging;
pub mod metrics;
pub mod monitor;
pub mod process;
pub mod resolve;
pub mod server;
