//! Lists of options against what a format knows of them.

use crate::syntax::list::{escaped, split};
use block_graph::{Error, OptionKind, OptionSpec, Options, Result, size_option};
use std::fmt::Write;

/// Options for a new image, checked against those that its format and its protocol have.
#[derive(Debug, Clone, Default)]
pub struct FormatOptions {
    specs: Vec<OptionSpec>,
    values: Vec<(String, String)>,
}

impl FormatOptions {
    /// No options of those in `specs`; of several with one name the first counts.
    pub fn new(specs: impl IntoIterator<Item = OptionSpec>) -> Self {
        let mut known: Vec<OptionSpec> = Vec::new();
        for spec in specs {
            if !known.iter().any(|other| other.name == spec.name) {
                known.push(spec);
            }
        }
        Self { specs: known, values: Vec::new() }
    }

    /// What is known of the option `name`.
    pub fn spec(&self, name: &str) -> Option<&OptionSpec> {
        self.specs.iter().find(|spec| spec.name == name)
    }

    /// Takes up a list.
    ///
    /// # Errors
    ///
    /// An option is not known, or has a value of the wrong kind.
    pub fn parse(&mut self, list: &str) -> Result<()> {
        for item in split(list, None) {
            if item.key != "id" {
                self.set(&item.key, &item.value)?;
            }
        }
        Ok(())
    }

    /// Sets an option.
    ///
    /// # Errors
    ///
    /// It is not known, or the value is of the wrong kind.
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let spec = self.spec(name).ok_or_else(|| Error::invalid(format!("Invalid parameter '{name}'")))?;
        let expects = |what: &str| Error::invalid(format!("Parameter '{name}' expects {what}"));
        let value = match spec.kind {
            OptionKind::Text => value.to_owned(),
            OptionKind::Switch if ["on", "off", "yes", "no", "true", "false", "y", "n"].contains(&value) => {
                value.to_owned()
            }
            OptionKind::Switch => return Err(expects("'on' or 'off'")),
            OptionKind::Number => number(value).ok_or_else(|| expects("a number"))?.to_string(),
            OptionKind::Size => size_option(name, value)?.to_string(),
        };
        self.values.retain(|(known, _)| known != name);
        self.values.push((name.to_owned(), value));
        Ok(())
    }

    /// The value of an option: what was set, else its default.
    pub fn get(&self, name: &str) -> Option<&str> {
        let set = self.values.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
        set.or_else(|| self.spec(name)?.default)
    }

    /// Whether it was set.
    pub fn is_set(&self, name: &str) -> bool {
        self.values.iter().any(|(known, _)| known == name)
    }

    /// A size that was set.
    pub fn size(&self, name: &str) -> Option<u64> {
        self.values.iter().find(|(known, _)| known == name)?.1.parse().ok()
    }

    /// Whether a switch is on.
    pub fn is_on(&self, name: &str) -> bool {
        self.get(name).is_some_and(|value| ["on", "yes", "true", "y"].contains(&value))
    }

    /// The options that were set or have a default, as a line: `cluster_size=65536 size=1024`.
    pub fn line(&self) -> String {
        let mut line = String::new();
        for spec in &self.specs {
            let Some(value) = self.get(spec.name) else { continue };
            let gap = if line.is_empty() { "" } else { " " };
            let value = if spec.kind == OptionKind::Text { escaped(value) } else { value.to_owned() };
            // Writing to a string does not fail.
            let _ = write!(line, "{gap}{}={value}", spec.name);
        }
        line
    }

    /// What was set, for [`block_graph::DriverKind::create`].
    pub fn options(&self) -> Options {
        self.values.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
    }
}

/// A number in decimal, hexadecimal or octal.
fn number(text: &str) -> Option<u64> {
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(digits, 16).ok();
    }
    match text.strip_prefix('0') {
        Some(digits) if !digits.is_empty() => u64::from_str_radix(digits, 8).ok(),
        _ => text.parse().ok(),
    }
}

/// What there is to say of options, a line each, sorted.
pub fn help(specs: impl IntoIterator<Item = OptionSpec>) -> Vec<String> {
    let known = FormatOptions::new(specs);
    let mut lines: Vec<String> = known
        .specs
        .iter()
        .map(|spec| {
            let kind = match spec.kind {
                OptionKind::Text => "str",
                OptionKind::Number => "num",
                OptionKind::Size => "size",
                OptionKind::Switch => "bool (on/off)",
            };
            let option = format!("  {}=<{kind}>", spec.name);
            if spec.help.is_empty() { option } else { format!("{option:<24} - {}", spec.help) }
        })
        .collect();
    lines.sort();
    lines
}

/// Options for opening a node, from a list. With `first`, the first item may lack its key.
pub fn open_options(list: &str, first: Option<&str>) -> Options {
    split(list, first)
        .into_iter()
        .filter(|item| item.key != "id")
        .map(|item| (item.key, item.value))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{FormatOptions, help};
    use block_graph::{OptionKind, OptionSpec};

    const fn spec(name: &'static str, kind: OptionKind, default: Option<&'static str>) -> OptionSpec {
        OptionSpec { name, kind, help: "does something", default, amendable: false }
    }

    fn known() -> Vec<OptionSpec> {
        vec![
            spec("size", OptionKind::Size, None),
            spec("file", OptionKind::Text, None),
            spec("bits", OptionKind::Number, Some("16")),
            spec("lazy", OptionKind::Switch, Some("off")),
            spec("size", OptionKind::Text, None),
        ]
    }

    #[test]
    fn lists_are_checked() {
        let mut options = FormatOptions::new(known());
        options.parse("file=a,,b,size=1k,size=2k,lazy").unwrap();
        assert_eq!(options.line(), "size=2048 file=a,,b bits=16 lazy=on");
        assert_eq!(options.get("bits"), Some("16"));
        assert!(!options.is_set("bits"));
        assert!(options.is_on("lazy"));
        for (list, says) in [
            ("x=1", "Invalid parameter 'x'"),
            ("lazy=1", "Parameter 'lazy' expects 'on' or 'off'"),
            ("bits=z", "Parameter 'bits' expects a number"),
            ("size=z", "Parameter 'size' expects a non-negative number below 2^64"),
            ("size=-1", "Value '-1' is out of range for parameter 'size'"),
        ] {
            assert_eq!(options.parse(list).unwrap_err().to_string(), says);
        }
    }

    #[test]
    fn help_is_sorted() {
        assert_eq!(
            help(known()),
            [
                "  bits=<num>             - does something",
                "  file=<str>             - does something",
                "  lazy=<bool (on/off)>   - does something",
                "  size=<size>            - does something",
            ]
        );
    }
}
