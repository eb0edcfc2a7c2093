//! How often a second a guest can go to its monitor and back.

use super::vmm::{GuestSpec, Running, Vmm};
use super::{Setting, order_of};
use crate::Outcome;
use crate::bench::statistics::median;
use anyhow::Result;

/// Reads of each kind that the guest makes.
const COUNT: f64 = 10_000.0;

pub(super) fn run(setting: &Setting<'_>) -> Outcome {
    let vmms: Vec<&Vmm> = setting.vmms.iter().filter(|vmm| vmm.is_pc()).collect();
    let mut rates: Vec<[Vec<f64>; 2]> = vec![Default::default(); vmms.len()];
    for round in 0..setting.runs {
        for index in order_of(round, vmms.len()) {
            let [pio, mmio] = once(setting, vmms[index])?;
            rates[index][0].push(pio);
            rates[index][1].push(mmio);
        }
    }
    println!("\nRound trips to the monitor a second, {} runs", setting.runs);
    println!("{:<18} {:>14} {:>14}", "", "port reads", "MMIO reads");
    for (vmm, rates) in vmms.iter().zip(&rates) {
        println!("{:<18} {:>14.0} {:>14.0}", vmm.name(), median(&rates[0]), median(&rates[1]));
    }
    if let [own, peer, ..] = rates.as_slice() {
        let ratio = |index: usize| median(&own[index]) / median(&peer[index]);
        println!("{:<18} {:>14.2} {:>14.2}", "ratio", ratio(0), ratio(1));
    }
    Ok(())
}

fn once(setting: &Setting<'_>, vmm: &Vmm) -> Result<[f64; 2]> {
    let kernel = setting.parts.exits();
    let guest = GuestSpec { kernel: &kernel, initrd: None, append: "", memory: 64, disk: None, tuned: false };
    let mut running = Running::start(vmm.command(&guest)?)?;
    let mut rate = |kind: &str| -> Result<f64> {
        let (begin, _) = running.expect(&format!("{kind}-begin"))?;
        let (end, _) = running.expect(&format!("{kind}-end"))?;
        Ok(COUNT / (end - begin).as_secs_f64())
    };
    Ok([rate("pio")?, rate("mmio")?])
}
