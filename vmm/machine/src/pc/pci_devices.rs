//! The PCI root complex, and the slots for virtio devices on it.

use super::chipset::Chipset;
use crate::MachineError;
use crate::assembly::{Assembly, wiring};
use crate::virtio_devices::Attach;
use accel::AccelVm;
use acpi::{AcpiConfig, intx_gsi};
use chipset_x86::{Board, addresses};
use guest_memory::GuestMemory;
use pci::{ConfigPorts, DevFn, ECAM_BYTES_PER_BUS, Ecam, HostBridge, LpcBridge, PciBus, Windows};
use std::sync::Arc;
use virtio::{VirtioDevice, VirtioPciConfig, VirtioPciDevice};

/// Ports for I/O BARs: above all fixed ones.
const IO_WINDOW: std::ops::Range<u64> = 0xc000..0x1_0000;

/// Adds the bus, its bridges and the ways in which the guest reaches configuration space.
pub(super) fn add_root(
    assembly: &mut Assembly,
    acpi: &AcpiConfig,
    chipset: &Chipset,
) -> Result<Arc<PciBus>, MachineError> {
    let windows = Windows {
        memory32: acpi.pci.windows32.first().cloned().unwrap_or(0..0),
        memory64: acpi.pci.window64.clone().unwrap_or(0..0),
        io: IO_WINDOW,
    };
    let bus = PciBus::new(assembly.mmio.clone(), assembly.pio.clone(), windows);
    let ecam = acpi.ecam();
    let last_bus = ((ecam.end - ecam.start) / ECAM_BYTES_PER_BUS - 1) as u8;
    let host = Arc::new(HostBridge::new(acpi.pci.ecam_base, last_bus));
    let lpc = Arc::new(LpcBridge::new(addresses::PM_PORT_BASE));
    for (device, bridge) in [(0, host as Arc<dyn pci::PciDevice>), (31, lpc)] {
        let place = DevFn::new(device, 0).ok_or(pci::PciError::NoSlot).map_err(wiring)?;
        bus.attach(place, bridge.clone()).map_err(wiring)?;
        assembly.add(bridge);
    }
    assembly.map_memory(ecam.start, ecam.end - ecam.start, Arc::new(Ecam::new(bus.clone())))?;
    let reset = chipset.reset_control.port_regions().into_iter().next().map(|region| region.device);
    let ports = Arc::new(ConfigPorts::new(bus.clone(), reset));
    assembly.map_ports(pci::CONFIG_PORTS_FIRST, pci::CONFIG_PORTS, ports.clone())?;
    assembly.add(ports);
    Ok(bus)
}

/// Puts virtio devices into the next free slots.
pub(super) struct Slots<'a> {
    pub(super) root: Arc<PciBus>,
    pub(super) board: &'a Arc<Board>,
    pub(super) memory: &'a GuestMemory,
    pub(super) accel: &'a Arc<dyn AccelVm>,
}

impl Attach for Slots<'_> {
    fn attach(&self, assembly: &mut Assembly, device: Arc<dyn VirtioDevice>) -> Result<(), MachineError> {
        let place = self.root.free_slot().map_err(wiring)?;
        let gsi = intx_gsi(place.device(), 0);
        let config = VirtioPciConfig {
            memory: self.memory.clone(),
            msi: self.accel.msi_target(),
            intx: Some((self.board.gsi_line(gsi), 1, gsi as u8)),
            inline: assembly.determinism.is_some(),
        };
        let function = Arc::new(VirtioPciDevice::new(device, config).map_err(wiring)?);
        self.root.attach(place, function.clone()).map_err(wiring)?;
        if let Some(sink) = crate::doorbells::sink(&**self.accel) {
            function.connect_doorbells(sink);
        }
        assembly.add(function);
        Ok(())
    }
}
