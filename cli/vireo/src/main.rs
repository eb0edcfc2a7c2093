//! The `vireo` command: parses, calls, prints.

mod accelerator;
mod cpu;
mod exit;
mod info;
mod qmp;
mod run;
mod tools;

use clap::{CommandFactory, Parser, Subcommand};
use std::process::ExitCode;

/// Runs virtual machines, with or without hardware virtualization.
#[derive(Parser)]
#[command(name = "vireo", version, propagate_version = true, after_help = EXAMPLES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs a VM in this terminal.
    Run(Box<run::Options>),
    /// Shows what this host offers to VMs, and which accelerator a run would take.
    Info(info::Options),
    /// Shows which processors guests can be given.
    Cpu(cpu::Options),
    /// Sends commands to a running VM, and prints its events.
    Qmp(qmp::Options),
    /// Makes, examines, copies and changes disk images.
    #[command(disable_help_flag = true)]
    Img {
        /// What `vireo img --help` says.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
    /// Sends single requests to disk images, for tests.
    #[command(disable_help_flag = true)]
    Io {
        /// What `vireo io --help` says.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
    /// Serves disk images over the network, and lists what others serve.
    #[command(disable_help_flag = true)]
    Nbd {
        /// What `vireo nbd --help` says.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
    /// Prints a completion script for a shell.
    ///
    /// For bash: vireo completion bash > ~/.local/share/bash-completion/completions/vireo
    Completion {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

const EXAMPLES: &str = "\
Examples:
  vireo run debian                      a stock Debian kernel to a shell, fetched and checked
  vireo run --kernel bzImage --initrd initrd.img --append console=ttyS0
  vireo info                            what this host offers, and what to do about the rest
  vireo cpu list                        the processors that --cpu takes
  vireo img create -f qcow2 disk 20G    a disk image; the program is also qemu-img if it is called so
  vireo run --help                      everything about running";

fn main() -> ExitCode {
    if let Some(code) = tools::run() {
        return code;
    }
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("VIREO_LOG").unwrap_or_else(|_| "warn".into()),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
    let result = match arguments.command {
        Command::Run(options) => run::run(&options),
        Command::Info(options) => info::run(&options),
        Command::Cpu(options) => cpu::run(&options),
        Command::Qmp(options) => qmp::run(&options),
        // The words after these are read before, and come here only if something stands before them.
        Command::Img { words } => Ok(img::run("vireo img", words)),
        Command::Io { words } => Ok(qemu_io::run("vireo io", words)),
        Command::Nbd { words } => Ok(nbd_tool::run("vireo nbd", words)),
        Command::Completion { shell } => {
            let mut command = Arguments::command().mut_subcommand("img", |_| img::completion());
            command = command.mut_subcommand("io", |_| qemu_io::completion());
            command = command.mut_subcommand("nbd", |_| nbd_tool::completion());
            clap_complete::generate(shell, &mut command, "vireo", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    };
    result.unwrap_or_else(|error| {
        chardev::RawTerminal::restore();
        eprintln!("vireo: {}", one_line(&error));
        let no_accelerator = error.is::<accelerator::NoAccelerator>();
        ExitCode::from(if no_accelerator { exit::NO_ACCELERATOR } else { exit::ERROR })
    })
}

/// An error with its causes, but for those that it names itself.
fn one_line(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{Arguments, one_line};
    use clap::CommandFactory;

    #[test]
    fn a_cause_is_named_once() {
        let error = anyhow::Error::msg("no such file").context("cannot read x: no such file").context("a VM");
        assert_eq!(one_line(&error), "a VM: cannot read x: no such file");
        assert_eq!(one_line(&anyhow::Error::msg("alone")), "alone");
    }

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
