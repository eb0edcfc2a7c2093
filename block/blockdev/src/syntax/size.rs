//! Sizes in bytes, as QEMU's tools print them.

const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];

/// A size with three significant digits: `196 KiB`, `1.5 GiB`.
pub fn human(bytes: u64) -> String {
    // A unit is taken from 1000 of the one below it on, so that there are never four digits.
    let unit = (1..UNITS.len()).take_while(|unit| bytes as f64 >= 1000.0 * scale(unit - 1)).count();
    format!("{} {}B", three_digits(bytes as f64 / scale(unit)), UNITS[unit])
}

fn scale(unit: usize) -> f64 {
    1024_f64.powi(i32::try_from(unit).unwrap_or_default())
}

/// A number below about 1000 as C's `%0.3g` writes it.
fn three_digits(value: f64) -> String {
    let decimals = match value {
        0.0 => 0,
        _ if value < 0.9995 => 3,
        _ if value < 9.995 => 2,
        _ if value < 99.95 => 1,
        _ if value < 999.5 => 0,
        _ => return "1e+03".to_owned(),
    };
    let text = format!("{value:.decimals$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::human;

    #[test]
    fn sizes_are_printed() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (196 << 10, "196 KiB"),
            (1023 << 10, "0.999 MiB"),
            (3 << 29, "1.5 GiB"),
            (1 << 40, "1 TiB"),
            ((1 << 63) - 512, "8 EiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }
}
