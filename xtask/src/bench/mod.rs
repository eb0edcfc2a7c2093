//! Measuring against a named peer in the same run: the same kernel, initramfs and programs under
//! `vireo run` and under QEMU's TCG, in turn, and natively.
//!
//! The machines that this runs on are noisy, so only ratios between medians of interleaved runs are worth
//! quoting.

mod boot;
mod cpu;
mod guest;
mod image;
mod kvm;
mod statistics;
mod target;
mod userland;

pub(crate) use target::read_lines;

use crate::Outcome;
use clap::{Args, Subcommand};
use std::path::{Path, PathBuf};

/// What can be measured.
#[derive(Subcommand)]
pub(crate) enum Bench {
    /// Time from exec to the guest's init and to power-off.
    Boot(Options),
    /// Compute, memory, vector and system workloads inside the guest.
    Cpu(Options),
    /// Disk images: copying, checking and requests, beside qemu-img.
    Image(image::Options),
    /// Under KVM, beside QEMU and others: start-up, memory, disk, exits. Runs in the KVM lab.
    Kvm(kvm::Options),
    /// A Debian from a disk image, with systemd, compilers, interpreters and 32-bit programs.
    Userland(userland::Options),
}

/// How to measure.
#[derive(Args, Clone)]
pub(crate) struct Options {
    /// Runs of each program; the medians are compared.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// vCPUs of the guests.
    #[arg(long, default_value_t = 1)]
    smp: u32,
    /// A kernel (bzImage) to use instead of Debian's.
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// QEMU's processor model; the default comes closest to what ours announces.
    #[arg(long, default_value = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+lahf-lm")]
    qemu_cpu: String,
    /// Further arguments for `vireo run`, split at spaces.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    vireo_args: String,
    /// Measure only vireo and the host, not QEMU.
    #[arg(long)]
    no_qemu: bool,
    /// Have the guest's program, and the host's, of 32-bit code (i386), under the same kernel. Needs Debian's
    /// libc6-dev-i386, or the like.
    #[arg(long)]
    m32: bool,
    /// Only these workloads.
    workloads: Vec<String>,
}

impl Bench {
    /// Runs the measurement and prints its table.
    pub(crate) fn run(self, root: &Path) -> Outcome {
        match self {
            Self::Boot(options) => boot::run(root, &options),
            Self::Cpu(options) => cpu::run(root, &options),
            Self::Image(options) => image::run(root, &options),
            Self::Kvm(options) => kvm::run(root, &options),
            Self::Userland(options) => userland::run(root, &options),
        }
    }
}
