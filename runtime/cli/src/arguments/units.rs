//! Sizes and times with units, as people write them for runc.

use std::time::Duration;

use anyhow::{Context, Result, bail};

/// Splits a number from the unit behind it.
fn with_unit(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len()))
}

/// A size as Docker and runc write it: `64m`, `1.5GiB`, `4096`, and -1 for no limit.
pub(crate) fn bytes(text: &str) -> Result<i64> {
    if text == "-1" {
        return Ok(-1);
    }
    let invalid = || format!("invalid size {text:?}");
    let (number, unit) = with_unit(text);
    let unit = unit.trim_start().to_ascii_lowercase();
    let letter = unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(&unit);
    let shift = match letter {
        "" if unit != "ib" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => bail!(invalid()),
    };
    // A whole number is not put through a fraction, which has fewer digits.
    let size = match number.parse::<i64>() {
        Ok(number) => number.checked_mul(1 << shift),
        Err(_) => {
            let size = number.parse::<f64>().ok().with_context(invalid)? * (1u64 << shift) as f64;
            (size < i64::MAX as f64).then_some(size as i64)
        }
    };
    size.with_context(|| format!("{}: it is too large", invalid()))
}

/// A time as Go writes it: `5s`, `100ms`, `1m30s`.
///
/// # Errors
/// Naming `flag`, for what is none and for none at all.
pub(super) fn duration(flag: &str, text: &str) -> Result<Duration> {
    let invalid = || format!("invalid --{flag} {text:?}: it is a time such as 100ms, 5s or 2m");
    let mut total = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let (number, after) = with_unit(rest);
        let number: f64 = number.parse().ok().with_context(invalid)?;
        let end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        total += number
            * match &after[..end] {
                "ns" => 1e-9,
                "us" | "µs" | "μs" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => bail!("{}: it needs a unit, as in 5s", invalid()),
            };
        rest = &after[end..];
    }
    match Duration::try_from_secs_f64(total) {
        Ok(interval) if !interval.is_zero() => Ok(interval),
        Ok(_) => bail!("{}: duration interval must be greater than 0", invalid()),
        Err(e) => bail!("{}: {e}", invalid()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_units() {
        for (text, size) in [
            ("4096", 4096),
            ("50M", 50 << 20),
            ("1.5g", 3 << 29),
            ("2 KiB", 2048),
            ("7b", 7),
            ("1tb", 1 << 40),
            ("-1", -1),
        ] {
            assert_eq!(bytes(text).unwrap(), size, "{text}");
        }
        for bad in ["", "m", "-2", "1x", "1ib", "1..2k", "9999999p", "1mm"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_have_gos_units() {
        for (text, milliseconds) in [("5s", 5000), ("100ms", 100), ("1m30s", 90_000), ("1.5h", 5_400_000)] {
            assert_eq!(duration("x", text).unwrap(), Duration::from_millis(milliseconds), "{text}");
        }
        for bad in ["", "5", "0s", "-1s", "s", "1y"] {
            assert!(duration("x", bad).is_err(), "{bad}");
        }
    }
}
