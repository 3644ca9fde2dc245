//! What others write is parsed or refused, whatever it is.

use std::path::PathBuf;

use runx_core::bundle::{self, Bundle};
use runx_core::spec::{LinuxResources, Process, Spec};

const FULL: &[u8] = br#"{"ociVersion": "1.3.0", "hostname": "h", "process": {"terminal": true,
"consoleSize": {"height": 5, "width": 6}, "user": {"uid": 1, "gid": 2, "umask": 18, "additionalGids": [3]}, "args": ["sh", "-c", "x"],
"env": ["PATH=/bin", "A=b"], "cwd": "/", "capabilities": {"bounding": ["CAP_KILL"], "ambient": ["CAP_KILL"]},
"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 8, "hard": 9}], "noNewPrivileges": true, "oomScoreAdj": 10,
"scheduler": {"policy": "SCHED_BATCH", "nice": 4}, "ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 2},
"execCPUAffinity": {"initial": "0-1,3", "final": "0"}}, "root": {"path": "rootfs", "readonly": true},
"mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "ro"]},
{"destination": "/data", "type": "bind", "source": "/x", "options": ["rbind", "rprivate", "idmap", "rro"],
"uidMappings": [{"containerID": 0, "hostID": 5, "size": 6}], "gidMappings": [{"containerID": 0, "hostID": 5, "size": 6}]}],
"hooks": {"prestart": [{"path": "/bin/true", "args": ["a"], "env": ["B=c"], "timeout": 3}], "poststop": [{"path": "/x"}]},
"annotations": {"run.oci.x": "y", "org.systemd.property.X": "'y'"}}"#;

const LINUX: &[u8] = br#"{"ociVersion": "1.0.2", "process": {"user": {"uid": 0, "gid": 0}, "args": ["x"], "cwd": "/"}, "root": {"path": "r"},
"linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "user"}, {"type": "network", "path": "/proc/1/ns/net"}, {"type": "time"}],
"uidMappings": [{"containerID": 0, "hostID": 1000, "size": 65536}], "gidMappings": [{"containerID": 0, "hostID": 1000, "size": 65536}],
"timeOffsets": {"monotonic": {"secs": 5, "nanosecs": 6}}, "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 3, "fileMode": 438,
"uid": 0, "gid": 0}], "cgroupsPath": "/a/b", "resources": {"devices": [{"allow": false, "access": "rwm"}, {"allow": true, "type": "c",
"major": 1, "minor": 3, "access": "r"}], "memory": {"limit": 5, "swap": -1, "swappiness": 60}, "cpu": {"shares": 2, "quota": -1, "period": 5,
"cpus": "0-1", "mems": "0", "idle": 1, "burst": 3}, "pids": {"limit": 5}, "blockIO": {"weight": 10, "throttleReadBpsDevice": [{"major": 8,
"minor": 0, "rate": 5}]}, "hugepageLimits": [{"pageSize": "2MB", "limit": 5}], "network": {"classID": 5, "priorities": [{"name": "lo",
"priority": 4}]}, "rdma": {"x": {"hcaHandles": 3}}, "unified": {"memory.high": "5"}}, "seccomp": {"defaultAction": "SCMP_ACT_ERRNO",
"defaultErrnoRet": 38, "architectures": ["SCMP_ARCH_X86_64"], "flags": ["SECCOMP_FILTER_FLAG_LOG"], "syscalls": [{"names": ["read"],
"action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_MASKED_EQ"}]}]}, "rootfsPropagation": "slave",
"maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"], "mountLabel": "", "sysctl": {"net.ipv4.ip_forward": "1"},
"personality": {"domain": "LINUX32"}, "netDevices": {"eth0": {"name": "x"}}, "intelRdt": {"closID": "x", "l3CacheSchema": "y"}}}"#;

const PROCESS: &[u8] =
    br#"{"user": {"uid": 0, "gid": 0}, "args": ["sh"], "env": ["A=b"], "cwd": "/", "apparmorProfile": "x"}"#;

const RESOURCES: &[u8] =
    br#"{"memory": {"limit": 5, "reservation": 4}, "cpu": {"shares": 2, "cpus": "0"}, "pids": {"limit": 0}, "unified": {"a.b": "c"}}"#;

fn short(error: &impl std::fmt::Display) {
    // An error that repeats all of a hostile input would fill the logs.
    assert!(error.to_string().len() < 128 << 10);
}

#[test]
fn config_json_of_any_form_is_read_or_refused() {
    runx_fuzz::feed("config.json", &[FULL, LINUX], 20_000, |text| {
        let checked =
            bundle::parse::<Spec>(text, "config.json").and_then(|spec| Bundle::new(PathBuf::from("/b"), spec));
        if let Err(e) = checked {
            short(&e);
        }
    });
}

#[test]
fn a_process_of_any_form_is_read_or_refused() {
    runx_fuzz::feed("a process", &[PROCESS, FULL], 20_000, |text| {
        let checked = bundle::parse::<Process>(text, "process").and_then(|process| bundle::check_process(&process));
        if let Err(e) = checked {
            short(&e);
        }
    });
}

#[test]
fn resources_of_any_form_are_read_or_refused() {
    runx_fuzz::feed("resources", &[RESOURCES], 20_000, |text| {
        if let Err(e) = bundle::parse::<LinuxResources>(text, "resources") {
            short(&e);
        }
    });
}
