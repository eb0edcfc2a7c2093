//! `cargo xtask interop`: images between our code and the installed qemu-img, over all combinations of parameters.

use crate::Outcome;
use anyhow::{Context, bail};
use std::path::Path;
use std::process::Command;

/// Nothing to choose.
#[derive(clap::Args)]
pub(crate) struct Options {}

/// Runs the matrix, which prints a line for each combination that is alike.
pub(crate) fn run(root: &Path, _: &Options) -> Outcome {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        bail!("qemu-img is not installed: apt-get install -y qemu-utils");
    }
    let test = ["test", "--quiet", "--package", "qcow2", "--test", "interop", "matrix", "--", "--nocapture"];
    let status = Command::new("cargo").current_dir(root).args(test).env("INTEROP", "all").status();
    if !status.context("starting cargo")?.success() {
        bail!("images are not alike");
    }
    Ok(())
}
