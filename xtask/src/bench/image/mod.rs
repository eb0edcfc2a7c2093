//! `bench image`: disk images under our tool and under QEMU's in turn: whole images copied, a fragmented one checked,
//! and requests of 4 KiB.
//!
//! Requests are sent by `bench` of both tools, with a step that is coprime to the number of blocks, so that both go
//! through all blocks in the same scattered order. Encrypted images, for which `bench` has no keys, are used by a script
//! of `qemu-io`. QEMU's side has two ways, its default (Linux AIO with direct I/O,
//! threads without) and io_uring, and counts with the better.

mod cell;
mod stock;

use super::statistics::{geometric_mean, median};
use crate::Outcome;
use anyhow::{Context, Result, bail};
use cell::{Cell, Contestant};
use clap::Args;
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use stock::Stock;

/// What the tools say the time in, in seconds.
const RESOLUTION: f64 = 0.001;

/// How to measure.
#[derive(Args, Clone)]
pub(crate) struct Options {
    /// Runs of each; the medians are compared.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Where the images are made. On a disk, requests past the page cache tell of the disk; in memory (/dev/shm), of the
    /// tools.
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Size of the images in MiB.
    #[arg(long, default_value_t = 512)]
    size: u64,
    /// Requests of one run at depth 32; a third at depth 1.
    #[arg(long, default_value_t = 30_000)]
    count: u64,
    /// Only cells whose names contain one of these; `bench image --list` names them.
    cells: Vec<String>,
    /// A program to measure instead of building this tree's.
    #[arg(long)]
    vireo: Option<PathBuf>,
    /// Name the cells.
    #[arg(long)]
    list: bool,
}

pub(super) fn run(root: &Path, options: &Options) -> Outcome {
    let wanted =
        |cell: &Cell| options.cells.is_empty() || options.cells.iter().any(|word| cell.name().contains(word));
    let cells: Vec<Cell> = Cell::all().into_iter().filter(wanted).collect();
    if options.list {
        cells.iter().for_each(|cell| println!("{}", cell.name()));
        return Ok(());
    }
    let vireo = match &options.vireo {
        Some(program) => program.clone(),
        None => crate::build_vireo(root)?,
    };
    let base = options.folder.clone().unwrap_or_else(std::env::temp_dir);
    let folder = tempfile::Builder::new().prefix("vireo-images-").tempdir_in(base);
    let folder = folder.context("making a folder for the images")?;
    let mut stock = Stock::new(folder.path(), options.size << 20);
    for cell in &cells {
        cell.stock_up(&mut stock)?;
    }
    let mut seconds: Vec<Vec<Vec<f64>>> =
        cells.iter().map(|cell| vec![Vec::new(); cell.contestants().len()]).collect();
    for round in 0..options.runs {
        for (cell, seconds) in cells.iter().zip(&mut seconds) {
            eprintln!("round {} of {}: {}", round + 1, options.runs, cell.name());
            for (contestant, seconds) in cell.contestants().iter().zip(seconds) {
                cell.prepare(&stock)?;
                let mut command = match (*contestant, cell.is_script()) {
                    (Contestant::Vireo, _) => Command::new(&vireo),
                    (_, false) => Command::new("qemu-img"),
                    (_, true) => Command::new("qemu-io"),
                };
                if *contestant == Contestant::Vireo {
                    command.arg(if cell.is_script() { "io" } else { "img" });
                }
                command.args(cell.words(*contestant, &stock, options));
                let mut script = tempfile::tempfile().context("making a script")?;
                script.write_all(cell.script(&stock, options).as_bytes())?;
                script.rewind()?;
                match measure(command.stdin(script), cell) {
                    Ok(took) => seconds.push(took),
                    // qemu-img's own stack overflows where requests end at once (holes, with Linux AIO).
                    Err(error) if *contestant != Contestant::Vireo => eprintln!("{error:#}"),
                    Err(error) => return Err(error),
                }
            }
        }
    }
    print(&cells, &seconds);
    Ok(())
}

/// The seconds that `command` took, or says that its requests took.
fn measure(command: &mut Command, cell: &Cell) -> Result<f64> {
    let begin = Instant::now();
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    let took = begin.elapsed().as_secs_f64();
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    if !cell.says_time() {
        return Ok(took);
    }
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let seconds = said.split_once("Run completed in ").and_then(|(_, rest)| rest.split(' ').next());
    seconds.and_then(|word| word.parse().ok()).with_context(|| format!("{command:?} said {said:?}"))
}

fn print(cells: &[Cell], seconds: &[Vec<Vec<f64>>]) {
    println!("{:<40} {:>9} {:>9} {:>9}", "cell", "QEMU s", "vireo s", "ratio");
    let mut ratios = Vec::new();
    for (cell, seconds) in cells.iter().zip(seconds) {
        let of = |vireo: bool| {
            let contestants = cell.contestants();
            let medians = contestants
                .iter()
                .zip(seconds)
                .filter(|(contestant, all)| (**contestant == Contestant::Vireo) == vireo && !all.is_empty())
                .map(|(_, seconds)| median(seconds));
            medians.fold(f64::INFINITY, f64::min).max(RESOLUTION)
        };
        let (qemu, vireo) = (of(false), of(true));
        ratios.push(qemu / vireo);
        println!("{:<40} {qemu:>9.3} {vireo:>9.3} {:>9.2}", cell.name(), qemu / vireo);
    }
    println!("{:<40} {:>9} {:>9} {:>9.2}", "geomean", "", "", geometric_mean(&ratios));
}
