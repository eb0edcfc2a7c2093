//! Split virtqueues (2.7), from the device's side.

use crate::Chain;
use crate::chain::DESC_SIZE;
use guest_memory::GuestMemory;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{Ordering, fence};
use vm_memory::{Bytes, GuestAddress};

/// The most entries in a queue (2.7).
pub const MAX_QUEUE_SIZE: u16 = 1 << 15;

/// The available ring's flag: no interrupts, please.
const AVAIL_NO_INTERRUPT: u16 = 1;
/// The used ring's flag: no doorbells, please.
const USED_NO_NOTIFY: u16 = 1;
/// Bytes before the entries of either ring.
const RING_HEADER: u64 = 4;
/// Bytes in an entry of the available ring.
const AVAIL_ENTRY: u64 = 2;
/// Bytes in an entry of the used ring.
const USED_ENTRY: u64 = 8;

/// How a driver broke the rules of a queue, or of the requests in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The queue's size is 0, no power of two or above the maximum.
    #[error("queue size {0} is invalid")]
    BadSize(u16),
    /// A part of the queue is not where it may be.
    #[error("the {part} at {address:#x} is unaligned or not all guest memory")]
    BadAddress {
        /// Which part of the queue.
        part: &'static str,
        /// Its guest physical address.
        address: u64,
    },
    /// The available ring claims more entries than it has.
    #[error("available index {index} is more than the queue's size past {expected}")]
    AvailableIndex {
        /// The index in the ring.
        index: u16,
        /// The index up to which entries were taken.
        expected: u16,
    },
    /// A descriptor's number is past the end of its table.
    #[error("descriptor {index} is not in a table of {count}")]
    DescriptorIndex {
        /// The number.
        index: u16,
        /// The table's length.
        count: u32,
    },
    /// A chain loops or has too many descriptors or bytes.
    #[error("a descriptor chain loops or is too long")]
    ChainTooLong,
    /// A descriptor's buffer is not guest memory.
    #[error("{len} bytes at {address:#x} are not all guest memory")]
    NotMemory {
        /// The guest physical address.
        address: u64,
        /// The length in bytes.
        len: u64,
    },
    /// An indirect descriptor where none may be, or with an impossible length.
    #[error("an indirect descriptor is not allowed here or has a bad length")]
    BadIndirect,
    /// A descriptor that the device reads follows one that it writes.
    #[error("a readable descriptor follows a writable one")]
    ReadableAfterWritable,
    /// A buffer is too short for what is in it.
    #[error("a buffer is too short")]
    TooShort,
    /// A request is not one of the device's.
    #[error("{0}")]
    BadRequest(&'static str),
    /// The device itself cannot go on.
    #[error("{0}")]
    Device(String),
}

/// Ring features as negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RingFeatures {
    /// `VIRTIO_F_INDIRECT_DESC`.
    pub indirect: bool,
    /// `VIRTIO_F_EVENT_IDX`.
    pub event_idx: bool,
}

/// A queue's guest-visible state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries, as set by the driver.
    pub size: u16,
    /// Whether the driver enabled it.
    pub enabled: bool,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest physical address of the available ring (the driver area).
    pub available: u64,
    /// Guest physical address of the used ring (the device area).
    pub used: u64,
    /// Index up to which available entries were taken.
    pub next_available: u16,
    /// Index up to which used entries were written.
    pub next_used: u16,
}

/// One split virtqueue.
#[derive(Debug)]
pub struct Queue {
    max_size: u16,
    features: RingFeatures,
    state: QueueState,
    /// `next_used` when it was last decided whether to interrupt; `None` if that is not known.
    signalled: Option<u16>,
}

impl Queue {
    /// A queue, not enabled, of at most `max_size` entries: a power of two up to [`MAX_QUEUE_SIZE`], else
    /// the next lower one.
    pub fn new(max_size: u16) -> Self {
        let max_size = 1 << max_size.clamp(1, MAX_QUEUE_SIZE).ilog2();
        Self { max_size, features: RingFeatures::default(), state: initial(max_size), signalled: None }
    }

    /// The most entries.
    pub fn max_size(&self) -> u16 {
        self.max_size
    }

    /// Back to the state of [`Queue::new`].
    pub fn reset(&mut self) {
        *self = Self::new(self.max_size);
    }

    /// The guest-visible state.
    pub fn state(&self) -> &QueueState {
        &self.state
    }

    /// Whether the driver enabled the queue.
    pub fn enabled(&self) -> bool {
        self.state.enabled
    }

    /// Lets `change` set size and addresses. Ignored once the queue is enabled (4.1.4.3.2).
    pub fn configure(&mut self, change: impl FnOnce(&mut QueueState)) {
        if !self.state.enabled {
            change(&mut self.state);
            self.state.enabled = false;
        }
    }

    /// Enables the queue.
    ///
    /// # Errors
    /// [`QueueError`] if size or addresses are impossible; it stays disabled.
    pub fn enable(&mut self, memory: &GuestMemory) -> Result<(), QueueError> {
        self.check(memory)?;
        self.state.enabled = true;
        Ok(())
    }

    /// Takes the queue out of use, and back to its initial state but for what `configure` set: nothing is
    /// available any more, and what was taken is not given back.
    pub fn disable(&mut self) {
        let QueueState { size, enabled: _, descriptors, available, used, next_available: _, next_used: _ } =
            self.state;
        self.state = QueueState { size, descriptors, available, used, ..initial(self.max_size) };
        self.signalled = None;
    }

    /// Sets the features negotiated.
    pub fn set_features(&mut self, features: RingFeatures) {
        self.features = features;
    }

    /// Takes over a saved state.
    ///
    /// # Errors
    /// [`QueueError`] if it is impossible; the queue is then as new.
    pub fn restore(&mut self, memory: &GuestMemory, state: &QueueState) -> Result<(), QueueError> {
        self.reset();
        self.state = state.clone();
        let result = if state.enabled { self.check(memory) } else { Ok(()) };
        if result.is_err() {
            self.reset();
        }
        result
    }

    fn check(&self, memory: &GuestMemory) -> Result<(), QueueError> {
        let QueueState { size, descriptors, available, used, .. } = self.state;
        if !size.is_power_of_two() || size > self.max_size {
            return Err(QueueError::BadSize(size));
        }
        let entries = u64::from(size);
        // Both rings end in an event index.
        let parts = [
            ("descriptor table", descriptors, entries * DESC_SIZE, DESC_SIZE),
            ("available ring", available, RING_HEADER + entries * AVAIL_ENTRY + 2, 2),
            ("used ring", used, RING_HEADER + entries * USED_ENTRY + 2, 4),
        ];
        for (part, address, len, align) in parts {
            if !address.is_multiple_of(align) || !memory.contains(address, len) {
                return Err(QueueError::BadAddress { part, address });
            }
        }
        Ok(())
    }

    /// Takes the next chain that the driver made available, if there is one.
    ///
    /// # Errors
    /// [`QueueError`] if ring or chain break the rules.
    pub fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, QueueError> {
        if !self.state.enabled {
            return Ok(None);
        }
        let expected = self.state.next_available;
        let index = load(memory, self.state.available + 2, Ordering::Acquire)?;
        let ready = index.wrapping_sub(expected);
        if ready == 0 {
            return Ok(None);
        }
        if ready > self.state.size {
            return Err(QueueError::AvailableIndex { index, expected });
        }
        let slot = u64::from(expected % self.state.size);
        let head = load(memory, self.state.available + RING_HEADER + slot * AVAIL_ENTRY, Ordering::Relaxed)?;
        let table = self.state.descriptors;
        let chain = Chain::parse(memory, table, self.state.size, head, self.features.indirect)?;
        self.state.next_available = expected.wrapping_add(1);
        Ok(Some(chain))
    }

    /// The chain that begins at `head` again: one that was taken, and not given back.
    ///
    /// # Errors
    /// [`QueueError`] if it breaks the rules by now.
    pub fn chain(&self, memory: &GuestMemory, head: u16) -> Result<Chain, QueueError> {
        let QueueState { descriptors, size, .. } = self.state;
        Chain::parse(memory, descriptors, size, head, self.features.indirect)
    }

    /// Takes back the last [`Queue::pop`]: the next one finds the same chain again, unless the driver changes
    /// it. Only for a chain that nothing was given back of since.
    pub fn put_back(&mut self) {
        self.state.next_available = self.state.next_available.wrapping_sub(1);
    }

    /// Whether the driver made chains available that were not taken yet.
    ///
    /// # Errors
    /// [`QueueError`] if the ring is not memory.
    pub fn has_available(&self, memory: &GuestMemory) -> Result<bool, QueueError> {
        if !self.state.enabled {
            return Ok(false);
        }
        let index = load(memory, self.state.available + 2, Ordering::Acquire)?;
        Ok(index != self.state.next_available)
    }

    /// Gives the chain that begins at `head` back to the driver, with `written` bytes written to it.
    ///
    /// # Errors
    /// [`QueueError`] if the ring is not memory.
    pub fn push(&mut self, memory: &GuestMemory, head: u16, written: u32) -> Result<(), QueueError> {
        if !self.state.enabled {
            return Ok(());
        }
        let slot = u64::from(self.state.next_used % self.state.size);
        let address = self.state.used + RING_HEADER + slot * USED_ENTRY;
        let mut entry = [0; USED_ENTRY as usize];
        entry[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        entry[4..].copy_from_slice(&written.to_le_bytes());
        memory.write(address, &entry).map_err(|_| QueueError::BadAddress { part: "used ring", address })?;
        self.state.next_used = self.state.next_used.wrapping_add(1);
        store(memory, self.state.used + 2, self.state.next_used, Ordering::Release)
    }

    /// Whether the driver wants an interrupt for the chains given back since this was last asked (2.7.7.2).
    ///
    /// # Errors
    /// [`QueueError`] if the ring is not memory.
    pub fn needs_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        if !self.state.enabled {
            return Ok(false);
        }
        // The used index must be visible before the driver's wish is read: the driver writes its wish and
        // then looks at the used index once more.
        fence(Ordering::SeqCst);
        let new = self.state.next_used;
        let old = self.signalled.replace(new);
        if !self.features.event_idx {
            let flags = load(memory, self.state.available, Ordering::Relaxed)?;
            return Ok(flags & AVAIL_NO_INTERRUPT == 0 && old != Some(new));
        }
        let entries = u64::from(self.state.size) * AVAIL_ENTRY;
        let event = load(memory, self.state.available + RING_HEADER + entries, Ordering::Relaxed)?;
        Ok(old.is_none_or(|old| new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)))
    }

    /// Asks the driver for doorbells, and says whether chains became available meanwhile, for which none
    /// may come (2.7.10).
    ///
    /// # Errors
    /// [`QueueError`] if the ring is not memory.
    pub fn enable_doorbell(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        if !self.state.enabled {
            return Ok(false);
        }
        if self.features.event_idx {
            store(memory, self.avail_event(), self.state.next_available, Ordering::Relaxed)?;
        } else {
            store(memory, self.state.used, 0, Ordering::Relaxed)?;
        }
        // The wish must be visible before the index is read: the driver does it the other way round.
        fence(Ordering::SeqCst);
        self.has_available(memory)
    }

    /// Tells the driver that doorbells are not needed for now. It may ring nevertheless.
    ///
    /// # Errors
    /// [`QueueError`] if the ring is not memory.
    pub fn disable_doorbell(&mut self, memory: &GuestMemory) -> Result<(), QueueError> {
        if self.features.event_idx || !self.state.enabled {
            // With event indices the driver rings only when it passes the index last asked for.
            return Ok(());
        }
        store(memory, self.state.used, USED_NO_NOTIFY, Ordering::Relaxed)
    }

    fn avail_event(&self) -> u64 {
        self.state.used + RING_HEADER + u64::from(self.state.size) * USED_ENTRY
    }
}

fn initial(size: u16) -> QueueState {
    QueueState {
        size,
        enabled: false,
        descriptors: 0,
        available: 0,
        used: 0,
        next_available: 0,
        next_used: 0,
    }
}

/// The rings were checked to be aligned guest memory when the queue was enabled.
fn load(memory: &GuestMemory, address: u64, order: Ordering) -> Result<u16, QueueError> {
    memory
        .backend()
        .load(GuestAddress(address), order)
        .map(u16::from_le)
        .map_err(|_| QueueError::BadAddress { part: "ring", address })
}

fn store(memory: &GuestMemory, address: u64, value: u16, order: Ordering) -> Result<(), QueueError> {
    memory
        .backend()
        .store(value.to_le(), GuestAddress(address), order)
        .map_err(|_| QueueError::BadAddress { part: "ring", address })
}
