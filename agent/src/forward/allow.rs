//! Ranges of addresses.

use std::net::{IpAddr, Ipv6Addr};

/// Addresses that have their first bits in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    first: IpAddr,
    bits: u8,
}

impl Range {
    /// Of `ADDRESS` or `ADDRESS/BITS`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn of(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is neither an address nor a range such as 10.0.0.0/8");
        let (address, bits) = text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
        let first: IpAddr = address.parse().map_err(|_| wrong())?;
        let most = if first.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Ok(most), |bits| bits.parse().map_err(|_| wrong()))?;
        if bits > most { Err(wrong()) } else { Ok(Self { first, bits }) }
    }

    /// Whether an address is in it. One of version 4 that came as one of version 6 is what it is.
    pub(super) fn holds(&self, address: IpAddr) -> bool {
        let wide = |address: IpAddr| match address {
            IpAddr::V4(address) => (u128::from(u32::from(address)) << 96, true),
            IpAddr::V6(address) => (u128::from(address), false),
        };
        let plain = |address: IpAddr| match address {
            IpAddr::V6(six) => six.to_ipv4_mapped().map_or(IpAddr::V6(six), IpAddr::V4),
            four => four,
        };
        let ((first, four), (given, given_four)) = (wide(self.first), wide(plain(address)));
        let mask = u128::MAX.checked_shl(128 - u32::from(self.bits)).unwrap_or(0);
        four == given_four && first & mask == given & mask
    }
}

/// Whether an address is this machine's own for itself.
pub(super) fn is_loopback(address: IpAddr) -> bool {
    match address {
        IpAddr::V6(six) => six == Ipv6Addr::LOCALHOST || six.to_ipv4_mapped().is_some_and(|four| four.is_loopback()),
        four => four.is_loopback(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_hold_what_is_in_them() {
        let holds = |range: &str, address: &str| Range::of(range).unwrap().holds(address.parse().unwrap());
        assert!(holds("10.0.0.0/8", "10.255.0.1") && !holds("10.0.0.0/8", "11.0.0.1"));
        assert!(holds("10.1.2.3", "10.1.2.3") && !holds("10.1.2.3", "10.1.2.4"));
        assert!(holds("0.0.0.0/0", "8.8.8.8") && !holds("0.0.0.0/0", "::1") && holds("::/0", "::1"));
        assert!(holds("10.0.0.0/8", "::ffff:10.0.0.1"));
        for wrong in ["10.0.0.0/33", "x", "", "::1/129", "10.0.0.0/"] {
            assert!(Range::of(wrong).is_err(), "{wrong}");
        }
    }
}
