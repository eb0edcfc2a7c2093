//! How the commands print amounts, times and bytes.

use std::fmt::Write;
use std::time::Duration;

/// An amount of bytes with a unit and up to three decimals: `64 KiB`, `1.500 MiB`, `512 bytes`.
pub(crate) fn amount(bytes: f64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = "bytes";
    let mut value = bytes;
    for larger in UNITS {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    // Below a KiB there are as many decimals as C prints if nothing is said.
    let text = if unit == "bytes" { format!("{value:.6}") } else { format!("{value:.3}") };
    match text.split_once('.') {
        Some((whole, decimals)) if decimals.starts_with("000") => format!("{whole} {unit}"),
        _ => format!("{text} {unit}"),
    }
}

/// A time: seconds and hundredths, or hours, minutes and seconds from one second on or if `fixed`.
fn time(took: Duration, fixed: bool) -> String {
    let seconds = took.as_secs();
    let hundredths = f64::from(took.subsec_nanos()) / 1e9;
    if fixed || seconds > 0 {
        let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
        format!("{hours}:{minutes:02}:{:05.2}", (seconds % 60) as f64 + hundredths)
    } else {
        format!("{hundredths:05.2} sec")
    }
}

/// What a request has done, in two lines, or in one for programs.
pub(crate) fn report(
    what: &str,
    offset: u64,
    asked: u64,
    done: u64,
    took: Duration,
    for_programs: bool,
) -> String {
    let rate = |amount: f64| amount / took.as_secs_f64();
    let (bytes, operations) = (rate(done as f64), rate(1.0));
    if for_programs {
        return format!("{done},1,{},{bytes:.3},{operations:.3}", time(took, true));
    }
    format!(
        "{what} {done}/{asked} bytes at offset {offset}\n{}, 1 ops; {} ({}/sec and {operations:.4} ops/sec)",
        amount(done as f64),
        time(took, false),
        amount(bytes),
    )
}

/// Bytes, sixteen a line, in hexadecimal and as letters and digits.
pub(crate) fn dump(bytes: &[u8], offset: u64) -> String {
    let mut text = String::with_capacity(bytes.len() * 5);
    for (line, at) in bytes.chunks(16).zip((offset..).step_by(16)) {
        // Writing to a string does not fail.
        let _ = write!(text, "{at:08x}:  ");
        for byte in line {
            let _ = write!(text, "{byte:02x} ");
        }
        text.push(' ');
        text.extend(
            line.iter().map(|byte| if byte.is_ascii_alphanumeric() { char::from(*byte) } else { '.' }),
        );
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{amount, dump, report};
    use std::time::Duration;

    #[test]
    fn amounts() {
        assert_eq!(amount(0.0), "0 bytes");
        assert_eq!(amount(512.0), "512 bytes");
        assert_eq!(amount(65536.0), "64 KiB");
        assert_eq!(amount(1536.0 * 1024.0), "1.500 MiB");
        assert_eq!(amount(0.5), "0.500000 bytes");
        assert_eq!(amount(1024.0_f64.powi(6) * 8.0), "8 EiB");
    }

    #[test]
    fn reports() {
        let half = Duration::from_millis(500);
        assert_eq!(
            report("read", 0, 512, 512, half, false),
            "read 512/512 bytes at offset 0\n512 bytes, 1 ops; 00.50 sec (1 KiB/sec and 2.0000 ops/sec)"
        );
        assert_eq!(report("read", 0, 512, 512, half, true), "512,1,0:00:00.50,1024.000,2.000");
        let long = Duration::from_secs(3661);
        assert!(report("wrote", 0, 1, 1, long, false).contains("; 1:01:01.00 ("));
    }

    #[test]
    fn dumps() {
        assert_eq!(dump(b"ab\0", 16), "00000010:  61 62 00  ab.\n");
        assert_eq!(dump(&[], 0), "");
    }
}
