//! `bench boot`: from exec to the guest's init, and to power-off.

use super::Options;
use super::guest::Guest;
use super::statistics::median;
use super::target::Target;
use crate::Outcome;
use anyhow::Context;
use std::path::Path;

pub(super) fn run(root: &Path, options: &Options) -> Outcome {
    let guest = Guest::prepare(root, options, true)?;
    let mut targets = vec![Target::Tcg, Target::Vireo];
    if options.no_qemu {
        targets.retain(|target| *target != Target::Tcg);
    }
    let mut to_init: Vec<Vec<f64>> = vec![Vec::new(); targets.len()];
    let mut to_exit = to_init.clone();
    for round in 0..options.runs {
        for (index, target) in targets.iter().enumerate() {
            eprintln!("run {} of {}: {}", round + 1, options.runs, target.name());
            let run = target.run(root, &guest, options)?;
            to_init[index].push(run.init_reached().context("init was not reached")?.as_secs_f64());
            to_exit[index].push(run.total.as_secs_f64());
        }
    }
    println!("{:<10} {:>12} {:>12}   init, each run", "", "to init, s", "to exit, s");
    for (index, target) in targets.iter().enumerate() {
        println!(
            "{:<10} {:>12.3} {:>12.3}   {:.3?}",
            target.name(),
            median(&to_init[index]),
            median(&to_exit[index]),
            to_init[index]
        );
    }
    if targets.len() == 2 {
        let ratio = |times: &[Vec<f64>]| median(&times[0]) / median(&times[1]);
        println!("{:<10} {:>12.2} {:>12.2}", "TCG/vireo", ratio(&to_init), ratio(&to_exit));
    }
    Ok(())
}
