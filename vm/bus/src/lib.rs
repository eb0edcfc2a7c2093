//! Dispatch of guest physical and port accesses to devices.
//!
//! Look-ups take a snapshot of the map without a lock held while the device runs, so a device may change
//! the map (a BAR that moves) from within an access.

use device::{MmioDevice, PioDevice};
use parking_lot::RwLock;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Why a region could not be put on a bus.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Another device is there.
    #[error("bus region {:#x}..{:#x} overlaps {:#x}..{:#x}", wanted.start, wanted.end, taken.start, taken.end)]
    Overlap {
        /// The region asked for.
        wanted: Range<u64>,
        /// The region that is in the way.
        taken: Range<u64>,
    },
    /// The region has no length or reaches past the end of the address space.
    #[error("bus region of {len:#x} bytes at {start:#x} is not a region of this address space")]
    BadRegion {
        /// Its first address.
        start: u64,
        /// Its length in bytes.
        len: u64,
    },
}

struct Region<D: ?Sized> {
    end: u64,
    device: Arc<D>,
}

struct Map<D: ?Sized> {
    regions: RwLock<BTreeMap<u64, Region<D>>>,
}

impl<D: ?Sized> Map<D> {
    fn new() -> Self {
        Self { regions: RwLock::new(BTreeMap::new()) }
    }

    fn insert(&self, start: u64, len: u64, limit: u64, device: Arc<D>) -> Result<(), BusError> {
        let bad = BusError::BadRegion { start, len };
        let end = start.checked_add(len).filter(|end| len > 0 && *end <= limit).ok_or(bad)?;
        let mut regions = self.regions.write();
        if let Some((taken_start, taken)) = regions.range(..end).next_back()
            && taken.end > start
        {
            return Err(BusError::Overlap { wanted: start..end, taken: *taken_start..taken.end });
        }
        regions.insert(start, Region { end, device });
        Ok(())
    }

    fn remove(&self, start: u64) -> bool {
        self.regions.write().remove(&start).is_some()
    }

    /// The device at `address`, the offset into its region, and how many bytes are left there.
    fn find(&self, address: u64) -> Option<(Arc<D>, u64, u64)> {
        let regions = self.regions.read();
        let (start, region) = regions.range(..=address).next_back()?;
        (address < region.end).then(|| (region.device.clone(), address - start, region.end - address))
    }

    fn ranges(&self) -> Vec<Range<u64>> {
        self.regions.read().iter().map(|(start, region)| *start..region.end).collect()
    }
}

/// The devices in guest physical address space.
pub struct MmioBus(Map<dyn MmioDevice>);

impl Default for MmioBus {
    fn default() -> Self {
        Self::new()
    }
}

impl MmioBus {
    /// A bus with nothing on it.
    pub fn new() -> Self {
        Self(Map::new())
    }

    /// Puts `device` at `start..start + len` (guest physical, bytes).
    ///
    /// # Errors
    /// [`BusError`] if the region is taken or no region.
    pub fn map(&self, start: u64, len: u64, device: Arc<dyn MmioDevice>) -> Result<(), BusError> {
        self.0.insert(start, len, u64::MAX, device)
    }

    /// Takes away the device whose region starts at `start`; says whether there was one.
    pub fn unmap(&self, start: u64) -> bool {
        self.0.remove(start)
    }

    /// A guest's load; what no device backs reads as all ones.
    pub fn read(&self, gpa: u64, data: &mut [u8]) {
        match self.0.find(gpa) {
            Some((device, offset, left)) if data.len() as u64 <= left => device.mmio_read(offset, data),
            _ => data.fill(0xff),
        }
    }

    /// A guest's store; where no device is, it is lost.
    pub fn write(&self, gpa: u64, data: &[u8]) {
        if let Some((device, offset, left)) = self.0.find(gpa)
            && data.len() as u64 <= left
        {
            device.mmio_write(offset, data);
        }
    }

    /// Whether a device is at `gpa`.
    pub fn is_mapped(&self, gpa: u64) -> bool {
        self.0.find(gpa).is_some()
    }

    /// The regions in use, in order.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        self.0.ranges()
    }
}

impl fmt::Debug for MmioBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MmioBus").field(&self.ranges()).finish()
    }
}

/// The devices at I/O ports.
pub struct PioBus(Map<dyn PioDevice>);

impl Default for PioBus {
    fn default() -> Self {
        Self::new()
    }
}

impl PioBus {
    /// A bus with nothing on it.
    pub fn new() -> Self {
        Self(Map::new())
    }

    /// Puts `device` at the `count` ports from `first` on.
    ///
    /// # Errors
    /// [`BusError`] if a port is taken or the range is none.
    pub fn map(&self, first: u16, count: u16, device: Arc<dyn PioDevice>) -> Result<(), BusError> {
        self.0.insert(first.into(), count.into(), 0x1_0000, device)
    }

    /// Takes away the device whose ports start at `first`; says whether there was one.
    pub fn unmap(&self, first: u16) -> bool {
        self.0.remove(first.into())
    }

    /// `IN`; what no device backs reads as all ones. An access that reaches past a device's last port is
    /// split into single bytes, as chipsets do.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        match self.0.find(port.into()) {
            Some((device, offset, left)) if data.len() as u64 <= left => {
                device.pio_read(offset as u16, data);
            }
            _ if data.len() == 1 => data.fill(0xff),
            _ => {
                for (index, byte) in data.iter_mut().enumerate() {
                    self.read(port.wrapping_add(index as u16), std::slice::from_mut(byte));
                }
            }
        }
    }

    /// `OUT`; where no device is, it is lost. Split like [`PioBus::read`].
    pub fn write(&self, port: u16, data: &[u8]) {
        match self.0.find(port.into()) {
            Some((device, offset, left)) if data.len() as u64 <= left => {
                device.pio_write(offset as u16, data);
            }
            _ if data.len() == 1 => {}
            _ => {
                for (index, byte) in data.iter().enumerate() {
                    self.write(port.wrapping_add(index as u16), std::slice::from_ref(byte));
                }
            }
        }
    }

    /// The port ranges in use, in order.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        self.0.ranges()
    }
}

impl fmt::Debug for PioBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PioBus").field(&self.ranges()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;

    #[derive(Default)]
    struct Log(Mutex<Vec<(u64, Vec<u8>)>>);
    impl MmioDevice for Log {
        fn mmio_read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn mmio_write(&self, offset: u64, data: &[u8]) {
            self.0.lock().push((offset, data.to_vec()));
        }
    }
    impl PioDevice for Log {
        fn pio_read(&self, offset: u16, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn pio_write(&self, offset: u16, data: &[u8]) {
            self.0.lock().push((offset.into(), data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_that_is_there_and_no_other() {
        let bus = MmioBus::new();
        let device = Arc::new(Log::default());
        bus.map(0x1000, 0x100, device.clone()).unwrap();
        assert!(bus.map(0x10ff, 1, device.clone()).is_err());
        assert!(bus.map(0xfff, 2, device.clone()).is_err());
        assert!(bus.map(0x2000, 0, device.clone()).is_err());
        bus.map(0x1100, 1, device.clone()).unwrap();
        let mut data = [0; 4];
        bus.read(0x1004, &mut data);
        assert_eq!(data, [4; 4]);
        bus.read(0x10fd, &mut data); // reaches past the end
        assert_eq!(data, [0xff; 4]);
        bus.write(0x1008, &[1, 2]);
        bus.write(0x3000, &[1, 2]);
        assert_eq!(*device.0.lock(), [(8, vec![1, 2])]);
        assert!(bus.unmap(0x1000) && !bus.unmap(0x1000));
    }

    #[test]
    fn a_wide_port_access_over_a_boundary_is_split() {
        let bus = PioBus::new();
        let device = Arc::new(Log::default());
        bus.map(0x70, 2, device.clone()).unwrap();
        let mut data = [0; 4];
        bus.read(0x71, &mut data);
        assert_eq!(data, [1, 0xff, 0xff, 0xff]);
        bus.write(0x6f, &[9, 8]);
        assert_eq!(*device.0.lock(), [(0, vec![8])]);
        assert!(bus.map(0xffff, 2, device).is_err());
    }
}
