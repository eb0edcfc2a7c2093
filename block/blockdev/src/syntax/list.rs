//! Lists of options: `key=value,key=value`. A comma in a value is doubled; a key alone is a switch that is on, or off
//! if it begins with `no`.

/// An option of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// The key.
    pub key: String,
    /// The value, or `on` or `off` for a switch.
    pub value: String,
    /// Whether it stood without a value, which is deprecated where it is not a request for help: then what stood there.
    pub switch: Option<String>,
}

impl Item {
    /// Whether it asks for help.
    pub fn is_help(&self) -> bool {
        self.switch.is_some() && is_help(&self.key)
    }
}

fn is_help(text: &str) -> bool {
    text == "help" || text == "?"
}

/// Splits a list. With `first`, a first item without a key has that one.
pub fn split(list: &str, first: Option<&str>) -> Vec<Item> {
    let mut items = Vec::new();
    let mut first = first;
    let mut rest = list;
    while !rest.is_empty() {
        let end = rest.find(['=', ',']).unwrap_or(rest.len());
        let (key, value, switch);
        if rest[end..].starts_with('=') {
            key = rest[..end].to_owned();
            (value, rest) = take_value(&rest[end + 1..]);
            switch = None;
        } else if let Some(first) = first {
            key = first.to_owned();
            (value, rest) = take_value(rest);
            switch = None;
        } else {
            let name = &rest[..end];
            (key, value) = match name.strip_prefix("no") {
                Some(key) => (key.to_owned(), "off".to_owned()),
                None => (name.to_owned(), "on".to_owned()),
            };
            switch = Some(name.to_owned());
            rest = rest[end..].strip_prefix(',').unwrap_or_default();
        }
        first = None;
        items.push(Item { key, value, switch });
    }
    items
}

/// The value that `text` begins with, and what follows its comma.
fn take_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let Some(comma) = rest.find(',') else {
            value.push_str(rest);
            return (value, "");
        };
        value.push_str(&rest[..comma]);
        rest = &rest[comma + 1..];
        match rest.strip_prefix(',') {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, rest),
        }
    }
}

/// Whether a list asks for help on options.
pub fn asks_for_help(list: &str) -> bool {
    split(list, None).iter().any(Item::is_help)
}

/// Whether lists such as this one can be joined by commas: it is not empty, and no comma at an end of it would join
/// with the one between.
pub fn can_be_joined(list: &str) -> bool {
    let commas = list.len() - list.trim_end_matches(',').len();
    !list.is_empty() && !list.starts_with(',') && commas.is_multiple_of(2)
}

/// A value as it stands in a list, with its commas doubled.
pub fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::{asks_for_help, can_be_joined, escaped, split};
    use proptest::prelude::*;

    fn pairs(list: &str, first: Option<&str>) -> Vec<(String, String)> {
        split(list, first).into_iter().map(|item| (item.key, item.value)).collect()
    }

    fn pair(key: &str, value: &str) -> (String, String) {
        (key.into(), value.into())
    }

    #[test]
    fn lists_are_split() {
        assert_eq!(pairs("a=b,c=d,,e", None), [pair("a", "b"), pair("c", "d,e")]);
        assert_eq!(pairs("a,nob,c=", None), [pair("a", "on"), pair("b", "off"), pair("c", "")]);
        assert_eq!(pairs("x,,y,driver=raw", Some("file")), [pair("file", "x,y"), pair("driver", "raw")]);
        assert_eq!(pairs("driver=raw,x", Some("file")), [pair("driver", "raw"), pair("x", "on")]);
        assert_eq!(pairs("", None), []);
    }

    #[test]
    fn help_is_found() {
        assert!(asks_for_help("help"));
        assert!(asks_for_help("size=1,?"));
        assert!(!asks_for_help("backing_file=1,,help"));
        assert!(!asks_for_help("help=1"));
    }

    #[test]
    fn joining() {
        assert!(can_be_joined("a=b"));
        assert!(can_be_joined("a=b,,"));
        assert!(!can_be_joined("a=b,"));
        assert!(!can_be_joined(",a"));
        assert!(!can_be_joined(""));
    }

    proptest! {
        #[test]
        fn values_come_back(value in ".*") {
            let list = format!("a={},b=c", escaped(&value));
            prop_assert_eq!(pairs(&list, None), [pair("a", &value), pair("b", "c")]);
        }

        #[test]
        fn any_list_ends(list in "[a=,?no]{0,30}") {
            prop_assert!(split(&list, None).len() <= list.len());
        }
    }
}
