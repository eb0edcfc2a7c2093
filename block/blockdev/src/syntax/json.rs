//! JSON as QEMU's tools print it: with an object's members not sorted and not in the order in which they were put in,
//! but in that of the hash table that those tools keep objects in. Scripts, and QEMU's own tests, compare such output to
//! the letter.

use serde_json::{Map, Value};
use std::fmt::Write;

/// The members of an object in QEMU's order.
pub fn in_order(object: &Map<String, Value>) -> Vec<(&String, &Value)> {
    let mut members: Vec<_> = object.iter().collect();
    members.sort_by_key(|(key, _)| bucket(key));
    members
}

/// The bucket, of 512, that QEMU's objects have a key in: the hash function of gdbm.
fn bucket(key: &str) -> u32 {
    let length = u32::try_from(key.len()).unwrap_or(u32::MAX);
    let sum = key.bytes().zip(0_u32..).fold(0x238F_13AF_u32.wrapping_mul(length), |sum, (byte, index)| {
        sum.wrapping_add(u32::from(byte) << (index * 5 % 24))
    });
    sum.wrapping_mul(1_103_515_243).wrapping_add(12345) % 512
}

/// A value over several lines, with four spaces a level, and no line feed at its end.
pub fn pretty(value: &Value) -> String {
    let mut out = String::new();
    print(value, Some(0), &mut out);
    out
}

/// A value in one line.
pub fn compact(value: &Value) -> String {
    let mut out = String::new();
    print(value, None, &mut out);
    out
}

fn print(value: &Value, level: Option<usize>, out: &mut String) {
    let inner = level.map(|level| level + 1);
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
        Value::Number(number) => out.push_str(&number.to_string()),
        Value::String(text) => print_string(text, out),
        Value::Array(values) => {
            out.push('[');
            for (index, value) in values.iter().enumerate() {
                separate(index, inner, out);
                print(value, inner, out);
            }
            break_line(level, out);
            out.push(']');
        }
        Value::Object(object) => {
            out.push('{');
            for (index, (key, value)) in in_order(object).into_iter().enumerate() {
                separate(index, inner, out);
                print_string(key, out);
                out.push_str(": ");
                print(value, inner, out);
            }
            break_line(level, out);
            out.push('}');
        }
    }
}

/// An object for people, a line for each member, with four spaces a level, from `level` on. Dashes in names are spaces.
pub fn outline(object: &Map<String, Value>, level: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for (key, value) in in_order(object) {
        outline_entry(&key.replace('-', " "), value, level, &mut lines);
    }
    lines
}

fn outline_entry(name: &str, value: &Value, level: usize, lines: &mut Vec<String>) {
    let indent = "    ".repeat(level);
    match value {
        Value::Object(object) => {
            lines.push(format!("{indent}{name}:"));
            lines.extend(outline(object, level + 1));
        }
        Value::Array(values) => {
            lines.push(format!("{indent}{name}:"));
            for (index, value) in values.iter().enumerate() {
                outline_entry(&format!("[{index}]"), value, level + 1, lines);
            }
        }
        Value::String(text) => lines.push(format!("{indent}{name}: {text}")),
        scalar => lines.push(format!("{indent}{name}: {scalar}")),
    }
}

fn separate(index: usize, level: Option<usize>, out: &mut String) {
    if index > 0 {
        out.push_str(if level.is_some() { "," } else { ", " });
    }
    break_line(level, out);
}

fn break_line(level: Option<usize>, out: &mut String) {
    if let Some(level) = level {
        out.push('\n');
        out.extend(std::iter::repeat_n("    ", level));
    }
}

/// A string in double quotes, with what is not ASCII as escapes.
fn print_string(text: &str, out: &mut String) {
    out.push('"');
    for letter in text.chars() {
        match letter {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(letter),
            _ => {
                for unit in letter.encode_utf16(&mut [0; 2]) {
                    // Writing to a string does not fail.
                    let _ = write!(out, "\\u{unit:04X}");
                }
            }
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::{compact, pretty};
    use proptest::prelude::*;
    use serde_json::{Value, json};

    #[test]
    fn the_order_is_qemus() {
        let info = json!({
            "filename": "a", "format": "qcow2", "virtual-size": 64, "actual-size": 196, "cluster-size": 65536,
            "dirty-flag": false, "children": [], "format-specific": {"type": "qcow2", "data": {
                "refcount-bits": 16, "lazy-refcounts": false, "compat": "1.1", "corrupt": false,
                "compression-type": "zlib", "extended-l2": false}},
        });
        let text = pretty(&info);
        let keys: Vec<_> = text.lines().filter_map(|line| line.trim().split('"').nth(1)).collect();
        assert_eq!(
            keys,
            [
                "children",
                "virtual-size",
                "filename",
                "cluster-size",
                "format",
                "actual-size",
                "format-specific",
                "type",
                "data",
                "compat",
                "compression-type",
                "lazy-refcounts",
                "refcount-bits",
                "corrupt",
                "extended-l2",
                "dirty-flag"
            ]
        );
        assert!(text.starts_with("{\n    \"children\": [\n    ],\n    \"virtual-size\": 64,\n"));
    }

    #[test]
    fn outlines_are_for_people() {
        let value = json!({"refcount-bits": 16, "slots": [{"active": true}, 1], "compat": "1.1"});
        assert_eq!(
            super::outline(value.as_object().unwrap(), 1),
            [
                "    compat: 1.1",
                "    refcount bits: 16",
                "    slots:",
                "        [0]:",
                "            active: true",
                "        [1]: 1",
            ]
        );
    }

    #[test]
    fn strings_are_escaped() {
        assert_eq!(compact(&json!(["a\n\"ä😀\u{7f}", 1])), r#"["a\n\"\u00E4\uD83D\uDE00\u007F", 1]"#);
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read(text in ".*", key in "[a-z.-]{1,12}") {
            let value = json!({ key: text });
            prop_assert_eq!(&serde_json::from_str::<Value>(&compact(&value)).unwrap(), &value);
            prop_assert_eq!(serde_json::from_str::<Value>(&pretty(&value)).unwrap(), value);
        }
    }
}
