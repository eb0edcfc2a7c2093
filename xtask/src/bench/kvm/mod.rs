//! `bench kvm`: under KVM, beside QEMU and, where they are to be had, Firecracker and Cloud Hypervisor. On a
//! host without KVM everything runs in the KVM lab, where times are those of an emulated processor: only the
//! ratios mean something there.

mod disk;
mod exits;
mod parts;
mod start;
mod to_init;
mod vmm;

use crate::Outcome;
use ::kvm_lab::Lab;
use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use parts::Parts;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vmm::Vmm;

/// Where the lab has what is measured.
const LAB_FOLDER: &str = "/lab/bench";
/// What QEMU reads at its start.
const QEMU_FOLDERS: &[&str] = &["/usr/share/qemu", "/usr/share/seabios"];
const QEMU_FILES: &[&str] = &[
    "bios-256k.bin",
    "bios-microvm.bin",
    "kvmvapic.bin",
    "linuxboot_dma.bin",
    "linuxboot.bin",
    "multiboot_dma.bin",
    "pvh.bin",
];

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// From exec to the guest's init, and the monitor's own memory then.
    Init,
    /// The monitor's CPU time before the guest's first instruction.
    Start,
    /// Random reads of a virtio disk.
    Disk,
    /// Round trips of port and memory-mapped reads to the monitor.
    Exits,
}

/// How to measure.
#[derive(Args, Clone)]
pub(crate) struct Options {
    /// Runs of each; the medians are compared.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Memory of the guests, in MiB.
    #[arg(long, default_value_t = 256)]
    memory: u32,
    /// Processors of the lab.
    #[arg(long, default_value_t = 1)]
    lab_cpus: u32,
    /// The longest that the lab may take, in seconds.
    #[arg(long, default_value_t = 1800)]
    limit: u64,
    /// Firecracker's program, if it is not in the PATH.
    #[arg(long)]
    firecracker: Option<PathBuf>,
    /// Cloud Hypervisor's program, if it is not in the PATH.
    #[arg(long)]
    cloud_hypervisor: Option<PathBuf>,
    /// Measure on this host's KVM, not in the lab.
    #[arg(long)]
    here: bool,
    /// With --here: the folder where all is prepared.
    #[arg(long, hide = true)]
    prepared: Option<PathBuf>,
    /// Our program, instead of building it.
    #[arg(long)]
    vireo: Option<PathBuf>,
    /// Only these.
    what: Vec<What>,
}

/// Measures and prints the tables.
pub(super) fn run(root: &Path, options: &Options) -> Outcome {
    if let Some(folder) = &options.prepared {
        return measure(root, options, &Parts::at(folder));
    }
    let folder = tempfile::TempDir::with_prefix("vireo-bench-").context("making a temporary folder")?;
    let parts = Parts::prepare(root, folder.path(), options.vireo.is_none())?;
    if options.here { measure(root, options, &parts) } else { in_lab(root, options, &parts) }
}

fn measure(root: &Path, options: &Options, parts: &Parts) -> Outcome {
    let vireo = options.vireo.clone().unwrap_or_else(|| crate::vireo(root));
    let found = vmm::find_all(&vireo, options.firecracker.as_deref(), options.cloud_hypervisor.as_deref());
    let wanted = |what| options.what.is_empty() || options.what.contains(&what);
    let setting = Setting { vmms: found, parts, runs: options.runs, memory: options.memory };
    if wanted(What::Start) {
        start::run(&setting)?;
    }
    if wanted(What::Init) {
        to_init::run(&setting)?;
    }
    if wanted(What::Exits) {
        exits::run(&setting)?;
    }
    if wanted(What::Disk) {
        disk::run(&setting)?;
    }
    Ok(())
}

/// The order of a round: each round begins with another contestant, and every second one goes backwards, so that
/// a clock that drifts, and what the one before left behind, count for and against all alike.
fn order_of(round: usize, contestants: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..contestants).collect();
    if contestants > 0 {
        order.rotate_left(round * 2 % contestants);
    }
    if round % 2 == 1 {
        order.reverse();
    }
    order
}

/// What all measurements have in common.
struct Setting<'a> {
    vmms: Vec<Vmm>,
    parts: &'a Parts,
    runs: usize,
    memory: u32,
}

/// Runs this program again, in the lab.
fn in_lab(root: &Path, options: &Options, parts: &Parts) -> Outcome {
    let own = std::env::current_exe().context("finding this program")?;
    let text = |number: u64| number.to_string();
    let mut words: Vec<String> = ["/lab/xtask", "bench", "kvm", "--here", "--vireo", "/bin/vireo"]
        .iter()
        .chain(&["--prepared", LAB_FOLDER, "--runs"])
        .map(|word| (*word).to_owned())
        .collect();
    words.extend([text(options.runs as u64), "--memory".to_owned(), text(options.memory.into())]);
    let names = options.what.iter().filter_map(ValueEnum::to_possible_value);
    words.extend(names.map(|name| name.get_name().to_owned()));
    let mut lab = Lab::new(words)
        .memory(options.memory + 2048)
        .cpus(options.lab_cpus)
        .limit(Duration::from_secs(options.limit))
        .file(own, "/lab/xtask")
        .file(options.vireo.clone().unwrap_or_else(|| crate::vireo(root)), "/bin/vireo")
        .file(&parts.folder, LAB_FOLDER);
    let given = [("firecracker", &options.firecracker), ("cloud-hypervisor", &options.cloud_hypervisor)];
    let others = given.map(|(name, path)| (name, path.clone().or_else(|| ::kvm_lab::find_program(name))));
    let qemu = [("qemu-system-x86_64", ::kvm_lab::find_program("qemu-system-x86_64"))];
    for (name, path) in qemu.into_iter().chain(others) {
        if let Some(path) = path {
            lab = lab.file(path, Path::new("/usr/local/bin").join(name));
        }
    }
    for folder in QEMU_FOLDERS {
        for file in QEMU_FILES.iter().map(|name| Path::new(folder).join(name)).filter(|file| file.is_file()) {
            lab = lab.file(&file, &file);
        }
    }
    lab = lab.env("PATH", "/usr/local/bin:/bin");
    let mut console = std::io::stdout().lock();
    let status = lab.run(&mut |bytes| {
        let _ = console.write_all(bytes).and_then(|()| console.flush());
    })?;
    if status != 0 {
        bail!("measuring in the lab ended with status {status}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::order_of;

    #[test]
    fn every_round_has_all_and_begins_elsewhere() {
        let rounds: Vec<_> = (0..4).map(|round| order_of(round, 5)).collect();
        assert_eq!(rounds, [[0, 1, 2, 3, 4], [1, 0, 4, 3, 2], [4, 0, 1, 2, 3], [0, 4, 3, 2, 1]]);
        assert!(order_of(3, 0).is_empty());
    }
}
