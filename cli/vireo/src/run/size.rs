//! Sizes as people write them.

/// Reads a size: a number, perhaps with a fraction, and a unit K, M, G or T (powers of 1024; `iB` and `B`
/// may follow). Without a unit, `default_unit` counts.
pub(crate) fn parse(text: &str, default_unit: u64) -> Result<u64, String> {
    let accepted =
        || format!("{text:?} is no size; accepted are numbers with K, M, G or T, such as 512M or 1.5G");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = match unit.trim().to_ascii_lowercase().as_str() {
        "" => default_unit,
        "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        _ => return Err(accepted()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.len() > 9 || fraction.contains('.') {
        return Err(accepted());
    }
    let whole: u64 = whole.parse().map_err(|_| accepted())?;
    let bytes = whole.checked_mul(unit).ok_or_else(|| format!("{text:?} is too large a size"))?;
    let part = if fraction.is_empty() {
        0
    } else {
        let numerator: u128 = fraction.parse().map_err(|_| accepted())?;
        (numerator * u128::from(unit) / 10u128.pow(fraction.len() as u32)) as u64
    };
    bytes.checked_add(part).ok_or_else(|| format!("{text:?} is too large a size"))
}

/// A size of memory: MiB without a unit, rounded up to whole pages.
pub(crate) fn parse_memory(text: &str) -> Result<u64, String> {
    parse(text, 1 << 20)?
        .checked_next_multiple_of(4096)
        .ok_or_else(|| format!("{text:?} is too large a size"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_people_write() {
        for (text, bytes) in [
            ("1G", 1 << 30),
            ("512", 512 << 20),
            ("1.5g", 3 << 29),
            ("64KiB", 64 << 10),
            ("0.25T", 1 << 38),
            ("2 MB", 2 << 20),
            ("4096b", 4096),
        ] {
            assert_eq!(parse_memory(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", ".5G", "1.2.3G", "-1G", "1X", "99999999999999999999", "99999999T", "1e3"] {
            assert!(parse_memory(text).is_err(), "{text}");
        }
    }
}
