//! Command lines as the C library's `getopt_long` reads them: options after operands, `-p -q` as `-pq`, `-fqcow2`,
//! unique beginnings of long names, `--` as the end.
//!
//! The tools that stand in for `qemu-img`, `qemu-io` and `qemu-nbd` are called by scripts that rely on this, and on how
//! those tools speak of what they do not understand; clap, which reads the rest of our command line, does neither. One
//! table of [`Flag`]s serves the parsing, the help, and (as a [`clap::Command`]) the shells' completion.

use std::collections::VecDeque;

/// An option of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flag {
    /// What the program calls it: the same for its short and its long form.
    pub key: &'static str,
    /// `-x`.
    pub short: Option<char>,
    /// `--name`.
    pub long: Option<&'static str>,
    /// The name of its value, if it takes one.
    pub value: Option<&'static str>,
    /// What it does, in a line.
    pub about: &'static str,
}

impl Flag {
    /// `-x`, without a value.
    pub const fn switch(short: char, key: &'static str, about: &'static str) -> Self {
        Self { key, short: Some(short), long: None, value: None, about }
    }

    /// `-x VALUE`.
    pub const fn valued(short: char, key: &'static str, value: &'static str, about: &'static str) -> Self {
        Self { key, short: Some(short), long: None, value: Some(value), about }
    }

    /// `--name`, without a value.
    pub const fn long_switch(long: &'static str, about: &'static str) -> Self {
        Self { key: long, short: None, long: Some(long), value: None, about }
    }

    /// `--name VALUE`.
    pub const fn long_valued(long: &'static str, value: &'static str, about: &'static str) -> Self {
        Self { key: long, short: None, long: Some(long), value: Some(value), about }
    }

    /// The same with a long name too.
    #[must_use]
    pub const fn or(mut self, long: &'static str) -> Self {
        self.long = Some(long);
        self
    }

    /// As clap knows it, for completion.
    fn argument(&self) -> clap::Arg {
        let mut argument = clap::Arg::new(self.key).help(self.about);
        if let Some(short) = self.short {
            argument = argument.short(short);
        }
        if let Some(long) = self.long {
            argument = argument.long(long);
        }
        match self.value {
            Some(name) => argument.value_name(name).action(clap::ArgAction::Append),
            None => argument.action(clap::ArgAction::Count),
        }
    }
}

/// A clap command that knows `flags` and takes file names: what shells complete.
pub fn completion(name: &'static str, about: &'static str, flags: &'static [Flag]) -> clap::Command {
    clap::Command::new(name)
        .about(about)
        .disable_help_flag(true)
        .args(flags.iter().map(Flag::argument))
        .arg(clap::Arg::new("FILE").num_args(0..).value_hint(clap::ValueHint::FilePath))
}

/// What stands next on a command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// An option, with its value if it takes one.
    Option(&'static str, String),
    /// Something that is no option.
    Operand(String),
    /// An option that lacks its value: the word as it was written.
    MissingValue(String),
    /// What looks like an option and is none, or not one alone: the word as it was written, and what `getopt_long`
    /// says of it.
    Unknown(String, String),
}

/// Reads a command line.
#[derive(Debug)]
pub struct Getopt {
    flags: &'static [Flag],
    rest: VecDeque<String>,
    /// What is left of a word of several short options, and the word.
    group: Option<(String, String)>,
    only_operands: bool,
    stops_at_operand: bool,
}

impl Getopt {
    /// Reads `arguments` (without the program's name).
    pub fn new(flags: &'static [Flag], arguments: impl IntoIterator<Item = String>) -> Self {
        Self {
            flags,
            rest: arguments.into_iter().collect(),
            group: None,
            only_operands: false,
            stops_at_operand: false,
        }
    }

    /// The same, where everything from the first operand on is operands: they are another command's words.
    #[must_use]
    pub fn stopping_at_operand(mut self) -> Self {
        self.stops_at_operand = true;
        self
    }

    /// What has not been read.
    pub fn rest(self) -> Vec<String> {
        self.rest.into()
    }

    fn long(&mut self, word: String) -> Word {
        let text = &word[2..];
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (text, None),
        };
        let named = |flag: &&Flag| flag.long == Some(name);
        let begins = |flag: &&Flag| flag.long.is_some_and(|long| long.starts_with(name));
        let flag = match self.flags.iter().find(named) {
            Some(flag) => flag,
            None => {
                let found: Vec<_> = self.flags.iter().filter(begins).collect();
                match found[..] {
                    [flag] => flag,
                    [] => {
                        let says = format!("unrecognized option '--{name}'");
                        return Word::Unknown(word, says);
                    }
                    _ => {
                        let says = format!("option '--{name}' is ambiguous");
                        return Word::Unknown(word, says);
                    }
                }
            }
        };
        match (flag.value, value) {
            (None, None) => Word::Option(flag.key, String::new()),
            (None, Some(_)) => {
                let says = format!("option '--{}' doesn't allow an argument", flag.long.unwrap_or(name));
                Word::Unknown(word, says)
            }
            (Some(_), Some(value)) => Word::Option(flag.key, value),
            (Some(_), None) => match self.rest.pop_front() {
                Some(value) => Word::Option(flag.key, value),
                None => Word::MissingValue(word),
            },
        }
    }

    /// The next short option of `group`, which is not empty, in `word`.
    fn short(&mut self, group: &str, word: String) -> Word {
        let mut letters = group.chars();
        let letter = letters.next().unwrap_or_default();
        let left = letters.as_str().to_owned();
        let Some(flag) = self.flags.iter().find(|flag| flag.short == Some(letter)) else {
            let says = format!("invalid option -- '{letter}'");
            if !left.is_empty() {
                self.group = Some((left, word.clone()));
            }
            return Word::Unknown(word, says);
        };
        if flag.value.is_none() {
            if !left.is_empty() {
                self.group = Some((left, word));
            }
            return Word::Option(flag.key, String::new());
        }
        if !left.is_empty() {
            return Word::Option(flag.key, left);
        }
        match self.rest.pop_front() {
            Some(value) => Word::Option(flag.key, value),
            None => Word::MissingValue(word),
        }
    }
}

impl Iterator for Getopt {
    type Item = Word;

    fn next(&mut self) -> Option<Word> {
        if let Some((group, word)) = self.group.take() {
            return Some(self.short(&group, word));
        }
        if self.stops_at_operand {
            let first = self.rest.front()?;
            if !first.starts_with('-') || first == "-" {
                return None;
            }
        }
        let word = self.rest.pop_front()?;
        if self.only_operands || !word.starts_with('-') || word == "-" {
            return Some(Word::Operand(word));
        }
        if word == "--" {
            self.only_operands = true;
            return if self.stops_at_operand { None } else { self.next() };
        }
        if word.starts_with("--") {
            return Some(self.long(word));
        }
        let group = word[1..].to_owned();
        Some(self.short(&group, word))
    }
}

#[cfg(test)]
mod tests {
    use super::{Flag, Getopt, Word};

    const FLAGS: &[Flag] = &[
        Flag::valued('f', "f", "FMT", "the format").or("format"),
        Flag::switch('p', "p", "progress"),
        Flag::switch('q', "q", "quiet"),
        Flag::long_valued("output", "HOW", "how"),
        Flag::long_switch("object", "an object"),
    ];

    fn words(line: &str) -> Vec<Word> {
        Getopt::new(FLAGS, line.split_whitespace().map(str::to_owned)).collect()
    }

    fn option(key: &'static str, value: &str) -> Word {
        Word::Option(key, value.into())
    }

    #[test]
    fn options_and_operands_mix() {
        assert_eq!(
            words("a -pfqcow2 b --output=json -q -- -p"),
            [
                Word::Operand("a".into()),
                option("p", ""),
                option("f", "qcow2"),
                Word::Operand("b".into()),
                option("output", "json"),
                option("q", ""),
                Word::Operand("-p".into()),
            ]
        );
    }

    #[test]
    fn beginnings_of_long_names() {
        assert_eq!(words("--out x --fo raw"), [option("output", "x"), option("f", "raw")]);
        assert!(matches!(&words("--o")[..], [Word::Unknown(word, _)] if word == "--o"));
    }

    #[test]
    fn what_is_not_understood() {
        assert_eq!(words("-f"), [Word::MissingValue("-f".into())]);
        assert_eq!(words("--output"), [Word::MissingValue("--output".into())]);
        assert_eq!(words("-x"), [Word::Unknown("-x".into(), "invalid option -- 'x'".into())]);
        let says = "option '--object' doesn't allow an argument".into();
        assert_eq!(words("--object=1"), [Word::Unknown("--object=1".into(), says)]);
    }

    #[test]
    fn a_command_of_its_own_follows() {
        let line = ["-p", "create", "-f", "raw"].map(str::to_owned);
        let mut getopt = Getopt::new(FLAGS, line).stopping_at_operand();
        assert_eq!(getopt.next(), Some(option("p", "")));
        assert_eq!(getopt.next(), None);
        assert_eq!(getopt.rest(), ["create", "-f", "raw"]);
    }

    #[test]
    fn completion_knows_the_flags() {
        super::completion("x", "a tool", FLAGS).debug_assert();
    }
}
