//! What a pool costs: executions through a warm sandbox, a sandbox made while somebody waits, and the floor below both,
//! vfork and exec, in turns, so that a busy machine is busy for all. `pool-bench [ROUNDS [PROGRAM [ARGUMENT…]]]`; the program is
//! /bin/true by default.

use std::time::{Duration, Instant};

use runx_pool::{Command, Pool, Settings, Status, Template, Tier};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    runx_pool::spawner_main();
    let mut args = std::env::args().skip(1);
    let rounds: usize = args.next().map_or(Ok(300), |text| text.parse())?;
    let program = args.next().unwrap_or_else(|| "/bin/true".into());
    let program = Program { name: program, args: args.collect() };
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?.lines().count();
    println!("{}, {rounds} rounds, {mounts} mounts; milliseconds", program.name);
    println!("{:28} {:>7} {:>7} {:>7} {:>7}", "", "min", "p50", "p90", "p99");
    for tier in [Tier::Complete, Tier::Wipe, Tier::None] {
        let template = Template { tier, ..Template::host() };
        let pool = Pool::new(template, Settings { size: 4, burst: 4, ..Settings::default() })?;
        let (mut floor, mut times) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            while pool.metrics().ready < 4 {
                std::thread::sleep(Duration::from_micros(200));
            }
            let begin = Instant::now();
            // The standard library starts a plain command by posix_spawn, which is vfork and exec.
            std::process::Command::new(&program.name)
                .args(&program.args)
                .stdout(std::process::Stdio::null())
                .status()?;
            floor.push(begin.elapsed());
            let begin = Instant::now();
            let mut lease = pool.acquire()?;
            run(&mut lease, &program)?;
            times.push(begin.elapsed());
        }
        show("floor: vfork and exec", &floor);
        show(&format!("pooled execution, {}", tier.name()), &times);
    }
    let pool = Pool::new(Template::host(), Settings { size: 0, burst: 2, ..Settings::default() })?;
    let mut cold = Vec::new();
    let mut whole = Vec::new();
    for _ in 0..rounds {
        let begin = Instant::now();
        let mut lease = pool.acquire()?;
        cold.push(begin.elapsed());
        run(&mut lease, &program)?;
        whole.push(begin.elapsed());
        drop(lease);
        while pool.metrics().leased > 0 {
            std::thread::yield_now();
        }
    }
    show("cold: a sandbox is made", &cold);
    show("cold: and a program run", &whole);
    for tier in [Tier::Complete, Tier::None] {
        let template = Template { tier, ..Template::host() };
        let pool = Pool::new(template, Settings { size: 8, burst: 8, ..Settings::default() })?;
        let threads = std::thread::available_parallelism()?.get();
        let begin = Instant::now();
        std::thread::scope(|scope| {
            let work = || -> Result<(), String> {
                (0..rounds).try_for_each(|_| {
                    let mut lease = pool.acquire().map_err(|e| e.to_string())?;
                    run(&mut lease, &program).map_err(|e| e.to_string())
                })
            };
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            running.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked".to_owned())?)
        })?;
        let each = (rounds * threads) as f64 / begin.elapsed().as_secs_f64();
        println!("throughput, {}: {each:.0} executions a second by {threads} threads", tier.name());
    }
    Ok(())
}

/// What is executed.
struct Program {
    name: String,
    args: Vec<String>,
}

fn run(lease: &mut runx_pool::Lease, program: &Program) -> Result<(), Failure> {
    let outcome = lease.run(Command::new(&program.name).args(&program.args))?;
    if outcome.status == Status::Accepted { Ok(()) } else { Err(format!("{outcome:?}").into()) }
}

fn show(what: &str, times: &[Duration]) {
    let mut times = times.to_vec();
    times.sort_unstable();
    let at = |part: usize| times.get((times.len() * part / 100).min(times.len().saturating_sub(1))).copied();
    let [min, p50, p90, p99] = [0, 50, 90, 99].map(|part| at(part).unwrap_or_default().as_secs_f64() * 1e3);
    println!("{what:28} {min:7.3} {p50:7.3} {p90:7.3} {p99:7.3}");
}
