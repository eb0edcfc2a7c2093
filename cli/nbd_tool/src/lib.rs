//! `vireo nbd`, which is also `qemu-nbd`: serves disk images over the network, and lists what others serve.
//!
//! Options, messages and exit codes are qemu-nbd's, so that scripts run unchanged.

mod arguments;
mod background;
mod list;
mod objects;
mod serve;

use arguments::{Arguments, FLAGS, Parsed};
use block_graph::Error;
use std::io::Write;
use std::process::ExitCode;

/// Why the program ends otherwise than well: what it says, without its name.
#[derive(Debug)]
struct Failure(Vec<String>);

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Self(vec![message])
    }
}

impl From<&str> for Failure {
    fn from(message: &str) -> Self {
        Self(vec![message.to_owned()])
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let mut lines = vec![error.to_string()];
        lines.extend(error.hints().iter().cloned());
        Self(lines)
    }
}

impl Failure {
    /// The same, with what was being done before it.
    fn context(mut self, context: &str) -> Self {
        if let Some(first) = self.0.first_mut() {
            *first = format!("{context}: {first}");
        }
        self
    }

    fn say(&self, name: &str) {
        let _ = std::io::stdout().flush();
        for (n, line) in self.0.iter().enumerate() {
            if n == 0 {
                eprintln!("{name}: {line}");
            } else {
                eprintln!("{line}");
            }
        }
    }
}

/// What the command is, for shells to complete.
pub fn completion() -> clap::Command {
    getopt::completion("nbd", "Serves disk images over the network.", FLAGS)
}

/// Runs the program called `name` with `arguments`, which are without that name.
pub fn run(name: &str, arguments: Vec<String>) -> ExitCode {
    let outcome = match arguments::parse(name, arguments.clone()) {
        Ok(Parsed::Help) => {
            print!("{}", arguments::help(name));
            Ok(ExitCode::SUCCESS)
        }
        Ok(Parsed::Version) => {
            println!("{name} {}", env!("CARGO_PKG_VERSION"));
            Ok(ExitCode::SUCCESS)
        }
        Ok(Parsed::Run(parsed)) => start(&parsed, arguments),
        Err(failure) => Err(failure),
    };
    outcome.unwrap_or_else(|failure| {
        // Messages begin with the program's name alone; advice names the program as it was called.
        failure.say(name.rsplit('/').next().unwrap_or(name));
        ExitCode::FAILURE
    })
}

fn start(arguments: &Arguments, words: Vec<String>) -> Result<ExitCode, Failure> {
    if arguments.list {
        return io_loop::block_on(list::run(arguments));
    }
    if arguments.fork && !background::is_behind() {
        return background::start(words);
    }
    io_loop::block_on(serve::run(arguments))
}
