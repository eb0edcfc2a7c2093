//! Between SVM's part of the processor and of the neutral state.

use super::{segment_in, segment_out, table_in, table_out};
use accel::{SvmGuestState, SvmHostState, SvmState};
use x86_core::svm::{Control, HostState, Svm, VirtualInterrupts};

/// The neutral state; nothing if it is as after reset.
pub(super) fn save(svm: &Svm) -> Option<Box<SvmState>> {
    let state = SvmState {
        vm_cr: svm.vm_cr,
        hsave: svm.hsave,
        gif: svm.gif,
        guest: svm.guest.then(|| guest_out(svm.vmcb, &svm.control, &svm.host)),
    };
    (state != SvmState::default()).then(|| Box::new(state))
}

/// Takes over a state into a processor that was just reset.
pub(super) fn load(svm: &mut Svm, state: Option<&SvmState>) {
    let Some(state) = state else { return };
    svm.vm_cr = state.vm_cr;
    svm.hsave = state.hsave;
    svm.gif = state.gif;
    if let Some(guest) = &state.guest {
        svm.guest = true;
        svm.vmcb = guest.vmcb;
        svm.control = control_in(guest);
        svm.host = host_in(&guest.host);
    }
}

fn guest_out(vmcb: u64, control: &Control, host: &HostState) -> SvmGuestState {
    // When the last PAUSE was is forgotten: the filter counts anew at worst.
    let Control {
        intercepts,
        pause_filter,
        pauses_left,
        pause_threshold,
        last_pause: _,
        iopm,
        msrpm,
        tsc_offset,
        asid,
        interrupts,
        nested_paging,
        ncr3,
    } = *control;
    SvmGuestState {
        vmcb,
        intercepts,
        pause_filter,
        pauses_left,
        pause_threshold,
        iopm,
        msrpm,
        tsc_offset,
        asid,
        interrupts: interrupts.0,
        nested_paging,
        ncr3,
        host: host_out(host),
    }
}

fn control_in(guest: &SvmGuestState) -> Control {
    Control {
        intercepts: guest.intercepts,
        pause_filter: guest.pause_filter,
        pauses_left: guest.pauses_left,
        pause_threshold: guest.pause_threshold,
        last_pause: 0,
        iopm: guest.iopm & !0xfff,
        msrpm: guest.msrpm & !0xfff,
        tsc_offset: guest.tsc_offset,
        asid: guest.asid,
        interrupts: VirtualInterrupts(guest.interrupts),
        nested_paging: guest.nested_paging,
        ncr3: guest.ncr3,
    }
}

fn host_out(host: &HostState) -> SvmHostState {
    let HostState { segments, gdtr, idtr, efer, cr0, cr3, cr4, rflags, rip, rsp, rax, pdpte, pat } = host;
    SvmHostState {
        segments: segments.each_ref().map(segment_out),
        gdtr: table_out(gdtr),
        idtr: table_out(idtr),
        efer: *efer,
        cr0: *cr0,
        cr3: *cr3,
        cr4: *cr4,
        rflags: *rflags,
        rip: *rip,
        rsp: *rsp,
        rax: *rax,
        pdpte: *pdpte,
        pat: *pat,
    }
}

fn host_in(host: &SvmHostState) -> HostState {
    HostState {
        segments: host.segments.each_ref().map(segment_in),
        gdtr: table_in(&host.gdtr),
        idtr: table_in(&host.idtr),
        efer: host.efer,
        cr0: host.cr0,
        cr3: host.cr3,
        cr4: host.cr4,
        // What VMRUN would have put aside.
        rflags: host.rflags & x86_core::flags::EXIST | x86_core::flags::FIXED,
        rip: host.rip,
        rsp: host.rsp,
        rax: host.rax,
        pdpte: host.pdpte,
        pat: host.pat,
    }
}
