//! The words of `vireo run`.

use super::icount::{self, Icount};
use super::numa::NumaWord;
use super::{device, drive, memory_backing, numa, size};
use crate::accelerator::{self, Preference};
use crate::exit;
use accel::{CpuSpec, Tier};
use chardev::ChardevSpec;
use clap::{ArgGroup, Args};
use gdb::Endpoint;
use guest_memory::MemoryOptions;
use machine::{DeviceSpec, DriveSpec, MachineKind};
use placement::{Pin, Schedule};
use std::path::PathBuf;
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  vireo run debian
      Debian 13's cloud kernel and a shell; the image is fetched once, and checked
  vireo run debian:12 -m 2G --smp 2 --drive file=disk.raw,format=raw
  vireo run --kernel bzImage --initrd initrd.img --append 'console=ttyS0 root=/dev/vda'
  vireo run debian --accel kvm
      on the host's KVM, or not at all; `vireo info` says what the host has
  vireo run --kernel vmlinux --serial file=boot.log --no-reboot
  vireo run debian --append nokaslr --gdb tcp::1234 --paused
      gdb debugs the kernel from its first instruction on: `target remote :1234`
  vireo run debian --record session.rec
      writes down what is typed; `vireo run debian --replay session.rec` does it again, to the instruction
  vireo run debian --smp 2 --memory-backing hugepages=2M --pin 0=2 --pin 1=3 --sched vcpus=fifo:1

Keys in the terminal:
  Ctrl-A X ends the VM, Ctrl-A H lists the other keys";

/// The heading of options on how the host is used.
const HOST: &str = "Use of the host";
/// The heading of options on deterministic machines.
const REPEATING: &str = "Repeating a run exactly";
/// The heading of options on controlling a VM.
const CONTROL: &str = "Control";
/// The heading of options on debugging.
const DEBUGGING: &str = "Debugging";

/// Options of `vireo run`.
#[derive(Args)]
#[command(after_help = format!("{EXAMPLES}\n\n{}", exit::HELP))]
#[command(group = ArgGroup::new("starters").args(["gdb", "qmp"]).multiple(true))]
pub(crate) struct Options {
    /// An image of the store: debian, debian:12 or debian:13, with :generic for the generic kernel.
    #[arg(required_unless_present_any = ["kernel", "bios"], conflicts_with = "kernel")]
    pub(super) image: Option<String>,
    /// The kernel to boot: a Linux bzImage, or an ELF file for PVH or multiboot.
    #[arg(long, short = 'k', value_name = "FILE")]
    pub(super) kernel: Option<PathBuf>,
    /// A firmware image to begin with instead of a kernel: it ends at 4 GiB, and its last 128 KiB are below 1 MiB
    /// as well.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["image", "kernel", "initrd", "append", "no_unpack"])]
    pub(super) bios: Option<PathBuf>,
    /// The initial RAM disk.
    #[arg(long, value_name = "FILE")]
    pub(super) initrd: Option<PathBuf>,
    /// The kernel's command line; with an image, added to the image's own.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(super) append: Option<String>,
    /// Have a bzImage unpack itself in the guest, instead of unpacking it here.
    #[arg(long)]
    pub(super) no_unpack: bool,
    /// Memory: MiB, or a number with K, M, G or T [default: what the NUMA nodes say, or 1G]
    #[arg(long, short, value_name = "SIZE", value_parser = size::parse_memory)]
    pub(super) memory: Option<u64>,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(super) smp: u32,
    /// CPU model, and features to add or take away: MODEL[,+FEATURE][,-FEATURE].
    #[arg(long, value_name = "MODEL", default_value = "max")]
    pub(super) cpu: CpuSpec,
    /// Accelerators to try in this order: kvm, the host's hardware virtualization; dbt, the dynamic binary
    /// translator.
    #[arg(long, value_name = "NAME[:NAME]", default_value = accelerator::DEFAULT)]
    pub(super) accel: Preference,
    /// How the translator executes: auto, interpreter, translator or lockstep.
    #[arg(long, value_name = "TIER", default_value = "auto", value_parser = parse_tier)]
    pub(super) tier: Tier,
    /// Machine type: pc, or microvm, which has no chipset and no PCI and starts faster.
    #[arg(long, short = 'M', value_name = "TYPE", default_value = "pc", value_parser = parse_machine)]
    pub(super) machine: MachineKind,
    /// A disk: file=PATH[,format=FORMAT][,readonly=on][,snapshot=on][,serial=TEXT][,queues=N][,cache=MODE][,aio=HOW]
    /// [,discard=unmap|ignore][,werror=report|ignore|stop|enospc][,rerror=report|ignore|stop]
    /// [,references=files|any|none][,id=NAME].
    ///
    /// Without format=, the image's first bytes say what it is (raw, qcow2, …). With snapshot=on the image stays as it
    /// is, and what the guest writes is lost at the end. MODE is none, directsync, writeback (the default),
    /// writethrough or unsafe, as QEMU has them; HOW is io_uring, native or threads. werror and rerror say what
    /// becomes of what the host fails: the guest is told, or not, or stands still until `cont` (see --qmp), for any error
    /// or for want of space; with --qmp the default is werror=enospc, else report. references says which files an
    /// image may name as its backing or data file: paths (the default), anything, or nothing. Options of the image's
    /// driver may follow, such as l2-cache-size=8M. Example: --drive file=disk.qcow2,cache=none
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
    #[arg(long, value_name = "PORT", num_args = 0..=1, default_missing_value = "0x501", value_parser = device::parse_debug_exit)]
    pub(super) debug_exit: Option<DeviceSpec>,
    /// Another device: isa-debug-exit[,iobase=PORT][,iosize=N], isa-debugcon[,iobase=PORT][,chardev=WHERE],
    /// with WHERE as for --serial, or pc-testdev, which CPU test programs use.
    #[arg(long, value_name = "OPTIONS", value_parser = device::parse)]
    pub(super) device: Vec<DeviceSpec>,
    /// What guest memory is made of: file=PATH, hugepages=2M|1G, shared=on|off, prealloc=on|off,
    /// prealloc-threads=N, lock=on|on-fault|off, thp=on|off, ksm=on|off, dump=on|off.
    ///
    /// A file is shared unless shared=off is said, and is made if it is missing. lock=on keeps memory in RAM.
    /// thp and ksm are advice to the host: transparent huge pages, and merging of equal pages. Example:
    /// --memory-backing hugepages=2M,prealloc=on
    #[arg(long, value_name = "OPTIONS", value_parser = memory_backing::parse, help_heading = HOST)]
    pub(super) memory_backing: Option<MemoryOptions>,
    /// A NUMA node of the guest, node[,cpus=LIST][,memory=SIZE][,host-nodes=LIST][,policy=POLICY], or the
    /// distance between two, dist,src=N,dst=N,val=DISTANCE.
    ///
    /// Memory comes from the host's nodes host-nodes, with the policy bind (from nowhere else; the default),
    /// preferred or interleave. vCPUs and memory are shared out evenly if no node claims any. Example:
    /// --numa node,cpus=0-1,memory=1G,host-nodes=0 --numa node,cpus=2-3,memory=1G,host-nodes=1
    #[arg(long, value_name = "OPTIONS", value_parser = numa::parse, help_heading = HOST)]
    pub(super) numa: Vec<NumaWord>,
    /// The host's CPUs that threads may run on: TARGET=CPUS, where TARGET is a vCPU, a list of them, vcpus
    /// (all), or io (all other threads).
    ///
    /// Example: --pin 0=2 --pin 1=3 --pin io=0-1
    #[arg(long, value_name = "TARGET=CPUS", help_heading = HOST)]
    pub(super) pin: Vec<Pin>,
    /// The scheduling policy of threads: TARGET=POLICY with a TARGET as for --pin, and fifo:N or rr:N
    /// (real-time with priority 1 to 99), other, batch or idle.
    ///
    /// Example: --sched vcpus=fifo:1
    #[arg(long, value_name = "TARGET=POLICY", help_heading = HOST)]
    pub(super) sched: Vec<Schedule>,
    /// How long a halted vCPU looks for work before its thread sleeps: off, or a time such as 200us. Longer
    /// costs the host's time and answers the guest's devices sooner [default: the accelerator's choice]
    #[arg(long, value_name = "TIME", value_parser = parse_halt_poll, help_heading = HOST)]
    pub(super) halt_poll: Option<Duration>,
    /// Print the CPU time of vCPUs and other threads at the end. Signal USR1 prints it at any time.
    #[arg(long, help_heading = HOST)]
    pub(super) cpu_times: bool,
    /// Let programs control the VM by QMP: unix:PATH or tcp:HOST:PORT[,server=on|off][,wait=on|off], or stdio.
    ///
    /// Whoever can connect has the whole VM. wait=on starts it when somebody has connected; server=off connects to a
    /// client that listens. May be given several times. Example: --qmp unix:/tmp/vm.sock, and in a shell
    /// `vireo qmp /tmp/vm.sock query-status`
    #[arg(long, value_name = "WHERE", conflicts_with_all = ["record", "replay"], help_heading = CONTROL)]
    pub(super) qmp: Vec<control::Endpoint>,
    /// The VM's name, for those who control it.
    #[arg(long, value_name = "TEXT", help_heading = CONTROL)]
    pub(super) name: Option<String>,
    /// Let gdb debug the guest: tcp::PORT (of this host only), tcp:HOST:PORT or unix:PATH.
    ///
    /// Each vCPU is a thread of gdb's. Example: --gdb tcp::1234 --paused, and in gdb `target remote :1234`
    #[arg(long, value_name = "WHERE", help_heading = DEBUGGING)]
    pub(super) gdb: Option<Endpoint>,
    /// Do not start the guest: gdb does, with `continue`, or a client of --qmp, with `cont`.
    #[arg(long, short = 'S', requires = "starters", help_heading = CONTROL)]
    pub(super) paused: bool,
    /// Make time of instructions, so that the same guest does the same whenever it runs:
    /// [shift=N][,sleep=on|off][,seed=N][,rtc=SECONDS].
    ///
    /// An instruction takes 2^N nanoseconds (0 to 10; default 0). There is one vCPU, and the translator executes it. An
    /// idle guest waits as long as it thinks it does, or with sleep=off not at all. Random numbers come from a generator
    /// with that seed (default 0): they are no secrets. The clock begins at SECONDS since 1970 (default: 2026-01-01).
    /// QEMU's rr=record|replay,rrfile=FILE are taken for --record FILE and --replay FILE; there is no shift=auto.
    /// Example: --icount shift=1,sleep=off
    #[arg(long, value_name = "OPTIONS", num_args = 0..=1, default_missing_value = "", value_parser = icount::parse,
        help_heading = REPEATING)]
    pub(super) icount: Option<Icount>,
    /// Write down in FILE what comes from outside and when, so that --replay can do it again. Implies --icount.
    ///
    /// Disks must be readonly=on or snapshot=on, so that they are the same at each replay. Example:
    /// vireo run debian --record session.rec, and then: vireo run debian --replay session.rec
    #[arg(long, value_name = "FILE", conflicts_with_all = ["replay", "gdb"], help_heading = REPEATING)]
    pub(super) record: Option<PathBuf>,
    /// Do again what was recorded in FILE, on the same machine: the same guest instructions, at the same moments. What is
    /// typed is ignored; gdb can debug it. Where it does something else, it ends with exit code 12 and says where.
    #[arg(long, value_name = "FILE", conflicts_with = "icount", help_heading = REPEATING)]
    pub(super) replay: Option<PathBuf>,
    /// Debian's mirror to fetch images from, instead of the one that the host is configured with.
    #[arg(long, value_name = "URL")]
    pub(super) mirror: Option<String>,
}

/// Reads a time: `off`, or a number with ns, us or ms.
fn parse_halt_poll(text: &str) -> Result<Duration, String> {
    /// More would be no halt at all.
    const MOST: Duration = Duration::from_secs(1);
    let wrong =
        || format!("{text:?} is not possible; accepted are off, and times up to 1000ms in ns, us or ms");
    if text == "off" {
        return Ok(Duration::ZERO);
    }
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let time = match unit {
        "ns" => Duration::from_nanos(number),
        "us" => Duration::from_micros(number),
        "ms" => Duration::from_millis(number),
        _ => return Err(wrong()),
    };
    if time > MOST { Err(wrong()) } else { Ok(time) }
}

fn parse_machine(text: &str) -> Result<MachineKind, String> {
    let found = MachineKind::NAMES.iter().find(|(name, _)| *name == text);
    found.map(|(_, kind)| *kind).ok_or_else(|| {
        let names: Vec<_> = MachineKind::NAMES.iter().map(|(name, _)| *name).collect();
        format!("accepted are {}", names.join(", "))
    })
}

fn parse_tier(text: &str) -> Result<Tier, String> {
    let found = Tier::NAMES.iter().find(|(name, _)| *name == text);
    found.map(|(_, tier)| *tier).ok_or_else(|| {
        let names: Vec<_> = Tier::NAMES.iter().map(|(name, _)| *name).collect();
        format!("accepted are {}", names.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_people_write() {
        for (text, nanos) in [("off", 0), ("0ns", 0), ("200us", 200_000), ("1000ms", 1_000_000_000)] {
            assert_eq!(parse_halt_poll(text), Ok(Duration::from_nanos(nanos)), "{text}");
        }
        for text in ["", "on", "5", "1s", "1001ms", "-1us", "99999999999999999999ns", "us"] {
            assert!(parse_halt_poll(text).is_err(), "{text}");
        }
    }
}
