//! What one lease leaves to the next: the table in docs/pool.md, row for row.

mod common;

use std::collections::BTreeMap;

use common::{pool, probe, run, text};
use runx_pool::{Filter, Pool, Template, Tier};

const TIERS: [Tier; 3] = [Tier::Complete, Tier::Wipe, Tier::None];

/// Memory that a program takes which leaves a peak, and which none has that only looks; in bytes.
const PEAK: u64 = 60 << 20;

/// Without a filter, which would keep programs from leaving half of the traces.
fn template(tier: Tier) -> Template {
    Template { tier, filter: Filter::Off, ..Template::host() }
}

/// The table: whether a kind stays, by tier.
fn documented() -> BTreeMap<String, [bool; 3]> {
    let text = include_str!("../../../docs/pool.md");
    let mut table = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [kind, _, complete, wipe, none] = cells.as_slice() else { continue };
        let stays = |cell: &str| match cell {
            "stays" => true,
            "–" => false,
            other => panic!("{kind}: {other:?} is neither \"stays\" nor \"–\""),
        };
        table.insert(kind.trim_matches('`').to_owned(), [stays(complete), stays(wipe), stays(none)]);
    }
    table
}

/// A kernel that has no such thing: attributes of files on a tmpfs came with Linux 6.6.
fn is_unknown_here(left: &str) -> bool {
    left.contains(&format!("(os error {})", libc::EOPNOTSUPP))
}

/// Leaves a kind in one lease and returns what the next one finds; `None` if there is no such thing here.
fn found_after(pool: &Pool, kind: &str) -> Option<Vec<String>> {
    let mut lease = pool.acquire().expect("lend a sandbox");
    let dirty =
        lease.run(probe(&["dirty", kind]).env("PROBE", "dirty").limits(common::patient())).expect("run the probe");
    assert_eq!(dirty.code(), 0, "{kind}: {dirty:?}");
    let left = text(&dirty);
    if kind != "all" && is_unknown_here(&left) {
        return None;
    }
    assert!(left.contains("left"), "nothing was left: {left}");
    let uid = text(&run(&mut lease, &["detect"])).lines().find(|line| line.starts_with("uid ")).map(str::to_owned);
    drop(lease);
    let mut lease = pool.acquire().expect("lend another sandbox");
    let seen = run(&mut lease, &["detect"]);
    assert_eq!(seen.code(), 0, "{kind}: {seen:?}");
    let mut found: Vec<String> =
        text(&seen).lines().filter_map(|line| line.strip_prefix("found ")).map(str::to_owned).collect();
    if text(&seen).lines().find(|line| line.starts_with("uid ")) == uid.as_deref() {
        found.push("user-id".into());
    }
    if seen.memory > PEAK {
        found.push("memory-peak".into());
    }
    if seen.processes.is_some_and(|count| count > 2) {
        found.push("process-peak".into());
    }
    Some(found)
}

#[test]
fn every_row_of_the_table_is_true() {
    needs_root!();
    let table = documented();
    assert!(table.len() > 20, "the table was not found: {table:?}");
    let mut wrong = Vec::new();
    for (at, tier) in TIERS.into_iter().enumerate() {
        for (kind, stays) in &table {
            let pool = pool(template(tier), 1);
            // What nobody leaves on purpose is looked for after all of them.
            let left = if kind == "inherited" { "files" } else { kind };
            let Some(found) = found_after(&pool, left) else { continue };
            let found = found.contains(kind);
            if found != stays[at] {
                wrong.push(format!("{kind}, {}: found {found}, documented {}", tier.name(), stays[at]));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn after_all_traces_at_once_a_complete_lease_finds_none() {
    needs_root!();
    let pool = pool(template(Tier::Complete), 1);
    assert_eq!(found_after(&pool, "all"), Some(Vec::new()));
    assert_eq!(pool.metrics().unclean, 0);
}

#[test]
fn the_probe_leaves_and_finds_what_it_says() {
    needs_root!();
    // In the same lease everything is there, or the table would prove nothing.
    let pool = pool(template(Tier::Complete), 1);
    let mut never = Vec::new();
    for kind in documented()
        .keys()
        .filter(|kind| !["user-id", "memory-peak", "process-peak", "inherited"].contains(&kind.as_str()))
    {
        let mut lease = pool.acquire().expect("lend a sandbox");
        let left = text(&run(&mut lease, &["dirty", kind]));
        let found = text(&run(&mut lease, &["detect"])).contains(&format!("found {kind}\n"));
        // What lives in processes ends with the execution that made them.
        let ends = ["abstract-socket", "listener", "processes", "hostname", "mounts", "environment", "stream-flags"];
        if is_unknown_here(&left) {
            continue;
        }
        if !left.contains(&format!("{kind}: left")) || (!found && !ends.contains(&kind.as_str())) {
            never.push(format!("{kind}: {left}, found {found}"));
        }
    }
    assert!(never.is_empty(), "{never:#?}");
}

#[test]
fn a_sandbox_with_ipc_objects_is_replaced_and_not_wiped() {
    needs_root!();
    let pool = pool(template(Tier::Wipe), 1);
    for (round, kind) in ["sysv-shm", "posix-mqueue"].into_iter().enumerate() {
        assert_eq!(found_after(&pool, kind), Some(Vec::new()));
        assert_eq!(pool.metrics().unclean, round as u64 + 1, "{kind}");
    }
}

#[test]
fn user_ids_are_not_used_twice_and_a_new_spawner_begins_when_they_are_all_used() {
    needs_root!();
    let mut template = template(Tier::Complete);
    template.users.count = 5;
    let pool = pool(template, 1);
    let mut spawners = BTreeMap::new();
    for _ in 0..12 {
        let mut lease = pool.acquire().expect("lend a sandbox");
        let seen = text(&run(&mut lease, &["detect"]));
        let uid = seen.lines().find(|line| line.starts_with("uid ")).expect("a user id").to_owned();
        assert!(!seen.contains("found"), "{seen}");
        *spawners.entry(uid).or_insert(0) += 1;
    }
    assert!(spawners.len() <= 4 && pool.metrics().spawners >= 3, "{spawners:?} {:?}", pool.metrics());
}
