//! Giving guest memory back to the host.

use guest_memory::GuestMemory;
use std::ops::Range;
use virtio::QueueError;

/// Gives pages back to the host, neighbours together: see [`GuestMemory::discard`].
pub(crate) struct Discard<'a> {
    memory: &'a GuestMemory,
    /// Pages not given back yet.
    run: Range<u64>,
}

impl<'a> Discard<'a> {
    pub(crate) fn new(memory: &'a GuestMemory) -> Self {
        Self { memory, run: 0..0 }
    }

    /// The whole pages `gpa..gpa + len` are not needed.
    pub(crate) fn add(&mut self, gpa: u64, len: u64) -> Result<(), QueueError> {
        if !self.memory.contains(gpa, len) {
            return Err(QueueError::NotMemory { address: gpa, len });
        }
        if gpa == self.run.end {
            self.run.end += len;
        } else if gpa + len == self.run.start {
            self.run.start = gpa;
        } else {
            self.give_back()?;
            self.run = gpa..gpa + len;
        }
        Ok(())
    }

    /// Gives back what is left.
    pub(crate) fn finish(mut self) -> Result<(), QueueError> {
        self.give_back()
    }

    fn give_back(&mut self) -> Result<(), QueueError> {
        self.memory
            .discard(std::mem::take(&mut self.run))
            .map_err(|error| QueueError::Device(format!("the host does not take memory back: {error}")))
    }
}
