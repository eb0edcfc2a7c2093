//! The two ways in which a guest reaches configuration space: ECAM and the ports 0xCF8 and 0xCFC.

use crate::{CONFIG_SIZE, DevFn, PciBus};
use device::{Device, MmioDevice, PioDevice, SavedState, StateError, decode, encode};
use parking_lot::Mutex;
use std::fmt;
use std::sync::Arc;

/// Bytes of address space that the configuration spaces of one bus take in ECAM (7.2.2).
pub const ECAM_BYTES_PER_BUS: u64 = 1 << 20;

/// Configuration space in memory (7.2.2). Offset 0 is function 00:00.0 of bus 0; what belongs to other
/// buses reads as all ones.
#[derive(Debug)]
pub struct Ecam {
    bus: Arc<PciBus>,
}

impl Ecam {
    /// The configuration spaces of the functions on `bus`.
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self { bus }
    }

    fn target(offset: u64) -> Option<(DevFn, u16)> {
        let register = (offset % CONFIG_SIZE as u64) as u16;
        let place = DevFn::from_number(((offset >> 12) & 0xff) as u8);
        (offset < ECAM_BYTES_PER_BUS).then_some((place, register))
    }
}

impl MmioDevice for Ecam {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        match Self::target(offset) {
            Some((place, register)) => self.bus.config_read(place, register, data),
            None => data.fill(0xff),
        }
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        if let Some((place, register)) = Self::target(offset) {
            self.bus.config_write(place, register, data);
        }
    }
}

/// The first of the legacy configuration ports.
pub const CONFIG_PORTS_FIRST: u16 = 0xcf8;
/// How many legacy configuration ports there are.
pub const CONFIG_PORTS: u16 = 8;

const KIND: &str = "pci-config-ports";
const VERSION: u32 = 1;
/// The address register's bit that enables configuration cycles.
const ENABLE: u32 = 1 << 31;

/// Configuration mechanism #1 (PCI Local Bus Specification 3.0, 3.2.2.3.2): a dword written to port 0xCF8
/// selects a register, and ports 0xCFC to 0xCFF are that register. To be mapped at [`CONFIG_PORTS_FIRST`],
/// [`CONFIG_PORTS`] ports long.
///
/// Port 0xCF9 lies amid the address register and is the chipset's reset control register: byte accesses
/// there go to another device.
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    reset_control: Option<Arc<dyn PioDevice>>,
    address: Mutex<u32>,
}

impl ConfigPorts {
    /// The ports for `bus`. Byte accesses to port 0xCF9 go to `reset_control`, with offset 0.
    pub fn new(bus: Arc<PciBus>, reset_control: Option<Arc<dyn PioDevice>>) -> Self {
        Self { bus, reset_control, address: Mutex::new(0) }
    }

    fn target(&self, offset: u16) -> Option<(DevFn, u16)> {
        let address = *self.address.lock();
        let bus_zero = (address >> 16) & 0xff == 0;
        (address & ENABLE != 0 && bus_zero).then(|| {
            let register = (address & 0xfc) as u16 + (offset - 4);
            (DevFn::from_number((address >> 8) as u8), register)
        })
    }
}

impl PioDevice for ConfigPorts {
    fn pio_read(&self, offset: u16, data: &mut [u8]) {
        match (offset, data.len(), &self.reset_control) {
            (0, 4, _) => data.copy_from_slice(&self.address.lock().to_le_bytes()),
            (1, 1, Some(device)) => device.pio_read(0, data),
            (4..8, ..) if let Some((place, register)) = self.target(offset) => {
                self.bus.config_read(place, register, data);
            }
            _ => data.fill(0xff),
        }
    }

    fn pio_write(&self, offset: u16, data: &[u8]) {
        match (offset, data, &self.reset_control) {
            (0, &[a, b, c, d], _) => *self.address.lock() = u32::from_le_bytes([a, b, c, d]) & !0x7f00_0003,
            (1, [_], Some(device)) => device.pio_write(0, data),
            (4..8, ..) if let Some((place, register)) = self.target(offset) => {
                self.bus.config_write(place, register, data);
            }
            _ => {}
        }
    }
}

impl Device for ConfigPorts {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn reset(&self) {
        *self.address.lock() = 0;
    }

    fn save(&self) -> SavedState {
        encode(KIND, VERSION, &*self.address.lock())
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        self.reset();
        let address: u32 = decode(KIND, VERSION, state)?;
        *self.address.lock() = address & !0x7f00_0003;
        Ok(())
    }
}

impl fmt::Debug for ConfigPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigPorts").field("address", &self.address).finish_non_exhaustive()
    }
}
