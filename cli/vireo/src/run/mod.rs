//! `vireo run`: a VM in this terminal.

mod drive;
mod options;
mod progress;
mod size;

pub(crate) use options::Options;

use crate::exit;
use accel_dbt::DbtAccelerator;
use anyhow::{Context, Result};
use chardev::{ChardevSpec, RawTerminal};
use machine::{KernelSpec, MachineSpec, Vm};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

/// Builds the VM and runs it to its end.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let spec = spec(options)?;
    let mut vm = Vm::new(&spec, &DbtAccelerator)?;
    let signal = end_on_signals(&vm)?;
    let ending = vm.run();
    drop(vm);
    RawTerminal::restore();
    match signal.load(Ordering::SeqCst) {
        0 => Ok(exit::of(&ending?)),
        signal => Ok(ExitCode::from(128 + signal as u8)),
    }
}

/// What the options describe, with the image fetched if need be.
fn spec(options: &Options) -> Result<MachineSpec> {
    let mut serials = options.serial.clone();
    if serials.is_empty() && options.console != Some(ChardevSpec::Stdio) {
        serials.push(ChardevSpec::Stdio);
    }
    Ok(MachineSpec {
        memory: options.memory,
        vcpus: options.smp,
        cpu: options.cpu.clone(),
        tier: options.tier,
        kernel: kernel(options)?,
        drives: options.drive.clone(),
        serials,
        console: options.console.clone(),
        rng: !options.no_rng,
        balloon: !options.no_balloon,
        debug_exit: options.debug_exit,
        no_reboot: options.no_reboot,
    })
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

/// Has SIGTERM, SIGHUP and SIGINT end the VM; the number of the one that came is in what this returns.
fn end_on_signals(vm: &Vm) -> Result<Arc<AtomicI32>> {
    let received = Arc::new(AtomicI32::new(0));
    let mut signals = Signals::new([SIGTERM, SIGHUP, SIGINT]).context("cannot catch signals")?;
    let (handle, for_thread) = (vm.handle(), received.clone());
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                for_thread.store(signal, Ordering::SeqCst);
                handle.quit();
            }
        })
        .context("cannot start a thread")?;
    Ok(received)
}
