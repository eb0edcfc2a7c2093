//! Chores of the project: `cargo xtask --help` lists them.

mod bench;
mod debian_disk;
mod fuzz;
mod interop;
mod iotests;
mod isa;
mod kvm_lab;
mod lint;
mod stress;
mod suites;
mod test;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

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
    /// Compares the interpreter's instructions with the host's processor and counts them by extension.
    Isa(isa::Options),
    /// Builds the fuzz targets and runs each for a while; fails if one finds something.
    Fuzz(fuzz::Options),
    /// Makes, writes and reads qcow2 images here and with qemu-img, over all combinations of the format's parameters.
    Interop(interop::Options),
    /// Runs a command where /dev/kvm is real: in Debian on an emulated processor that has SVM.
    KvmLab(kvm_lab::Options),
    /// Runs others' CPU test suites on our accelerators, beside QEMU's TCG.
    Suites(suites::Options),
    /// Runs QEMU's own block tests on our image tools, beside real qemu-img.
    Iotests(iotests::Options),
    /// Loads a whole Debian with stress-ng and rcutorture and looks for complaints in its kernel's log.
    Stress(stress::Options),
    /// Measures against QEMU's TCG and the bare host, side by side.
    #[command(subcommand)]
    Bench(bench::Bench),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().chore {
        Chore::Lint => lint::run(&root()),
        Chore::Test(options) => test::run(&root(), &options),
        Chore::Isa(options) => isa::run(&root(), &options),
        Chore::Fuzz(options) => fuzz::run(&root(), &options),
        Chore::Interop(options) => interop::run(&root(), &options),
        Chore::KvmLab(options) => return kvm_lab::run(&root(), &options),
        Chore::Suites(options) => suites::run(&root(), &options),
        Chore::Iotests(options) => iotests::run(&root(), &options),
        Chore::Stress(options) => stress::run(&root(), &options),
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

/// Our program, as `cargo build --release` leaves it.
fn vireo(root: &Path) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    target.join("release/vireo")
}

/// Builds our program, and says where it is.
fn build_vireo(root: &Path) -> Result<PathBuf> {
    let build = ["build", "--release", "--quiet", "--package", "vireo"];
    let status = Command::new("cargo").current_dir(root).args(build).status().context("starting cargo")?;
    if !status.success() {
        bail!("cargo {} failed: {status}", build.join(" "));
    }
    Ok(vireo(root))
}

/// What chores return.
type Outcome = Result<()>;
