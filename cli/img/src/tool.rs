//! What every subcommand has: how errors are said, and how a command line is gone through.

use block_graph::Error;
use getopt::{Flag, Getopt, Word};
use std::cell::RefCell;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;

/// The name that the program goes by.
#[derive(Debug, Clone)]
pub(crate) struct Tool {
    name: String,
    program: String,
    /// Results that are printed when the command has ended.
    held: RefCell<String>,
}

impl Tool {
    /// The tool, called as `program`.
    pub(crate) fn new(program: &str) -> Self {
        let name = program.rsplit('/').next().unwrap_or(program);
        Self { name: name.to_owned(), program: program.to_owned(), held: RefCell::default() }
    }

    /// The name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Prints a line of the result: at once on a terminal, and otherwise when the command has ended, as programs do that
    /// write whole blocks to files and pipes.
    pub(crate) fn say(&self, line: &str) {
        if std::io::stdout().is_terminal() {
            println!("{line}");
        } else {
            let mut held = self.held.borrow_mut();
            held.push_str(line);
            held.push('\n');
        }
    }

    /// Prints what is held back.
    pub(crate) fn end(&self) {
        print!("{}", self.held.take());
    }

    /// Says what went wrong.
    pub(crate) fn error(&self, message: impl std::fmt::Display) {
        // What was printed before is to stand before it.
        let _ = std::io::stdout().flush();
        eprintln!("{}: {message}", self.name);
    }

    /// Warns.
    pub(crate) fn warn(&self, message: impl std::fmt::Display) {
        self.error(format_args!("warning: {message}"));
    }

    /// Says why a command failed, and makes its exit code of it.
    pub(crate) fn fail(&self, failure: &Failure, command: Option<&str>) -> ExitCode {
        let command = command.map_or_else(String::new, |command| format!(" {command}"));
        let program = &self.program;
        match failure {
            Failure::Usage(message) => {
                self.error(message);
                eprintln!("Try '{program}{command} --help' for more info");
                ExitCode::FAILURE
            }
            Failure::Option(message) => {
                let _ = std::io::stdout().flush();
                eprintln!("{program}{command}: {message}\nTry '{program}{command} --help' for more info");
                ExitCode::FAILURE
            }
            Failure::Messages(lines, code) => {
                lines.iter().for_each(|line| self.error(line));
                ExitCode::from(*code)
            }
            Failure::Said(code) => ExitCode::from(*code),
        }
    }
}

/// Why a command ends early.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line is wrong in a way that help helps against.
    Usage(String),
    /// An option is not understood.
    Option(String),
    /// Messages, and the exit code.
    Messages(Vec<String>, u8),
    /// All has been said; the exit code.
    Said(u8),
}

impl Failure {
    /// A message, and the usual exit code.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self::Messages(vec![message.into()], 1)
    }

    /// The same failure with another exit code.
    #[must_use]
    pub(crate) fn with_code(self, code: u8) -> Self {
        match self {
            Self::Messages(lines, _) => Self::Messages(lines, code),
            Self::Said(_) => Self::Said(code),
            usage @ (Self::Usage(_) | Self::Option(_)) => usage,
        }
    }

    /// An error of the block layer, with its hints, after `prefix`.
    pub(crate) fn of(prefix: &str, error: &Error) -> Self {
        Self::new(format!("{prefix}{}", with_hints(error)))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::of("", &error)
    }
}

/// An error's message, with its hints below it.
pub(crate) fn with_hints(error: &Error) -> String {
    let mut text = error.to_string();
    for hint in error.hints() {
        text.push('\n');
        text.push_str(hint.trim_end_matches('\n'));
    }
    text
}

/// What a command returns.
pub(crate) type Outcome = Result<ExitCode, Failure>;

/// Goes through a command line: hands every option to `option`, and returns the operands.
pub(crate) fn parse(
    flags: &'static [Flag],
    words: Vec<String>,
    mut option: impl FnMut(&'static str, String) -> Result<(), Failure>,
) -> Result<Vec<String>, Failure> {
    let mut operands = Vec::new();
    for word in Getopt::new(flags, words) {
        match word {
            Word::Option("help", _) => return Err(Failure::Said(HELP)),
            Word::Option(key, value) => option(key, value)?,
            Word::Operand(operand) => operands.push(operand),
            Word::MissingValue(word) => return Err(missing_value(&word)),
            Word::Unknown(_, says) => return Err(Failure::Option(says)),
        }
    }
    Ok(operands)
}

/// The pseudo exit code of a request for help.
pub(crate) const HELP: u8 = 255;

/// An option lacks its value.
pub(crate) fn missing_value(word: &str) -> Failure {
    let letter = word.chars().next_back().unwrap_or_default();
    Failure::Option(match word.starts_with("--") {
        true => format!("option '{word}' requires an argument"),
        false => format!("option requires an argument -- '{letter}'"),
    })
}

/// A number with a size's suffixes, in a range; `what` names it.
pub(crate) fn number_in(
    what: &str,
    text: &str,
    range: std::ops::RangeInclusive<u64>,
) -> Result<u64, Failure> {
    use block_graph::{SizeError, parse_size};
    match parse_size(text) {
        Ok(number) if range.contains(&number) => Ok(number),
        Err(SizeError::Malformed) => Err(Failure::new(format!("Invalid {what} specified: '{text}'."))),
        _ => {
            let (least, most) = range.into_inner();
            Err(Failure::new(format!("Invalid {what} specified. Must be between {least} and {most}.")))
        }
    }
}

/// The same up to the largest offset.
pub(crate) fn number(what: &str, text: &str) -> Result<u64, Failure> {
    number_in(what, text, 0..=i64::MAX.unsigned_abs())
}

/// Adds a list to the lists of several `-o`.
pub(crate) fn accumulate(lists: &mut Option<String>, list: &str) -> Result<(), Failure> {
    if !blockdev::syntax::list::can_be_joined(list) {
        return Err(Failure::new(format!("Invalid option list: {list}")));
    }
    match lists {
        Some(lists) => {
            lists.push(',');
            lists.push_str(list);
        }
        None => *lists = Some(list.to_owned()),
    }
    Ok(())
}

/// How a command prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// For people.
    Human,
    /// For programs.
    Json,
}

impl Output {
    /// The one of that name.
    pub(crate) fn parse(name: Option<&str>) -> Result<Self, Failure> {
        match name {
            None | Some("human") => Ok(Self::Human),
            Some("json") => Ok(Self::Json),
            Some(name) => Err(Failure::Usage(format!("--output expects 'human' or 'json' not '{name}'"))),
        }
    }
}

/// The one operand that most commands have.
pub(crate) fn one_file(operands: Vec<String>) -> Result<String, Failure> {
    <[String; 1]>::try_from(operands)
        .map(|[file]| file)
        .map_err(|_| Failure::Usage("Expecting one image file name".to_owned()))
}
