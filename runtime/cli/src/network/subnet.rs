//! The range of addresses that the bridge's containers get.

use std::fmt;
use std::fs;
use std::net::Ipv4Addr;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// An IPv4 network with room for a gateway and a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Subnet {
    address: Ipv4Addr,
    prefix: u8,
}

impl Subnet {
    const fn new(a: u8, b: u8, c: u8, prefix: u8) -> Self {
        Self { address: Ipv4Addr::new(a, b, c, 0), prefix }
    }

    fn mask(prefix: u8) -> u32 {
        u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
    }

    /// Whether they have an address in common.
    fn overlaps(self, other: Self) -> bool {
        let mask = Self::mask(self.prefix.min(other.prefix));
        self.address.to_bits() & mask == other.address.to_bits() & mask
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl FromStr for Subnet {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let parts =
            text.split_once('/').and_then(|(address, prefix)| Some((address.parse().ok()?, prefix.parse().ok()?)));
        let Some((address, prefix)) = parts else { bail!("{text:?} is no IPv4 network such as 10.87.0.0/16") };
        let address: Ipv4Addr = address;
        if !(8..=29).contains(&prefix) {
            bail!("{text:?}: the prefix of a network for containers has 8 to 29 bits");
        }
        if address.to_bits() & !Self::mask(prefix) != 0 {
            let network = Ipv4Addr::from_bits(address.to_bits() & Self::mask(prefix));
            bail!("{text:?} is an address in a network and no network: that is {network}/{prefix}");
        }
        Ok(Self { address, prefix })
    }
}

impl TryFrom<String> for Subnet {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> Self {
        subnet.to_string()
    }
}

/// A network that packets have a way to already, and by which interface.
#[derive(Debug, PartialEq, Eq)]
struct Route {
    interface: String,
    to: Subnet,
}

/// The routes of /proc/net/route, but for the one to everywhere and those by `bridge`.
fn routes(table: &str, bridge: &str) -> Vec<Route> {
    let parse = |line: &str| {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        // Written as the number in memory is, in the machine's order.
        let number = |at: usize| Some(u32::from_be(u32::from_str_radix(fields.get(at)?, 16).ok()?));
        let (address, mask) = (number(1)?, number(7)?);
        let to = Subnet { address: Ipv4Addr::from_bits(address), prefix: mask.count_ones() as u8 };
        Some(Route { interface: fields.first()?.to_string(), to })
    };
    let all = table.lines().skip(1).filter_map(parse);
    all.filter(|route| route.to.prefix > 0 && route.interface != bridge).collect()
}

/// Ranges to try, none of which docker or podman begins with.
const CANDIDATES: &[Subnet] = &[
    Subnet::new(10, 87, 0, 16),
    Subnet::new(10, 86, 0, 16),
    Subnet::new(10, 187, 0, 16),
    Subnet::new(10, 47, 0, 16),
    Subnet::new(172, 31, 0, 16),
    Subnet::new(172, 30, 0, 16),
    Subnet::new(192, 168, 187, 24),
    Subnet::new(192, 168, 87, 24),
];

/// The range for the containers of `bridge`: the one that is asked for, or one that the host has no route to.
///
/// # Errors
/// If the host reaches addresses of that range by another interface, or of all.
pub(crate) fn choose(asked: Option<Subnet>, bridge: &str) -> Result<Subnet> {
    let table = fs::read_to_string("/proc/net/route").context("read the host's routes from /proc/net/route")?;
    among(asked, &routes(&table, bridge))
}

fn among(asked: Option<Subnet>, routes: &[Route]) -> Result<Subnet> {
    let taken = |subnet: Subnet| routes.iter().find(|route| route.to.overlaps(subnet));
    match asked {
        Some(subnet) => match taken(subnet) {
            Some(Route { interface, to }) => bail!(
                "the subnet {subnet} of the config file has addresses that the host reaches by {interface} (route to {to}): \
                 set network.subnet to another one"
            ),
            None => Ok(subnet),
        },
        None => CANDIDATES.iter().copied().find(|subnet| taken(*subnet).is_none()).context(
            "the host has routes to all address ranges that runx tries: set network.subnet in the config file to a free one",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                         eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                         eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
                         tun0\t0000570A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n\
                         runx0\t0000560A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n";

    #[test]
    #[cfg(target_endian = "little")]
    fn a_range_that_the_host_has_a_route_to_is_not_taken() {
        let routes = routes(TABLE, "runx0");
        let names: Vec<_> = routes.iter().map(|route| format!("{} {}", route.interface, route.to)).collect();
        assert_eq!(names, ["eth0 192.0.2.0/24", "tun0 10.87.0.0/16"]);
        // The bridge's own route is no obstacle.
        assert_eq!(among(None, &routes).unwrap().to_string(), "10.86.0.0/16");
        let error = among(Some("10.87.9.0/24".parse().unwrap()), &routes).unwrap_err().to_string();
        assert!(error.contains("tun0") && error.contains("network.subnet"), "{error}");
        let everything = [
            Route { interface: "x".into(), to: Subnet { address: Ipv4Addr::UNSPECIFIED, prefix: 1 } },
            Route { interface: "y".into(), to: Subnet { address: Ipv4Addr::new(128, 0, 0, 0), prefix: 1 } },
        ];
        assert!(among(None, &everything).is_err());
    }

    #[test]
    fn only_networks_are_networks() {
        assert_eq!("10.0.0.0/8".parse::<Subnet>().unwrap().to_string(), "10.0.0.0/8");
        for bad in ["10.0.0.0", "10.0.0.1/24", "10.0.0.0/30", "10.0.0.0/0", "::/64", "10.0.0/24", ""] {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
        let error = "10.87.3.4/16".parse::<Subnet>().unwrap_err().to_string();
        assert!(error.contains("10.87.0.0/16"), "{error}");
    }
}
