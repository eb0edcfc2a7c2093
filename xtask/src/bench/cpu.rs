//! `bench cpu`: workloads inside the guest, beside the same program on the host.

use super::Options;
use super::guest::Guest;
use super::statistics::{geometric_mean, median};
use super::target::Target;
use crate::Outcome;
use std::collections::BTreeMap;
use std::path::Path;

/// Nanoseconds of each run, by workload and target.
type Times = BTreeMap<String, BTreeMap<&'static str, Vec<f64>>>;

pub(super) fn run(root: &Path, options: &Options) -> Outcome {
    let guest = Guest::prepare(root, options, false)?;
    let mut targets = vec![Target::Native, Target::Tcg, Target::Vireo];
    if options.no_qemu {
        targets.retain(|target| *target != Target::Tcg);
    }
    let mut order = Vec::new();
    let mut times = Times::new();
    for round in 0..options.runs {
        for target in &targets {
            eprintln!("run {} of {}: {}", round + 1, options.runs, target.name());
            let run = target.run(root, &guest, options)?;
            for (workload, nanos) in run.workloads() {
                if !order.iter().any(|known| known == workload) {
                    order.push(workload.to_owned());
                }
                let per_target = times.entry(workload.to_owned()).or_default();
                per_target.entry(target.name()).or_default().push(nanos);
            }
        }
    }
    print_table(&order, &times);
    Ok(())
}

fn print_table(order: &[String], times: &Times) {
    println!(
        "{:<12} {:>10} {:>10} {:>10} {:>9} {:>9} {:>9}",
        "workload", "native ms", "TCG ms", "vireo ms", "TCG/nat", "vireo/nat", "TCG/vireo"
    );
    let mut gains = Vec::new();
    let mut slowdowns = [Vec::new(), Vec::new()];
    for workload in order {
        let per_target = &times[workload];
        let of = |target: Target| per_target.get(target.name()).map(|values| median(values) / 1e6);
        let (native, tcg, vireo) = (of(Target::Native), of(Target::Tcg), of(Target::Vireo));
        let ratio = |a: Option<f64>, b: Option<f64>| Some(a? / b?);
        let cell = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2}"));
        slowdowns[0].extend(ratio(tcg, native));
        slowdowns[1].extend(ratio(vireo, native));
        gains.extend(ratio(tcg, vireo));
        println!(
            "{workload:<12} {:>10} {:>10} {:>10} {:>9} {:>9} {:>9}",
            cell(native),
            cell(tcg),
            cell(vireo),
            cell(ratio(tcg, native)),
            cell(ratio(vireo, native)),
            cell(ratio(tcg, vireo)),
        );
    }
    println!(
        "{:<12} {:>10} {:>10} {:>10} {:>9.2} {:>9.2} {:>9.2}",
        "geomean",
        "",
        "",
        "",
        geometric_mean(&slowdowns[0]),
        geometric_mean(&slowdowns[1]),
        geometric_mean(&gains)
    );
}
