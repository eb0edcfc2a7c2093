//! General, special and segment registers.

use crate::error::errno;
use crate::ioctl;
use accel::{Segment, TableRegister, X86State};
use kvm_bindings as kb;
use kvm_ioctls::VcpuFd;
use std::io;

/// Flag of `kvm_sregs2`: the PDPTEs are there.
const PDPTRS_VALID: u64 = 1;

pub(super) fn general(regs: &kb::kvm_regs) -> [u64; 16] {
    [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9,
        regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ]
}

pub(super) fn kernel_general(state: &X86State) -> kb::kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.regs;
    kb::kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: state.rip,
        rflags: state.rflags | 2,
    }
}

pub(super) fn segment(segment: &kb::kvm_segment) -> Segment {
    let bit = |value: u8, at: u32| u16::from(value & 1) << at;
    Segment {
        selector: segment.selector,
        base: segment.base,
        limit: segment.limit,
        rights: u16::from(segment.type_ & 0xf)
            | bit(segment.s, 4)
            | u16::from(segment.dpl & 3) << 5
            | bit(segment.present, 7)
            | bit(segment.avl, 12)
            | bit(segment.l, 13)
            | bit(segment.db, 14)
            | bit(segment.g, 15),
        unusable: segment.unusable != 0,
    }
}

pub(super) fn kernel_segment(segment: &Segment) -> kb::kvm_segment {
    let bits = |at: u32, mask: u16| (segment.rights >> at & mask) as u8;
    kb::kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: bits(0, 0xf),
        s: bits(4, 1),
        dpl: bits(5, 3),
        present: bits(7, 1),
        avl: bits(12, 1),
        l: bits(13, 1),
        db: bits(14, 1),
        g: bits(15, 1),
        unusable: segment.unusable.into(),
        padding: 0,
    }
}

pub(super) fn table(table: &kb::kvm_dtable) -> TableRegister {
    TableRegister { base: table.base, limit: table.limit }
}

fn kernel_table(table: &TableRegister) -> kb::kvm_dtable {
    kb::kvm_dtable { base: table.base, limit: table.limit, padding: [0; 3] }
}

/// The special registers; without PDPTEs where the kernel does not tell them (`has_sregs2`).
pub(super) fn sregs(fd: &VcpuFd, has_sregs2: bool) -> io::Result<kb::kvm_sregs2> {
    if has_sregs2 {
        let mut sregs = ioctl::sregs2(fd)?;
        if sregs.flags & PDPTRS_VALID == 0 {
            sregs.pdptrs = [0; 4];
        }
        return Ok(sregs);
    }
    let old = fd.get_sregs().map_err(errno)?;
    Ok(kb::kvm_sregs2 {
        cs: old.cs,
        ds: old.ds,
        es: old.es,
        fs: old.fs,
        gs: old.gs,
        ss: old.ss,
        tr: old.tr,
        ldt: old.ldt,
        gdt: old.gdt,
        idt: old.idt,
        cr0: old.cr0,
        cr2: old.cr2,
        cr3: old.cr3,
        cr4: old.cr4,
        cr8: old.cr8,
        efer: old.efer,
        apic_base: old.apic_base,
        flags: 0,
        pdptrs: [0; 4],
    })
}

/// Whether a processor in this state pages with PDPTEs in registers (Intel SDM volume 3, 4.4.1).
fn pae_paging(state: &X86State) -> bool {
    state.cr0 >> 31 & 1 != 0 && state.cr4 >> 5 & 1 != 0 && state.efer >> 10 & 1 == 0
}

pub(super) fn set_sregs(fd: &VcpuFd, has_sregs2: bool, state: &X86State) -> io::Result<()> {
    let [es, cs, ss, ds, fs, gs] = state.segments.each_ref().map(kernel_segment);
    let common = kb::kvm_sregs2 {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr: kernel_segment(&state.tr),
        ldt: kernel_segment(&state.ldtr),
        gdt: kernel_table(&state.gdtr),
        idt: kernel_table(&state.idtr),
        cr0: state.cr0 | 0x10,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: u64::from(state.lapic.tpr >> 4),
        efer: state.efer,
        apic_base: state.lapic.apic_base,
        flags: if pae_paging(state) { PDPTRS_VALID } else { 0 },
        pdptrs: state.pdpte,
    };
    if has_sregs2 {
        return ioctl::set_sregs2(fd, &common);
    }
    // This loads the PDPTEs from memory.
    let old = kb::kvm_sregs {
        cs: common.cs,
        ds: common.ds,
        es: common.es,
        fs: common.fs,
        gs: common.gs,
        ss: common.ss,
        tr: common.tr,
        ldt: common.ldt,
        gdt: common.gdt,
        idt: common.idt,
        cr0: common.cr0,
        cr2: common.cr2,
        cr3: common.cr3,
        cr4: common.cr4,
        cr8: common.cr8,
        efer: common.efer,
        apic_base: common.apic_base,
        interrupt_bitmap: [0; 4],
    };
    fd.set_sregs(&old).map_err(errno)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn segments_survive(base: u64, limit: u32, selector: u16, rights: u16, unusable: bool) {
            let original = Segment { selector, base, limit, rights: rights & 0xf0ff, unusable };
            prop_assert_eq!(segment(&kernel_segment(&original)), original);
        }
    }
}
