//! `cargo xtask iotests`: QEMU's own block tests on our image tools, beside real qemu-img.
//!
//! The tests compare outputs to the letter. They come from Debian's source package of the installed `qemu-utils`, are
//! kept in the user's cache folder, and never become part of this repository.

mod harness;
mod sources;

use crate::Outcome;
use anyhow::{Context, Result};
use harness::{Harness, Verdict};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const EXAMPLES: &str = "\
Examples:
  cargo xtask iotests                    the quick qcow2 tests that need only qemu-img and qemu-io
  cargo xtask iotests --format raw
  cargo xtask iotests 029 036 --no-peer --vireo target/debug/vireo

Needs python3 and Debian's qemu-utils, and apt for the tests' source. What failed, and how, is below
target/iotests, one file a test.";

/// The tests in QEMU's group `quick` that run for qcow2 and need only qemu-img and qemu-io.
const QUICK_QCOW2: &str = "\
    001 002 004 005 008 009 010 011 012 017 018 019 020 021 024 025 027 029 031 032 033 034 035 036 037 038 039 042 \
    046 047 048 050 052 053 054 062 063 066 069 072 073 074 082 086 089 090 098 103 105 107 110 111 114 133 134 138 \
    150 154 158 159 170 177 179 188 190 197 204 215 217 226 243 250 251 252 263 265 268 270 277 279 287 289 290 292 \
    303 305 313 314 detect-zeroes-registered-buf qcow2-encryption qemu-img-close-errors regression-vhdx-log";

/// What to run and how.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Options {
    /// The tests [default: the quick ones that need only qemu-img and qemu-io]
    tests: Vec<String>,
    /// The image format to test.
    #[arg(long, value_parser = ["qcow2", "raw", "luks"], default_value = "qcow2")]
    format: String,
    /// Leave real qemu-img out.
    #[arg(long)]
    no_peer: bool,
    /// The program to test, instead of a release build of this one.
    #[arg(long, value_name = "FILE")]
    vireo: Option<PathBuf>,
    /// How many tests run at once.
    #[arg(long, value_name = "N", default_value_t = 1)]
    jobs: u32,
}

/// Runs the tests with real tools and with ours, and prints a table.
pub(crate) fn run(root: &Path, options: &Options) -> Outcome {
    let suite = sources::get()?;
    let vireo = match &options.vireo {
        Some(program) => {
            program.canonicalize().with_context(|| format!("looking at {}", program.display()))?
        }
        None => crate::build_vireo(root)?,
    };
    let harness = Harness::new(suite.folder, &options.format, options.jobs)?;
    let tests = if !options.tests.is_empty() {
        options.tests.clone()
    } else if options.format == "qcow2" {
        QUICK_QCOW2.split_whitespace().map(str::to_owned).collect()
    } else {
        harness.quick_with_image_tools()?
    };
    let failures = failures_folder(root, &options.format)?;
    let real = if options.no_peer { None } else { Some(harness.run(&harness::real_tools()?, &tests)?) };
    let ours = harness.run(&harness::our_tools(&vireo, harness.scratch())?, &tests)?;
    println!("QEMU's tests of {}, format {}", suite.version, options.format);
    println!("{:<32} {:<6} ours", "test", "real");
    for test in &tests {
        let verdict = ours.get(test).cloned().unwrap_or(Verdict::Absent);
        let peer = real.as_ref().map_or("", |real| real.get(test).unwrap_or(&Verdict::Absent).word());
        println!("{test:<32} {peer:<6} {}", verdict.word());
        if let Verdict::Failed(why) = &verdict {
            let file = failures.join(format!("{test}.diff"));
            fs::write(&file, why).with_context(|| format!("writing {}", file.display()))?;
        }
    }
    if let Some(real) = &real {
        println!("real: {}", count(real));
    }
    println!("ours: {}", count(&ours));
    println!("what failed: {}", failures.display());
    Ok(())
}

/// How many tests ended how, in words.
fn count(verdicts: &BTreeMap<String, Verdict>) -> String {
    let with = |word| verdicts.values().filter(|verdict| verdict.word() == word).count();
    format!("{} pass, {} fail, {} skipped", with("pass"), with("FAIL"), with("skip"))
}

/// The folder for what failed, emptied.
fn failures_folder(root: &Path, format: &str) -> Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let folder = target.join("iotests").join(format);
    if folder.is_dir() {
        fs::remove_dir_all(&folder).with_context(|| format!("emptying {}", folder.display()))?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    Ok(folder)
}
