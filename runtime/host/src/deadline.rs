//! The end of a module by time, whatever it is doing.

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::arguments::Arguments;

/// The exit code of a process whose time is over, as timeout(1) has it.
const EXIT_TIMED_OUT: i32 = 124;

/// Begins to count. The process ends when the time is over: there is nothing in it but the module.
pub(crate) fn set(arguments: &Arguments) -> Result<()> {
    let Some(limit) = arguments.timeout else { return Ok(()) };
    let name = arguments.args[0].clone();
    std::thread::Builder::new()
        .name("deadline".into())
        .spawn(move || end_after(limit, &name))
        .context("start the thread that waits for the deadline")?;
    Ok(())
}

fn end_after(limit: Duration, name: &str) {
    std::thread::sleep(limit);
    let _ = writeln!(std::io::stderr(), "runx: {name}: its time of {} ms is over", limit.as_millis());
    // SAFETY: nothing runs after it. Destructors of what the module uses in the other thread shall not run either.
    unsafe { libc::_exit(EXIT_TIMED_OUT) }
}
