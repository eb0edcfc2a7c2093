//! The root complex's bus.

use crate::{Allocator, BarMapper, DevFn, PciDevice, PciError, Windows};
use bus::{MmioBus, PioBus};
use parking_lot::{Mutex, RwLock};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// The byte of the header with the multi-function bit (7.5.1.1.9).
const HEADER_TYPE: usize = 0x0e;
const MULTI_FUNCTION: u8 = 0x80;

/// Which of four interrupt inputs pin `pin` (1 for INTA#) of device `device` reaches when the pins are
/// swizzled over them (PCI-to-PCI Bridge Architecture Specification 1.2, 9.1).
pub const fn intx_swizzle(device: u8, pin: u8) -> u8 {
    (device % 4 + pin.wrapping_sub(1) % 4) % 4
}

/// Bus 0 of the one segment, with up to 32 devices of 8 functions.
pub struct PciBus {
    functions: RwLock<BTreeMap<DevFn, Arc<dyn PciDevice>>>,
    mapper: Arc<BarMapper>,
    allocator: Mutex<Allocator>,
}

impl PciBus {
    /// An empty bus whose functions' BARs appear on `mmio` and `pio`, inside `windows`.
    pub fn new(mmio: Arc<MmioBus>, pio: Arc<PioBus>, windows: Windows) -> Arc<Self> {
        Arc::new(Self {
            functions: RwLock::new(BTreeMap::new()),
            mapper: Arc::new(BarMapper::new(mmio, pio, windows.clone())),
            allocator: Mutex::new(Allocator::new(windows)),
        })
    }

    /// Puts `device` at `place`, assigns its BARs and enables them.
    ///
    /// # Errors
    /// [`PciError`] if the place is taken or a window is full.
    pub fn attach(&self, place: DevFn, device: Arc<dyn PciDevice>) -> Result<(), PciError> {
        let mut functions = self.functions.write();
        if functions.contains_key(&place) {
            return Err(PciError::SlotTaken(place));
        }
        if !device.function().attach(&self.mapper, &mut self.allocator.lock())? {
            return Err(PciError::AlreadyAttached(place));
        }
        functions.insert(place, device);
        Ok(())
    }

    /// The first device number, from 1 on, that nothing uses.
    ///
    /// # Errors
    /// [`PciError::NoSlot`] if all are used.
    pub fn free_slot(&self) -> Result<DevFn, PciError> {
        let functions = self.functions.read();
        (1..32)
            .find(|device| !functions.keys().any(|place| place.device() == *device))
            .and_then(|device| DevFn::new(device, 0))
            .ok_or(PciError::NoSlot)
    }

    /// The function at `place`.
    pub fn device(&self, place: DevFn) -> Option<Arc<dyn PciDevice>> {
        self.functions.read().get(&place).cloned()
    }

    /// All functions, in order of their places.
    pub fn devices(&self) -> Vec<(DevFn, Arc<dyn PciDevice>)> {
        self.functions.read().iter().map(|(place, device)| (*place, device.clone())).collect()
    }

    /// A configuration read; where no function is, all ones. An access that crosses a dword is split.
    pub fn config_read(&self, place: DevFn, offset: u16, data: &mut [u8]) {
        let Some(device) = self.device(place) else { return data.fill(0xff) };
        for_each_dword(offset, data.len(), |offset, range| device.config_read(offset, &mut data[range]));
        if place.function() == 0
            && let Some(index) = HEADER_TYPE.checked_sub(offset.into())
            && index < data.len()
            && self.functions.read().keys().any(|other| other.device() == place.device() && *other != place)
        {
            data[index] |= MULTI_FUNCTION;
        }
    }

    /// A configuration write; where no function is, it is lost.
    pub fn config_write(&self, place: DevFn, offset: u16, data: &[u8]) {
        let Some(device) = self.device(place) else { return };
        for_each_dword(offset, data.len(), |offset, range| device.config_write(offset, &data[range]));
    }
}

/// Calls `access` for each part of an access that lies in one dword, with its offset and its place in the
/// data.
fn for_each_dword(offset: u16, len: usize, mut access: impl FnMut(u16, std::ops::Range<usize>)) {
    let mut done = 0;
    while done < len {
        let at = usize::from(offset) + done;
        let part = (4 - at % 4).min(len - done);
        let Ok(at) = u16::try_from(at) else { return };
        access(at, done..done + part);
        done += part;
    }
}

impl fmt::Debug for PciBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PciBus").field(&self.functions.read().keys().collect::<Vec<_>>()).finish()
    }
}
