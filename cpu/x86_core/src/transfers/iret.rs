//! IRET in all modes.

use super::{TaskSwitch, size_mask};
use crate::segments::rpl;
use crate::{Core, Seg, Segment, Trap, flags, reg, shadow, vector};

impl Core<'_> {
    /// IRET with operands of `size` bytes. If it ends a nested task, that one goes on at `next_rip` when it
    /// is called again.
    ///
    /// # Errors
    /// The fault of the instruction.
    pub fn iret(&mut self, size: u8, next_rip: u64) -> Result<(), Trap> {
        let (old_stack, old_task) = (self.cpu.regs[reg::RSP], self.cpu.tr);
        let result = if self.cpu.long64 {
            self.long_iret(size)
        } else if !self.protected() {
            self.real_iret(size)
        } else if self.cpu.rflags & flags::NT != 0 {
            self.nested_return(next_rip)
        } else {
            self.protected_iret(size)
        };
        match result {
            Ok(()) => self.cpu.interrupt_shadow &= !shadow::NMI,
            // After a task switch the fault is the other task's, and so is the stack pointer.
            Err(_) if self.cpu.tr == old_task => self.cpu.regs[reg::RSP] = old_stack,
            Err(_) => {}
        }
        result
    }

    /// IRET in real and virtual-8086 mode.
    fn real_iret(&mut self, size: u8) -> Result<(), Trap> {
        if self.vm86() && self.cpu.iopl() < 3 {
            return Err(Trap::gp(0));
        }
        let rip = self.pop(size)? & size_mask(size);
        let selector = self.pop(size)? as u16;
        let value = self.pop(size)?;
        if rip > u64::from(self.cpu.segments[Seg::Cs as usize].limit) {
            return Err(Trap::gp(0));
        }
        // IOPL stays in virtual-8086 mode, whose privilege level is 3.
        let value = self.iret_flags(value, size);
        self.load_real_segment(Seg::Cs, selector);
        self.cpu.rip = rip;
        self.set_rflags(value);
        self.mode_changed();
        Ok(())
    }

    /// RFLAGS as IRET loads them at the current level.
    fn iret_flags(&self, value: u64, size: u8) -> u64 {
        let merged = self.merged_flags(value, size, self.cpu.cpl);
        // RF comes with the image of 32 and 64 bits; a 16-bit image has none.
        if size == 2 { merged & !flags::RF } else { merged & !flags::RF | value & flags::RF }
    }

    /// IRET in 64-bit mode: SS and RSP are always popped.
    fn long_iret(&mut self, size: u8) -> Result<(), Trap> {
        if self.cpu.rflags & flags::NT != 0 {
            return Err(Trap::gp(0));
        }
        let (rip, selector, value, pointer, stack_selector) = if size == 8 {
            let top = self.cpu.regs[reg::RSP];
            let mut word = |index: u64| self.read::<u64>(Seg::Ss, top.wrapping_add(8 * index));
            (word(0)?, word(1)?, word(2)?, word(3)?, word(4)?)
        } else {
            (self.pop(size)?, self.pop(size)?, self.pop(size)?, self.pop(size)?, self.pop(size)?)
        };
        self.return_with_stack(rip, selector as u16, (value, size), pointer, stack_selector as u16)
    }

    /// The end of an IRET that has popped a stack too.
    fn return_with_stack(
        &mut self,
        rip: u64,
        selector: u16,
        (value, size): (u64, u8),
        pointer: u64,
        stack_selector: u16,
    ) -> Result<(), Trap> {
        let code = self.return_code(selector)?;
        let level = rpl(selector);
        let rip = if self.is_long_code(code) { rip } else { rip & 0xffff_ffff };
        self.check_target(code, rip)?;
        let stack = self.return_stack(stack_selector, code, level)?;
        self.mark_accessed(code)?;
        let outer = level > self.cpu.cpl;
        let value = self.iret_flags(value, size);
        self.cpu.segments[Seg::Ss as usize] = stack;
        self.enter_code(code, selector, level, rip);
        let mask = self.stack_mask();
        self.set_stack_pointer(pointer, mask);
        if outer {
            self.drop_inner_segments();
        }
        self.set_rflags(value);
        Ok(())
    }

    /// IRET in protected and compatibility mode.
    fn protected_iret(&mut self, size: u8) -> Result<(), Trap> {
        let rip = self.pop(size)? & size_mask(size);
        let selector = self.pop(size)? as u16;
        let value = self.pop(size)?;
        let to_vm86 = size == 4 && value & flags::VM != 0 && self.cpu.cpl == 0;
        if to_vm86 && !self.cpu.long_mode() {
            return self.return_to_vm86(rip, selector, value);
        }
        if rpl(selector) > self.cpu.cpl {
            let pointer = self.pop(size)?;
            let stack_selector = self.pop(size)? as u16;
            return self.return_with_stack(rip, selector, (value, size), pointer, stack_selector);
        }
        let code = self.return_code(selector)?;
        self.check_target(code, rip)?;
        self.mark_accessed(code)?;
        let value = self.iret_flags(value, size);
        self.enter_code(code, selector, self.cpu.cpl, rip);
        self.set_rflags(value);
        Ok(())
    }

    fn return_to_vm86(&mut self, rip: u64, selector: u16, value: u64) -> Result<(), Trap> {
        let pointer = self.pop(4)?;
        let mut selectors = [0; 5];
        for slot in &mut selectors {
            *slot = self.pop(4)? as u16;
        }
        if rip > 0xffff {
            return Err(Trap::gp(0));
        }
        let order = [Seg::Ss, Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs];
        for (seg, selector) in order.into_iter().zip(selectors) {
            self.cpu.segments[seg as usize] = Segment::vm86(selector);
        }
        self.cpu.segments[Seg::Cs as usize] = Segment::vm86(selector);
        self.cpu.regs[reg::RSP] = pointer;
        self.cpu.rip = rip;
        self.cpu.cpl = 3;
        self.set_rflags(value);
        self.mode_changed();
        Ok(())
    }

    /// IRET with NT set: back to the task that called this one.
    fn nested_return(&mut self, next_rip: u64) -> Result<(), Trap> {
        if self.cpu.long_mode() {
            return Err(Trap::gp(0));
        }
        let link = self.system_address(self.cpu.tr.base);
        let selector = self.read_linear(link, self.system_bank())?;
        if selector & 4 != 0 {
            return Err(crate::segments::selector_fault(vector::TS, selector));
        }
        self.task_switch(selector, TaskSwitch::Return, next_rip)
    }
}
