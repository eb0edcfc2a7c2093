//! Far JMP and CALL, call gates included (Intel SDM volume 3, 5.8).

use super::{TaskSwitch, size_mask};
use crate::segments::{Descriptor, is_null, kind, rpl, selector_fault};
use crate::{Core, Seg, Segment, Trap, reg, vector};

/// A call gate.
struct Gate {
    selector: u16,
    offset: u64,
    /// Operand size of what it pushes: 2, 4 or 8.
    size: u8,
    /// Parameters to copy to an inner stack.
    parameters: u8,
}

impl Core<'_> {
    /// Far JMP to `selector:offset` with operands of `size` bytes. If it switches tasks, the old task goes on
    /// at `next_rip` one day.
    ///
    /// # Errors
    /// The fault of the instruction.
    pub fn far_jump(&mut self, selector: u16, offset: u64, size: u8, next_rip: u64) -> Result<(), Trap> {
        let offset = offset & size_mask(size);
        if !self.protected() {
            return self.real_jump(selector, offset);
        }
        let descriptor = self.far_target(selector)?;
        if descriptor.is_segment() {
            self.check_direct_code(selector, descriptor)?;
            self.check_target(descriptor, offset)?;
            self.mark_accessed(descriptor)?;
            self.enter_code(descriptor, selector, self.cpu.cpl, offset);
            return Ok(());
        }
        if self.is_task(descriptor) {
            let selector = self.task_selector(selector, descriptor)?;
            return self.task_switch(selector, TaskSwitch::Jump, next_rip);
        }
        let gate = self.call_gate(selector, descriptor)?;
        let code = self.gate_code(&gate)?;
        if !code.is_conforming() && code.dpl() != self.cpu.cpl {
            return Err(selector_fault(vector::GP, gate.selector));
        }
        self.check_target(code, gate.offset)?;
        self.mark_accessed(code)?;
        self.enter_code(code, gate.selector, self.cpu.cpl, gate.offset);
        Ok(())
    }

    /// Far CALL of `selector:offset` with operands of `size` bytes; it returns to `next_rip`.
    ///
    /// # Errors
    /// The fault of the instruction.
    pub fn far_call(&mut self, selector: u16, offset: u64, size: u8, next_rip: u64) -> Result<(), Trap> {
        let offset = offset & size_mask(size);
        let (old_stack, old_task) = (self.cpu.regs[reg::RSP], self.cpu.tr);
        let result = if self.protected() {
            self.protected_call(selector, offset, size, next_rip)
        } else {
            let code = u64::from(self.cpu.segments[Seg::Cs as usize].selector);
            self.push(size, code)
                .and_then(|()| self.push(size, next_rip))
                .and_then(|()| self.real_jump(selector, offset))
        };
        // After a task switch a fault is the other task's, and so are its registers.
        if result.is_err() && self.cpu.tr == old_task {
            self.cpu.regs[reg::RSP] = old_stack;
        }
        result
    }

    fn real_jump(&mut self, selector: u16, offset: u64) -> Result<(), Trap> {
        if offset > u64::from(self.cpu.segments[Seg::Cs as usize].limit) {
            return Err(Trap::gp(0));
        }
        self.load_real_segment(Seg::Cs, selector);
        self.cpu.rip = offset;
        self.mode_changed();
        Ok(())
    }

    fn protected_call(&mut self, selector: u16, offset: u64, size: u8, next_rip: u64) -> Result<(), Trap> {
        let descriptor = self.far_target(selector)?;
        if descriptor.is_segment() {
            self.check_direct_code(selector, descriptor)?;
            self.check_target(descriptor, offset)?;
            self.mark_accessed(descriptor)?;
            self.push_return(size, next_rip)?;
            self.enter_code(descriptor, selector, self.cpu.cpl, offset);
            return Ok(());
        }
        if self.is_task(descriptor) {
            let selector = self.task_selector(selector, descriptor)?;
            return self.task_switch(selector, TaskSwitch::Call, next_rip);
        }
        let gate = self.call_gate(selector, descriptor)?;
        let code = self.gate_code(&gate)?;
        self.check_target(code, gate.offset)?;
        self.mark_accessed(code)?;
        if code.is_conforming() || code.dpl() == self.cpu.cpl {
            self.push_return(gate.size, next_rip)?;
            self.enter_code(code, gate.selector, self.cpu.cpl, gate.offset);
        } else if gate.size == 8 {
            self.inner_long_call(code, &gate, next_rip)?;
        } else {
            self.inner_call(code, &gate, next_rip)?;
        }
        Ok(())
    }

    /// Pushes CS and the return address.
    fn push_return(&mut self, size: u8, next_rip: u64) -> Result<(), Trap> {
        let code = u64::from(self.cpu.segments[Seg::Cs as usize].selector);
        self.push(size, code)?;
        self.push(size, next_rip)
    }

    /// A call to an inner level in IA-32e mode.
    fn inner_long_call(&mut self, code: Descriptor, gate: &Gate, next_rip: u64) -> Result<(), Trap> {
        let cpl = code.dpl();
        let stack = self.long_stack(4 + u64::from(cpl) * 8)?;
        let frame = [
            next_rip,
            u64::from(self.cpu.segments[Seg::Cs as usize].selector),
            self.cpu.regs[reg::RSP],
            u64::from(self.cpu.segments[Seg::Ss as usize].selector),
        ];
        let top = stack.wrapping_sub(32);
        if !self.cpu.is_canonical(top) {
            return Err(Trap::with_error(vector::SS, 0));
        }
        self.write_linear_words(top, &frame, self.cpu.bank_for(cpl))?;
        self.cpu.regs[reg::RSP] = top;
        self.cpu.segments[Seg::Ss as usize] = Segment::null_stack(cpl);
        self.enter_code(code, gate.selector, cpl, gate.offset);
        Ok(())
    }

    /// A call to an inner level in protected mode: parameters are copied.
    fn inner_call(&mut self, code: Descriptor, gate: &Gate, next_rip: u64) -> Result<(), Trap> {
        let cpl = code.dpl();
        let size = u64::from(gate.size);
        let mut frame =
            vec![u64::from(self.cpu.segments[Seg::Ss as usize].selector), self.cpu.regs[reg::RSP]];
        let mask = self.stack_mask();
        for index in (0..u64::from(gate.parameters)).rev() {
            let offset = self.cpu.regs[reg::RSP].wrapping_add(index * size) & mask;
            frame.push(if size == 4 {
                u64::from(self.read::<u32>(Seg::Ss, offset)?)
            } else {
                u64::from(self.read::<u16>(Seg::Ss, offset)?)
            });
        }
        frame.extend([u64::from(self.cpu.segments[Seg::Cs as usize].selector), next_rip]);
        let (stack, pointer) = self.inner_stack(cpl)?;
        let pointer = self.push_frame(&stack, pointer, &frame, size, cpl, stack.selector)?;
        self.cpu.segments[Seg::Ss as usize] = stack;
        self.cpu.regs[reg::RSP] = pointer;
        self.enter_code(code, gate.selector, cpl, gate.offset);
        Ok(())
    }

    fn far_target(&mut self, selector: u16) -> Result<Descriptor, Trap> {
        if is_null(selector) {
            return Err(Trap::gp(0));
        }
        self.descriptor(selector, vector::GP)
    }

    /// Whether the descriptor is one that switches tasks; there are none in IA-32e mode.
    fn is_task(&self, descriptor: Descriptor) -> bool {
        !self.cpu.long_mode() && matches!(descriptor.kind(), kind::TSS16 | kind::TSS | kind::TASK_GATE)
    }

    /// The TSS that a far transfer to a TSS or through a task gate goes to.
    fn task_selector(&mut self, selector: u16, descriptor: Descriptor) -> Result<u16, Trap> {
        if descriptor.dpl() < self.cpu.cpl.max(rpl(selector)) {
            return Err(selector_fault(vector::GP, selector));
        }
        if !descriptor.is_present() {
            return Err(selector_fault(vector::NP, selector));
        }
        let gate = descriptor.kind() == kind::TASK_GATE;
        Ok(if gate { (descriptor.raw >> 16) as u16 } else { selector })
    }

    fn call_gate(&mut self, selector: u16, descriptor: Descriptor) -> Result<Gate, Trap> {
        let long = self.cpu.long_mode();
        let wide = descriptor.kind() == kind::CALL_GATE;
        let known = wide || !long && descriptor.kind() == kind::CALL_GATE16;
        if !known || descriptor.dpl() < self.cpu.cpl.max(rpl(selector)) {
            return Err(selector_fault(vector::GP, selector));
        }
        if !descriptor.is_present() {
            return Err(selector_fault(vector::NP, selector));
        }
        let raw = descriptor.raw;
        let mut gate = Gate {
            selector: (raw >> 16) as u16,
            offset: raw & 0xffff | if wide { raw >> 32 & 0xffff_0000 } else { 0 },
            size: if wide { 4 } else { 2 },
            parameters: (raw >> 32 & 31) as u8,
        };
        if long {
            let high = self.descriptor_high(selector, descriptor, vector::GP)?;
            if high >> 40 & 0x1f != 0 {
                return Err(selector_fault(vector::GP, selector));
            }
            gate.offset |= high << 32;
            gate.size = 8;
            gate.parameters = 0;
        }
        Ok(gate)
    }

    /// The code segment that a call gate leads to.
    fn gate_code(&mut self, gate: &Gate) -> Result<Descriptor, Trap> {
        let code = self.far_target(gate.selector)?;
        let long = self.cpu.long_mode();
        if !code.is_code() || code.dpl() > self.cpu.cpl || long && (!code.is_long() || code.is_big()) {
            return Err(selector_fault(vector::GP, gate.selector));
        }
        if !code.is_present() {
            return Err(selector_fault(vector::NP, gate.selector));
        }
        Ok(code)
    }
}
