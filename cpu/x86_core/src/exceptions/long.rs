//! Delivery through the IDT of IA-32e mode (Intel SDM volume 3, 6.14).

use super::{Event, Source};
use crate::segments::{is_null, kind, selector_fault};
use crate::{Core, Seg, Segment, Trap, flags, reg, vector};

impl Core<'_> {
    pub(super) fn long_handler(&mut self, event: Event) -> Result<(), Trap> {
        let offset = u64::from(event.vector) * 16;
        if offset + 15 > u64::from(self.cpu.idtr.limit) {
            return Err(event.idt_fault(vector::GP));
        }
        let gate: u128 = self.read_linear(self.cpu.idtr.base.wrapping_add(offset), self.system_bank())?;
        let low = gate as u64;
        let kind = (low >> 40) as u32 & 0x1f;
        if kind != kind::INTERRUPT_GATE && kind != kind::TRAP_GATE {
            return Err(event.idt_fault(vector::GP));
        }
        let dpl = (low >> 45 & 3) as u8;
        if event.source == Source::Software && dpl < self.cpu.cpl {
            return Err(event.idt_fault(vector::GP));
        }
        if low >> 47 & 1 == 0 {
            return Err(event.idt_fault(vector::NP));
        }

        let selector = (low >> 16) as u16;
        if is_null(selector) {
            return Err(Trap::gp(0));
        }
        let code = self.descriptor(selector, vector::GP)?;
        if !code.is_code() || code.dpl() > self.cpu.cpl || !code.is_long() || code.is_big() {
            return Err(selector_fault(vector::GP, selector));
        }
        if !code.is_present() {
            return Err(selector_fault(vector::NP, selector));
        }
        let cpl = if code.is_conforming() { self.cpu.cpl } else { code.dpl() };
        let high = (gate >> 64) as u64 & 0xffff_ffff;
        let rip = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
        if !self.cpu.is_canonical(rip) {
            return Err(Trap::gp(0));
        }

        let ist = low >> 32 & 7;
        let stack = if ist != 0 {
            self.long_stack(0x1c + ist * 8)?
        } else if cpl < self.cpu.cpl {
            self.long_stack(4 + u64::from(cpl) * 8)?
        } else {
            self.cpu.regs[reg::RSP]
        } & !0xf;
        self.mark_accessed(code)?;
        self.push_long_frame(event, stack, cpl)?;

        if cpl < self.cpu.cpl {
            self.cpu.segments[Seg::Ss as usize] = Segment::null_stack(cpl);
        }
        self.cpu.segments[Seg::Cs as usize] = code.segment(selector & !3 | u16::from(cpl));
        self.cpu.cpl = cpl;
        self.cpu.rip = rip;
        let masked = if kind == kind::INTERRUPT_GATE { flags::IF } else { 0 };
        self.cpu.rflags &= !(flags::TF | flags::NT | flags::RF | flags::VM | masked);
        self.mode_changed();
        Ok(())
    }

    /// Pushes SS, RSP, RFLAGS, CS, RIP and the error code, if there is one.
    fn push_long_frame(&mut self, event: Event, stack: u64, cpl: u8) -> Result<(), Trap> {
        let values = [
            event.error.map_or(0, u64::from),
            event.return_rip,
            u64::from(self.cpu.segments[Seg::Cs as usize].selector),
            event.flags,
            self.cpu.regs[reg::RSP],
            u64::from(self.cpu.segments[Seg::Ss as usize].selector),
        ];
        let frame = if event.error.is_some() { &values[..] } else { &values[1..] };
        let top = stack.wrapping_sub(8 * frame.len() as u64);
        if !self.cpu.is_canonical(top) || !self.cpu.is_canonical(stack.wrapping_sub(1)) {
            return Err(Trap::with_error(vector::SS, 0));
        }
        self.write_linear_words(top, frame, self.cpu.bank_for(cpl))?;
        self.cpu.regs[reg::RSP] = top;
        Ok(())
    }

    /// A stack pointer out of the 64-bit TSS.
    pub(crate) fn long_stack(&mut self, offset: u64) -> Result<u64, Trap> {
        let tr = self.cpu.tr;
        if !tr.is_usable() || offset + 7 > u64::from(tr.limit) {
            return Err(selector_fault(vector::TS, tr.selector));
        }
        let stack = self.read_linear(tr.base.wrapping_add(offset), self.system_bank())?;
        if !self.cpu.is_canonical(stack) {
            return Err(Trap::with_error(vector::SS, 0));
        }
        Ok(stack)
    }
}
