//! From exec to the guest's first program, and the monitor's memory when it is reached.

use super::vmm::{GuestSpec, Running, Vmm};
use super::{Setting, order_of};
use crate::Outcome;
use crate::bench::statistics::median;
use anyhow::{Context, Result};
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// A monitor with one of the two kernels.
struct Contestant<'a> {
    vmm: &'a Vmm,
    kernel: PathBuf,
    kind: &'static str,
    seconds: Vec<f64>,
    memory: Vec<Memory>,
    failed: Option<String>,
}

/// The monitor's memory beyond the guest's, in KiB.
#[derive(Clone, Copy)]
struct Memory {
    private: f64,
    resident: f64,
}

pub(super) fn run(setting: &Setting<'_>) -> Outcome {
    let mut contestants = Vec::new();
    for vmm in &setting.vmms {
        let mut add = |kernel, kind| {
            contestants.push(Contestant { vmm, kernel, kind, seconds: vec![], memory: vec![], failed: None });
        };
        if vmm.takes_bzimage() {
            add(setting.parts.bzimage(), "bzImage");
        }
        add(setting.parts.vmlinux(), "vmlinux");
    }
    for round in 0..setting.runs {
        for index in order_of(round, contestants.len()) {
            let contestant = &mut contestants[index];
            if contestant.failed.is_some() {
                continue;
            }
            match once(setting, contestant) {
                Ok((seconds, memory)) => {
                    eprintln!(
                        "{} of {}: {} {} {seconds:.3} s",
                        round + 1,
                        setting.runs,
                        contestant.vmm.name(),
                        contestant.kind
                    );
                    contestant.seconds.push(seconds);
                    contestant.memory.push(memory);
                }
                Err(error) => contestant.failed = Some(format!("{error:#}")),
            }
        }
    }
    print_table(setting, &contestants);
    Ok(())
}

fn once(setting: &Setting<'_>, contestant: &Contestant<'_>) -> Result<(f64, Memory)> {
    let initrd = setting.parts.initrd();
    let guest = GuestSpec {
        kernel: &contestant.kernel,
        initrd: Some(&initrd),
        append: "",
        memory: setting.memory,
        disk: None,
        tuned: false,
    };
    let mut running = Running::start(contestant.vmm.command(&guest)?)?;
    let (time, _) = running.expect("bench-init")?;
    // Whatever it still does after the guest's first line is not to count as idle.
    std::thread::sleep(Duration::from_millis(300));
    let memory = memory_beyond(running.child.id(), u64::from(setting.memory) << 10)?;
    Ok((time.as_secs_f64(), memory))
}

/// The resident memory of a process beyond its mappings of a guest's memory of `guest` KiB: those that are
/// the largest, until they make up the guest's.
fn memory_beyond(process: u32, guest: u64) -> Result<Memory> {
    let path = format!("/proc/{process}/smaps");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let mut mappings = read_smaps(&text);
    mappings.sort_by_key(|mapping| std::cmp::Reverse(mapping.size));
    let mut covered = 0;
    let mut sum = Memory { private: 0.0, resident: 0.0 };
    for mapping in mappings {
        // A guest's memory lies in few large pieces.
        if covered < guest && mapping.size >= 1 << 10 && covered + mapping.size <= guest + (1 << 10) {
            covered += mapping.size;
            continue;
        }
        sum.private += mapping.private as f64;
        sum.resident += mapping.resident as f64;
    }
    Ok(sum)
}

/// A mapping; all sizes in KiB.
#[derive(Default, Debug, PartialEq, Eq)]
struct Mapping {
    size: u64,
    resident: u64,
    private: u64,
}

fn read_smaps(text: &str) -> Vec<Mapping> {
    let mut mappings = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else { continue };
        let number: u64 = value.parse().unwrap_or(0);
        if key == "Size:" {
            mappings.push(Mapping { size: number, ..Mapping::default() });
        }
        let Some(mapping) = mappings.last_mut() else { continue };
        match key {
            "Rss:" => mapping.resident = number,
            "Private_Clean:" | "Private_Dirty:" => mapping.private += number,
            _ => {}
        }
    }
    mappings
}

fn print_table(setting: &Setting<'_>, contestants: &[Contestant<'_>]) {
    println!(
        "\nFrom exec to the guest's init, {} runs, {} MiB, one vCPU; memory beyond the guest's then",
        setting.runs, setting.memory
    );
    println!(
        "{:<18} {:<8} {:>8} {:>8} {:>8} {:>8} {:>12} {:>13}",
        "", "kernel", "median s", "least", "most", "to vireo", "private MiB", "resident MiB"
    );
    let reference =
        contestants.first().filter(|first| !first.seconds.is_empty()).map(|first| median(&first.seconds));
    for contestant in contestants {
        let name = contestant.vmm.name();
        if let Some(error) = &contestant.failed {
            println!("{name:<18} {:<8} did not get there: {error}", contestant.kind);
            continue;
        }
        let seconds = &contestant.seconds;
        let least = seconds.iter().copied().fold(f64::INFINITY, f64::min);
        let most = seconds.iter().copied().fold(0.0, f64::max);
        let mib = |part: fn(&Memory) -> f64| {
            median(&contestant.memory.iter().map(part).collect::<Vec<_>>()) / 1024.0
        };
        println!(
            "{name:<18} {:<8} {:>8.3} {least:>8.3} {most:>8.3} {:>8.2} {:>12.1} {:>13.1}",
            contestant.kind,
            median(seconds),
            reference.map_or(f64::NAN, |reference| median(seconds) / reference),
            mib(|memory| memory.private),
            mib(|memory| memory.resident),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smaps_are_read() {
        let text = "55d0-55d1 r--p 00000000 00:19 5 /bin/x\nSize:   4 kB\nRss:  4 kB\nPrivate_Clean: 1 kB\n\
                    Private_Dirty: 2 kB\nVmFlags: rd\n7f00-7f01 rw-p 0 0:0 0\nSize: 262144 kB\nRss: 9 kB\n";
        let first = Mapping { size: 4, resident: 4, private: 3 };
        assert_eq!(read_smaps(text), [first, Mapping { size: 262_144, resident: 9, private: 0 }]);
    }
}
