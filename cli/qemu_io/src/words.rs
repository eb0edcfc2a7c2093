//! A command's words.

use crate::command::Command;
use crate::output::line;
use block_graph::{SizeError, parse_size};
use getopt::{Getopt, Word};
use std::collections::HashMap;

/// The most bytes of a request.
pub(crate) const MOST_BYTES: u64 = (i32::MAX as u64) & !511;

/// A command that failed, or was not understood; what there is to say has been said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Failed;

/// A command's options and other words.
#[derive(Debug)]
pub(crate) struct Words {
    command: &'static Command,
    options: HashMap<&'static str, String>,
    rest: Vec<String>,
}

impl Words {
    /// Goes through the words after a command's name.
    pub(crate) fn parse(
        program: &str,
        command: &'static Command,
        words: Vec<String>,
    ) -> Result<Self, Failed> {
        let mut parsed = Self { command, options: HashMap::new(), rest: Vec::new() };
        for word in Getopt::new(command.flags, words) {
            match word {
                Word::Option(key, value) => {
                    parsed.options.insert(key, value);
                }
                Word::Operand(word) => parsed.rest.push(word),
                Word::MissingValue(word) => {
                    let letter = word.chars().next_back().unwrap_or_default();
                    crate::output::flush();
                    eprintln!("{}: option requires an argument -- '{letter}'", command.name);
                    return Err(parsed.usage());
                }
                Word::Unknown(_, says) => {
                    crate::output::flush();
                    eprintln!("{}: {says}", command.name);
                    return Err(parsed.usage());
                }
            }
        }
        let _ = program;
        Ok(parsed)
    }

    /// Says how the command is called.
    pub(crate) fn usage(&self) -> Failed {
        line(self.command.line());
        Failed
    }

    /// Whether an option is there.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.options.contains_key(key)
    }

    /// An option's value.
    pub(crate) fn value(&self, key: &str) -> Option<&str> {
        self.options.get(key).map(String::as_str)
    }

    /// The words that are no options.
    pub(crate) fn rest(&self) -> &[String] {
        &self.rest
    }

    /// Exactly so many words.
    pub(crate) fn exactly<const COUNT: usize>(&self) -> Result<[&str; COUNT], Failed> {
        let words: Vec<&str> = self.rest.iter().map(String::as_str).collect();
        <[&str; COUNT]>::try_from(words).map_err(|_| self.usage())
    }

    /// A byte that fills a buffer.
    pub(crate) fn pattern(&self) -> Result<Option<u8>, Failed> {
        let Some(text) = self.value("P") else { return Ok(None) };
        let number = match (text.strip_prefix("0x"), text.strip_prefix('0')) {
            (Some(digits), _) => u8::from_str_radix(digits, 16).ok(),
            (None, Some(digits)) if !digits.is_empty() => u8::from_str_radix(digits, 8).ok(),
            _ => text.parse().ok(),
        };
        match number {
            Some(number) => Ok(Some(number)),
            None => {
                line(format_args!("{text} is not a valid pattern byte"));
                Err(Failed)
            }
        }
    }

    /// An option's value as a number.
    pub(crate) fn number(&self, key: &str) -> Result<Option<u64>, Failed> {
        self.value(key).map(number).transpose()
    }
}

/// A number with a size's suffixes.
pub(crate) fn number(text: &str) -> Result<u64, Failed> {
    match parse_size(text) {
        Ok(number) if i64::try_from(number).is_ok() => Ok(number),
        Err(SizeError::Malformed) => {
            let says = "Parsing error: non-numeric argument, or extraneous/unrecognized suffix";
            line(format_args!("{says} -- {text}"));
            Err(Failed)
        }
        _ => {
            line(format_args!("Parsing error: argument too large -- {text}"));
            Err(Failed)
        }
    }
}

/// The lengths of several buffers, together.
pub(crate) fn lengths(words: &[String]) -> Result<u64, Failed> {
    let mut total: u64 = 0;
    for word in words {
        let len = number(word)?;
        if len > MOST_BYTES {
            line(format_args!("Argument '{word}' exceeds maximum size {MOST_BYTES}"));
            return Err(Failed);
        }
        total += len;
        if total > MOST_BYTES {
            line(format_args!("The total number of bytes exceed the maximum size {MOST_BYTES}"));
            return Err(Failed);
        }
    }
    Ok(total)
}
