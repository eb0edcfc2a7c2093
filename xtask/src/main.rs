//! Chores of the project: `cargo xtask --help` lists them.

mod bench;
mod fuzz;
mod lint;
mod test;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Chores of the project.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Checks the rules of the house: layering, where unsafe code may be, file lengths, READMEs.
    Lint,
    /// Installs what the tests need and runs everything that must pass.
    Test(test::Options),
    /// Builds the fuzz targets and runs each for a while; fails if one finds something.
    Fuzz(fuzz::Options),
    /// Measures against QEMU's TCG and the bare host, side by side.
    #[command(subcommand)]
    Bench(bench::Bench),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().chore {
        Chore::Lint => lint::run(&root()),
        Chore::Test(options) => test::run(&root(), &options),
        Chore::Fuzz(options) => fuzz::run(&root(), &options),
        Chore::Bench(bench) => bench.run(&root()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The workspace's folder.
fn root() -> PathBuf {
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    own.parent().map_or(own.clone(), PathBuf::from)
}

/// What chores return.
type Outcome = Result<()>;
