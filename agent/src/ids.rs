//! Names that nobody can guess.

use std::io;

fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    let mut filled = 0;
    while filled < bytes.len() {
        // SAFETY: the pointer and the length are those of the rest of a local array.
        let got = unsafe { libc::getrandom(bytes[filled..].as_mut_ptr().cast(), bytes.len() - filled, 0) };
        match usize::try_from(got) {
            Ok(got) => filled += got,
            Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            // Without randomness no name is safe to give.
            Err(_) => panic!("getrandom: {}", io::Error::last_os_error()),
        }
    }
    bytes
}

/// 32 hexadecimal digits.
pub fn hex() -> String {
    random().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A random UUID (RFC 9562, version 4).
pub fn uuid() -> String {
    let mut bytes = random();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

#[cfg(test)]
mod tests {
    #[test]
    fn they_have_their_forms() {
        let uuid = super::uuid();
        assert_eq!((uuid.len(), &uuid[14..15], super::hex().len()), (36, "4", 32));
        assert!("89ab".contains(&uuid[19..20]), "{uuid}");
        assert_ne!(super::uuid(), uuid);
    }
}
