//! Far RET.

use super::size_mask;
use crate::segments::rpl;
use crate::{Core, Seg, Trap, reg};

impl Core<'_> {
    /// Far RET with operands of `size` bytes, dropping `pop_bytes` of parameters.
    ///
    /// # Errors
    /// The fault of the instruction.
    pub fn far_return(&mut self, size: u8, pop_bytes: u16) -> Result<(), Trap> {
        let old_stack = self.cpu.regs[reg::RSP];
        let result = self.try_far_return(size, u64::from(pop_bytes));
        if result.is_err() {
            self.cpu.regs[reg::RSP] = old_stack;
        }
        result
    }

    fn try_far_return(&mut self, size: u8, pop_bytes: u64) -> Result<(), Trap> {
        let rip = self.pop(size)? & size_mask(size);
        let selector = self.pop(size)? as u16;
        let mask = self.stack_mask();
        self.set_stack_pointer(self.cpu.regs[reg::RSP].wrapping_add(pop_bytes), mask);
        if !self.protected() {
            if rip > u64::from(self.cpu.segments[Seg::Cs as usize].limit) {
                return Err(Trap::gp(0));
            }
            self.load_real_segment(Seg::Cs, selector);
            self.cpu.rip = rip;
            self.mode_changed();
            return Ok(());
        }
        let code = self.return_code(selector)?;
        let level = rpl(selector);
        self.check_target(code, rip)?;
        if level == self.cpu.cpl {
            self.mark_accessed(code)?;
            self.enter_code(code, selector, level, rip);
            return Ok(());
        }
        let pointer = self.pop(size)?;
        let stack_selector = self.pop(size)? as u16;
        let stack = self.return_stack(stack_selector, code, level)?;
        self.mark_accessed(code)?;
        self.cpu.segments[Seg::Ss as usize] = stack;
        self.enter_code(code, selector, level, rip);
        let mask = self.stack_mask();
        self.set_stack_pointer(pointer.wrapping_add(pop_bytes), mask);
        self.drop_inner_segments();
        Ok(())
    }
}
