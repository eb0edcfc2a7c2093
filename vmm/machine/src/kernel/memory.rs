//! Guest memory as the loaders write it.

use boot::{LoadMemory, OutOfMemoryRange};
use guest_memory::{GuestMemory, PAGE_SIZE};

/// Writes to guest memory; zeroes that are there already are not written, so that they take no memory.
pub(super) struct Writer<'a> {
    memory: &'a GuestMemory,
    fresh: bool,
}

impl<'a> Writer<'a> {
    /// `fresh` says that all memory that will be written to is still zero.
    pub(super) fn new(memory: &'a GuestMemory, fresh: bool) -> Self {
        Self { memory, fresh }
    }

    fn write_nonzero(&self, gpa: u64, bytes: &[u8]) -> Result<(), guest_memory::MemoryError> {
        const ZERO: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
        let mut done = 0;
        let mut at = 0;
        while at < bytes.len() {
            let to_page_end = (PAGE_SIZE - (gpa + at as u64) % PAGE_SIZE) as usize;
            let end = bytes.len().min(at + to_page_end);
            if bytes[at..end] == ZERO[..end - at] {
                self.memory.write(gpa + done as u64, &bytes[done..at])?;
                done = end;
            }
            at = end;
        }
        self.memory.write(gpa + done as u64, &bytes[done..])
    }
}

impl LoadMemory for Writer<'_> {
    fn write(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), OutOfMemoryRange> {
        let len = bytes.len() as u64;
        let written = if self.fresh {
            if self.memory.contains(gpa, len) { self.write_nonzero(gpa, bytes).is_ok() } else { false }
        } else {
            self.memory.write(gpa, bytes).is_ok()
        };
        if written { Ok(()) } else { Err(OutOfMemoryRange { gpa, len }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_are_written_where_they_must_be() {
        let memory = GuestMemory::new(std::slice::from_ref(&(0..0x10_0000))).unwrap();
        let mut bytes = vec![1; 0x4800];
        bytes[0x800..0x2800].fill(0);
        Writer::new(&memory, true).write(0x1800, &bytes).unwrap();
        let mut read = vec![9; bytes.len()];
        memory.read(0x1800, &mut read).unwrap();
        assert!(read == bytes);
        Writer::new(&memory, false).write(0x1800, &[0; 0x4800]).unwrap();
        memory.read(0x1800, &mut read).unwrap();
        assert!(read.iter().all(|byte| *byte == 0));
        for fresh in [true, false] {
            assert!(Writer::new(&memory, fresh).write(0xf_f000, &[0; 0x2000]).is_err());
        }
    }
}
