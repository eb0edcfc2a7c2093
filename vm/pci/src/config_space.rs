//! The 4096 bytes of a function's configuration space, with a mask of what the guest may change.

use crate::{PciError, register};

/// Bytes in a function's configuration space.
pub const CONFIG_SIZE: usize = 4096;

/// Where capabilities may begin and where they must end: the rest of the conventional 256 bytes.
const CAPABILITY_AREA: std::ops::Range<usize> = 0x40..0x100;

/// The status bit that says that there is a capability list (7.5.1.1.4).
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// What a function is (7.5.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class code: base class, sub-class, programming interface, from the highest byte down.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// Configuration space as plain registers: each bit is fixed or writable by the guest.
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: Box<[u8; CONFIG_SIZE]>,
    writable: Box<[u8; CONFIG_SIZE]>,
    next_capability: usize,
    /// The byte that is to point at the next capability.
    link: usize,
}

impl ConfigSpace {
    /// A type 0 header for `identity`, without BARs and capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: Box::new([0; CONFIG_SIZE]),
            writable: Box::new([0; CONFIG_SIZE]),
            next_capability: CAPABILITY_AREA.start,
            link: register::CAPABILITIES.into(),
        };
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        space.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.set(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(0x0c, &[0xff]); // cache line size, which means nothing here
        space.allow(register::INTERRUPT_LINE, &[0xff]);
        space
    }

    /// The bytes at `offset`; past the end, all ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let start = usize::from(offset);
        match self.bytes.get(start..start + data.len()) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0xff),
        }
    }

    /// The little-endian 16-bit register at `offset`.
    pub fn read_u16(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// The little-endian 32-bit register at `offset`.
    pub fn read_u32(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// A guest's write: changes the writable bits.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (index, value) in data.iter().enumerate() {
            let at = usize::from(offset) + index;
            if at < CONFIG_SIZE {
                let mask = self.writable[at];
                self.bytes[at] = self.bytes[at] & !mask | value & mask;
            }
        }
    }

    /// Sets bytes whatever the mask says: the device's own side. What lies past the end is dropped.
    pub fn set(&mut self, offset: u16, data: &[u8]) {
        let start = usize::from(offset);
        for (at, value) in (start..CONFIG_SIZE).zip(data) {
            self.bytes[at] = *value;
        }
    }

    /// Makes the bits of `mask` writable by the guest.
    pub fn allow(&mut self, offset: u16, mask: &[u8]) {
        let start = usize::from(offset);
        for (at, value) in (start..CONFIG_SIZE).zip(mask) {
            self.writable[at] |= *value;
        }
    }

    /// Appends a capability (7.5.3 and following): `body` is what follows its two header bytes, and
    /// `writable` masks what of `body` the guest may change, all zeros where it is shorter. Returns the
    /// offset of the header.
    ///
    /// # Errors
    /// [`PciError::NoRoom`] when the conventional 256 bytes are full.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u16, PciError> {
        let len = 2 + body.len();
        let start = self.next_capability;
        if len > CAPABILITY_AREA.end - start {
            return Err(PciError::NoRoom { id, len });
        }
        let offset = start as u16;
        self.bytes[self.link] = start as u8;
        self.link = start + 1;
        self.set(offset, &[id, 0]);
        self.set(offset + 2, body);
        self.allow(offset + 2, &writable[..writable.len().min(body.len())]);
        self.next_capability = (start + len).next_multiple_of(4);
        let status = self.read_u16(register::STATUS) | STATUS_CAPABILITIES;
        self.set(register::STATUS, &status.to_le_bytes());
        Ok(offset)
    }

    /// All bytes, for saving.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..]
    }

    /// Takes over the guest-writable bits of saved `bytes`, as long as they are `CONFIG_SIZE` bytes.
    pub fn restore(&mut self, bytes: &[u8]) -> bool {
        let fits = bytes.len() == CONFIG_SIZE;
        if fits {
            self.write(0, bytes);
        }
        fits
    }
}
