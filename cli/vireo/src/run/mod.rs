//! `vireo run`: a VM in this terminal.

mod control_socket;
mod cpu_use;
mod device;
mod drive;
mod icount;
mod memory_backing;
mod numa;
mod options;
mod progress;
mod size;
mod words;

pub(crate) use options::Options;

use crate::{accelerator, exit};
use accel_kvm::HostReport;
use anyhow::{Context, Result, bail};
use chardev::{ChardevSpec, RawTerminal};
use gdb::{Listener, Start};
use machine::{
    BootSpec, DeterministicSpec, DriveSpec, Ending, ErrorPolicy, HostSpec, KernelSpec, MachineError,
    MachineSpec, Quitter, TraceSpec, Vm, VmHandle,
};
use placement::PlacementSpec;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

/// Guest memory in bytes where nobody says how much.
const DEFAULT_MEMORY: u64 = 1 << 30;

/// Builds the VM and runs it to its end.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let spec = spec(options)?;
    let counts = spec.deterministic.is_some();
    let choice = accelerator::choose(&options.accel, options.tier, counts, HostReport::probe)?;
    if let Some(note) = &choice.note {
        eprintln!("vireo: {note}");
    }
    let accelerator = accelerator::open(choice.kind)?;
    let listener = options.gdb.as_ref().map(Listener::bind).transpose()?;
    let sockets = control_socket::bind(&options.qmp)?;
    let allocation = progress::Allocation::default();
    let mut vm = Vm::with_progress(&spec, &*accelerator, &|done, all| allocation.advance(done, all))?;
    drop(allocation);
    let handle = vm.handle();
    let signal = hear_signals(&handle)?;
    let server = control_socket::serve(sockets, options, &spec, choice.kind, &mut vm)?;
    let ending = match listener {
        Some(listener) => debugged(&mut vm, listener, options.paused && server.is_none()),
        None => vm.run(),
    };
    if let Some(server) = server {
        server.finish(ending.as_ref().ok());
    }
    let progress = vm.progress();
    drop(vm);
    RawTerminal::restore();
    if options.cpu_times {
        eprint!("{}", cpu_use::table(&handle.cpu_use()));
    }
    if let Some((count, nanos)) = progress {
        let seconds = Duration::from_nanos(nanos).as_secs_f64();
        eprintln!("vireo: {count} instructions, {seconds:.6} s of the guest's time");
    }
    match signal.load(Ordering::SeqCst) {
        0 => Ok(exit::of(&ending?)),
        signal => Ok(ExitCode::from(128 + signal as u8)),
    }
}

/// Runs the VM with gdb.
fn debugged(vm: &mut Vm, listener: Listener, paused: bool) -> Result<Ending, MachineError> {
    let waits = if paused { "; the guest waits for it" } else { "" };
    eprintln!("vireo: gdb can connect to {}{waits}", listener.endpoint());
    let start = if paused { Start::Paused } else { Start::Running };
    gdb::run(vm, listener, start, &exit::code)
}

/// What the options describe, with the image fetched if need be.
fn spec(options: &Options) -> Result<MachineSpec> {
    let mut serials = options.serial.clone();
    if serials.is_empty() && options.console != Some(ChardevSpec::Stdio) {
        let taken = options.qmp.contains(&control::Endpoint::Stdio);
        serials.push(if taken { ChardevSpec::Null } else { ChardevSpec::Stdio });
    }
    let numa = numa::spec(&options.numa).map_err(anyhow::Error::msg)?;
    Ok(MachineSpec {
        kind: options.machine,
        memory: options.memory.or(numa::memory(&numa)).unwrap_or(DEFAULT_MEMORY),
        vcpus: options.smp,
        cpu: options.cpu.clone(),
        tier: options.tier,
        numa,
        host: HostSpec {
            memory: options.memory_backing.clone().unwrap_or_default(),
            placement: PlacementSpec { pins: options.pin.clone(), schedules: options.sched.clone() },
            halt_poll: options.halt_poll,
        },
        boot: boot(options)?,
        drives: drives(options),
        serials,
        console: options.console.clone(),
        rng: !options.no_rng,
        balloon: !options.no_balloon,
        devices: options.debug_exit.iter().chain(&options.device).cloned().collect(),
        no_reboot: options.no_reboot,
        deterministic: deterministic(options)?,
    })
}

/// The drives. Where somebody can have the guest go on, it waits for him if the host has no space left.
fn drives(options: &Options) -> Vec<DriveSpec> {
    let mut drives = options.drive.clone();
    if !options.qmp.is_empty() {
        for drive in &mut drives {
            drive.write_errors.get_or_insert(ErrorPolicy::Enospc);
        }
    }
    drives
}

fn deterministic(options: &Options) -> Result<Option<DeterministicSpec>> {
    let (icount, record, replay) = (&options.icount, &options.record, &options.replay);
    let spec = icount::spec(icount.as_ref(), record.as_ref(), replay.as_ref()).map_err(anyhow::Error::msg)?;
    let records = spec.as_ref().is_some_and(|spec| matches!(spec.trace, Some(TraceSpec::Record(_))));
    if records && options.gdb.is_some() {
        bail!("--gdb does not go with a recording, which knows nothing of what gdb changes; debug a replay");
    }
    Ok(spec)
}

fn boot(options: &Options) -> Result<BootSpec> {
    match &options.bios {
        Some(image) => Ok(BootSpec::Firmware(image.clone())),
        None => kernel(options).map(BootSpec::Kernel),
    }
}

fn kernel(options: &Options) -> Result<KernelSpec> {
    let unpack = !options.no_unpack;
    if let Some(kernel) = &options.kernel {
        let append = options.append.clone().unwrap_or_default();
        return Ok(KernelSpec { kernel: kernel.clone(), initrd: options.initrd.clone(), append, unpack });
    }
    let name = options.image.as_deref().unwrap_or_default();
    let image = progress::fetch(name, options.mirror.as_deref())
        .with_context(|| format!("getting the image {name:?}"))?;
    let append = match &options.append {
        Some(more) => format!("{} {more}", image.cmdline),
        None => image.cmdline,
    };
    let initrd = options.initrd.clone().unwrap_or(image.initrd);
    Ok(KernelSpec { kernel: image.kernel, initrd: Some(initrd), append, unpack })
}

/// Has SIGTERM, SIGHUP and SIGINT end the VM, and SIGUSR1 print its CPU time; the number of the one that
/// ended it is in what this returns.
fn hear_signals(handle: &VmHandle) -> Result<Arc<AtomicI32>> {
    let received = Arc::new(AtomicI32::new(0));
    let mut signals = Signals::new([SIGTERM, SIGHUP, SIGINT, SIGUSR1]).context("cannot catch signals")?;
    let (handle, for_thread) = (handle.clone(), received.clone());
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                if signal == SIGUSR1 {
                    eprint!("{}", cpu_use::table(&handle.cpu_use()));
                    continue;
                }
                for_thread.store(signal, Ordering::SeqCst);
                handle.quit(Quitter::Signal);
            }
        })
        .context("cannot start a thread")?;
    Ok(received)
}
