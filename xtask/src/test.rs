//! `cargo xtask test`: everything that must pass, in one command.

use crate::{Outcome, lint};
use anyhow::{Context, bail};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// A program that the tests call, and the Debian package it comes in.
const PROGRAMS: &[(&str, &str)] = &[
    ("gcc", "gcc libc6-dev"),
    // The stub is tested with it.
    ("gdb", "gdb"),
    ("gpgv", "gpgv"),
    ("mkfs.ext4", "e2fsprogs"),
    // Peers of the block layer: disk images, volumes, network block devices.
    ("cryptsetup", "cryptsetup-bin"),
    ("nbdinfo", "libnbd-bin"),
    ("nbdkit", "nbdkit"),
    ("openssl", "openssl"),
    ("qemu-img", "qemu-utils"),
    // Checks images that jobs of running VMs made.
    ("qemu-img", "qemu-utils"),
    // The public client of the control socket is a Python package.
    ("python3", "python3 python3-venv"),
    // The KVM lab's machine.
    ("qemu-system-x86_64", "qemu-system-x86"),
];

/// What to leave out.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Only the tests: no formatting, clippy or lint.
    #[arg(long)]
    only_tests: bool,
    /// Passed on to the test runner.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    runner: Vec<String>,
}

/// Installs what is missing, then formatting, clippy, the lint, the release program and all tests.
pub(crate) fn run(root: &Path, options: &Options) -> Outcome {
    install_missing()?;
    if !options.only_tests {
        step(root, &["fmt", "--all", "--check"])?;
        step(root, &["clippy", "--quiet", "--workspace", "--all-targets", "--", "--deny", "warnings"])?;
        lint::run(root)?;
    }
    install_qmp_client(root);
    // End-to-end tests boot guests with the program as users run it.
    step(root, &["build", "--release", "--package", "vireo"])?;
    let nextest = Command::new("cargo").args(["nextest", "--version"]).output();
    let mut arguments = match nextest {
        Ok(output) if output.status.success() => vec!["nextest", "run", "--workspace", "--no-fail-fast"],
        _ => vec!["test", "--workspace", "--no-fail-fast"],
    };
    arguments.extend(options.runner.iter().map(String::as_str));
    step(root, &arguments)
}

/// Installs the public Python client of QMP, which drives a VM in the tests, into an environment of its own. Where that
/// is not possible, the tests say what they leave out.
fn install_qmp_client(root: &Path) {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), Into::into);
    let folder = target.join("python");
    let works = || {
        let output = Command::new(folder.join("bin/python")).args(["-c", "import qemu.qmp"]).output();
        output.is_ok_and(|output| output.status.success())
    };
    if works() {
        return;
    }
    eprintln!("missing: qemu.qmp; installing it with pip to {}", folder.display());
    let done = |command: &mut Command| command.status().is_ok_and(|status| status.success());
    let installed = done(Command::new("python3").args(["-m", "venv"]).arg(&folder))
        && done(Command::new(folder.join("bin/python")).args([
            "-m",
            "pip",
            "install",
            "-q",
            "qemu.qmp==0.0.6",
        ]));
    if !installed || !works() {
        eprintln!("warning: qemu.qmp cannot be installed; the tests that need it are left out");
    }
}

fn step(root: &Path, arguments: &[&str]) -> Outcome {
    let start = Instant::now();
    eprintln!("+ cargo {}", arguments.join(" "));
    let status =
        Command::new("cargo").current_dir(root).args(arguments).status().context("starting cargo")?;
    if !status.success() {
        bail!("cargo {} failed: {status}", arguments.join(" "));
    }
    eprintln!("  done in {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// Whether `program` is on the PATH or in the folders of system programs.
fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(Into::into);
    std::env::split_paths(&path)
        .chain(system)
        .any(|folder: std::path::PathBuf| folder.join(program).is_file())
}

fn install_missing() -> Outcome {
    let missing: Vec<_> = PROGRAMS.iter().filter(|(program, _)| !is_there(program)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<_> = missing.iter().flat_map(|(_, packages)| packages.split(' ')).collect();
    let names: Vec<_> = missing.iter().map(|(program, _)| *program).collect();
    let command = format!(
        "apt-get update -qq && apt-get install -y -qq --no-install-recommends {}",
        packages.join(" ")
    );
    eprintln!("missing: {}; installing: {command}", names.join(", "));
    let status = Command::new("sh").args(["-c", &command]).status().context("starting sh")?;
    if !status.success() {
        bail!("{} missing; as root: {command}", names.join(", "));
    }
    Ok(())
}
