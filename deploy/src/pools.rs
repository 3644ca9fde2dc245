//! What pools on the node tell (`runx pool serve --metrics-file`), each under the name of its file. Their directory may be mounted
//! into pods that have pools, so nothing in it is trusted: known names, known labels and numbers are passed on, and nothing else.

use std::io::Read;
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::root::Root;
use crate::status::Metrics;

/// Where pools leave their files.
const DIRECTORY: &str = "/var/lib/runx/pools";

/// Files that are looked at.
const FILES: usize = 64;

/// The most that is read of one, in bytes.
const LIMIT: u64 = 64 << 10;

/// A pool writes every fifteen seconds; what is older is of one that was killed.
const FRESH: Duration = Duration::from_secs(60);

/// What is passed on: name, type, what it is, and its label with the values that it has.
type Known = (&'static str, &'static str, &'static str, Option<(&'static str, &'static [&'static str])>);

const KNOWN: [Known; 8] = [
    ("runx_pool_ready", "gauge", "Sandboxes that wait for a lease.", None),
    ("runx_pool_leased", "gauge", "Sandboxes that are lent.", None),
    ("runx_pool_queued", "gauge", "Requests that wait for a sandbox.", None),
    ("runx_pool_made_total", "counter", "Sandboxes that were made.", None),
    ("runx_pool_failed_total", "counter", "Attempts to make a sandbox that failed.", None),
    (
        "runx_pool_destroyed_total",
        "counter",
        "Sandboxes that were thrown away.",
        Some(("reason", &["unclean", "lost", "used"])),
    ),
    ("runx_pool_refused_total", "counter", "Requests that got no sandbox.", None),
    ("runx_pool_waiting_seconds_total", "counter", "The time that requests waited for a sandbox.", None),
];

/// A pool's name and its samples: index in [`KNOWN`], value of the label, number.
type Pool = (String, Vec<(usize, Option<&'static str>, f64)>);

fn sample(line: &str) -> Option<(usize, Option<&'static str>, f64)> {
    let (name, number) = line.rsplit_once(' ')?;
    let number = number.parse::<f64>().ok().filter(|number| number.is_finite() && *number >= 0.0)?;
    let (name, labels) = name.split_once('{').map_or((name, None), |(name, labels)| (name, Some(labels)));
    let at = KNOWN.iter().position(|known| known.0 == name)?;
    let value = match (KNOWN[at].3, labels) {
        (None, None) => None,
        (Some((label, values)), Some(labels)) => {
            let given = labels.strip_prefix(label)?.strip_prefix("=\"")?.strip_suffix("\"}")?;
            Some(*values.iter().find(|value| **value == given)?)
        }
        _ => return None,
    };
    Some((at, value, number))
}

fn read(root: &Root) -> Vec<Pool> {
    let directory = Path::new(DIRECTORY);
    let names = root.names(directory).unwrap_or_default();
    let names = names.iter().filter_map(|name| name.to_str()?.strip_suffix(".prom"));
    let plain = |name: &&str| {
        let inner = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        !name.is_empty() && name.len() <= 63 && name.bytes().all(inner)
    };
    let mut out = Vec::new();
    for name in names.filter(plain).take(FILES) {
        let path = directory.join(format!("{name}.prom"));
        // Whoever writes here can put something else in its place: what is looked at is what is read.
        let Ok(Some(file)) = root.open_file(&path) else { continue };
        let Ok(found) = file.metadata() else { continue };
        let age = found.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok()).unwrap_or_default();
        if !found.is_file() || age > FRESH {
            continue;
        }
        let mut bytes = Vec::new();
        if file.take(LIMIT).read_to_end(&mut bytes).is_err() {
            continue;
        }
        let mut samples: Vec<(usize, Option<&'static str>, f64)> = Vec::new();
        for one in String::from_utf8_lossy(&bytes).lines().filter_map(sample) {
            // Prometheus takes no sample twice.
            if !samples.iter().any(|known| (known.0, known.1) == (one.0, one.1)) {
                samples.push(one);
            }
        }
        out.push((name.to_owned(), samples));
    }
    out
}

/// Adds the metrics.
pub(crate) fn add(root: &Root, out: &mut Metrics) {
    let pools = read(root);
    out.family("runx_pools", "gauge", "Pools of sandboxes that tell of themselves.");
    out.sample("runx_pools", &[], pools.len());
    for (at, (name, kind, what, label)) in KNOWN.into_iter().enumerate() {
        out.family(name, kind, what);
        for (pool, samples) in &pools {
            for (_, value, number) in samples.iter().filter(|sample| sample.0 == at) {
                let mut labels = vec![("pool", pool.as_str())];
                labels.extend(label.zip(*value).map(|((label, _), value)| (label, value)));
                out.sample(name, &labels, number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn text(node: &Path) -> String {
        let mut out = Metrics::default();
        add(&Root::open(node).unwrap(), &mut out);
        out.0.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")).collect()
    }

    #[test]
    fn pools_are_told_apart_and_what_they_may_not_say_is_left_out() {
        let node = tempfile::tempdir().unwrap();
        assert_eq!(text(node.path()), "runx_pools 0\n");
        let directory = node.path().join("var/lib/runx/pools");
        fs::create_dir_all(&directory).unwrap();
        let put = |name: &str, text: &str| fs::write(directory.join(name), text).unwrap();
        put("judge.prom", "# HELP x\nrunx_pool_ready 4\nrunx_pool_ready 9\nrunx_pool_waiting_seconds_total 1.500000\n");
        put(
            "other.prom",
            "runx_pool_destroyed_total{reason=\"lost\"} 2\nrunx_pool_destroyed_total{reason=\"x\",pool=\"judge\"} 1\n\
             runx_pool_ready{pool=\"judge\"} 7\nrunx_info 1\nrunx_pool_leased NaN\nrunx_pool_queued -1\nup 1\n",
        );
        put("bad name.prom", "runx_pool_ready 1\n");
        put("other.prom.1.new", "runx_pool_ready 1\n");
        put("old.prom", "runx_pool_ready 1\n");
        let past = fs::File::options().write(true).open(directory.join("old.prom")).unwrap();
        past.set_modified(SystemTime::now() - FRESH * 2).unwrap();
        nix::unistd::mkfifo(&directory.join("pipe.prom"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", directory.join("link.prom")).unwrap();
        let expected = "runx_pools 2\nrunx_pool_ready{pool=\"judge\"} 4\n\
                        runx_pool_destroyed_total{pool=\"other\",reason=\"lost\"} 2\n\
                        runx_pool_waiting_seconds_total{pool=\"judge\"} 1.5\n";
        assert_eq!(text(node.path()), expected);
    }

    #[test]
    fn there_is_a_bound_on_what_is_read() {
        let node = tempfile::tempdir().unwrap();
        let directory = node.path().join("var/lib/runx/pools");
        fs::create_dir_all(&directory).unwrap();
        for at in 0..FILES + 9 {
            fs::write(directory.join(format!("p{at}.prom")), "").unwrap();
        }
        let late = format!("{}\nrunx_pool_ready 1\n", "x".repeat(LIMIT as usize));
        fs::write(directory.join("a.prom"), late).unwrap();
        assert_eq!(text(node.path()), format!("runx_pools {FILES}\n"));
    }
}
