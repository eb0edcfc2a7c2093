//! The virtio devices that every machine type can have, whatever it attaches them to.

use crate::assembly::Assembly;
use crate::deterministic;
use crate::requests::{Request, Requests};
use crate::run_state::{IoErrorReport, RunState, VmEvent};
use crate::{DriveSpec, MachineError, MachineSpec, serials};
use block_graph::{Backend, Errno};
use chardev::{ChardevSpec, Endpoint, PortConnection, connect_console};
use std::sync::Arc;
use virtio::VirtioDevice;
use virtio_balloon::VirtioBalloon;
use virtio_blk::{ErrorAction, IoFailure, VirtioBlk, VirtioBlkConfig};
use virtio_rng::VirtioRng;

/// The most request queues that a disk gets unasked.
const MOST_QUEUES: u32 = 16;
/// The most disks: as many as a PCI bus has room for beside the other devices.
const MOST_DRIVES: usize = 24;

/// What virtio devices are attached to: a PCI bus, or memory-mapped registers.
pub(super) trait Attach {
    /// Gives `device` the next free place.
    fn attach(&self, assembly: &mut Assembly, device: Arc<dyn VirtioDevice>) -> Result<(), MachineError>;
}

/// How many devices [`add`] will attach.
pub(super) fn count(spec: &MachineSpec) -> usize {
    let MachineSpec { drives, rng, balloon, console, .. } = spec;
    drives.len() + usize::from(*rng) + usize::from(*balloon) + usize::from(console.is_some())
}

/// Whether there are not too many.
pub(super) fn check(spec: &MachineSpec) -> Result<(), MachineError> {
    let count = spec.drives.len();
    if count > MOST_DRIVES {
        return Err(MachineError::TooMany { what: "drives", count, most: MOST_DRIVES });
    }
    Ok(())
}

/// Adds what `spec` has: disks first, in their order. What is returned keeps a console connected.
pub(super) fn add(
    assembly: &mut Assembly,
    bus: &dyn Attach,
    spec: &MachineSpec,
    requests: &Arc<Requests>,
) -> Result<Vec<PortConnection>, MachineError> {
    check(spec)?;
    for drive in &spec.drives {
        let disk = disk(assembly, drive, spec.vcpus, requests)?;
        bus.attach(assembly, disk)?;
    }
    if spec.rng {
        bus.attach(assembly, Arc::new(entropy_source(assembly)))?;
    }
    if spec.balloon {
        bus.attach(assembly, Arc::new(VirtioBalloon::new()))?;
    }
    match &spec.console {
        Some(console) => Ok(vec![add_console(assembly, bus, console, requests)?]),
        None => Ok(Vec::new()),
    }
}

fn entropy_source(assembly: &Assembly) -> VirtioRng {
    match &assembly.determinism {
        None => VirtioRng::new(),
        Some(determinism) => {
            let entropy = determinism.entropy(deterministic::DEVICE);
            VirtioRng::with_source(Arc::new(move |bytes| {
                entropy.fill(bytes).then_some(()).ok_or_else(|| "there are no random numbers".to_owned())
            }))
        }
    }
}

fn disk(
    assembly: &mut Assembly,
    drive: &DriveSpec,
    vcpus: u32,
    requests: &Arc<Requests>,
) -> Result<Arc<VirtioBlk>, MachineError> {
    let backend = assembly.drives.open(drive)?;
    let config = VirtioBlkConfig {
        queues: drive.queues.unwrap_or(vcpus.min(MOST_QUEUES) as u16),
        serial: drive.serial.clone().unwrap_or_default(),
        read_errors: drive.read_errors.unwrap_or_default(),
        write_errors: drive.write_errors.unwrap_or_default(),
        ..VirtioBlkConfig::default()
    };
    let device = Arc::new(VirtioBlk::new(config, backend.clone()));
    let told = Arc::downgrade(&device);
    backend.on_resize(move || {
        if let Some(device) = told.upgrade() {
            device.size_changed();
        }
    });
    let (requests, of) = (requests.clone(), backend);
    device.on_failure(move |failure| failed(&requests, &of, failure));
    Ok(device)
}

/// A disk's request failed: whoever listens is told, and the VM is stopped if it is to be.
fn failed(requests: &Requests, backend: &Backend, failure: &IoFailure<'_>) {
    let report = IoErrorReport {
        drive: backend.name().into(),
        node: backend.node().name().into(),
        read: failure.read,
        action: failure.action,
        no_space: failure.error.errno() == Errno::NO_SPACE,
        reason: failure.error.errno().to_string(),
    };
    if failure.action == ErrorAction::Stop {
        tracing::error!(
            "the guest stands still, since its disk '{}' failed: {}; it goes on with `cont`, which tries again",
            report.drive,
            failure.error
        );
        requests.push(Request::Hold(RunState::IoError));
    }
    requests.status.tell(VmEvent::IoError(report));
}

fn add_console(
    assembly: &mut Assembly,
    bus: &dyn Attach,
    spec: &ChardevSpec,
    requests: &Arc<Requests>,
) -> Result<PortConnection, MachineError> {
    let endpoint = Endpoint::open(spec)?;
    serials::announce(&endpoint, "the virtio console");
    let (console, connection) = connect_console(endpoint, serials::around(assembly, requests))?;
    bus.attach(assembly, console)?;
    Ok(connection)
}
