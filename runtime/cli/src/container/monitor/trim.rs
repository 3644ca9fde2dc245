//! Giving memory back that the start of a container took and watching it does not.

use std::fs;

/// A byte among the program's constants.
static CONSTANT: &str = "runx";

/// Gives back what the heap has to spare, and lets go of the parts of the program's file that are mapped: those that are
/// needed again come back from the page cache.
pub(super) fn trim() {
    // SAFETY: malloc_trim takes a number.
    unsafe { libc::malloc_trim(0) };
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for (address, permissions) in [(trim as fn() as usize, "r-xp"), (CONSTANT.as_ptr() as usize, "r--p")] {
        let Some((start, end)) = mapping(&maps, address, permissions) else { continue };
        // SAFETY: the mapping is of the program's file and was never writable, or holds nothing that was written to it: code,
        // and constants without addresses in them. So the kernel finds the same in the file again.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
    }
}

/// The bounds of the mapping that holds an address, if it has these permissions and is of a file.
fn mapping(maps: &str, address: usize, permissions: &str) -> Option<(usize, usize)> {
    maps.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let bounds = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
        let found = (bounds.0..bounds.1).contains(&address)
            && fields.next() == Some(permissions)
            && fields.nth(2).is_some_and(|inode| inode != "0");
        found.then_some(bounds)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_file_holds_and_nobody_wrote_is_let_go() {
        let maps = "1000-2000 r--p 00000000 fd:00 12 /x\n2000-3000 r-xp 00001000 fd:00 12 /x\n3000-4000 rw-p 0 00:00 0\n\
                    4000-5000 r-xp 0 00:00 0 [vdso]\n";
        assert_eq!(mapping(maps, 0x1fff, "r--p"), Some((0x1000, 0x2000)));
        assert_eq!(mapping(maps, 0x2000, "r-xp"), Some((0x2000, 0x3000)));
        assert_eq!(mapping(maps, 0x2000, "r--p"), None);
        assert_eq!(mapping(maps, 0x3000, "rw-p"), None);
        assert_eq!(mapping(maps, 0x4000, "r-xp"), None);
    }

    #[test]
    fn a_program_goes_on_as_before() {
        trim();
        assert_eq!(format!("{CONSTANT}{}", 1 + 1), "runx2");
    }
}
