//! The words of `vireo run`.

use super::{drive, size};
use crate::exit;
use accel::{CpuSpec, Tier};
use chardev::ChardevSpec;
use clap::Args;
use machine::DriveSpec;
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  vireo run debian
      Debian 13's cloud kernel and a shell; the image is fetched once, and checked
  vireo run debian:12 -m 2G --smp 2 --drive file=disk.raw,format=raw
  vireo run --kernel bzImage --initrd initrd.img --append 'console=ttyS0 root=/dev/vda'
  vireo run --kernel vmlinux --serial file=boot.log --no-reboot

Keys in the terminal:
  Ctrl-A X ends the VM, Ctrl-A H lists the other keys";

/// Options of `vireo run`.
#[derive(Args)]
#[command(after_help = format!("{EXAMPLES}\n\n{}", exit::HELP))]
pub(crate) struct Options {
    /// An image of the store: debian, debian:12 or debian:13, with :generic for the generic kernel.
    #[arg(required_unless_present = "kernel", conflicts_with = "kernel")]
    pub(super) image: Option<String>,
    /// The kernel to boot: a Linux bzImage, or an ELF file for PVH or multiboot.
    #[arg(long, short = 'k', value_name = "FILE")]
    pub(super) kernel: Option<PathBuf>,
    /// The initial RAM disk.
    #[arg(long, value_name = "FILE")]
    pub(super) initrd: Option<PathBuf>,
    /// The kernel's command line; with an image, added to the image's own.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(super) append: Option<String>,
    /// Have a bzImage unpack itself in the guest, instead of unpacking it here.
    #[arg(long)]
    pub(super) no_unpack: bool,
    /// Memory: MiB, or a number with K, M, G or T.
    #[arg(long, short, value_name = "SIZE", default_value = "1G", value_parser = size::parse_memory)]
    pub(super) memory: u64,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(super) smp: u32,
    /// CPU model, and features to add or take away: MODEL[,+FEATURE][,-FEATURE].
    #[arg(long, value_name = "MODEL", default_value = "max")]
    pub(super) cpu: CpuSpec,
    /// Accelerator: dbt, the dynamic binary translator.
    #[arg(long, value_name = "NAME", default_value = "dbt", value_parser = ["dbt"])]
    pub(super) accel: String,
    /// How the translator executes: auto, interpreter, translator or lockstep.
    #[arg(long, value_name = "TIER", default_value = "auto", value_parser = parse_tier)]
    pub(super) tier: Tier,
    /// Machine type: pc.
    #[arg(long, short = 'M', value_name = "TYPE", default_value = "pc", value_parser = ["pc", "q35"])]
    pub(super) machine: String,
    /// A disk: file=PATH[,format=raw][,readonly=on][,serial=TEXT][,queues=N].
    #[arg(long, value_name = "OPTIONS", value_parser = drive::parse)]
    pub(super) drive: Vec<DriveSpec>,
    /// A serial port: stdio, pty, file=PATH, unix=PATH[,server=on|off][,wait=on|off], null. The first is
    /// stdio if none is given.
    #[arg(long, value_name = "WHERE")]
    pub(super) serial: Vec<ChardevSpec>,
    /// A virtio console (hvc0), connected as --serial is.
    #[arg(long, value_name = "WHERE")]
    pub(super) console: Option<ChardevSpec>,
    /// End with exit code 0 when the guest resets, instead of rebooting it.
    #[arg(long)]
    pub(super) no_reboot: bool,
    /// Leave out the virtio entropy source.
    #[arg(long)]
    pub(super) no_rng: bool,
    /// Leave out the virtio balloon.
    #[arg(long)]
    pub(super) no_balloon: bool,
    /// A debug-exit device at this I/O port: a guest's write of N ends the program with 2 * N + 1.
    #[arg(long, value_name = "PORT", num_args = 0..=1, default_missing_value = "0x501", value_parser = parse_port)]
    pub(super) debug_exit: Option<u16>,
    /// Debian's mirror to fetch images from, instead of the one that the host is configured with.
    #[arg(long, value_name = "URL")]
    pub(super) mirror: Option<String>,
}

fn parse_tier(text: &str) -> Result<Tier, String> {
    let found = Tier::NAMES.iter().find(|(name, _)| *name == text);
    found.map(|(_, tier)| *tier).ok_or_else(|| {
        let names: Vec<_> = Tier::NAMES.iter().map(|(name, _)| *name).collect();
        format!("accepted are {}", names.join(", "))
    })
}

fn parse_port(text: &str) -> Result<u16, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u16::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| "accepted are ports from 0 to 0xffff".to_owned())
}
