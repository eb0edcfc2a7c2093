//! Delivery through the IDT of protected mode (Intel SDM volume 3, 6.12), from virtual-8086 mode too.

use super::{Event, Source};
use crate::segments::{Descriptor, is_null, kind, selector_fault};
use crate::transfers::TaskSwitch;
use crate::{Core, Seg, Segment, Trap, flags, reg, vector};

impl Core<'_> {
    pub(super) fn protected_handler(&mut self, event: Event) -> Result<(), Trap> {
        let offset = u64::from(event.vector) * 8;
        if offset + 7 > u64::from(self.cpu.idtr.limit) {
            return Err(event.idt_fault(vector::GP));
        }
        let address = self.system_address(self.cpu.idtr.base.wrapping_add(offset));
        let gate = Descriptor { raw: self.read_linear(address, self.system_bank())?, address };
        let known = matches!(
            gate.kind(),
            kind::TASK_GATE
                | kind::INTERRUPT_GATE16
                | kind::TRAP_GATE16
                | kind::INTERRUPT_GATE
                | kind::TRAP_GATE
        );
        if gate.is_segment() || !known {
            return Err(event.idt_fault(vector::GP));
        }
        if event.source == Source::Software && gate.dpl() < self.cpu.cpl {
            return Err(event.idt_fault(vector::GP));
        }
        if !gate.is_present() {
            return Err(event.idt_fault(vector::NP));
        }
        let selector = (gate.raw >> 16) as u16;
        if gate.kind() == kind::TASK_GATE {
            let source = TaskSwitch::Interrupt { error: event.error };
            return self.task_switch(selector, source, event.return_rip);
        }
        if is_null(selector) {
            return Err(Trap::gp(0));
        }
        let code = self.descriptor(selector, vector::GP)?;
        if !code.is_code() || code.dpl() > self.cpu.cpl {
            return Err(selector_fault(vector::GP, selector));
        }
        if !code.is_present() {
            return Err(selector_fault(vector::NP, selector));
        }
        let wide = gate.kind() & 8 != 0;
        let rip = gate.raw & 0xffff | if wide { gate.raw >> 32 & 0xffff_0000 } else { 0 };
        if rip > u64::from(code.limit()) {
            return Err(Trap::gp(0));
        }
        let inner = !code.is_conforming() && code.dpl() < self.cpu.cpl;
        if self.vm86() && (!inner || code.dpl() != 0) {
            return Err(selector_fault(vector::GP, selector));
        }
        let cpl = if inner { code.dpl() } else { self.cpu.cpl };
        self.mark_accessed(code)?;
        self.enter_protected_handler(event, cpl, wide)?;

        self.cpu.segments[Seg::Cs as usize] = code.segment(selector & !3 | u16::from(cpl));
        self.cpu.cpl = cpl;
        self.cpu.rip = rip;
        let masked = if gate.kind() & 1 == 0 { flags::IF } else { 0 };
        self.cpu.rflags &= !(flags::TF | flags::NT | flags::RF | flags::VM | masked);
        self.mode_changed();
        Ok(())
    }

    /// Switches stacks if `cpl` is an inner level, and pushes the frame. On failure nothing has changed.
    fn enter_protected_handler(&mut self, event: Event, cpl: u8, wide: bool) -> Result<(), Trap> {
        let from_vm86 = self.vm86();
        let inner = cpl < self.cpu.cpl;
        let selector = |seg: Seg| u64::from(self.cpu.segments[seg as usize].selector);
        let mut frame = Vec::with_capacity(10);
        if from_vm86 {
            frame.extend([Seg::Gs, Seg::Fs, Seg::Ds, Seg::Es].map(selector));
        }
        if inner {
            frame.extend([selector(Seg::Ss), self.cpu.regs[reg::RSP]]);
        }
        frame.extend([event.flags, selector(Seg::Cs), event.return_rip]);
        frame.extend(event.error.map(u64::from));

        let (stack, pointer) = if inner {
            self.inner_stack(cpl)?
        } else {
            (self.cpu.segments[Seg::Ss as usize], self.cpu.regs[reg::RSP])
        };
        let fault = if inner { stack.selector } else { 0 };
        let pointer = self.push_frame(&stack, pointer, &frame, if wide { 4 } else { 2 }, cpl, fault)?;
        if inner {
            self.cpu.segments[Seg::Ss as usize] = stack;
        }
        if from_vm86 {
            for seg in [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
                self.cpu.segments[seg as usize] = Segment::null(0);
            }
        }
        self.set_stack_pointer(pointer, stack_mask(&stack));
        Ok(())
    }

    /// The stack for privilege level `cpl` out of a 16- or 32-bit TSS.
    pub(crate) fn inner_stack(&mut self, cpl: u8) -> Result<(Segment, u64), Trap> {
        let tr = self.cpu.tr;
        let wide = tr.attributes & 8 != 0;
        let offset = u64::from(cpl) * if wide { 8 } else { 4 } + if wide { 4 } else { 2 };
        let last = offset + if wide { 5 } else { 3 };
        if !tr.is_usable() || last > u64::from(tr.limit) {
            return Err(selector_fault(vector::TS, tr.selector));
        }
        let address = self.system_address(tr.base.wrapping_add(offset));
        let (pointer, selector) = if wide {
            let pointer: u32 = self.read_linear(address, self.system_bank())?;
            let at = self.system_address(address.wrapping_add(4));
            (u64::from(pointer), self.read_linear::<u16>(at, self.system_bank())?)
        } else {
            let pointer: u16 = self.read_linear(address, self.system_bank())?;
            let at = self.system_address(address.wrapping_add(2));
            (u64::from(pointer), self.read_linear::<u16>(at, self.system_bank())?)
        };
        // The privilege checks of the new stack are against the new level.
        Ok((self.stack_segment(selector, cpl, vector::TS)?, pointer))
    }

    /// Pushes `values` of `size` bytes each onto `stack`, which need not be loaded, with the rights of
    /// `cpl`: all or none. Returns the new stack pointer. Where the segment has no room it is #SS with
    /// selector `fault`.
    pub(crate) fn push_frame(
        &mut self,
        stack: &Segment,
        pointer: u64,
        values: &[u64],
        size: u64,
        cpl: u8,
        fault: u16,
    ) -> Result<u64, Trap> {
        let mask = stack_mask(stack);
        let bank = self.cpu.bank_for(cpl);
        let slot = |index: usize| pointer.wrapping_sub(size * (index as u64 + 1)) & mask;
        let address = |offset: u64| stack.base.wrapping_add(offset) & 0xffff_ffff;
        for index in 0..values.len() {
            if !self.segment_allows(stack, slot(index), size, true) {
                return Err(selector_fault(vector::SS, fault));
            }
            self.check_linear_write(address(slot(index)), size, bank)?;
        }
        for (index, &value) in values.iter().enumerate() {
            if size == 4 {
                self.write_linear(address(slot(index)), value as u32, bank)?;
            } else {
                self.write_linear(address(slot(index)), value as u16, bank)?;
            }
        }
        Ok(pointer.wrapping_sub(size * values.len() as u64) & mask)
    }
}

/// The bits of the stack pointer that a stack segment uses outside 64-bit mode.
pub(crate) fn stack_mask(stack: &Segment) -> u64 {
    if stack.attributes & Segment::BIG != 0 { 0xffff_ffff } else { 0xffff }
}
