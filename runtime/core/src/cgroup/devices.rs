//! Which devices a container may use: the rules, and for cgroup v2 the program that enforces them.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceType, LinuxResources};

use crate::error::{Context, Error, Result};
use crate::sys;

/// One rule; the last that fits decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) allow: bool,
    /// `a`, `b` or `c`.
    pub(super) kind: char,
    /// `None`: any.
    pub(super) major: Option<u32>,
    /// `None`: any.
    pub(super) minor: Option<u32>,
    pub(super) read: bool,
    pub(super) write: bool,
    pub(super) mknod: bool,
}

impl Rule {
    fn new(allow: bool, kind: char, major: Option<u32>, minor: Option<u32>, access: &str) -> Result<Self> {
        if access.is_empty() || access.chars().any(|c| !"rwm".contains(c)) {
            return Err(Error::spec(format!("linux.resources.devices: access {access:?} is not made of r, w and m")));
        }
        Ok(Self {
            allow,
            kind,
            major,
            minor,
            read: access.contains('r'),
            write: access.contains('w'),
            mknod: access.contains('m'),
        })
    }

    /// Whether the rule speaks of every device and every access.
    pub(super) fn is_everything(&self) -> bool {
        self.major.is_none() && self.minor.is_none() && self.read && self.write && self.mknod && self.kind == 'a'
    }

    /// As `devices.allow` and `devices.deny` take it.
    pub(super) fn v1_text(&self) -> String {
        let number = |n: Option<u32>| n.map_or("*".to_owned(), |n| n.to_string());
        let mut access = String::new();
        for (on, letter) in [(self.read, 'r'), (self.write, 'w'), (self.mknod, 'm')] {
            if on {
                access.push(letter);
            }
        }
        format!("{} {}:{} {access}", self.kind, number(self.major), number(self.minor))
    }
}

/// What every container may do, after its own rules: make nodes of any device (using them is another
/// matter), and use the devices that the runtime-spec says are always there.
const ALWAYS: &[(char, Option<u32>, Option<u32>, &str)] = &[
    ('c', None, None, "m"),
    ('b', None, None, "m"),
    ('c', Some(1), Some(3), "rwm"),
    ('c', Some(1), Some(5), "rwm"),
    ('c', Some(1), Some(7), "rwm"),
    ('c', Some(1), Some(8), "rwm"),
    ('c', Some(1), Some(9), "rwm"),
    ('c', Some(5), Some(0), "rwm"),
    ('c', Some(5), Some(1), "rwm"),
    ('c', Some(5), Some(2), "rwm"),
    ('c', Some(136), None, "rwm"),
];

/// The rules of config.json in their order, then those of every container.
pub(super) fn rules(resources: Option<&LinuxResources>) -> Result<Vec<Rule>> {
    let mut rules = Vec::new();
    for device in resources.and_then(|r| r.devices().as_ref()).into_iter().flatten() {
        let kind = match device.typ() {
            None | Some(LinuxDeviceType::A) => 'a',
            Some(LinuxDeviceType::B) => 'b',
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => 'c',
            Some(LinuxDeviceType::P) => {
                return Err(Error::spec("linux.resources.devices: a pipe has no device numbers to allow"));
            }
        };
        let number = |n: Option<i64>| -> Result<Option<u32>> {
            match n {
                None | Some(-1) => Ok(None),
                Some(n) => u32::try_from(n)
                    .map(Some)
                    .map_err(|_| Error::spec(format!("linux.resources.devices: {n} is no device number"))),
            }
        };
        let access = device.access().as_deref().filter(|access| !access.is_empty()).unwrap_or("rwm");
        rules.push(Rule::new(device.allow(), kind, number(device.major())?, number(device.minor())?, access)?);
    }
    for (kind, major, minor, access) in ALWAYS {
        rules.push(Rule::new(true, *kind, *major, *minor, access)?);
    }
    Ok(rules)
}

/// One instruction of extended BPF.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

const LOAD_WORD: u8 = 0x61;
const AND_IMMEDIATE: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const MOVE_REGISTER: u8 = 0xbc;
const MOVE_IMMEDIATE: u8 = 0xb7;
const JUMP_NOT_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

fn op(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: destination | source << 4, offset, immediate }
}

/// The program: rules from the last to the first, the first that fits answers.
///
/// `struct bpf_cgroup_dev_ctx` is { access << 16 | type, major, minor }; type 1 is a block and 2 a
/// character device, access 1 is mknod, 2 read, 4 write.
fn program(rules: &[Rule]) -> Vec<Instruction> {
    let mut code = vec![
        op(LOAD_WORD, 2, 1, 0, 0),
        op(AND_IMMEDIATE, 2, 0, 0, 0xffff),
        op(LOAD_WORD, 3, 1, 0, 0),
        op(SHIFT_RIGHT, 3, 0, 0, 16),
        op(LOAD_WORD, 4, 1, 4, 0),
        op(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let mut tests = Vec::new();
        match rule.kind {
            'b' => tests.push(op(JUMP_NOT_EQUAL, 2, 0, 0, 1)),
            'c' => tests.push(op(JUMP_NOT_EQUAL, 2, 0, 0, 2)),
            _ => {}
        }
        let access = i32::from(rule.mknod) | i32::from(rule.read) << 1 | i32::from(rule.write) << 2;
        if access != 7 {
            tests.push(op(MOVE_REGISTER, 1, 3, 0, 0));
            if rule.allow {
                // Allowed only if nothing beyond the rule is asked for.
                tests.push(op(AND_IMMEDIATE, 1, 0, 0, !access & 7));
                tests.push(op(JUMP_NOT_EQUAL, 1, 0, 0, 0));
            } else {
                // Denied as soon as anything of the rule is asked for. A jump over the next
                // instruction stands for the missing "jump if equal".
                tests.push(op(AND_IMMEDIATE, 1, 0, 0, access));
                tests.push(op(JUMP_EQUAL, 1, 0, 0, 0));
            }
        }
        if let Some(major) = rule.major {
            tests.push(op(JUMP_NOT_EQUAL, 4, 0, 0, major as i32));
        }
        if let Some(minor) = rule.minor {
            tests.push(op(JUMP_NOT_EQUAL, 5, 0, 0, minor as i32));
        }
        // Every test that fails jumps behind the rule's two closing instructions.
        let length = tests.len();
        for (i, test) in tests.iter_mut().enumerate() {
            if matches!(test.code, JUMP_NOT_EQUAL | JUMP_EQUAL) {
                test.offset = (length - i - 1 + 2) as i16;
            }
        }
        let unconditional = tests.is_empty();
        code.extend(tests);
        code.push(op(MOVE_IMMEDIATE, 0, 0, 0, i32::from(rule.allow)));
        code.push(op(EXIT, 0, 0, 0, 0));
        if unconditional {
            // What follows could not be reached, which the kernel's verifier refuses.
            return code;
        }
    }
    code.push(op(MOVE_IMMEDIATE, 0, 0, 0, 0));
    code.push(op(EXIT, 0, 0, 0, 0));
    code
}

const JUMP_EQUAL: u8 = 0x15;

/// The head of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
struct LoadAttributes {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
}

/// The head of `union bpf_attr` for `BPF_PROG_ATTACH`.
#[repr(C)]
struct AttachAttributes {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> std::io::Result<libc::c_long> {
    // SAFETY: attributes is laid out as the head of union bpf_attr for the command, with its size
    // passed; the kernel takes what is missing as zero.
    sys::check(unsafe { libc::syscall(libc::SYS_bpf, command, attributes as *const T, size_of::<T>()) })
}

/// Attaches the rules to a cgroup v2 directory.
pub(super) fn attach(directory: &Path, rules: &[Rule]) -> Result<()> {
    const PROG_LOAD: libc::c_int = 5;
    const PROG_ATTACH: libc::c_int = 8;
    const TYPE_CGROUP_DEVICE: u32 = 15;
    const ATTACH_CGROUP_DEVICE: u32 = 6;
    const ALLOW_MULTI: u32 = 2;
    let code = program(rules);
    let load = LoadAttributes {
        prog_type: TYPE_CGROUP_DEVICE,
        insn_cnt: code.len() as u32,
        insns: code.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name: *b"runx_devices\0\0\0\0",
    };
    let loaded: OwnedFd = sys::owned(bpf(PROG_LOAD, &load).context("load the device program of the cgroup")?)
        .context("load the device program of the cgroup")?;
    let target = File::open(directory).on("open cgroup", directory)?;
    let attach = AttachAttributes {
        target_fd: target.as_raw_fd() as u32,
        attach_bpf_fd: loaded.as_raw_fd() as u32,
        attach_type: ATTACH_CGROUP_DEVICE,
        attach_flags: ALLOW_MULTI,
        replace_bpf_fd: 0,
    };
    bpf(PROG_ATTACH, &attach).on("attach the device program to cgroup", directory).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(allow: bool, kind: char, major: Option<u32>, minor: Option<u32>, access: &str) -> Rule {
        Rule::new(allow, kind, major, minor, access).unwrap()
    }

    /// Runs a program as the kernel would, on one access.
    fn decide(code: &[Instruction], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0u64; 11];
        let mut at = 0usize;
        loop {
            let i = code[at];
            let (d, s) = ((i.registers & 15) as usize, (i.registers >> 4) as usize);
            at += 1;
            match i.code {
                LOAD_WORD => registers[d] = u64::from(context[i.offset as usize / 4]),
                AND_IMMEDIATE => registers[d] &= i.immediate as u32 as u64,
                SHIFT_RIGHT => registers[d] >>= i.immediate,
                MOVE_REGISTER => registers[d] = registers[s],
                MOVE_IMMEDIATE => registers[d] = i.immediate as u64,
                JUMP_NOT_EQUAL if registers[d] != i.immediate as u64 => at += i.offset as usize,
                JUMP_EQUAL if registers[d] == i.immediate as u64 => at += i.offset as usize,
                JUMP_NOT_EQUAL | JUMP_EQUAL => {}
                EXIT => return registers[0] != 0,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn the_last_rule_that_fits_decides() {
        let code = program(&[
            rule(false, 'a', None, None, "rwm"),
            rule(true, 'c', Some(1), Some(3), "rw"),
            rule(true, 'c', Some(10), None, "rwm"),
            rule(false, 'c', Some(10), Some(5), "w"),
        ]);
        let (read, write, mknod) = (2, 4, 1);
        assert!(decide(&code, 2, read | write, 1, 3));
        assert!(!decide(&code, 2, mknod, 1, 3));
        assert!(!decide(&code, 1, read, 1, 3));
        assert!(decide(&code, 2, read, 10, 5));
        assert!(!decide(&code, 2, read | write, 10, 5));
        assert!(decide(&code, 2, write, 10, 6));
        assert!(!decide(&code, 2, read, 8, 0));
    }

    #[test]
    fn allowing_everything_ends_the_program_there() {
        let code = program(&[rule(false, 'a', None, None, "rwm"), rule(true, 'a', None, None, "rwm")]);
        assert!(decide(&code, 1, 7, 8, 0));
        assert_eq!(code.len(), 6 + 2);
    }

    #[test]
    fn texts_are_those_of_devices_allow() {
        assert_eq!(rule(true, 'c', Some(136), None, "rwm").v1_text(), "c 136:* rwm");
    }
}
