//! Segment descriptors and the loading of segment registers (Intel SDM volume 3, chapters 3 and 5).

use crate::{Core, Seg, Segment, Trap, vector};

/// System descriptor types (Intel SDM volume 3, table 3-2).
pub(crate) mod kind {
    pub(crate) const TSS16: u32 = 1;
    pub(crate) const LDT: u32 = 2;
    pub(crate) const CALL_GATE16: u32 = 4;
    pub(crate) const TASK_GATE: u32 = 5;
    pub(crate) const INTERRUPT_GATE16: u32 = 6;
    pub(crate) const TRAP_GATE16: u32 = 7;
    pub(crate) const TSS: u32 = 9;
    pub(crate) const CALL_GATE: u32 = 0xc;
    pub(crate) const INTERRUPT_GATE: u32 = 0xe;
    pub(crate) const TRAP_GATE: u32 = 0xf;
    /// What a busy TSS has in addition.
    pub(crate) const BUSY: u32 = 2;
}

/// The lower 8 bytes of a descriptor, and where it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Descriptor {
    pub(crate) raw: u64,
    /// Its linear address.
    pub(crate) address: u64,
}

impl Descriptor {
    /// As in [`Segment::attributes`].
    pub(crate) fn attributes(self) -> u32 {
        (self.raw >> 40) as u32 & 0xf0ff
    }

    /// The type field.
    pub(crate) fn kind(self) -> u32 {
        self.attributes() & 0xf
    }

    /// Whether this is a code or data segment (S is set).
    pub(crate) fn is_segment(self) -> bool {
        self.attributes() & 0x10 != 0
    }

    pub(crate) fn is_code(self) -> bool {
        self.attributes() & 0x18 == 0x18
    }

    pub(crate) fn is_data(self) -> bool {
        self.attributes() & 0x18 == 0x10
    }

    pub(crate) fn is_writable_data(self) -> bool {
        self.attributes() & 0x1a == 0x12
    }

    pub(crate) fn is_conforming(self) -> bool {
        self.attributes() & 0x1c == 0x1c
    }

    pub(crate) fn dpl(self) -> u8 {
        (self.attributes() >> 5 & 3) as u8
    }

    pub(crate) fn is_present(self) -> bool {
        self.attributes() & Segment::PRESENT != 0
    }

    pub(crate) fn is_long(self) -> bool {
        self.attributes() & Segment::LONG != 0
    }

    pub(crate) fn is_big(self) -> bool {
        self.attributes() & Segment::BIG != 0
    }

    pub(crate) fn base(self) -> u64 {
        self.raw >> 16 & 0xff_ffff | (self.raw >> 56) << 24
    }

    pub(crate) fn limit(self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.raw >> 55 & 1 != 0 { limit << 12 | 0xfff } else { limit }
    }

    /// The segment register that a load of it makes, with the accessed bit set.
    pub(crate) fn segment(self, selector: u16) -> Segment {
        let accessed = u32::from(self.is_segment());
        Segment { base: self.base(), limit: self.limit(), attributes: self.attributes() | accessed, selector }
    }
}

/// A null selector.
pub(crate) fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// The requested privilege level.
pub(crate) fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

/// An exception whose error code is a selector's index.
pub(crate) fn selector_fault(vector: u8, selector: u16) -> Trap {
    Trap::with_error(vector, u32::from(selector & 0xfffc))
}

impl Segment {
    /// What a null selector makes of a data segment register: base and limit are cleared.
    pub(crate) fn null(selector: u16) -> Self {
        Self { base: 0, limit: 0, attributes: Self::UNUSABLE, selector }
    }

    /// SS in 64-bit mode with a null selector.
    pub(crate) fn null_stack(cpl: u8) -> Self {
        Self {
            base: 0,
            limit: 0xffff_ffff,
            attributes: Self::UNUSABLE | u32::from(cpl) << 5 | 0xc013,
            selector: u16::from(cpl),
        }
    }

    /// A segment of virtual-8086 mode.
    pub(crate) fn vm86(selector: u16) -> Self {
        Self { base: u64::from(selector) << 4, limit: 0xffff, attributes: 0xf3, selector }
    }

    pub(crate) fn is_usable(&self) -> bool {
        self.attributes & Self::UNUSABLE == 0
    }
}

impl Core<'_> {
    /// The descriptor that `selector` names in the GDT or LDT, or the exception `fault` with the selector if
    /// it is outside. The accesses are supervisor ones whatever the privilege level.
    pub(crate) fn descriptor(&mut self, selector: u16, fault: u8) -> Result<Descriptor, Trap> {
        let (base, limit) = if selector & 4 != 0 {
            if !self.cpu.ldtr.is_usable() {
                return Err(selector_fault(fault, selector));
            }
            (self.cpu.ldtr.base, self.cpu.ldtr.limit)
        } else {
            (self.cpu.gdtr.base, u32::from(self.cpu.gdtr.limit))
        };
        let offset = u64::from(selector & 0xfff8);
        if offset + 7 > u64::from(limit) {
            return Err(selector_fault(fault, selector));
        }
        let address = self.system_address(base.wrapping_add(offset));
        let raw = self.read_linear(address, self.system_bank())?;
        Ok(Descriptor { raw, address })
    }

    /// The base of a 16-byte system descriptor of IA-32e mode, or of an 8-byte one in other modes.
    pub(crate) fn system_base(&mut self, selector: u16, descriptor: Descriptor) -> Result<u64, Trap> {
        if !self.cpu.long_mode() {
            return Ok(descriptor.base());
        }
        let high = self.descriptor_high(selector, descriptor, vector::GP)?;
        Ok(descriptor.base() | high << 32)
    }

    /// The upper 8 bytes of a 16-byte system descriptor.
    pub(crate) fn descriptor_high(
        &mut self,
        selector: u16,
        descriptor: Descriptor,
        fault: u8,
    ) -> Result<u64, Trap> {
        let limit = if selector & 4 != 0 { self.cpu.ldtr.limit } else { u32::from(self.cpu.gdtr.limit) };
        if u32::from(selector & 0xfff8) + 15 > limit {
            return Err(selector_fault(fault, selector));
        }
        let address = self.system_address(descriptor.address.wrapping_add(8));
        self.read_linear(address, self.system_bank())
    }

    /// A linear address in a system table: 32 bits outside IA-32e mode.
    pub(crate) fn system_address(&self, va: u64) -> u64 {
        if self.cpu.long_mode() { va } else { va & 0xffff_ffff }
    }

    /// Sets the accessed bit of a code or data segment's descriptor if it is clear.
    pub(crate) fn mark_accessed(&mut self, descriptor: Descriptor) -> Result<(), Trap> {
        if descriptor.is_segment() && descriptor.attributes() & 1 == 0 {
            self.or_attributes(descriptor, 1)?;
        }
        Ok(())
    }

    /// Sets bits in the type field of the descriptor in memory.
    pub(crate) fn or_attributes(&mut self, descriptor: Descriptor, bits: u8) -> Result<(), Trap> {
        let address = self.system_address(descriptor.address.wrapping_add(5));
        self.update_linear::<u8>(address, self.system_bank(), true, |old| Some(old | bits))?;
        Ok(())
    }

    /// Loads a data segment register or SS as MOV, POP and LSS do. (CS is loaded by control transfers.)
    ///
    /// # Errors
    /// #GP, #NP or #SS with the selector.
    pub fn load_segment(&mut self, seg: Seg, selector: u16) -> Result<(), Trap> {
        if !self.protected() {
            self.load_real_segment(seg, selector);
            return Ok(());
        }
        let loaded = if seg == Seg::Ss {
            self.stack_segment(selector, self.cpu.cpl, vector::GP)?
        } else {
            self.data_segment(selector)?
        };
        self.cpu.segments[seg as usize] = loaded;
        Ok(())
    }

    /// A load in real or virtual-8086 mode. In real mode limit and attributes stay as they are.
    pub(crate) fn load_real_segment(&mut self, seg: Seg, selector: u16) {
        let vm86 = self.vm86();
        let segment = &mut self.cpu.segments[seg as usize];
        if vm86 {
            *segment = Segment::vm86(selector);
        } else {
            segment.selector = selector;
            segment.base = u64::from(selector) << 4;
            segment.attributes &= !Segment::UNUSABLE;
        }
    }

    /// Checks and reads what a load of `selector` into DS, ES, FS or GS gives.
    pub(crate) fn data_segment(&mut self, selector: u16) -> Result<Segment, Trap> {
        if is_null(selector) {
            return Ok(Segment::null(selector));
        }
        let descriptor = self.descriptor(selector, vector::GP)?;
        let readable = descriptor.is_data() || descriptor.is_code() && descriptor.kind() & 2 != 0;
        let privileged = !descriptor.is_conforming() && descriptor.dpl() < self.cpu.cpl.max(rpl(selector));
        if !readable || privileged {
            return Err(selector_fault(vector::GP, selector));
        }
        if !descriptor.is_present() {
            return Err(selector_fault(vector::NP, selector));
        }
        self.mark_accessed(descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// Checks and reads what a load of `selector` into SS gives for privilege level `cpl`; bad selectors are
    /// `fault` (#GP, or #TS for those out of a TSS).
    pub(crate) fn stack_segment(&mut self, selector: u16, cpl: u8, fault: u8) -> Result<Segment, Trap> {
        if is_null(selector) {
            let allowed = fault == vector::GP && self.cpu.long64 && cpl < 3 && rpl(selector) == cpl;
            return if allowed { Ok(Segment::null_stack(cpl)) } else { Err(Trap::with_error(fault, 0)) };
        }
        let descriptor = self.descriptor(selector, fault)?;
        if rpl(selector) != cpl || descriptor.dpl() != cpl || !descriptor.is_writable_data() {
            return Err(selector_fault(fault, selector));
        }
        if !descriptor.is_present() {
            return Err(selector_fault(vector::SS, selector));
        }
        self.mark_accessed(descriptor)?;
        Ok(descriptor.segment(selector))
    }
}
