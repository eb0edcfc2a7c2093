//! `cargo xtask stress`: a Debian with stress-ng and the kernel's torture tests under load on our translator, and
//! then its kernel's log.
//!
//! Debian's kernels come without the torture tests, so that one is built here, of Debian's source.

use crate::Outcome;
use crate::bench::read_lines;
use crate::debian_disk::{DebianDisk, cache, run as run_command};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const EXAMPLES: &str = "\
Examples:
  cargo xtask stress
  cargo xtask stress --minutes 5 --smp 4 --vireo-args '--cpu x86-64-v3'

Needs root, debootstrap, a Debian mirror, and what a kernel is built with: gcc, make, bc, bison, flex, libelf-dev. The
kernel and the disk stay in the user's cache folder.";

/// Debian's package with the kernel's source.
const SOURCE: &str = "linux-source-6.12";
/// What the kernel's build leaves that is used.
const BUILT: [&str; 4] = [
    "arch/x86/boot/bzImage",
    "kernel/torture.ko",
    "kernel/rcu/rcutorture.ko",
    "kernel/locking/locktorture.ko",
];
/// The longest that all but the load itself may take.
const REST: Duration = Duration::from_secs(900);

/// The load.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Options {
    /// How long the load runs.
    #[arg(long, default_value_t = 30)]
    minutes: u32,
    /// The guest's vCPUs.
    #[arg(long, default_value_t = 2)]
    smp: u32,
    /// Further arguments for `vireo run`, split at spaces.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    vireo_args: String,
}

/// Runs the load; an error if there is any complaint.
pub(crate) fn run(root: &Path, options: &Options) -> Outcome {
    let kernel = kernel(&root.join("xtask/guest/stress/kernel.config"))?;
    let debian = DebianDisk::get()?;
    let program = crate::build_vireo(root)?;
    let folder = tempfile::TempDir::with_prefix("vireo-stress-").context("making a temporary folder")?;
    let mut files = vec![root.join("xtask/guest/stress/run.sh")];
    files.extend(BUILT.iter().skip(1).map(|built| kernel.join(file_name(built))));
    let disk = debian.copy(folder.path(), &files)?;

    let mut command = Command::new(program);
    command.args(["run", "--accel", "dbt", "-m", "2G", "--no-reboot", "--serial", "stdio", "--smp"]);
    command.arg(options.smp.to_string()).args(options.vireo_args.split_whitespace());
    command.arg("--kernel").arg(kernel.join(file_name(BUILT[0]))).arg("--append").arg(format!(
        "root=/dev/vda rw console=ttyS0 quiet panic=-1 rcutree.kthread_prio=2 \
         systemd.mask=serial-getty@ttyS0.service systemd.mask=systemd-logind.service stress={}",
        options.minutes
    ));
    command.arg("--drive").arg(format!("file={},format=raw", disk.display()));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn().with_context(|| format!("starting {:?}", command.get_program()))?;
    let limit = REST + Duration::from_secs(u64::from(options.minutes) * 60);
    let lines = read_lines(&mut child, start, limit, &mut |line| println!("  {line}"))?;
    let status = child.wait()?;
    verdict(lines.iter().map(|(_, line)| line.as_str()))?;
    if !status.success() {
        bail!("the guest ended well, but vireo with {status}");
    }
    Ok(())
}

/// Whether the guest came to its end without a complaint.
fn verdict<'a>(lines: impl Iterator<Item = &'a str>) -> Result<()> {
    let (mut complaints, mut ended) = (Vec::new(), false);
    for line in lines {
        ended |= line.contains("stress-end");
        if line.contains("complaint: ") {
            complaints.push(line);
        }
    }
    if let Some(first) = complaints.first() {
        bail!("{} complaints; the first: {first}", complaints.len());
    }
    if !ended {
        bail!("the guest did not come to its end");
    }
    println!("no complaint");
    Ok(())
}

/// The folder with the kernel and its modules, built anew if it is not there or its configuration is another.
fn kernel(config: &Path) -> Result<PathBuf> {
    let folder = cache("vireo-stress-kernel")?;
    let wanted = fs::read(config).with_context(|| format!("reading {}", config.display()))?;
    let mark = folder.join("config");
    if fs::read(&mark).is_ok_and(|there| there == wanted) {
        return Ok(folder);
    }
    eprintln!("building a kernel with torture tests in {}: this takes some minutes", folder.display());
    if folder.is_dir() {
        fs::remove_dir_all(&folder).context("removing the old kernel")?;
    }
    let tree = folder.join("tree");
    fs::create_dir_all(&tree).context("making the cache folder")?;
    run_command(Command::new("apt-get").args(["download", "-qq", SOURCE]).current_dir(&folder))?;
    let unpack = format!(
        "dpkg-deb --fsys-tarfile {SOURCE}_*.deb | tar -xOf - ./usr/src/{SOURCE}.tar.xz |
         tar -xJf - -C tree --strip-components=1 && rm {SOURCE}_*.deb"
    );
    run_command(Command::new("sh").args(["-ec", &unpack]).current_dir(&folder))?;
    let log = fs::File::create(folder.join("log")).context("making the log")?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let mut all_config = std::ffi::OsString::from("KCONFIG_ALLCONFIG=");
    all_config.push(config);
    run_command(
        Command::new("make").arg(all_config).arg("allnoconfig").current_dir(&tree).stdout(log.try_clone()?),
    )?;
    let mut make = Command::new("make");
    make.arg(format!("-j{jobs}")).args(["bzImage", "modules"]).current_dir(&tree).stdout(log);
    run_command(&mut make).with_context(|| format!("see {}/log", folder.display()))?;
    for built in BUILT {
        fs::copy(tree.join(built), folder.join(file_name(built)))
            .with_context(|| format!("copying {built}"))?;
    }
    fs::remove_dir_all(&tree).context("removing the kernel's tree")?;
    fs::write(&mark, wanted).context("marking the kernel as complete")?;
    Ok(folder)
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::verdict;

    #[test]
    fn a_complaint_or_no_end_is_an_error() {
        let lines = ["stress-begin 2 vCPUs", "stress-ng ended with 0", "stress-end"];
        assert!(verdict(lines.into_iter()).is_ok());
        let error = verdict(lines[..2].iter().copied()).expect_err("it did not end");
        assert!(error.to_string().contains("end"));
        let complaining = ["complaint: [ 31.0] watchdog: BUG: soft lockup", "stress-end"];
        let error = verdict(complaining.into_iter()).expect_err("it complained");
        assert!(error.to_string().contains("soft lockup"));
    }
}
