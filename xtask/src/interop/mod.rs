//! `cargo xtask interop`: images between our tools and the installed qemu-img and qemu-io, over all combinations of
//! the format's parameters, in both directions.

mod combination;
mod content;
mod round;
mod tools;

use crate::{Outcome, build_vireo};
use anyhow::{Context, bail};
use combination::Combination;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use tools::Tools;

/// Which combinations, and with what.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Only every Nth combination.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    every: u32,
    /// Only combinations whose description has this in it, as `luks` or `cluster_size=512,`.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// The program to test, instead of a release build of this one.
    #[arg(long, value_name = "PROGRAM")]
    program: Option<PathBuf>,
}

/// Runs the matrix, and says of how many combinations the images were alike.
pub(crate) fn run(root: &Path, options: &Options) -> Outcome {
    let version = Command::new("qemu-img").arg("--version").output();
    let version = version.context("qemu-img is not installed: apt-get install -y qemu-utils")?;
    let version = String::from_utf8_lossy(&version.stdout).lines().next().unwrap_or_default().to_owned();
    let program = match &options.program {
        Some(program) => {
            program.canonicalize().with_context(|| format!("looking at {}", program.display()))?
        }
        None => build_vireo(root)?,
    };
    let chosen: Vec<Combination> = combination::all()
        .filter(|one| options.only.as_ref().is_none_or(|text| one.to_string().contains(text)))
        .step_by(options.every as usize)
        .collect();
    eprintln!("{} combinations, each written here and there; {version}", chosen.len());

    let folder = tempfile::tempdir().context("making a folder")?;
    let (ours, theirs) = (Tools::ours(&program, folder.path())?, Tools::theirs());
    let (next, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for worker in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            let place = folder.path().join(format!("worker-{worker}"));
            let (next, failed, chosen, ours, theirs) = (&next, &failed, &chosen, &ours, &theirs);
            scope.spawn(move || {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(combination) = chosen.get(number) else { return };
                    if number > 0 && number.is_multiple_of(100) {
                        eprintln!("{number} of {}, {:.0} s", chosen.len(), begin.elapsed().as_secs_f64());
                    }
                    for (writer, reader) in [(ours, theirs), (theirs, ours)] {
                        if let Err(error) = round::run(&place, combination, writer, reader) {
                            failed.fetch_add(1, Ordering::Relaxed);
                            println!("{combination}: made by {}: {error:#}", writer.name());
                        }
                    }
                }
            });
        }
    });
    let failed = failed.into_inner();
    println!(
        "{} combinations in both directions, {} rounds alike, {failed} not, in {:.0} s",
        chosen.len(),
        2 * chosen.len() - failed,
        begin.elapsed().as_secs_f64()
    );
    if failed > 0 {
        bail!("{failed} rounds failed");
    }
    Ok(())
}
