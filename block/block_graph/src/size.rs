//! Sizes in bytes, as people write them in options.

use crate::{Errno, Error, Result};

/// Why a text is no size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// It is not a number with one of the suffixes.
    #[error("not a number with an optional suffix")]
    Malformed,
    /// It is negative, or 2⁶⁴ or more.
    #[error("out of range")]
    OutOfRange,
}

/// Reads a size: a decimal number, possibly with a fraction, and a suffix (`b`, `k`, `M`, `G`, `T`, `P`, `E`, in either
/// case, by powers of 1024); or a hexadecimal number without either. A fraction of a byte is cut off.
///
/// # Errors
/// The text is no such number, or does not fit into 64 bits.
pub fn parse_size(text: &str) -> std::result::Result<u64, SizeError> {
    let text = text.trim_start();
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let hexadecimal = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X"));
    if let Some(hexadecimal) = hexadecimal {
        let is_digits = !hexadecimal.is_empty() && hexadecimal.bytes().all(|byte| byte.is_ascii_hexdigit());
        return match u64::from_str_radix(hexadecimal, 16) {
            _ if !is_digits => Err(SizeError::Malformed),
            Ok(value) if !negative || value == 0 => Ok(value),
            _ => Err(SizeError::OutOfRange),
        };
    }
    let whole_length = digits.bytes().take_while(u8::is_ascii_digit).count();
    let (whole, rest) = digits.split_at(whole_length);
    let (fraction, suffix) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(rest.bytes().take_while(u8::is_ascii_digit).count()),
        None => ("", rest),
    };
    if whole.is_empty() && fraction.is_empty() {
        return Err(SizeError::Malformed);
    }
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return Err(SizeError::Malformed),
    };
    // A fraction needs something to be a fraction of.
    if shift == 0 && fraction.bytes().any(|digit| digit != b'0') {
        return Err(SizeError::Malformed);
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| SizeError::OutOfRange)? };
    let value = (u128::from(whole) << shift) + u128::from(part(fraction, shift));
    match u64::try_from(value) {
        Ok(value) if !negative || value == 0 => Ok(value),
        _ => Err(SizeError::OutOfRange),
    }
}

/// The bytes of a decimal fraction of 2^`shift`.
fn part(fraction: &str, shift: u32) -> u64 {
    // 18 digits are exact in 64 bits, and finer than 2⁻⁵⁹.
    let mut numerator = 0_u128;
    let mut denominator = 1_u128;
    for digit in fraction.bytes().take(18) {
        numerator = numerator * 10 + u128::from(digit - b'0');
        denominator *= 10;
    }
    u64::try_from((numerator << shift) / denominator).unwrap_or(u64::MAX)
}

/// A size option's value.
///
/// # Errors
/// It is not a size; `name` is the option's, for the message.
pub fn size_option(name: &str, value: &str) -> Result<u64> {
    parse_size(value).map_err(|error| match error {
        SizeError::OutOfRange => {
            Error::new(Errno::RANGE, format!("Value '{value}' is out of range for parameter '{name}'"))
        }
        SizeError::Malformed => {
            Error::invalid(format!("Parameter '{name}' expects a non-negative number below 2^64"))
                .hint("Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-")
                .hint("and exabytes, respectively.")
        }
    })
}

#[cfg(test)]
mod tests {
    use super::{SizeError, parse_size};
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read() {
        for (text, size) in [
            ("0", 0),
            ("1024", 1024),
            ("1k", 1024),
            ("1K", 1024),
            ("1.5M", 3 << 19),
            (".5G", 1 << 29),
            ("1.k", 1024),
            ("2T", 2 << 40),
            ("3P", 3 << 50),
            ("7E", 7 << 60),
            ("12b", 12),
            ("0x10", 16),
            ("18446744073709551615", u64::MAX),
            ("-0", 0),
            (" 5", 5),
            ("1.0", 1),
        ] {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
    }

    #[test]
    fn what_is_no_size() {
        for text in ["", "k", "foo", "1kilobyte", "1 k", "1..2k", "0x", "0x1k", "1.5", "1.5b", "--1"] {
            assert_eq!(parse_size(text), Err(SizeError::Malformed), "{text}");
        }
        for text in ["-1", "-1024", "16E", "18446744073709551616", "-0x1", "99999999999999999999"] {
            assert_eq!(parse_size(text), Err(SizeError::OutOfRange), "{text}");
        }
    }

    proptest! {
        #[test]
        fn numbers_are_themselves(number: u64) {
            prop_assert_eq!(parse_size(&number.to_string()), Ok(number));
        }

        #[test]
        fn no_text_panics(text in "[-+0-9.xkKEe ]{0,24}") {
            let _ = parse_size(&text);
        }
    }
}
