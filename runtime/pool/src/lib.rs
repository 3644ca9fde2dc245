//! Warm sandboxes: programs start in under a millisecond, and nothing of them stays.
//!
//! A [`Pool`] keeps sandboxes ready that were made ahead of time. [`Pool::acquire`] lends one; the [`Lease`] opens files
//! in it and runs programs, one after the other, with limits; when it is dropped the sandbox is thrown away, or reset as
//! far as the [`Tier`] says, and another one takes its place in the background.
//!
//! Three kinds of processes: the pool's own, which may have any number of threads; its *spawner*, a small process with one
//! thread in an almost empty mount table, which clones sandboxes; and in each sandbox an *init*, process 1 of namespaces of
//! its own, which has all prepared and waits on a socket. An execution is one message to it and one back; what is in
//! between is a vfork and an exec.
//!
//! `docs/pool.md` tells what stays in which tier, what is defended against whom, and what it costs.
//!
//! ```no_run
//! use runx_pool::{Command, Output, Pool, Settings, Status, Template};
//!
//! // First thing: the pool executes this program again, to be its spawner.
//! runx_pool::spawner_main();
//! let pool = Pool::new(Template::host(), Settings::default())?;
//! let mut lease = pool.acquire()?;
//! let command = Command::new("/bin/echo").arg("hello").stdout(Output::Capture(1 << 20));
//! let outcome = lease.run(command)?;
//! assert_eq!(outcome.status, Status::Accepted);
//! assert_eq!(outcome.stdout, b"hello\n");
//! # Ok::<(), runx_pool::Error>(())
//! ```

#![cfg(target_os = "linux")]

mod command;
mod error;
mod filter;
mod group;
mod init;
mod module;
mod outcome;
mod pool;
mod spawner;
mod stat;
mod sys;
mod template;
mod wire;

pub use command::{Command, Input, Limits, Output};
pub use error::{Error, Result};
pub use outcome::{Outcome, Status};
pub use pool::lease::{Lease, OpenOptions};
pub use pool::metrics::Metrics;
pub use pool::stop::Killer;
pub use pool::{Pool, Settings};
pub use spawner::spawner_main;
pub use stat::{Stat, stat};
pub use template::{Bind, Filter, Network, Root, Template, Tier, Tmpfs, Users};

/// The example in docs/pool.md is compiled as well.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/pool.md")]
struct Documentation;
