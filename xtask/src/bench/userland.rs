//! `bench userland`: a whole Debian from a disk image, with systemd, compilers and interpreters, under our
//! translator and under QEMU's TCG in turn. What each workload prints must be the same under both.

use super::statistics::{geometric_mean, median};
use super::target::{Run, Target, read_lines};
use crate::Outcome;
use crate::debian_disk::DebianDisk;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The longest that one run may take.
const TIME_LIMIT: Duration = Duration::from_secs(3600);

/// How to measure.
#[derive(Args, Clone)]
pub(crate) struct Options {
    /// Runs of each; the medians are compared.
    #[arg(long, default_value_t = 1)]
    runs: usize,
    /// vCPUs of the guests.
    #[arg(long, default_value_t = 2)]
    smp: u32,
    /// QEMU's processor model.
    #[arg(long, default_value = "max")]
    qemu_cpu: String,
    /// Further arguments for `vireo run`, split at spaces.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    vireo_args: String,
    /// Run only under vireo, not under QEMU.
    #[arg(long)]
    no_qemu: bool,
    /// Only these workloads.
    workloads: Vec<String>,
}

/// Seconds by workload and target, in the order of the guest.
#[derive(Default)]
struct Table {
    order: Vec<String>,
    seconds: BTreeMap<(String, &'static str), Vec<f64>>,
    /// What the workload printed, as a checksum, and where.
    said: BTreeMap<String, BTreeMap<String, &'static str>>,
}

pub(super) fn run(root: &Path, options: &Options) -> Outcome {
    let image = DebianDisk::get()?;
    crate::build_vireo(root)?;
    let targets = if options.no_qemu { vec![Target::Vireo] } else { vec![Target::Tcg, Target::Vireo] };
    let mut table = Table::default();
    for round in 0..options.runs {
        for &target in &targets {
            eprintln!("run {} of {}: {}", round + 1, options.runs, target.name());
            once(root, options, &image, target, &mut table)?;
        }
    }
    table.print(&targets);
    let different: Vec<_> = table.said.iter().filter(|(_, said)| said.len() > 1).collect();
    if !different.is_empty() {
        bail!("what was printed is not the same everywhere: {different:?}");
    }
    Ok(())
}

fn command(root: &Path, options: &Options, image: &DebianDisk, disk: &Path, target: Target) -> Command {
    let only = options.workloads.join(" ");
    let only = if only.is_empty() { only } else { format!(" userland=\"{only}\"") };
    let append = format!(
        "root=/dev/vda rw console=ttyS0 quiet panic=-1 systemd.mask=serial-getty@ttyS0.service{only}"
    );
    let mut command;
    if target == Target::Tcg {
        command = Command::new("qemu-system-x86_64");
        command.args(["-machine", "q35", "-accel", "tcg,thread=multi", "-m", "2G", "-nographic"]);
        command.args(["-no-reboot", "-nic", "none", "-cpu", &options.qemu_cpu, "-smp"]);
        command.arg(options.smp.to_string());
        command
            .arg("-kernel")
            .arg(&image.kernel)
            .arg("-initrd")
            .arg(&image.initrd)
            .arg("-append")
            .arg(append);
        command.arg("-drive").arg(format!("file={},format=raw,if=virtio", disk.display()));
    } else {
        command = Command::new(crate::vireo(root));
        command.args(["run", "--accel", "dbt", "-m", "2G", "--no-reboot", "--serial", "stdio", "--smp"]);
        command.arg(options.smp.to_string()).args(options.vireo_args.split_whitespace());
        command.arg("--kernel").arg(&image.kernel).arg("--initrd").arg(&image.initrd);
        command.arg("--append").arg(append);
        command.arg("--drive").arg(format!("file={},format=raw", disk.display()));
    }
    command
}

/// Boots a copy of the image and takes down what its workloads tell.
fn once(root: &Path, options: &Options, image: &DebianDisk, target: Target, table: &mut Table) -> Result<()> {
    let folder = tempfile::TempDir::with_prefix("vireo-userland-").context("making a temporary folder")?;
    let workloads = fs::read_dir(root.join("xtask/guest/userland")).context("reading the workloads")?;
    let files = workloads.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let disk = image.copy(folder.path(), &files)?;
    let mut command = command(root, options, image, &disk, target);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn().with_context(|| format!("starting {:?}", command.get_program()))?;
    let lines = read_lines(&mut child, start, TIME_LIMIT, &mut |line| eprintln!("  {line}"))?;
    let total = start.elapsed();
    child.wait()?;
    let run = Run::new(lines, total);
    let name = target.name();
    if !run.lines().any(|line| line.starts_with("bench-end")) {
        bail!("{name}: the guest did not get to its end; last: {:#?}", run.lines().last());
    }
    if let Some(line) = run.lines().find(|line| line.starts_with("complaints ") && *line != "complaints 0") {
        eprintln!("{name}: the kernel's log has {line}");
    }
    let boot = run.init_reached().context("the guest's service did not start")?;
    table.add("(boot)", name, boot.as_secs_f64());
    for line in run.lines() {
        // Systemd's own escape sequences may stand before it.
        let words: Vec<_> = line[line.find("bench ").unwrap_or(0)..].split_whitespace().collect();
        let ["bench", workload, nanoseconds, sum] = words[..] else { continue };
        let Ok(nanoseconds) = nanoseconds.parse::<f64>() else { continue };
        table.add(workload, name, nanoseconds / 1e9);
        table.said.entry(workload.to_owned()).or_default().insert(sum.to_owned(), name);
    }
    table.add("(all)", name, total.as_secs_f64());
    Ok(())
}

impl Table {
    fn add(&mut self, workload: &str, target: &'static str, seconds: f64) {
        if !self.order.iter().any(|known| known == workload) {
            self.order.push(workload.to_owned());
        }
        self.seconds.entry((workload.to_owned(), target)).or_default().push(seconds);
    }

    fn print(&self, targets: &[Target]) {
        println!("{:<12} {:>10} {:>10} {:>10}", "workload", "TCG s", "vireo s", "TCG/vireo");
        let mut gains = Vec::new();
        for workload in &self.order {
            let of =
                |target: Target| self.seconds.get(&(workload.clone(), target.name())).map(|all| median(all));
            let (tcg, vireo) = (of(Target::Tcg), of(Target::Vireo));
            let ratio = tcg.zip(vireo).map(|(tcg, vireo)| tcg / vireo);
            gains.extend(ratio);
            let cell = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2}"));
            println!("{workload:<12} {:>10} {:>10} {:>10}", cell(tcg), cell(vireo), cell(ratio));
        }
        if targets.len() > 1 {
            println!("{:<12} {:>10} {:>10} {:>10.2}", "geomean", "", "", geometric_mean(&gains));
        }
    }
}
