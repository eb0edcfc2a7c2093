//! Random reads of 4 KiB from a virtio disk, eight at a time.

use super::vmm::{GuestSpec, Kind, Running, Vmm};
use super::{Setting, order_of};
use crate::Outcome;
use crate::bench::statistics::median;
use anyhow::{Context, Result};
use std::io::Write;
use std::path::Path;

/// The disk's size, in MiB: it lies in the host's cache.
const SIZE: usize = 64;

pub(super) fn run(setting: &Setting<'_>) -> Outcome {
    let mut disk = tempfile::NamedTempFile::new().context("making the disk")?;
    let chunk: Vec<u8> = (0..1usize << 20).map(|at| (at * 31 + (at >> 8)) as u8).collect();
    for _ in 0..SIZE {
        disk.write_all(&chunk).context("writing the disk")?;
    }
    let mut contestants: Vec<(&Vmm, bool)> = Vec::new();
    for vmm in setting.vmms.iter().filter(|vmm| vmm.is_pc()) {
        contestants.push((vmm, false));
        if vmm.kind == Kind::QemuQ35 {
            contestants.push((vmm, true));
        }
    }
    let mut rates: Vec<Vec<f64>> = vec![Vec::new(); contestants.len()];
    let mut failures: Vec<Option<String>> = vec![None; contestants.len()];
    for round in 0..setting.runs {
        for index in order_of(round, contestants.len()) {
            let (vmm, tuned) = &contestants[index];
            match once(setting, vmm, *tuned, disk.path()) {
                Ok(rate) => rates[index].push(rate),
                Err(error) => failures[index] = Some(format!("{error:#}")),
            }
        }
    }
    println!("\nRandom reads of 4 KiB from a virtio disk a second, 8 threads, {} runs", setting.runs);
    for (index, (vmm, tuned)) in contestants.iter().enumerate() {
        let name = format!("{}{}", vmm.name(), if *tuned { ", iothread and io_uring" } else { "" });
        match &failures[index] {
            Some(error) => println!("{name:<36} did not get there: {error}"),
            None => {
                let ratio =
                    if rates[0].is_empty() { f64::NAN } else { median(&rates[0]) / median(&rates[index]) };
                println!("{name:<36} {:>10.0}   vireo to it: {ratio:.2}", median(&rates[index]));
            }
        }
    }
    Ok(())
}

fn once(setting: &Setting<'_>, vmm: &Vmm, tuned: bool, disk: &Path) -> Result<f64> {
    let (kernel, initrd) = (setting.parts.bzimage(), setting.parts.disk_initrd());
    let guest = GuestSpec {
        kernel: &kernel,
        initrd: Some(&initrd),
        append: "",
        memory: setting.memory,
        disk: Some(disk),
        tuned,
    };
    let mut running = Running::start(vmm.command(&guest)?)?;
    let (_, line) = running.expect("bench-disk ")?;
    let mut numbers = line.split_whitespace().skip(1).map(str::parse::<f64>);
    let mut next = || numbers.next().and_then(Result::ok).with_context(|| format!("the guest said {line:?}"));
    let (reads, nanoseconds) = (next()?, next()?);
    Ok(reads / (nanoseconds / 1e9))
}
