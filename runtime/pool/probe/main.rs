//! What the tests of the pool run in sandboxes: programs that leave traces, that look for them, and that attack.
//!
//! It is the spawner of their pools, too, and in one mode a program that has a pool.

mod attack;
mod detect;
mod dirty;
mod manager;
mod traces;

fn main() {
    runx_pool::spawner_main();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["dirty", kind] => dirty::leave(kind),
        ["detect"] => detect::look(),
        ["attack", name] => attack::attack(name),
        ["manager", how] => manager::manage(how),
        _ => {
            eprintln!("pool-probe: {words:?} means nothing");
            std::process::exit(2);
        }
    }
}
