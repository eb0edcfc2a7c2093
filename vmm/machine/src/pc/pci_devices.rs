//! The PCI root complex and the virtio devices on it.

use super::assembly::{Assembly, wiring};
use super::chipset::Chipset;
use super::serials;
use crate::requests::Requests;
use crate::{DriveSpec, MachineError};
use accel::AccelVm;
use acpi::{AcpiConfig, intx_gsi};
use chardev::{ChardevSpec, Endpoint, PortConnection, connect_console};
use chipset_x86::{Board, addresses};
use guest_memory::GuestMemory;
use pci::{ConfigPorts, DevFn, ECAM_BYTES_PER_BUS, Ecam, HostBridge, LpcBridge, PciBus, Windows};
use std::sync::Arc;
use virtio::{VirtioDevice, VirtioPciConfig, VirtioPciDevice};
use virtio_balloon::VirtioBalloon;
use virtio_blk::{RawFile, VirtioBlk, VirtioBlkConfig};
use virtio_rng::VirtioRng;

/// Ports for I/O BARs: above all fixed ones.
const IO_WINDOW: std::ops::Range<u64> = 0xc000..0x1_0000;
/// The most request queues that a disk gets unasked.
const MOST_QUEUES: u32 = 16;

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

impl Slots<'_> {
    fn add(&self, assembly: &mut Assembly, device: Arc<dyn VirtioDevice>) -> Result<(), MachineError> {
        let place = self.root.free_slot().map_err(wiring)?;
        let gsi = intx_gsi(place.device(), 0);
        let config = VirtioPciConfig {
            memory: self.memory.clone(),
            msi: self.accel.msi_target(),
            intx: Some((self.board.gsi_line(gsi), 1, gsi as u8)),
        };
        let function = Arc::new(VirtioPciDevice::new(device, config).map_err(wiring)?);
        self.root.attach(place, function.clone()).map_err(wiring)?;
        if let Some(sink) = crate::doorbells::sink(&**self.accel) {
            function.connect_doorbells(sink);
        }
        assembly.add(function);
        Ok(())
    }

    /// Adds a virtio disk for each of `drives`.
    pub(super) fn add_disks(
        &self,
        assembly: &mut Assembly,
        drives: &[DriveSpec],
        vcpus: u32,
    ) -> Result<(), MachineError> {
        /// Device numbers 1 to 30, less room for the other devices.
        const MOST: usize = 24;
        if drives.len() > MOST {
            return Err(MachineError::TooMany { what: "drives", count: drives.len(), most: MOST });
        }
        for drive in drives {
            let file = RawFile::open(&drive.file, drive.read_only).map_err(|error| MachineError::Drive {
                path: drive.file.clone(),
                reason: error.to_string(),
            })?;
            let config = VirtioBlkConfig {
                queues: drive.queues.unwrap_or(vcpus.min(MOST_QUEUES) as u16),
                serial: drive.serial.clone().unwrap_or_default(),
                ..VirtioBlkConfig::default()
            };
            self.add(assembly, Arc::new(VirtioBlk::new(config, Arc::new(file))))?;
        }
        Ok(())
    }

    /// Adds an entropy source.
    pub(super) fn add_rng(&self, assembly: &mut Assembly) -> Result<(), MachineError> {
        self.add(assembly, Arc::new(VirtioRng::new()))
    }

    /// Adds a balloon.
    pub(super) fn add_balloon(&self, assembly: &mut Assembly) -> Result<(), MachineError> {
        self.add(assembly, Arc::new(VirtioBalloon::new()))
    }

    /// Adds a console connected to what `spec` names; what is returned keeps it connected.
    pub(super) fn add_console(
        &self,
        assembly: &mut Assembly,
        spec: &ChardevSpec,
        requests: &Arc<Requests>,
    ) -> Result<PortConnection, MachineError> {
        let endpoint = Endpoint::open(spec)?;
        serials::announce(&endpoint, "the virtio console");
        let (console, connection) = connect_console(endpoint, serials::events(requests))?;
        self.add(assembly, console)?;
        Ok(connection)
    }
}
