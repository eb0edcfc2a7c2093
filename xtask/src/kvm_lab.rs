//! `cargo xtask kvm-lab`: a command where `/dev/kvm` is real.

use ::kvm_lab::{Lab, Outer};
use anyhow::Result;
use image_store::{DebianImageName, Flavour, Progress, Release};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  cargo xtask kvm-lab -- vireo info
  cargo xtask kvm-lab --own -- vireo run debian --accel kvm
  cargo xtask kvm-lab -s 2 -- vireo run debian --accel kvm --smp 2
  cargo xtask kvm-lab -f ./prog:/prog -- /prog --its options
  cargo xtask kvm-lab -- sh

The program `vireo` is built and copied in when the command begins with it, and Debian's images 12 and 13
with it. What the lab prints comes out, and the exit code is the command's.";

/// The lab's size and the command.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Options {
    /// Memory of the lab, in MiB.
    #[arg(short, value_name = "MIB", default_value_t = 3072, value_parser = clap::value_parser!(u32).range(256..))]
    memory: u32,
    /// Processors of the lab.
    #[arg(short = 's', value_name = "CPUS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// The longest it may take, in seconds.
    #[arg(short = 't', value_name = "SECONDS", default_value_t = 300)]
    seconds: u32,
    /// Have `vireo`'s own translator be the lab's machine, in place of QEMU's.
    #[arg(long)]
    own: bool,
    /// A file or a folder of the host and where it is in the lab; a program's libraries come along.
    #[arg(short, value_name = "HOST:LAB", value_parser = parse_pair)]
    file: Vec<(PathBuf, PathBuf)>,
    /// The command to run in the lab.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

fn parse_pair(text: &str) -> Result<(PathBuf, PathBuf), String> {
    match text.split_once(':') {
        Some((host, lab)) if !host.is_empty() && lab.starts_with('/') => Ok((host.into(), lab.into())),
        _ => Err("accepted is HOST:LAB, where LAB is an absolute path".to_owned()),
    }
}

/// Runs the command; the exit code is its own.
pub(crate) fn run(root: &Path, options: &Options) -> ExitCode {
    match run_lab(root, options) {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(1)),
        Err(error) => {
            eprintln!("kvm-lab: {error:#}");
            ExitCode::from(125)
        }
    }
}

fn run_lab(root: &Path, options: &Options) -> Result<i32> {
    let mut lab = Lab::new(options.command.clone())
        .memory(options.memory)
        .cpus(options.cpus)
        .limit(Duration::from_secs(options.seconds.into()))
        .interactive(std::io::stdin().is_terminal() && std::io::stdout().is_terminal());
    for (host, place) in &options.file {
        lab = lab.file(host, place);
    }
    let inside = options.command.first().is_some_and(|word| word == "vireo");
    if inside {
        lab = with_vireo(root, lab)?;
    }
    if options.own {
        let program = if inside { crate::vireo(root) } else { crate::build_vireo(root)? };
        lab = lab.outer(Outer::Vireo(program));
    }
    let mut console = std::io::stdout().lock();
    let status = lab.run_with(
        &mut |bytes| {
            let _ = console.write_all(bytes).and_then(|()| console.flush());
        },
        &Lines,
    )?;
    Ok(status)
}

/// Adds our program, as it is now, and the images that it boots.
pub(crate) fn with_vireo(root: &Path, lab: Lab) -> Result<Lab> {
    let program = crate::build_vireo(root)?;
    let images = [Release::Bookworm, Release::Trixie]
        .map(|release| DebianImageName { release, flavour: Flavour::Cloud });
    Ok(images.into_iter().fold(lab.file(program, "/bin/vireo"), Lab::image))
}

/// A line on standard error for each thing that is fetched.
struct Lines;

impl Progress for Lines {
    fn begin(&self, what: &str, _: Option<u64>) {
        eprintln!("kvm-lab: {what}");
    }

    fn advance(&self, _: u64) {}

    fn end(&self) {}
}
