//! Options that nodes are opened with and images are made with.

use crate::size::size_option;
use crate::{Errno, Error, NodeRef, Result};
use std::collections::BTreeMap;
use std::fmt;

/// The value of an option.
#[derive(Debug, Clone)]
pub enum Value {
    /// Text, also of numbers that came from a command line.
    Text(String),
    /// A number.
    Number(i64),
    /// Yes or no.
    Switch(bool),
    /// Nothing: `null` in JSON, which for `backing` says that there is none.
    Null,
    /// A node that is there already.
    Node(NodeRef),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<bool> for Value {
    fn from(on: bool) -> Self {
        Self::Switch(on)
    }
}

impl From<i64> for Value {
    fn from(number: i64) -> Self {
        Self::Number(number)
    }
}

impl From<NodeRef> for Value {
    fn from(node: NodeRef) -> Self {
        Self::Node(node)
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Number(number) => write!(f, "{number}"),
            Self::Switch(true) => f.write_str("on"),
            Self::Switch(false) => f.write_str("off"),
            Self::Null => f.write_str("null"),
            Self::Node(node) => f.write_str(node.name()),
        }
    }
}

/// An option whose value makes no sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptionsError {
    /// The option.
    pub name: String,
    /// What it wants, such as "'on' or 'off'" or "a size".
    pub expects: &'static str,
}

impl fmt::Display for OptionsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Parameter '{}' expects {}", self.name, self.expects)
    }
}

impl std::error::Error for OptionsError {}

impl From<OptionsError> for Error {
    fn from(error: OptionsError) -> Self {
        Self::of(Errno::INVALID, error)
    }
}

/// Options by name. What belongs to a child has the child's name before it: "file.filename", "encrypt.key-secret".
///
/// Whoever uses an option takes it out, so that what is left at the end is what nobody knows.
#[derive(Debug, Clone, Default)]
pub struct Options {
    entries: BTreeMap<String, Value>,
}

impl Options {
    /// No options.
    pub fn new() -> Self {
        Self::default()
    }

    /// The options in a JSON object: what is in objects and arrays within it has their names before it, with dots.
    /// Strings may stand in single quotes too, as people write them on command lines.
    ///
    /// # Errors
    /// If it is none, or too deep.
    pub fn from_json(text: &str) -> Result<Self> {
        let value: serde_json::Value = serde_json::from_str(&with_double_quotes(text))
            .map_err(|error| Error::of(Errno::INVALID, error).context("Could not parse the JSON options"))?;
        if !value.is_object() {
            return Err(Error::invalid("Invalid JSON object given"));
        }
        let mut options = Self::new();
        options.flatten(String::new(), value)?;
        Ok(options)
    }

    /// Depth is bounded by the JSON parser's own limit.
    fn flatten(&mut self, name: String, value: serde_json::Value) -> Result<()> {
        use serde_json::Value as Json;
        let below = |key: &str| if name.is_empty() { key.to_owned() } else { format!("{name}.{key}") };
        match value {
            Json::Object(map) => {
                map.into_iter().try_for_each(|(key, value)| self.flatten(below(&key), value))?
            }
            Json::Array(list) => {
                list.into_iter()
                    .enumerate()
                    .try_for_each(|(n, value)| self.flatten(below(&n.to_string()), value))?;
            }
            Json::Null => self.set(name, Value::Null),
            Json::Bool(on) => self.set(name, on),
            Json::String(text) => self.set(name, text),
            Json::Number(number) => match number.as_i64() {
                Some(number) => self.set(name, number),
                None => self.set(name, number.to_string()),
            },
        }
        Ok(())
    }

    /// Options with one entry.
    pub fn with(name: &str, value: impl Into<Value>) -> Self {
        let mut options = Self::default();
        options.set(name, value);
        options
    }

    /// Sets an option, whatever it was.
    pub fn set(&mut self, name: impl Into<String>, value: impl Into<Value>) {
        self.entries.insert(name.into(), value.into());
    }

    /// Sets an option unless it is there.
    pub fn set_default(&mut self, name: &str, value: impl Into<Value>) {
        self.entries.entry(name.into()).or_insert_with(|| value.into());
    }

    /// Whether it is there.
    pub fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Whether it, or one of a child of this name, is there.
    pub fn has_child(&self, name: &str) -> bool {
        self.has(name) || self.entries.keys().any(|key| belongs(key, name).is_some())
    }

    /// Looks at an option.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.entries.get(name)
    }

    /// Takes an option out.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.entries.remove(name)
    }

    /// Takes out all that begins with "name.", without that.
    pub fn take_child(&mut self, name: &str) -> Self {
        let keys: Vec<String> =
            self.entries.keys().filter(|key| belongs(key, name).is_some()).cloned().collect();
        let entries = keys.into_iter().filter_map(|key| {
            let value = self.entries.remove(&key)?;
            Some((belongs(&key, name)?.to_owned(), value))
        });
        Self { entries: entries.collect() }
    }

    /// Puts `child` in with "name." before each.
    pub fn set_child(&mut self, name: &str, child: Self) {
        self.entries.extend(child.entries.into_iter().map(|(key, value)| (format!("{name}.{key}"), value)));
    }

    /// Puts in what `other` has and this has not.
    pub fn merge_defaults(&mut self, other: Self) {
        for (key, value) in other.entries {
            self.entries.entry(key).or_insert(value);
        }
    }

    /// Takes a text out; numbers and switches are texts too.
    pub fn take_text(&mut self, name: &str) -> Option<String> {
        self.take(name).map(|value| value.to_string())
    }

    /// Takes a switch out: a bool, or `on`, `off`, `yes`, `no`, `true`, `false`, `y`, `n`.
    ///
    /// # Errors
    /// [`OptionsError`] as an [`Error`] if it is something else.
    pub fn take_switch(&mut self, name: &str) -> Result<Option<bool>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let on = match &value {
            Value::Switch(on) => Some(*on),
            Value::Text(text) => match text.as_str() {
                "on" | "yes" | "true" | "y" => Some(true),
                "off" | "no" | "false" | "n" => Some(false),
                _ => None,
            },
            _ => None,
        };
        on.map(Some).ok_or_else(|| OptionsError { name: name.into(), expects: "'on' or 'off'" }.into())
    }

    /// Takes a number out.
    ///
    /// # Errors
    /// [`OptionsError`] as an [`Error`] if it is none, or negative.
    pub fn take_number(&mut self, name: &str) -> Result<Option<u64>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = match &value {
            Value::Number(number) => u64::try_from(*number).ok(),
            Value::Text(text) => match text.strip_prefix("0x") {
                Some(hex) => u64::from_str_radix(hex, 16).ok(),
                None => text.parse().ok(),
            },
            _ => None,
        };
        number.map(Some).ok_or_else(|| OptionsError { name: name.into(), expects: "a number" }.into())
    }

    /// Takes a size in bytes out: a number, or text such as `64k`, `1.5G`.
    ///
    /// # Errors
    /// [`OptionsError`] as an [`Error`] if it is none, or too large.
    pub fn take_size(&mut self, name: &str) -> Result<Option<u64>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Number(number)) => size_option(name, &number.to_string()).map(Some),
            Some(Value::Text(text)) => size_option(name, &text).map(Some),
            Some(_) => Err(OptionsError { name: name.into(), expects: "a size" }.into()),
        }
    }

    /// The options in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The first name, for messages about options that nobody knows.
    pub fn first_name(&self) -> Option<&str> {
        self.entries.keys().next().map(String::as_str)
    }
}

impl<K: Into<String>, V: Into<Value>> FromIterator<(K, V)> for Options {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        Self { entries: entries.into_iter().map(|(key, value)| (key.into(), value.into())).collect() }
    }
}

/// The same JSON with its strings in double quotes.
fn with_double_quotes(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    let mut quote = None;
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match (quote, letter) {
            (None, '\'' | '"') => {
                quote = Some(letter);
                out.push('"');
            }
            (Some(open), _) if open == letter => {
                quote = None;
                out.push('"');
            }
            (Some('\''), '"') => out.push_str("\\\""),
            (Some(_), '\\') => match letters.next() {
                Some('\'') => out.push('\''),
                Some(escaped) => out.extend(['\\', escaped]),
                None => out.push('\\'),
            },
            _ => out.push(letter),
        }
    }
    out
}

fn belongs<'a>(key: &'a str, child: &str) -> Option<&'a str> {
    key.strip_prefix(child)?.strip_prefix('.')
}
