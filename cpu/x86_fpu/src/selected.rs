//! Accesses to those elements of memory that a mask register selects.

use crate::frame::Frame;
use crate::masking::Masking;
use crate::operand;
use x86_core::{Core, Seg, Trap};

impl Masking {
    /// Whether anything is accessed: if not, nothing has to be aligned.
    pub(crate) fn accesses(self, core: &Core) -> bool {
        self.runs(core).next().is_some()
    }

    /// Reads what is selected into the frame; the rest is zeros there.
    pub(crate) fn read(
        self,
        core: &mut Core,
        (seg, offset): (Seg, u64),
        frame: &mut Frame,
    ) -> Result<(), Trap> {
        let mut data = [0; 64];
        for (at, len) in self.runs(core) {
            operand::read(core, (seg, offset.wrapping_add(at as u64)), &mut data[at..at + len])?;
        }
        frame.set_memory(&data);
        Ok(())
    }

    /// Checks that what is selected can be written.
    pub(crate) fn check_write(self, core: &mut Core, (seg, offset): (Seg, u64)) -> Result<(), Trap> {
        if self.checked != 0 {
            core.check_write(seg, offset, u64::from(self.checked))?;
        }
        for (at, len) in self.runs(core) {
            core.check_write(seg, offset.wrapping_add(at as u64), len as u64)?;
        }
        Ok(())
    }

    /// Writes what is selected of the frame's memory operand.
    pub(crate) fn write(self, core: &mut Core, address: (Seg, u64), frame: &Frame) -> Result<(), Trap> {
        self.check_write(core, address)?;
        for (at, len) in self.runs(core) {
            // SAFETY: the instruction stored what its mask selects.
            let data = unsafe { frame.memory_part(at, len) };
            operand::write(core, (address.0, address.1.wrapping_add(at as u64)), data)?;
        }
        Ok(())
    }
}
