//! How long a shim takes for the life of one container, without containerd: the start command, Create, Start, the
//! end of a `true`, and Delete. One line of milliseconds for each round, and each part.
//!
//!     shim-bench runx|runc ROUNDS GAP_MS

use std::time::{Duration, Instant};

use runx_tests::shim::{Host, Make};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let make = match args.get(1).map(String::as_str) {
        Some("runx") => Make::Runx,
        Some("runc") => Make::Runc,
        _ => panic!("usage: shim-bench runx|runc ROUNDS GAP_MS"),
    };
    let number = |at: usize| args.get(at).and_then(|text| text.parse::<u64>().ok()).expect("a number");
    let (rounds, gap) = (number(2), Duration::from_millis(number(3)));
    let host = Host::new(make);
    for round in 0..rounds {
        let id = format!("b{round}");
        host.make_bundle(&id, &["/bin/true"], |_| ());
        std::thread::sleep(gap);
        let begun = Instant::now();
        let mut marks = Vec::new();
        let mut mark = |name: &'static str| marks.push((name, begun.elapsed()));
        let shim = host.shim(&id);
        mark("command");
        shim.create(&host.create_request(&id)).expect("create");
        mark("create");
        shim.start(&id, "").expect("start");
        mark("start");
        shim.wait(&id, "").expect("wait");
        mark("wait");
        shim.delete(&id, "").expect("delete");
        mark("delete");
        // containerd's own closes the connection before it answers.
        let _ = shim.shutdown(&id);
        let mut before = Duration::ZERO;
        let parts: Vec<String> = marks
            .iter()
            .map(|(name, at)| {
                let part = *at - before;
                before = *at;
                format!("\"{name}\": {:.3}", part.as_secs_f64() * 1000.0)
            })
            .collect();
        println!("{{\"total\": {:.3}, {}}}", before.as_secs_f64() * 1000.0, parts.join(", "));
    }
    host.assert_nothing_left();
}
