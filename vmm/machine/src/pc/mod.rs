//! The machine type `pc`: what a stock kernel expects of a Q35-like PC, one function per device family.

pub(crate) mod chipset;
mod pci_devices;

use crate::assembly::{Assembly, MachineBus};
use crate::boot_source::BootSource;
use crate::deterministic::{self, Determinism, Entropy};
use crate::firmware::{self, Firmware};
use crate::hardware::Hardware;
use crate::layout::Layout;
use crate::ram::RamPlan;
use crate::requests::Requests;
use crate::{MachineError, MachineSpec, fw_cfg_device, isa_devices, serials, virtio_devices};
use accel::{Accelerator, VmSpec};
use guest_memory::PreallocProgress;
use std::sync::Arc;

/// Builds the machine that `spec` describes. What its guest asks for goes to `requests`; `progress` is
/// told of memory that is allocated in advance. With `determinism` it is to do the same whenever it runs.
pub(crate) fn build(
    spec: &MachineSpec,
    accelerator: &dyn Accelerator,
    determinism: Option<&Arc<Determinism>>,
    requests: &Arc<Requests>,
    progress: PreallocProgress<'_>,
) -> Result<Hardware, MachineError> {
    let layout = Layout::new(spec.memory)?;
    let entropy = determinism.map_or(Entropy::Host, |determinism| determinism.entropy(deterministic::KERNEL));
    let boot = BootSource::open(spec, entropy)?;
    let mut acpi = firmware::acpi_config(spec);
    let ram = RamPlan::new(spec, layout.regions())?;
    acpi.numa = ram.numa();
    let map = layout.map(Some(acpi.ecam()))?;
    let firmware = Firmware::new(&acpi, spec.vcpus, layout.regions())?;

    let memory = ram.allocate(boot.rom(), progress)?;
    let timers = deterministic::timers(determinism)?;
    let vm_spec = VmSpec {
        vcpus: spec.vcpus,
        socket_vcpus: ram.socket_vcpus(),
        cpu: spec.cpu.clone(),
        tier: spec.tier,
        halt_poll: spec.host.halt_poll,
    };
    let accel = accelerator.create_vm(&vm_spec, &memory, &timers)?;

    let mut assembly = Assembly::new(determinism);
    let chipset = chipset::add(&mut assembly, &acpi, spec, &layout, &accel, &timers, requests)?;
    let mut connections = serials::add(&mut assembly, &chipset.board, &spec.serials, requests)?;
    fw_cfg_device::add(&mut assembly, spec, &memory)?;
    let root = pci_devices::add_root(&mut assembly, &acpi, &chipset)?;
    let slots = pci_devices::Slots { root, board: &chipset.board, memory: &memory, accel: &accel };
    connections.extend(virtio_devices::add(&mut assembly, &slots, spec, requests)?);
    connections.extend(isa_devices::add(&mut assembly, spec, requests, &chipset.board)?);

    let bus = MachineBus { mmio: assembly.mmio, pio: assembly.pio, pic: Some(chipset.pic) };
    Ok(Hardware {
        accel,
        bus: Arc::new(bus),
        memory,
        map,
        timers,
        devices: assembly.devices,
        connections,
        firmware,
        boot,
        pm: Some(chipset.pm),
        drives: assembly.drives,
    })
}
