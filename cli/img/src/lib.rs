//! `vireo img`, which is also `qemu-img`: makes, examines, copies and changes disk images.
//!
//! Options, outputs and exit codes are qemu-img's, so that scripts run unchanged.

mod amend;
mod bench;
mod bitmap;
mod check;
mod commands;
mod commit;
mod compare;
mod convert;
mod create;
mod dd;
mod info;
mod map;
mod measure;
mod progress;
mod rebase;
mod resize;
mod shared_options;
mod snapshot;
mod tool;

use getopt::{Flag, Getopt, Word};
use std::process::ExitCode;
use tool::{Failure, HELP, Outcome, Tool};

const FLAGS: &[Flag] = &[
    Flag::switch('h', "help", "Show help").or("help"),
    Flag::switch('V', "V", "Show the version").or("version"),
    Flag::valued('T', "T", "PATTERN", "Ignored: there is no tracing").or("trace"),
];

/// What the command is, for shells to complete.
pub fn completion() -> clap::Command {
    let subcommands = commands::SUBCOMMANDS
        .iter()
        .map(|command| getopt::completion(command.name, command.about, command.flags));
    clap::Command::new("img")
        .about("Makes, examines, copies and changes disk images.")
        .subcommands(subcommands)
}

/// Runs the program that was called as `program` with `arguments`.
pub fn run(program: &str, arguments: Vec<String>) -> ExitCode {
    let tool = Tool::new(program);
    let code = match split(&tool, arguments) {
        Ok(Some((command, words))) => match io_loop::block_on(subcommand(&tool, &command, words)) {
            Ok(code) => code,
            Err(Failure::Said(HELP)) => help(&tool, Some(&command)),
            Err(failure) => tool.fail(&failure, Some(&command)),
        },
        Ok(None) => ExitCode::SUCCESS,
        Err(failure) => tool.fail(&failure, None),
    };
    tool.end();
    code
}

/// Takes what stands before the subcommand, and returns its name and words, if there is one.
fn split(tool: &Tool, arguments: Vec<String>) -> Result<Option<(String, Vec<String>)>, Failure> {
    if arguments.is_empty() {
        return Err(Failure::Usage("Not enough arguments".to_owned()));
    }
    let mut getopt = Getopt::new(FLAGS, arguments).stopping_at_operand();
    for word in getopt.by_ref() {
        match word {
            Word::Option("help", _) => {
                help(tool, None);
                return Ok(None);
            }
            Word::Option("V", _) => {
                println!("{} version {}", tool.name(), env!("CARGO_PKG_VERSION"));
                return Ok(None);
            }
            Word::MissingValue(word) => return Err(tool::missing_value(&word)),
            Word::Unknown(_, says) => return Err(Failure::Option(says)),
            Word::Option(..) | Word::Operand(_) => {}
        }
    }
    let mut words = getopt.rest();
    if words.is_empty() {
        return Ok(None);
    }
    let command = words.remove(0);
    if !commands::SUBCOMMANDS.iter().any(|known| known.name == command) {
        return Err(Failure::Usage(format!("Command not found: {command}")));
    }
    Ok(Some((command, words)))
}

async fn subcommand(tool: &Tool, command: &str, words: Vec<String>) -> Outcome {
    match command {
        "amend" => amend::run(tool, words).await,
        "bench" => bench::run(tool, words).await,
        "bitmap" => bitmap::run(tool, words).await,
        "check" => check::run(tool, words).await,
        "commit" => commit::run(tool, words).await,
        "compare" => compare::run(tool, words).await,
        "convert" => convert::run(tool, words).await,
        "create" => create::run(tool, words).await,
        "dd" => dd::run(tool, words).await,
        "info" => info::run(tool, words).await,
        "map" => map::run(tool, words).await,
        "measure" => measure::run(tool, words).await,
        "rebase" => rebase::run(tool, words).await,
        "resize" => resize::run(tool, words).await,
        _ => snapshot::run(tool, words).await,
    }
}

const SIZES: &str = "\
Sizes are in bytes, or have a suffix: k, M, G, T, P, E (powers of 1024).
OPTIONS are name=value,name=value; `-o help` lists a format's.
CACHE is none, writeback, writethrough, directsync or unsafe.";

/// Prints what there is to say of a subcommand, or of all.
fn help(tool: &Tool, command: Option<&str>) -> ExitCode {
    let name = tool.name();
    if let Some(command) = commands::SUBCOMMANDS.iter().find(|known| Some(known.name) == command) {
        println!("{}.\n\nUsage: {name} {} {}\n\nOptions:", command.about, command.name, command.usage);
        for flag in command.flags {
            println!("{}", flag_line(flag));
        }
        println!("\n{SIZES}");
        return ExitCode::SUCCESS;
    }
    println!(
        "Makes, examines, copies and changes disk images.\n\nUsage: {name} COMMAND [OPTIONS] FILE...\n\nCommands:"
    );
    for command in commands::SUBCOMMANDS {
        println!("  {:<10} {}", command.name, command.about);
    }
    let formats: Vec<_> = blockdev::registry().kinds().map(block_graph::DriverKind::name).collect();
    println!("\n{SIZES}\n\nSupported formats: {}", formats.join(" "));
    println!(
        "\nExamples:\n  {name} create -f qcow2 disk.qcow2 20G\n  {name} convert -p -O qcow2 -c disk.raw disk.qcow2\n  \
         {name} info --backing-chain disk.qcow2\n  {name} check -r leaks disk.qcow2\n  {name} convert --help"
    );
    ExitCode::SUCCESS
}

fn flag_line(flag: &Flag) -> String {
    let short = flag.short.map(|short| format!("-{short}"));
    let long = flag.long.map(|long| format!("--{long}"));
    let mut names: Vec<String> = short.into_iter().chain(long).collect();
    if let (Some(value), Some(last)) = (flag.value, names.last_mut()) {
        last.push_str(&format!(" {value}"));
    }
    format!("  {:<28} {}", names.join(", "), flag.about)
}

#[cfg(test)]
mod tests {
    #[test]
    fn completion_is_consistent() {
        super::completion().debug_assert();
    }

    #[test]
    fn options_are_not_given_twice() {
        for command in super::commands::SUBCOMMANDS {
            for (index, flag) in command.flags.iter().enumerate() {
                let same = |other: &getopt::Flag| {
                    other.key == flag.key || (flag.short.is_some() && other.short == flag.short)
                };
                assert!(!command.flags[..index].iter().any(same), "{} {}", command.name, flag.key);
            }
        }
    }
}
