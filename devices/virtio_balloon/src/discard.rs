//! Giving guest memory back to the host.

use guest_memory::GuestMemory;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use std::ops::Range;
use virtio::QueueError;

/// Gives pages back to the host, neighbours together. What is given back reads as zeros.
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
        let run = std::mem::take(&mut self.run);
        // The regions stand in the file one after the other.
        let mut offset = 0;
        for region in self.memory.regions() {
            let start = run.start.max(region.gpa);
            let end = run.end.min(region.gpa + region.len);
            if start < end {
                self.punch(offset + (start - region.gpa), end - start)?;
                // Their content changed: for the dirty log, and for code translated from them.
                self.memory.changed(start, end - start);
            }
            offset += region.len;
        }
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> Result<(), QueueError> {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match fallocate(self.memory.file(), how, offset, len) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => {
                    return Err(QueueError::Device(format!("the host does not take memory back: {error}")));
                }
            }
        }
    }
}
