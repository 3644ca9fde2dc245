//! What a process is called in `ps`: a monitor is a copy of a command, whose words and environment may hold secrets.

use std::fs;

/// Overwrites this process's command line and environment, where /proc shows them.
pub(super) fn set(title: &str) {
    let kept: Vec<_> =
        ["PATH", "XDG_CACHE_HOME", "HOME"].iter().filter_map(|name| Some((*name, std::env::var_os(name)?))).collect();
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // proc_pid_stat(5): arg_start is field 48, and the third is the first after the name.
    let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace().skip(45);
    let mut next = || fields.next().and_then(|field| field.parse::<usize>().ok()).unwrap_or(0);
    let [args, args_end, environment, environment_end] = [next(), next(), next(), next()];
    if args == 0 || args_end <= args || environment_end < environment {
        return;
    }
    // SAFETY: these are the bounds of the words and variables that the kernel put on this process's stack, which stay
    // writable; the environment is made anew below, in memory of its own. This process has one thread.
    unsafe {
        std::ptr::write_bytes(args as *mut u8, 0, args_end - args);
        std::ptr::write_bytes(environment as *mut u8, 0, environment_end - environment);
        let length = title.len().min(args_end - args - 1);
        std::ptr::copy_nonoverlapping(title.as_ptr(), args as *mut u8, length);
        libc::clearenv();
        for (name, value) in kept {
            std::env::set_var(name, value);
        }
    }
}
