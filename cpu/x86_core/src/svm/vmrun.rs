//! VMRUN: from the host to a guest (AMD APM volume 2, 15.5.1).

use super::vmcb::{Vmcb, at};
use super::vmexit::STEP;
use super::{Cached, Control, Exit, HostState, VirtualInterrupts, code};
use crate::cpuid::feature;
use crate::mmu::canonical_base;
use crate::{Core, Flow, Seg, Segment, Trap, cr0, cr4, efer, flags, reg, shadow, vector};
use std::sync::atomic::Ordering;

/// What VMRUN loads, before it is known to be good.
struct GuestState {
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    dr6: u64,
    dr7: u64,
    pat: u64,
    /// ES, CS, SS, DS.
    segments: [Segment; 4],
}

impl GuestState {
    fn read(vmcb: Vmcb) -> Self {
        Self {
            cr0: vmcb.read(at::CR0),
            cr3: vmcb.read(at::CR3),
            cr4: vmcb.read(at::CR4),
            efer: vmcb.read(at::EFER),
            dr6: vmcb.read(at::DR6),
            dr7: vmcb.read(at::DR7),
            pat: vmcb.read(at::PAT),
            segments: [0, 1, 2, 3].map(|index| vmcb.read_segment(at::ES + 16 * index)),
        }
    }

    /// Whether IA-32e mode is active.
    fn long(&self) -> bool {
        self.efer & efer::LME != 0 && self.cr0 & cr0::PG != 0
    }
}

impl Control {
    fn read(vmcb: Vmcb) -> Self {
        let pause_filter = vmcb.read(at::PAUSE_COUNT);
        Self {
            intercepts: [0, 1, 2, 3, 4, 5].map(|word| vmcb.read(at::INTERCEPTS + 4 * word)),
            pause_filter,
            pauses_left: pause_filter,
            pause_threshold: vmcb.read(at::PAUSE_THRESHOLD),
            last_pause: 0,
            iopm: vmcb.read::<u64>(at::IOPM) & !0xfff,
            msrpm: vmcb.read::<u64>(at::MSRPM) & !0xfff,
            tsc_offset: vmcb.read(at::TSC_OFFSET),
            asid: vmcb.read(at::ASID),
            interrupts: VirtualInterrupts(vmcb.read(at::INTERRUPTS)),
            nested_paging: vmcb.read::<u64>(at::NESTED_CONTROL) & 1 != 0,
            ncr3: vmcb.read(at::NCR3),
        }
    }

    fn intercepts(&self, code: u64) -> bool {
        self.intercepts[(code / 32) as usize] >> (code % 32) & 1 != 0
    }
}

impl Core<'_> {
    /// Runs the guest of the VMCB at `pa`, which is the address of a page; `next_rip` is where the host goes on.
    pub(super) fn vmrun(&mut self, pa: u64, next_rip: u64) -> Result<Flow, Trap> {
        let vmcb = Vmcb::new(self, pa);
        let (control, guest) = (Control::read(vmcb), GuestState::read(vmcb));
        let injected: u64 = vmcb.read(at::EVENT_INJECTION);
        if !(self.control_makes_sense(&control, &guest)
            && self.state_makes_sense(&guest)
            && self.pointers_make_sense(&control, &guest)
            && super::events::may_inject(injected))
        {
            return self.refuse(vmcb, next_rip);
        }
        self.cpu.svm.host = self.host_state(next_rip);
        self.cpu.svm.vmcb = pa;
        self.cpu.svm.control = control;
        self.cpu.svm.guest = true;
        self.cpu.svm.gif = true;
        self.cpu.svm.delivering = 0;
        self.load_guest(vmcb, &guest);
        self.flush_for_guest(vmcb.read::<u32>(at::TLB_CONTROL) & 0xff);
        self.mode_changed();
        // The run loop is to look at what interrupts are now.
        self.cpu.exit_request.store(1, Ordering::Relaxed);
        self.inject(injected, vmcb.read(at::NEXT_RIP))?;
        Ok(Flow::Jump)
    }

    /// A #VMEXIT before anything of the guest was loaded.
    fn refuse(&mut self, vmcb: Vmcb, next_rip: u64) -> Result<Flow, Trap> {
        let Exit { code, info1, info2, .. } = Exit::plain(code::INVALID);
        vmcb.write(at::EXIT_CODE, code);
        vmcb.write(at::EXIT_INFO1, info1);
        vmcb.write(at::EXIT_INFO2, info2);
        vmcb.write(at::EXIT_INT_INFO, 0u64);
        vmcb.written(self);
        self.cpu.svm.gif = false;
        self.cpu.rip = next_rip;
        self.cpu.dr[7] = 0x400;
        self.cpu.exit_request.store(1, Ordering::Relaxed);
        self.mode_changed();
        if self.cpu.rflags & flags::TF != 0 {
            self.cpu.dr[6] |= STEP;
            return Err(Trap::plain(vector::DB));
        }
        Ok(Flow::Jump)
    }

    fn host_state(&self, next_rip: u64) -> HostState {
        let cpu = &*self.cpu;
        HostState {
            segments: [cpu.segments[0], cpu.segments[1], cpu.segments[2], cpu.segments[3]],
            gdtr: cpu.gdtr,
            idtr: cpu.idtr,
            efer: cpu.msrs.efer,
            cr0: cpu.cr0,
            cr3: cpu.cr3,
            cr4: cpu.cr4,
            // It is held off by RF no more when it goes on.
            rflags: cpu.rflags & !flags::RF,
            rip: next_rip,
            rsp: cpu.regs[reg::RSP],
            rax: cpu.regs[reg::RAX],
            pdpte: cpu.pdpte,
            pat: cpu.msrs.pat,
        }
    }

    fn control_makes_sense(&self, control: &Control, guest: &GuestState) -> bool {
        let physical = self.cpu.model.physical_mask();
        // The end, which is one byte into the third page of the map of ports, must be an address itself.
        let fits = |map: u64, len: u64| map.checked_add(len).is_some_and(|end| end & !physical == 0);
        let nested = !control.nested_paging
            || (self.cpu.cr0 & cr0::PG != 0
                && control.ncr3 & !physical == 0
                && guest.pat.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7)));
        control.intercepts(code::VMRUN)
            && control.asid != 0
            && (!control.intercepts(code::MSR) || fits(control.msrpm, 0x2000))
            && (!control.intercepts(code::IOIO) || fits(control.iopm, 0x2001))
            && nested
    }

    /// The canonicalization and consistency checks of the guest's state.
    fn state_makes_sense(&self, guest: &GuestState) -> bool {
        let code = guest.segments[1].attributes;
        let cache = guest.cr0 & (cr0::CD | cr0::NW);
        let (long_wanted, long) = (guest.efer & efer::LME != 0, guest.long());
        let cs_both = code & Segment::LONG != 0 && code & Segment::BIG != 0;
        guest.efer & efer::SVME != 0
            && guest.efer & !self.supported_efer() == 0
            && cache != cr0::NW
            && guest.cr0 >> 32 == 0
            && guest.cr4 & !self.supported_cr4() == 0
            && guest.dr6 >> 32 == 0
            && guest.dr7 >> 32 == 0
            && (!long_wanted || self.cpu.model.has(feature::LM))
            && !(long && (guest.cr4 & cr4::PAE == 0 || guest.cr0 & cr0::PE == 0 || cs_both))
            && guest.cr3 & !self.cpu.model.physical_mask() == 0
    }

    /// Page-directory pointers of PAE paging are loaded from the host's memory, unless there is nested paging, and are
    /// looked at as when CR3 is loaded.
    fn pointers_make_sense(&self, control: &Control, guest: &GuestState) -> bool {
        let pae = guest.cr0 & cr0::PG != 0 && guest.cr4 & cr4::PAE != 0 && !guest.long();
        let sound = |pointer: &u64| self.is_page_directory_pointer(*pointer);
        !pae || control.nested_paging || self.page_directory_pointers(guest.cr3).iter().all(sound)
    }

    fn load_guest(&mut self, vmcb: Vmcb, guest: &GuestState) {
        let long = guest.long();
        let tsc_offset = self.cpu.svm.control.tsc_offset;
        let cpu = &mut *self.cpu;
        cpu.cr0 = guest.cr0 & cr0::EXIST | cr0::ET;
        cpu.cr2 = vmcb.read(at::CR2);
        cpu.cr3 = guest.cr3;
        cpu.cr4 = guest.cr4;
        cpu.msrs.efer = guest.efer & !efer::LMA | if long { efer::LMA } else { 0 };
        cpu.segments[..4].copy_from_slice(&guest.segments);
        for index in 0..4 {
            let base = cpu.segments[index].base;
            cpu.segments[index].base =
                if long { canonical_base(&cpu.model, base) } else { base & 0xffff_ffff };
        }
        cpu.gdtr = vmcb.read_table(at::GDTR);
        cpu.idtr = vmcb.read_table(at::IDTR);
        cpu.gdtr.base = canonical_base(&cpu.model, cpu.gdtr.base);
        cpu.idtr.base = canonical_base(&cpu.model, cpu.idtr.base);
        cpu.dr[6] = guest.dr6 & 0xe00f | 0xffff_0ff0;
        cpu.dr[7] = guest.dr7 & 0xffff_2bff | 0x400;
        let mut rflags = vmcb.read::<u64>(at::RFLAGS) & flags::EXIST | flags::FIXED;
        if long || cpu.cr0 & cr0::PE == 0 {
            rflags &= !flags::VM;
        }
        cpu.rflags = rflags;
        cpu.cpl = match (cpu.cr0 & cr0::PE != 0, rflags & flags::VM != 0) {
            (false, _) => 0,
            (true, true) => 3,
            (true, false) => vmcb.read::<u8>(at::CPL) & 3,
        };
        cpu.rip = vmcb.read(at::RIP);
        if !(long && cpu.segments[Seg::Cs as usize].attributes & Segment::LONG != 0) {
            cpu.rip &= 0xffff_ffff;
        }
        cpu.regs[reg::RSP] = vmcb.read(at::RSP);
        cpu.regs[reg::RAX] = vmcb.read(at::RAX);
        let shadowed = vmcb.read::<u64>(at::INTERRUPT_SHADOW) & 1 != 0;
        cpu.interrupt_shadow = cpu.interrupt_shadow & shadow::NMI | if shadowed { shadow::STI } else { 0 };
        cpu.halted = false;
        cpu.breakpoints_met = 0;
        cpu.msrs.tsc_offset = cpu.msrs.tsc_offset.wrapping_add(tsc_offset);
        if cpu.svm.control.nested_paging {
            cpu.msrs.pat = guest.pat;
        } else if cpu.cr0 & cr0::PG != 0 && cpu.cr4 & cr4::PAE != 0 && !long {
            self.cpu.pdpte = self.page_directory_pointers(self.cpu.cr3);
        }
    }

    /// What the guest's translations depend on.
    pub(super) fn cached_tag(&self) -> Cached {
        let (cpu, svm) = (&*self.cpu, &self.cpu.svm);
        Cached {
            asid: svm.control.asid,
            nested_paging: svm.control.nested_paging,
            ncr3: svm.control.ncr3,
            cr0: cpu.cr0,
            cr3: cpu.cr3,
            cr4: cpu.cr4,
            efer: cpu.msrs.efer,
            host_cr4: svm.host.cr4,
            host_efer: svm.host.efer,
        }
    }

    /// Drops translations as TLB_CONTROL says, and those of another guest or of other tables than those that are
    /// there (AMD APM volume 2, 15.16).
    fn flush_for_guest(&mut self, control: u32) {
        const FLUSH_ALL: u32 = 1;
        const FLUSH_LOCAL: u32 = 7;
        let tag = self.cached_tag();
        if control == FLUSH_ALL {
            self.flush_all_tlbs();
        } else if control == FLUSH_LOCAL && tag == self.cpu.svm.cached {
            self.cpu.tlb.nested.clear();
            self.flush_tlb(true);
        } else if control != 0 || tag != self.cpu.svm.cached {
            self.cpu.tlb.nested.clear();
            self.flush_tlb(false);
        }
    }
}
