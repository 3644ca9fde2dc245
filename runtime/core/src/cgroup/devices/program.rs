//! The program that enforces the rules with cgroup v2.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use super::Rule;
use crate::error::{Context, Result};
use crate::sys;

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
pub(in crate::cgroup) fn attach(directory: &Path, rules: &[Rule]) -> Result<()> {
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
    // The kernel's check of a program gives up with EAGAIN when a signal comes.
    let loaded = (0..30).find_map(|_| match bpf(PROG_LOAD, &load) {
        Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => None,
        other => Some(other),
    });
    let loaded: OwnedFd = loaded
        .unwrap_or_else(|| Err(std::io::Error::from_raw_os_error(libc::EAGAIN)))
        .and_then(sys::owned)
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
}
