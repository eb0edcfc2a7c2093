//! Descriptor chains (2.7.5): one buffer that the driver made available, as a list of pieces of memory.

use crate::QueueError;
use guest_memory::{GuestMemory, PageBitmap};
use vm_memory::bitmap::BS;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

/// A piece of guest memory in this process. Other threads may change it at any time. Whoever writes to it
/// by its pointer must mark the bytes dirty in its bitmap afterwards.
pub type GuestSlice<'a> = VolatileSlice<'a, BS<'a, PageBitmap>>;

/// The most descriptors in a chain, where the queue's size does not allow more: drivers use chains in
/// indirect tables that are longer than the queue, though 2.7.5.3.1 forbids it.
pub const MAX_CHAIN_DESCRIPTORS: usize = 1024;

/// A descriptor's flag: another follows.
pub(crate) const DESC_NEXT: u16 = 1;
/// A descriptor's flag: the device writes.
pub(crate) const DESC_WRITE: u16 = 2;
/// A descriptor's flag: its buffer is a table of descriptors.
pub(crate) const DESC_INDIRECT: u16 = 4;
/// Bytes in a descriptor.
pub(crate) const DESC_SIZE: u64 = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    address: u64,
    len: u32,
}

#[derive(Debug, Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn parse(bytes: &[u8; DESC_SIZE as usize]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *bytes;
        Self {
            address: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            len: u32::from_le_bytes([i, j, k, l]),
            flags: u16::from_le_bytes([m, n]),
            next: u16::from_le_bytes([o, p]),
        }
    }
}

/// A buffer that the driver made available: readable bytes, then writable bytes. All of it was guest memory
/// when the chain was taken from its queue, once and for all: later changes of the descriptors have no
/// effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    readable_len: u32,
    writable_len: u32,
}

/// Where descriptors are read from.
struct Table {
    address: u64,
    count: u32,
    indirect: bool,
}

impl Chain {
    /// Follows the chain from descriptor `head` of the table at `table`, which has `size` entries.
    pub(crate) fn parse(
        memory: &GuestMemory,
        table: u64,
        size: u16,
        head: u16,
        indirect_allowed: bool,
    ) -> Result<Self, QueueError> {
        let mut chain =
            Self { head, readable: Vec::new(), writable: Vec::new(), readable_len: 0, writable_len: 0 };
        let mut table = Table { address: table, count: size.into(), indirect: false };
        let mut index = head;
        // A direct chain with more descriptors than there are in the table has a loop.
        let mut left = usize::from(size);
        loop {
            if u32::from(index) >= table.count {
                return Err(QueueError::DescriptorIndex { index, count: table.count });
            }
            if left == 0 {
                return Err(QueueError::ChainTooLong);
            }
            left -= 1;
            let mut bytes = [0; DESC_SIZE as usize];
            let address = table.address.saturating_add(u64::from(index) * DESC_SIZE);
            memory
                .read(address, &mut bytes)
                .map_err(|_| QueueError::NotMemory { address, len: DESC_SIZE })?;
            let descriptor = Descriptor::parse(&bytes);
            if descriptor.flags & DESC_INDIRECT != 0 {
                if !indirect_allowed || table.indirect || descriptor.flags & DESC_NEXT != 0 {
                    return Err(QueueError::BadIndirect);
                }
                table = chain.indirect_table(&descriptor)?;
                left = MAX_CHAIN_DESCRIPTORS.max(size.into()).min(table.count as usize);
                index = 0;
                continue;
            }
            chain.append(memory, &descriptor)?;
            if descriptor.flags & DESC_NEXT == 0 {
                return Ok(chain);
            }
            index = descriptor.next;
        }
    }

    fn indirect_table(&self, descriptor: &Descriptor) -> Result<Table, QueueError> {
        let len = u64::from(descriptor.len);
        if len == 0 || !len.is_multiple_of(DESC_SIZE) {
            return Err(QueueError::BadIndirect);
        }
        Ok(Table { address: descriptor.address, count: (len / DESC_SIZE) as u32, indirect: true })
    }

    fn append(&mut self, memory: &GuestMemory, descriptor: &Descriptor) -> Result<(), QueueError> {
        let Descriptor { address, len, flags, .. } = *descriptor;
        let device_writes = flags & DESC_WRITE != 0;
        if !device_writes && !self.writable.is_empty() {
            return Err(QueueError::ReadableAfterWritable);
        }
        if len == 0 {
            return Ok(());
        }
        if !memory.contains(address, len.into()) {
            return Err(QueueError::NotMemory { address, len: len.into() });
        }
        // No chain has more than 2^32 bytes in all (2.7.5.2).
        let total = self.readable_len.checked_add(self.writable_len).and_then(|total| total.checked_add(len));
        if total.is_none() {
            return Err(QueueError::ChainTooLong);
        }
        let (list, list_len) = if device_writes {
            (&mut self.writable, &mut self.writable_len)
        } else {
            (&mut self.readable, &mut self.readable_len)
        };
        *list_len += len;
        list.push(Segment { address, len });
        Ok(())
    }

    /// The index of the first descriptor, which names the chain in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// How many bytes the device may read.
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// How many bytes the device may write.
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    /// The addresses and lengths of what the device may read, for devices in which they mean something.
    pub fn readable_ranges(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        self.readable.iter().map(|segment| (segment.address, segment.len))
    }

    /// The addresses and lengths of what the device may write, for devices in which they mean something.
    pub fn writable_ranges(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        self.writable.iter().map(|segment| (segment.address, segment.len))
    }

    /// Copies the readable bytes from `offset` on into `data`.
    ///
    /// # Errors
    /// [`QueueError::TooShort`] if there are not as many.
    pub fn read(&self, memory: &GuestMemory, offset: u32, data: &mut [u8]) -> Result<(), QueueError> {
        let len = data.len() as u64;
        let mut done = 0;
        for (address, part) in parts(&self.readable, offset, len)? {
            let part = part as usize;
            memory
                .read(address, &mut data[done..done + part])
                .map_err(|_| QueueError::NotMemory { address, len: part as u64 })?;
            done += part;
        }
        Ok(())
    }

    /// Copies `data` over the writable bytes from `offset` on.
    ///
    /// # Errors
    /// [`QueueError::TooShort`] if there are not as many; nothing is written then.
    pub fn write(&self, memory: &GuestMemory, offset: u32, data: &[u8]) -> Result<(), QueueError> {
        let mut done = 0;
        for (address, part) in parts(&self.writable, offset, data.len() as u64)? {
            let part = part as usize;
            memory
                .write(address, &data[done..done + part])
                .map_err(|_| QueueError::NotMemory { address, len: part as u64 })?;
            done += part;
        }
        Ok(())
    }

    /// `len` readable bytes from `offset` on, where they lie.
    ///
    /// # Errors
    /// [`QueueError::TooShort`] if there are not as many.
    pub fn readable_slices<'a>(
        &self,
        memory: &'a GuestMemory,
        offset: u32,
        len: u32,
    ) -> Result<Vec<GuestSlice<'a>>, QueueError> {
        slices(memory, parts(&self.readable, offset, len.into())?)
    }

    /// `len` writable bytes from `offset` on, where they lie.
    ///
    /// # Errors
    /// [`QueueError::TooShort`] if there are not as many.
    pub fn writable_slices<'a>(
        &self,
        memory: &'a GuestMemory,
        offset: u32,
        len: u32,
    ) -> Result<Vec<GuestSlice<'a>>, QueueError> {
        slices(memory, parts(&self.writable, offset, len.into())?)
    }
}

/// Addresses and lengths of the `len` bytes of `segments` from `offset` on.
fn parts(segments: &[Segment], offset: u32, len: u64) -> Result<Vec<(u64, u64)>, QueueError> {
    let mut skip = u64::from(offset);
    let mut left = len;
    let mut list = Vec::new();
    for segment in segments {
        let here = u64::from(segment.len);
        if skip >= here {
            skip -= here;
            continue;
        }
        let part = (here - skip).min(left);
        if part == 0 {
            break;
        }
        list.push((segment.address + skip, part));
        left -= part;
        skip = 0;
    }
    if left == 0 { Ok(list) } else { Err(QueueError::TooShort) }
}

fn slices(memory: &GuestMemory, parts: Vec<(u64, u64)>) -> Result<Vec<GuestSlice<'_>>, QueueError> {
    let mut list = Vec::with_capacity(parts.len());
    for (address, len) in parts {
        let not_memory = QueueError::NotMemory { address, len };
        for slice in memory.backend().get_slices(GuestAddress(address), len as usize) {
            list.push(slice.map_err(|_| not_memory.clone())?);
        }
    }
    Ok(list)
}
