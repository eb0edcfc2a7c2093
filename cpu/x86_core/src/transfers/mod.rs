//! Control transfers between segments, privilege levels and tasks.

mod call;
mod fast;
mod iret;
mod returns;
mod task;

#[cfg(test)]
mod tests;

pub(crate) use task::TaskSwitch;

use crate::segments::{Descriptor, is_null, rpl, selector_fault};
use crate::{Core, Seg, Segment, Trap, flags, vector};

/// Flags that IRET and POPF leave alone, whatever they are given.
const ALWAYS_KEPT: u64 = !flags::EXIST;

/// The bits of a value of `size` bytes.
fn size_mask(size: u8) -> u64 {
    match size {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

impl Core<'_> {
    /// RFLAGS after a load of `value` with `size` bytes at the current privilege (Intel SDM volume 2, IRET
    /// and POPF; IRET alone changes RF, and VM in its own way).
    pub(crate) fn merged_flags(&self, value: u64, size: u8, cpl: u8) -> u64 {
        let mut kept = ALWAYS_KEPT | flags::VM;
        if size == 2 {
            kept |= !0xffff;
        }
        if cpl > self.cpu.iopl() {
            kept |= flags::IF;
        }
        if cpl != 0 {
            kept |= flags::IOPL | flags::VIF | flags::VIP;
        }
        self.cpu.rflags & kept | value & !kept | flags::FIXED
    }

    /// Checks that `descriptor` is a code segment that a direct far JMP or CALL may go to.
    fn check_direct_code(&self, selector: u16, descriptor: Descriptor) -> Result<(), Trap> {
        let cpl = self.cpu.cpl;
        let allowed = if descriptor.is_conforming() {
            descriptor.dpl() <= cpl
        } else {
            rpl(selector) <= cpl && descriptor.dpl() == cpl
        };
        if !allowed || !descriptor.is_code() || self.has_both_sizes(descriptor) {
            return Err(selector_fault(vector::GP, selector));
        }
        if !descriptor.is_present() {
            return Err(selector_fault(vector::NP, selector));
        }
        Ok(())
    }

    /// L and D both set is reserved.
    fn has_both_sizes(&self, descriptor: Descriptor) -> bool {
        self.cpu.long_mode() && descriptor.is_long() && descriptor.is_big()
    }

    /// Whether code of `descriptor` runs in 64-bit mode.
    fn is_long_code(&self, descriptor: Descriptor) -> bool {
        self.cpu.long_mode() && descriptor.is_long()
    }

    /// Checks an instruction pointer for the code segment `descriptor`.
    fn check_target(&self, descriptor: Descriptor, rip: u64) -> Result<(), Trap> {
        let inside = if self.is_long_code(descriptor) {
            self.cpu.is_canonical(rip)
        } else {
            rip <= u64::from(descriptor.limit())
        };
        if inside { Ok(()) } else { Err(Trap::gp(0)) }
    }

    /// Loads CS and goes on at `rip`.
    fn enter_code(&mut self, descriptor: Descriptor, selector: u16, cpl: u8, rip: u64) {
        self.cpu.segments[Seg::Cs as usize] = descriptor.segment(selector & !3 | u16::from(cpl));
        self.cpu.cpl = cpl;
        self.cpu.rip = if self.is_long_code(descriptor) { rip } else { rip & 0xffff_ffff };
        self.mode_changed();
    }

    /// The code segment that a far return or IRET goes back to.
    fn return_code(&mut self, selector: u16) -> Result<Descriptor, Trap> {
        if is_null(selector) {
            return Err(Trap::gp(0));
        }
        let descriptor = self.descriptor(selector, vector::GP)?;
        let level = rpl(selector);
        let allowed = level >= self.cpu.cpl
            && if descriptor.is_conforming() { descriptor.dpl() <= level } else { descriptor.dpl() == level };
        if !allowed || !descriptor.is_code() || self.has_both_sizes(descriptor) {
            return Err(selector_fault(vector::GP, selector));
        }
        if !descriptor.is_present() {
            return Err(selector_fault(vector::NP, selector));
        }
        Ok(descriptor)
    }

    /// The stack segment that a return to the code `descriptor` at level `cpl` loads.
    fn return_stack(&mut self, selector: u16, code: Descriptor, cpl: u8) -> Result<Segment, Trap> {
        if is_null(selector) {
            // Allowed in 64-bit mode below level 3.
            return if self.is_long_code(code) && cpl < 3 && rpl(selector) == cpl {
                Ok(Segment::null_stack(cpl))
            } else {
                Err(Trap::gp(0))
            };
        }
        self.stack_segment(selector, cpl, vector::GP)
    }

    /// After a return to an outer level: segments that it may not use become null.
    fn drop_inner_segments(&mut self) {
        let cpl = self.cpu.cpl;
        for seg in [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
            let segment = &mut self.cpu.segments[seg as usize];
            let conforming_code = segment.attributes & 0x1c == 0x1c;
            // The base stays, which MSRs may have set: in 64-bit mode it still counts.
            if segment.is_usable() && !conforming_code && segment.dpl() < cpl {
                *segment = Segment { base: segment.base, ..Segment::null(0) };
            }
        }
    }
}
