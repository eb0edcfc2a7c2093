//! What the parts of a machine are put together on while it is built.

use crate::MachineError;
use crate::deterministic::Determinism;
use crate::drives::Drives;
use accel::VcpuBus;
use bus::{MmioBus, PioBus};
use chipset_x86::{Pic, PortRegion};
use device::{Device, MmioDevice, PioDevice};
use std::fmt::Display;
use std::sync::Arc;

/// Both buses, and the devices on them in the order of their addition.
pub(super) struct Assembly {
    pub(super) mmio: Arc<MmioBus>,
    pub(super) pio: Arc<PioBus>,
    pub(super) devices: Vec<Arc<dyn Device>>,
    /// The images of its disks.
    pub(super) drives: Drives,
    /// If the machine is to do the same whenever it runs.
    pub(super) determinism: Option<Arc<Determinism>>,
}

impl Assembly {
    pub(super) fn new(determinism: Option<&Arc<Determinism>>) -> Self {
        Self {
            mmio: Arc::new(MmioBus::new()),
            pio: Arc::new(PioBus::new()),
            devices: Vec::new(),
            drives: Drives::new(),
            determinism: determinism.cloned(),
        }
    }

    /// Adds a device that has no place on the buses, or has been given one.
    pub(super) fn add(&mut self, device: Arc<dyn Device>) {
        self.devices.push(device);
    }

    /// Adds a device with its ports.
    pub(super) fn add_at_ports(
        &mut self,
        device: Arc<dyn Device>,
        regions: Vec<PortRegion>,
    ) -> Result<(), MachineError> {
        for region in regions {
            self.map_ports(region.first, region.count, region.device)?;
        }
        self.add(device);
        Ok(())
    }

    pub(super) fn map_ports(
        &self,
        first: u16,
        count: u16,
        device: Arc<dyn PioDevice>,
    ) -> Result<(), MachineError> {
        self.pio.map(first, count, device).map_err(wiring)
    }

    pub(super) fn map_memory(
        &self,
        gpa: u64,
        len: u64,
        device: Arc<dyn MmioDevice>,
    ) -> Result<(), MachineError> {
        self.mmio.map(gpa, len, device).map_err(wiring)
    }
}

/// A mistake in a machine type.
pub(super) fn wiring(error: impl Display) -> MachineError {
    MachineError::Wiring(error.to_string())
}

/// The machine's buses, as vCPUs see them.
pub(crate) struct MachineBus {
    pub(super) mmio: Arc<MmioBus>,
    pub(super) pio: Arc<PioBus>,
    /// A machine without one never asks for its vectors.
    pub(super) pic: Option<Arc<Pic>>,
}

impl VcpuBus for MachineBus {
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.mmio.read(gpa, data);
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.mmio.write(gpa, data);
    }

    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.pio.read(port, data);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        self.pio.write(port, data);
    }

    fn acknowledge_ext_int(&self) -> u8 {
        /// What a bus reads on which nobody answers.
        const NOBODY: u8 = 0xff;
        self.pic.as_ref().map_or(NOBODY, |pic| pic.acknowledge())
    }
}
