//! Limits as properties of a unit. systemd writes its own values into a unit's cgroup when the unit starts and again
//! later, at a daemon-reload for example: whatever it would write has to be the container's limit.

use std::collections::HashMap;
use std::path::Path;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use super::message::Value;
use crate::cgroup::convert::{io_weight, pids_max, swap_alone, weight_from_shares};
use crate::cgroup::devices::Allowed;
use crate::cgroup::files::{exists, read, read_number};
use crate::error::{Error, Result};

/// Name and value.
pub(super) type Property = (String, Value);

/// The kernel's period where none is set.
const DEFAULT_PERIOD: u64 = 100_000;

/// systemd's "infinity".
const INFINITY: u64 = u64::MAX;

/// The limits' properties, growing.
pub(super) struct Properties {
    pub(super) list: Vec<Property>,
    /// systemd's version, asked for only where it matters.
    version: u32,
    /// The quota as systemd keeps it, if one is given.
    quota: Option<i64>,
}

/// The first version that makes a group idle when its CPUWeight is 0.
pub(super) const KNOWS_IDLE: u32 = 252;

/// The first version that lets a scope have an OOMPolicy.
pub(super) const KNOWS_OOM_POLICY: u32 = 253;

/// Whether the properties of these limits depend on systemd's version.
pub(super) fn needs_version(resources: &LinuxResources) -> bool {
    resources.cpu().as_ref().is_some_and(|cpu| cpu.idle() == Some(1))
        || resources.unified().iter().flatten().any(|(file, _)| file == "cpu.idle" || file == "memory.oom.group")
}

/// Rounds a quota up to whole percents, as systemd writes it to its files, and so forgets the rest. What is then
/// written to the group directly has to be the same.
pub(super) fn round_quota(quota: i64, period: u64) -> (i64, u64) {
    let per_second = (quota as u128 * 1_000_000).div_ceil(u128::from(period)).next_multiple_of(10_000);
    let rounded = i64::try_from(per_second * u128::from(period) / 1_000_000);
    match (rounded, u64::try_from(per_second)) {
        (Ok(rounded), Ok(per_second)) => (rounded, per_second),
        _ => (quota, INFINITY),
    }
}

fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(INFINITY)
}

impl Properties {
    pub(super) fn new(version: u32) -> Self {
        Self { list: Vec::new(), version, quota: None }
    }

    /// Adds a property, or replaces the one that has its name.
    pub(super) fn set(&mut self, name: &str, value: impl Into<Value>) {
        let value = value.into();
        match self.list.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => *old = value,
            None => self.list.push((name.to_owned(), value)),
        }
    }

    /// The limits as they are then written to the group: with the quota that systemd keeps.
    pub(super) fn adjusted(&self, resources: &LinuxResources) -> LinuxResources {
        let mut resources = resources.clone();
        if let (Some(quota), Some(cpu)) = (self.quota, resources.cpu()) {
            let mut cpu = cpu.clone();
            cpu.set_quota(Some(quota));
            resources.set_cpu(Some(cpu));
        }
        resources
    }

    /// As the call to systemd takes them.
    pub(super) fn into_value(self) -> Value {
        let fields = |(name, value): Property| Value::Struct(vec![Value::Text(name), Value::Variant(Box::new(value))]);
        Value::Array("(sv)".to_owned(), self.list.into_iter().map(fields).collect())
    }

    /// The limits with version 2. `path` is the group, whose present limits complete what is given.
    pub(super) fn limits_2(&mut self, path: &Path, resources: &LinuxResources) -> Result<()> {
        if let Some(memory) = resources.memory() {
            self.memory_2(memory)?;
        }
        if let Some(cpu) = resources.cpu() {
            if cpu.idle() == Some(1) {
                if self.version >= KNOWS_IDLE {
                    self.set("CPUWeight", 0u64);
                }
            } else if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
                self.set("CPUWeight", weight_from_shares(shares));
            }
            let now = read(path, "cpu.max").unwrap_or_default();
            let now: Vec<Option<u64>> = now.split_ascii_whitespace().map(|n| n.parse().ok()).collect();
            let quota = now.first().copied().flatten().and_then(|quota| i64::try_from(quota).ok());
            self.cpu(cpu, quota, now.get(1).copied().flatten())?;
        }
        self.tasks(resources);
        if let Some(weight) = resources.block_io().as_ref().and_then(LinuxBlockIo::weight).filter(|weight| *weight != 0)
        {
            self.set("IOWeight", io_weight_for_systemd(weight, exists(path, "io.bfq.weight")));
        }
        if let Some(unified) = resources.unified() {
            self.unified(unified)?;
        }
        Ok(())
    }

    fn memory_2(&mut self, memory: &LinuxMemory) -> Result<()> {
        for (name, limit) in [("MemoryMax", memory.limit()), ("MemoryLow", memory.reservation())] {
            if let Some(limit) = limit.filter(|limit| *limit != 0) {
                self.set(name, unsigned(limit));
            }
        }
        if let Some(swap) = swap_alone(memory)? {
            self.set("MemorySwapMax", unsigned(swap));
        }
        Ok(())
    }

    /// The limits with version 1.
    pub(super) fn limits_1(&mut self, cpu_directory: Option<&Path>, resources: &LinuxResources) -> Result<()> {
        if let Some(limit) = resources.memory().as_ref().and_then(LinuxMemory::limit).filter(|limit| *limit != 0) {
            self.set("MemoryLimit", unsigned(limit));
        }
        if let Some(cpu) = resources.cpu() {
            if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
                self.set("CPUShares", shares);
            }
            let quota = cpu_directory.and_then(|d| read(d, "cpu.cfs_quota_us").ok()?.parse().ok());
            self.cpu(cpu, quota, cpu_directory.and_then(|d| read_number(d, "cpu.cfs_period_us")))?;
        }
        self.tasks(resources);
        if let Some(weight) = resources.block_io().as_ref().and_then(LinuxBlockIo::weight).filter(|weight| *weight != 0)
        {
            self.set("BlockIOWeight", u64::from(weight));
        }
        Ok(())
    }

    /// Quota and period belong together in systemd; `now` is what is in force of the one that is not given.
    fn cpu(&mut self, cpu: &LinuxCpu, quota_now: Option<i64>, period_now: Option<u64>) -> Result<()> {
        let period = cpu.period().filter(|period| *period != 0);
        let quota = cpu.quota().filter(|quota| *quota != 0);
        if let Some(period) = period {
            self.set("CPUQuotaPeriodUSec", period);
        }
        if period.is_some() || quota.is_some() {
            let period = period.or(period_now).unwrap_or(DEFAULT_PERIOD);
            let per_second = match quota.or(quota_now).filter(|quota| *quota > 0) {
                Some(all) => {
                    let (rounded, per_second) = round_quota(all, period);
                    self.quota = quota.map(|_| rounded);
                    per_second
                }
                None => INFINITY,
            };
            self.set("CPUQuotaPerSecUSec", per_second);
        }
        for (name, field, list) in [("AllowedCPUs", "cpus", cpu.cpus()), ("AllowedMemoryNodes", "mems", cpu.mems())] {
            if let Some(list) = list.as_deref().filter(|list| !list.is_empty()) {
                self.set(name, bits(list, &format!("linux.resources.cpu.{field}"))?);
            }
        }
        Ok(())
    }

    fn tasks(&mut self, resources: &LinuxResources) {
        if let Some(pids) = resources.pids() {
            self.set("TasksMax", pids_max(pids).unwrap_or(INFINITY));
        }
    }

    /// Files of version 2 that systemd writes, too. Others are written to the group and stay.
    fn unified(&mut self, unified: &HashMap<String, String>) -> Result<()> {
        let idle = unified.get("cpu.idle").is_some_and(|value| value.trim() == "1") && self.version >= KNOWS_IDLE;
        for (file, value) in unified {
            let value = value.trim();
            let bad = || Error::spec(format!("linux.resources.unified: {value:?} is no value for {file}"));
            let number = |text: &str| if text == "max" { Ok(INFINITY) } else { text.parse().map_err(|_| bad()) };
            match file.as_str() {
                "memory.high" => self.set("MemoryHigh", number(value)?),
                "memory.low" => self.set("MemoryLow", number(value)?),
                "memory.min" => self.set("MemoryMin", number(value)?),
                "memory.max" => self.set("MemoryMax", number(value)?),
                "memory.swap.max" => self.set("MemorySwapMax", number(value)?),
                "memory.zswap.max" if self.version >= 253 => self.set("MemoryZSwapMax", number(value)?),
                "pids.max" => self.set("TasksMax", number(value)?.max(1)),
                "cpu.idle" if idle => self.set("CPUWeight", 0u64),
                "cpu.weight" if !idle => self.set("CPUWeight", number(value)?),
                "cpu.max" => {
                    let mut fields = value.split_ascii_whitespace();
                    let quota = number(fields.next().ok_or_else(bad)?)?;
                    let period = fields.next().map_or(Ok(DEFAULT_PERIOD), number)?;
                    if period == 0 || fields.next().is_some() {
                        return Err(bad());
                    }
                    self.set("CPUQuotaPeriodUSec", period);
                    let quota = i64::try_from(quota).ok();
                    self.set("CPUQuotaPerSecUSec", quota.map_or(INFINITY, |quota| round_quota(quota, period).1));
                }
                "cpuset.cpus" => self.set("AllowedCPUs", bits(value, "linux.resources.unified: cpuset.cpus")?),
                "cpuset.mems" => self.set("AllowedMemoryNodes", bits(value, "linux.resources.unified: cpuset.mems")?),
                "io.weight" => {
                    if let Ok(weight) = value.strip_prefix("default ").unwrap_or(value).parse::<u64>() {
                        self.set("IOWeight", weight);
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// `memory.oom.group`, which systemd takes only while it makes the unit.
    pub(super) fn oom_policy(&mut self, resources: &LinuxResources) {
        let group = resources.unified().as_ref().and_then(|unified| unified.get("memory.oom.group"));
        match group.map(|value| value.trim()) {
            Some("0") if self.version >= KNOWS_OOM_POLICY => self.set("OOMPolicy", "continue"),
            Some("1") if self.version >= KNOWS_OOM_POLICY => self.set("OOMPolicy", "kill"),
            _ => {}
        }
    }

    /// The devices, where systemd writes them into the group (version 1).
    pub(super) fn devices(&mut self, allowed: Allowed) {
        let (policy, list) = match allowed {
            Allowed::Everything => ("auto", Vec::new()),
            Allowed::Only(list) => ("strict", list),
        };
        let entry = |(path, access)| Value::Struct(vec![Value::Text(path), Value::Text(access)]);
        self.set("DevicePolicy", policy);
        self.set("DeviceAllow", Value::Array("(ss)".to_owned(), list.into_iter().map(entry).collect()));
    }
}

/// The weight with which systemd's own conversion for BFQ comes back to `weight`; without BFQ, the kernel's.
fn io_weight_for_systemd(weight: u16, bfq: bool) -> u64 {
    match weight {
        _ if !bfq => io_weight(weight),
        0..=100 => u64::from(weight),
        _ => 100 + 11 * u64::from(weight - 100),
    }
}

/// `0-2,5` as a set of bits, the lowest first.
fn bits(list: &str, field: &str) -> Result<Value> {
    /// More than any kernel is built for.
    const MOST: usize = 65_536;
    let bad = || Error::spec(format!("{field} {list:?} is no list of numbers and ranges"));
    let mut bytes: Vec<u8> = Vec::new();
    for part in list.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.trim().parse::<usize>().ok().filter(|n| *n < MOST).ok_or_else(bad);
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(bad());
        }
        bytes.resize(bytes.len().max(last / 8 + 1), 0);
        (first..=last).for_each(|n| bytes[n / 8] |= 1 << (n % 8));
    }
    if bytes.is_empty() {
        return Err(bad());
    }
    Ok(Value::Array("y".to_owned(), bytes.into_iter().map(Value::Byte).collect()))
}

/// Properties of annotations named `org.systemd.property.NAME`, by runc's rules: the value is GVariant text, and a
/// name that ends in `Sec`, as in systemd's manual, becomes `USec`, as it is on the bus.
pub(super) fn from_annotations(annotations: &HashMap<String, String>) -> Result<Vec<Property>> {
    const PREFIX: &str = "org.systemd.property.";
    let mut out = Vec::new();
    for (key, text) in annotations {
        let Some(name) = key.strip_prefix(PREFIX) else { continue };
        if name.len() < 3 || !name.bytes().all(|byte| byte.is_ascii_alphabetic()) {
            return Err(Error::spec(format!("annotation {key}: {name:?} is not the name of a property")));
        }
        let bad = |why: String| Error::spec(format!("annotation {key}={text}: {why}"));
        let value = super::text::parse(text).map_err(bad)?;
        let seconds = name.strip_suffix("Sec").filter(|stem| stem.ends_with(|c: char| c.is_ascii_lowercase()));
        out.push(match seconds {
            Some(stem) => (format!("{stem}USec"), microseconds(&value).map_err(bad)?),
            None => (name.to_owned(), value),
        });
    }
    out.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(out)
}

fn microseconds(seconds: &Value) -> std::result::Result<Value, String> {
    let whole = match *seconds {
        Value::Byte(n) => i128::from(n),
        Value::I16(n) => n.into(),
        Value::U16(n) => n.into(),
        Value::I32(n) => n.into(),
        Value::U32(n) => n.into(),
        Value::I64(n) => n.into(),
        Value::U64(n) => n.into(),
        Value::Double(n) if (0.0..1e12).contains(&n) => return Ok(Value::U64((n * 1e6) as u64)),
        _ => return Err("it is not a number of seconds".into()),
    };
    let all = whole.checked_mul(1_000_000).and_then(|n| u64::try_from(n).ok());
    all.map(Value::U64).ok_or_else(|| "it is not a number of seconds".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find<'a>(properties: &'a Properties, name: &str) -> Option<&'a Value> {
        properties.list.iter().find(|(known, _)| known == name).map(|(_, value)| value)
    }

    fn resources(json: &str) -> LinuxResources {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn limits_become_properties() {
        let mut properties = Properties::new(252);
        let limits = resources(
            r#"{"memory": {"limit": 1000, "swap": 1500, "reservation": -1}, "pids": {"limit": 0},
                "cpu": {"shares": 1024, "quota": 50000, "cpus": "0,9"}, "blockIO": {"weight": 1000},
                "unified": {"memory.high": "max", "cpu.max.burst": "7"}}"#,
        );
        properties.limits_2(Path::new("/nowhere"), &limits).unwrap();
        assert_eq!(find(&properties, "MemoryMax"), Some(&Value::U64(1000)));
        assert_eq!(find(&properties, "MemorySwapMax"), Some(&Value::U64(500)));
        assert_eq!(find(&properties, "MemoryLow"), Some(&Value::U64(INFINITY)));
        assert_eq!(find(&properties, "MemoryHigh"), Some(&Value::U64(INFINITY)));
        assert_eq!(find(&properties, "TasksMax"), Some(&Value::U64(1)));
        assert_eq!(find(&properties, "CPUWeight"), Some(&Value::U64(100)));
        assert_eq!(find(&properties, "CPUQuotaPerSecUSec"), Some(&Value::U64(500_000)));
        assert_eq!(find(&properties, "CPUQuotaPeriodUSec"), None);
        assert_eq!(find(&properties, "IOWeight"), Some(&Value::U64(10_000)));
        let bytes = vec![Value::Byte(1), Value::Byte(2)];
        assert_eq!(find(&properties, "AllowedCPUs"), Some(&Value::Array("y".into(), bytes)));
    }

    #[test]
    fn an_idle_group_is_one_of_weight_zero() {
        let mut properties = Properties::new(KNOWS_IDLE);
        let idle = resources(r#"{"cpu": {"idle": 1, "shares": 500}}"#);
        properties.limits_2(Path::new("/nowhere"), &idle).unwrap();
        assert_eq!(find(&properties, "CPUWeight"), Some(&Value::U64(0)));
        let mut properties = Properties::new(KNOWS_IDLE - 1);
        properties.limits_2(Path::new("/nowhere"), &idle).unwrap();
        assert_eq!(find(&properties, "CPUWeight"), None);
        assert!(needs_version(&idle));
    }

    #[test]
    fn quotas_are_rounded_up_to_whole_percents() {
        assert_eq!(round_quota(50_000, 100_000), (50_000, 500_000));
        assert_eq!(round_quota(50_001, 100_000), (51_000, 510_000));
        assert_eq!(round_quota(1000, 33_000), (1320, 40_000));
        assert_eq!(round_quota(i64::MAX, 1), (i64::MAX, INFINITY));
    }

    #[test]
    fn weights_survive_systemds_conversion_for_bfq() {
        // What systemd makes of an IOWeight for BFQ.
        let bfq = |weight: u64| if weight <= 100 { weight } else { 100 + (weight - 100) * 900 / 9900 };
        for weight in [1, 10, 100, 101, 500, 1000] {
            assert_eq!(bfq(io_weight_for_systemd(weight, true)), u64::from(weight));
        }
    }

    #[test]
    fn lists_that_are_none_are_refused() {
        for bad in ["", ",", "1-0", "a", "0-4294967295", "-"] {
            assert!(bits(bad, "cpus").is_err(), "{bad}");
        }
    }

    #[test]
    fn annotations_become_properties() {
        let annotations = |list: &[(&str, &str)]| {
            let map = list.iter().map(|(k, v)| (format!("org.systemd.property.{k}"), (*v).to_owned())).collect();
            from_annotations(&map)
        };
        let all = annotations(&[("TimeoutStopSec", "1.5"), ("CollectMode", "'inactive'"), ("XSec", "5")]).unwrap();
        assert_eq!(all[0], ("CollectMode".into(), "inactive".into()));
        assert_eq!(all[1], ("TimeoutStopUSec".into(), Value::U64(1_500_000)));
        assert_eq!(all[2], ("XSec".into(), Value::I32(5)));
        for bad in [("A", "1"), ("Bad-Name", "1"), ("TimeoutStopSec", "'x'"), ("TimeoutStopSec", "-1"), ("Good", "")] {
            assert!(annotations(&[bad]).is_err(), "{bad:?}");
        }
        let other = HashMap::from([("io.kubernetes.x".to_owned(), "nonsense".to_owned())]);
        assert!(from_annotations(&other).unwrap().is_empty());
    }
}
