//! Lists of `KEY=VALUE`, separated by commas, as QEMU writes them.

/// Splits at single commas; two commas stand for one.
pub(super) fn split(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        let comma = c == ',' && rest.next_if_eq(&',').is_none();
        match words.last_mut() {
            Some(word) if !comma => word.push(c),
            _ => words.push(String::new()),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

/// Reads `on` or `off`, and what QEMU takes for them.
pub(super) fn switch(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" | "yes" | "true" => Ok(true),
        "off" | "no" | "false" => Ok(false),
        _ => Err(format!("{key}={value} is not possible; accepted is on or off")),
    }
}

/// Reads a 16-bit number, decimal or with 0x.
pub(super) fn number(text: &str) -> Option<u16> {
    match text.strip_prefix("0x") {
        Some(digits) => u16::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_commas_split_and_double_ones_do_not() {
        assert_eq!(split("a=1,,2,b,,c,"), ["a=1,2", "b,c"]);
        assert!(split("").is_empty());
        assert_eq!((switch("a", "on"), switch("a", "no")), (Ok(true), Ok(false)));
        assert!(switch("a", "1").is_err());
    }
}
