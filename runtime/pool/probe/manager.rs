//! A program with a pool that is closed, or killed while programs run in it.

use std::io::Read;
use std::time::Duration;

use runx_pool::{Command, Pool, Settings, Template};

pub(crate) fn manage(how: &str) {
    let pool =
        Pool::new(Template::host(), Settings { size: 3, burst: 2, ..Settings::default() }).expect("start a pool");
    let mut lease = pool.acquire().expect("lend a sandbox");
    let own = std::fs::File::open("/proc/self/exe").expect("open the own program");
    let outcome = lease.run(Command::new("true")).expect("run a program");
    assert_eq!(outcome.code(), 0, "{outcome:?}");
    let runs =
        std::thread::spawn(move || lease.run(Command::new("probe").program(own.into()).args(["attack", "sleep"])));
    std::thread::sleep(Duration::from_millis(100));
    println!("running");
    // Until the test has seen it, and wants it to end.
    let _ = std::io::stdin().read(&mut [0]);
    match how {
        "drop" => {
            drop(pool);
            let _ = runs.join();
        }
        "exit" => std::process::exit(0),
        _ => {
            // SAFETY: ends the process.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }
    }
}
