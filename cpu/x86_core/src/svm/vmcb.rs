//! The virtual machine control block in memory (AMD APM volume 2, appendix B).

use crate::{Core, Scalar, Segment, TableRegister};

/// Offsets in the control area.
pub(super) mod at {
    pub(crate) const INTERCEPTS: u64 = 0;
    pub(crate) const PAUSE_THRESHOLD: u64 = 0x3c;
    pub(crate) const PAUSE_COUNT: u64 = 0x3e;
    pub(crate) const IOPM: u64 = 0x40;
    pub(crate) const MSRPM: u64 = 0x48;
    pub(crate) const TSC_OFFSET: u64 = 0x50;
    pub(crate) const ASID: u64 = 0x58;
    pub(crate) const TLB_CONTROL: u64 = 0x5c;
    pub(crate) const INTERRUPTS: u64 = 0x60;
    pub(crate) const INTERRUPT_SHADOW: u64 = 0x68;
    pub(crate) const EXIT_CODE: u64 = 0x70;
    pub(crate) const EXIT_INFO1: u64 = 0x78;
    pub(crate) const EXIT_INFO2: u64 = 0x80;
    pub(crate) const EXIT_INT_INFO: u64 = 0x88;
    pub(crate) const NESTED_CONTROL: u64 = 0x90;
    pub(crate) const EVENT_INJECTION: u64 = 0xa8;
    pub(crate) const NCR3: u64 = 0xb0;
    pub(crate) const NEXT_RIP: u64 = 0xc8;
    /// How many bytes of the instruction follow, up to 15.
    pub(crate) const INSTRUCTION: u64 = 0xd0;
    // The state save area.
    pub(crate) const ES: u64 = 0x400;
    pub(crate) const FS: u64 = 0x440;
    pub(crate) const GS: u64 = 0x450;
    pub(crate) const GDTR: u64 = 0x460;
    pub(crate) const LDTR: u64 = 0x470;
    pub(crate) const IDTR: u64 = 0x480;
    pub(crate) const TR: u64 = 0x490;
    pub(crate) const CPL: u64 = 0x4cb;
    pub(crate) const EFER: u64 = 0x4d0;
    pub(crate) const CR4: u64 = 0x548;
    pub(crate) const CR3: u64 = 0x550;
    pub(crate) const CR0: u64 = 0x558;
    pub(crate) const DR7: u64 = 0x560;
    pub(crate) const DR6: u64 = 0x568;
    pub(crate) const RFLAGS: u64 = 0x570;
    pub(crate) const RIP: u64 = 0x578;
    pub(crate) const RSP: u64 = 0x5d8;
    pub(crate) const RAX: u64 = 0x5f8;
    pub(crate) const STAR: u64 = 0x600;
    pub(crate) const LSTAR: u64 = 0x608;
    pub(crate) const CSTAR: u64 = 0x610;
    pub(crate) const SFMASK: u64 = 0x618;
    pub(crate) const KERNEL_GS_BASE: u64 = 0x620;
    pub(crate) const SYSENTER_CS: u64 = 0x628;
    pub(crate) const SYSENTER_ESP: u64 = 0x630;
    pub(crate) const SYSENTER_EIP: u64 = 0x638;
    pub(crate) const CR2: u64 = 0x640;
    pub(crate) const PAT: u64 = 0x668;
}

/// The page of a VMCB, in this process. One that is no RAM reads as all ones, as on a floating bus, and what is
/// written there is lost.
#[derive(Debug, Clone, Copy)]
pub(super) struct Vmcb {
    gpa: u64,
    host: Option<*mut u8>,
    writable: bool,
}

impl Vmcb {
    pub(super) fn new(core: &Core<'_>, gpa: u64) -> Self {
        let host = core.memory.host_page(gpa).map(|page| page.ptr);
        Self { gpa, host, writable: !core.memory.is_read_only(gpa) }
    }

    /// Reads the number at `offset`, which is within the page and aligned.
    pub(super) fn read<T: Scalar>(self, offset: u64) -> T {
        debug_assert!(offset + T::BYTES as u64 <= 0x1000);
        match self.host {
            // SAFETY: inside a page of guest memory.
            Some(host) => unsafe { T::load(host.wrapping_add(offset as usize)) },
            None => T::from_bytes(&[0xff; 16]),
        }
    }

    /// Writes it. [`Vmcb::written`] is to follow the last of several.
    pub(super) fn write<T: Scalar>(self, offset: u64, value: T) {
        debug_assert!(offset + T::BYTES as u64 <= 0x1000);
        if let Some(host) = self.host.filter(|_| self.writable) {
            // SAFETY: inside a page of guest memory.
            unsafe { T::store(host.wrapping_add(offset as usize), value) };
        }
    }

    /// Tells guest memory of what was written.
    pub(super) fn written(self, core: &Core<'_>) {
        if self.host.is_some() && self.writable && !core.memory.may_write_directly(self.gpa) {
            core.memory.written(self.gpa, 0x1000);
        }
    }

    /// A segment register.
    pub(super) fn read_segment(self, offset: u64) -> Segment {
        // Selector, attributes and limit; then the base.
        let low: u64 = self.read(offset);
        let packed = (low >> 16) as u32;
        let attributes = packed & 0xff | (packed & 0xf00) << 4;
        let unusable = if attributes & Segment::PRESENT == 0 { Segment::UNUSABLE } else { 0 };
        Segment {
            selector: low as u16,
            attributes: attributes | unusable,
            limit: (low >> 32) as u32,
            base: self.read(offset + 8),
        }
    }

    /// Writes one.
    pub(super) fn write_segment(self, offset: u64, segment: &Segment) {
        let mut attributes = segment.attributes;
        if attributes & Segment::UNUSABLE != 0 {
            attributes &= !Segment::PRESENT;
        }
        let packed = attributes & 0xff | attributes >> 4 & 0xf00;
        let low = u64::from(segment.selector) | u64::from(packed) << 16 | u64::from(segment.limit) << 32;
        self.write(offset, low);
        self.write(offset + 8, segment.base);
    }

    /// GDTR or IDTR.
    pub(super) fn read_table(self, offset: u64) -> TableRegister {
        TableRegister { base: self.read(offset + 8), limit: self.read(offset + 4) }
    }

    /// Writes one.
    pub(super) fn write_table(self, offset: u64, table: &TableRegister) {
        self.write(offset + 4, u32::from(table.limit));
        self.write(offset + 8, table.base);
    }
}
