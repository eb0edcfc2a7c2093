//! Debian's order of versions (deb-version(7)).

use std::cmp::Ordering;

/// Compares two versions.
pub(crate) fn compare(left: &str, right: &str) -> Ordering {
    let split = |version: &str| -> (u64, String, String) {
        let (epoch, rest) = version.split_once(':').unwrap_or(("0", version));
        let (upstream, revision) = rest.rsplit_once('-').unwrap_or((rest, "0"));
        (epoch.parse().unwrap_or(0), upstream.to_owned(), revision.to_owned())
    };
    let (left, right) = (split(left), split(right));
    left.0
        .cmp(&right.0)
        .then_with(|| compare_part(left.1.as_bytes(), right.1.as_bytes()))
        .then_with(|| compare_part(left.2.as_bytes(), right.2.as_bytes()))
}

/// The rank of a character outside of numbers: a tilde before the end, letters before the rest.
fn rank(byte: Option<u8>) -> i32 {
    match byte {
        Some(b'~') => -1,
        None => 0,
        Some(byte) if byte.is_ascii_digit() => 0,
        Some(byte) if byte.is_ascii_alphabetic() => byte.into(),
        Some(byte) => i32::from(byte) + 256,
    }
}

fn compare_part(mut left: &[u8], mut right: &[u8]) -> Ordering {
    while !left.is_empty() || !right.is_empty() {
        // Text, character by character.
        loop {
            let (a, b) = (left.first().copied(), right.first().copied());
            let text = |byte: Option<u8>| byte.is_some_and(|byte| !byte.is_ascii_digit());
            if !text(a) && !text(b) {
                break;
            }
            match rank(a).cmp(&rank(b)) {
                Ordering::Equal => {}
                order => return order,
            }
            left = left.get(1..).unwrap_or_default();
            right = right.get(1..).unwrap_or_default();
        }
        // Numbers, of any length.
        let (a, b) = (take_number(&mut left), take_number(&mut right));
        match a.len().cmp(&b.len()).then_with(|| a.cmp(b)) {
            Ordering::Equal => {}
            order => return order,
        }
    }
    Ordering::Equal
}

/// Cuts the digits off the front and returns them without leading zeros.
fn take_number<'a>(text: &mut &'a [u8]) -> &'a [u8] {
    let end = text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    *text = rest;
    let zeros = digits.iter().take_while(|byte| **byte == b'0').count();
    &digits[zeros..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_in_debians_order() {
        let ascending = [
            "1.0~rc1-1",
            "1.0-1~bpo1",
            "1.0-1",
            "1.0-1+b1",
            "1.0-2",
            "1.0a-1",
            "1.0+x-1",
            "1.1",
            "1.9-1",
            "1.10-1",
            "6.1.0-9",
            "6.1.0-50",
            "6.12.94-1",
            "6.12.107-1",
            "1:0.1",
            "2:0.1",
        ];
        for (index, left) in ascending.iter().enumerate() {
            for (other, right) in ascending.iter().enumerate() {
                assert_eq!(compare(left, right), index.cmp(&other), "{left} {right}");
            }
        }
        assert_eq!(compare("1.00", "1.0"), Ordering::Equal);
        assert_eq!(compare("", "x:y"), Ordering::Less);
    }
}
