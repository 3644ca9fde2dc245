//! How sandboxes come and go, and how programs are ended from outside.

mod common;

use std::time::Duration;

use common::settings;
use runx_pool::{Pool, Template};

#[test]
fn what_is_thrown_away_does_not_pile_up() {
    needs_root!();
    let (size, burst) = (2, 2);
    let pool = Pool::new(Template::host(), settings(size, burst)).expect("start a pool");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    drop(pool.acquire().expect("lend a sandbox"));
                    // As many as there may be were lent when makers began to wait.
                    let ending = pool.metrics().ending;
                    assert!(ending <= 3 * (size + burst) as u64, "{ending} are ending");
                }
            });
        }
    });
    while pool.metrics().ending > 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(pool.metrics().destroyed >= 200, "{:?}", pool.metrics());
}
