//! Between KVM's structures and the neutral state.

mod events;
mod lapic;
mod msrs;
mod registers;
mod xsave;

pub(crate) use lapic::{Timer, start_timer, stop_timer};
pub(crate) use msrs::{read_msrs, readable_msrs, saved_msrs, write_msrs};
pub(crate) use xsave::Layout as XsaveLayout;

use crate::vcpu::{KvmVcpu, MSR_TSC_DEADLINE};
use accel::{AccelError, MpState, X86State};
use kvm_bindings as kb;
use std::io;

type Host<T> = Result<T, AccelError>;

fn host(what: &'static str) -> impl Fn(io::Error) -> AccelError {
    move |source| AccelError::Host { what, source }
}

fn errno(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

/// The neutral state of a vCPU that does not run.
pub(crate) fn save(vcpu: &KvmVcpu) -> Host<X86State> {
    let fd = &vcpu.fd;
    let failed = host("a vCPU's state");
    // Asking for this has the kernel deal with INITs and SIPIs, so it comes before all else.
    let mp_state = fd.get_mp_state().map_err(errno).map_err(&failed)?;
    let regs = fd.get_regs().map_err(errno).map_err(&failed)?;
    let sregs = registers::sregs(vcpu).map_err(&failed)?;
    let debug = fd.get_debug_regs().map_err(errno).map_err(&failed)?;
    let xcrs = fd.get_xcrs().map_err(errno).map_err(&failed)?;
    let area = fd.get_xsave().map_err(errno).map_err(&failed)?;
    let kernel_events = fd.get_vcpu_events().map_err(errno).map_err(&failed)?;
    let kernel_lapic = fd.get_lapic().map_err(errno).map_err(&failed)?;
    let tsc_time = vcpu.vm.time.clock().now();
    let mut events = events::save(&kernel_events, mp_state);
    if events.interrupt.is_none() {
        events.interrupt = events::offered(vcpu, &regs, &kernel_events);
    }
    let mut lapic = lapic::save(&kernel_lapic, sregs.apic_base, &vcpu.timer);
    lapic.lint0_level = vcpu.vm.ext_int.load(std::sync::atomic::Ordering::SeqCst);
    let used = xcrs.xcrs[..(xcrs.nr_xcrs as usize).min(xcrs.xcrs.len())].iter();
    let mut state = X86State {
        regs: registers::general(&regs),
        rip: regs.rip,
        rflags: regs.rflags,
        segments: [&sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs].map(registers::segment),
        ldtr: registers::segment(&sregs.ldt),
        tr: registers::segment(&sregs.tr),
        gdtr: registers::table(&sregs.gdt),
        idtr: registers::table(&sregs.idt),
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        xcr0: used.clone().find(|xcr| xcr.xcr == 0).map_or(1, |xcr| xcr.value),
        efer: sregs.efer,
        debug_addresses: debug.db,
        dr6: debug.dr6,
        dr7: debug.dr7,
        pdpte: sregs.pdptrs,
        msrs: read_msrs(fd, &vcpu.msrs).map_err(&failed)?,
        fpu: xsave::save(&area, vcpu.vm.cpu.xsave_layout()),
        events,
        lapic,
        tsc: vcpu.vm.time.now().wrapping_add(vcpu.tsc_delta),
        tsc_time,
    };
    state.msrs.sort_unstable();
    Ok(state)
}

/// Takes over a state whose counter differs from the VM's by `tsc_delta`.
pub(crate) fn restore(vcpu: &mut KvmVcpu, state: &X86State, tsc_delta: u64) -> Host<()> {
    let id = vcpu.id;
    let bad = |field: &'static str| {
        move |error: io::Error| AccelError::BadState { id, field, reason: format!("refused by KVM: {error}") }
    };
    let not = |field: &'static str, reason: String| AccelError::BadState { id, field, reason };
    state.check().map_err(|(field, reason)| not(field, reason))?;
    if state.lapic.id != id {
        return Err(not("lapic", format!("of APIC {}, and this is APIC {id}", state.lapic.id)));
    }
    vcpu.offered = None;
    // A vCPU that waits for a SIPI takes no state; and the local APIC's mode decides what its registers mean.
    set_mp_state(vcpu, kb::KVM_MP_STATE_RUNNABLE).map_err(bad("events"))?;
    registers::set_sregs(vcpu, state).map_err(bad("cr0 to cr4, efer, segments or apic_base"))?;
    set_xcr0(vcpu, state.xcr0).map_err(bad("xcr0"))?;
    let area = xsave::load(&state.fpu, vcpu.vm.cpu.xsave_layout()).map_err(|reason| not("fpu", reason))?;
    // SAFETY: no feature is in use whose state is beyond the 4096 bytes of this structure.
    unsafe { vcpu.fd.set_xsave(&area) }.map_err(errno).map_err(bad("fpu"))?;
    msrs::restore(vcpu, state).map_err(|reason| not("msrs", reason))?;
    let now = state.tsc_time;
    vcpu.timer = lapic::timer_of(&state.lapic);
    vcpu.fd.set_lapic(&lapic::load(&state.lapic, now)).map_err(errno).map_err(bad("lapic"))?;
    vcpu.set_msr(MSR_TSC_DEADLINE, 0).map_err(bad("lapic"))?;
    for vector in lapic::level_vectors(&state.lapic) {
        vcpu.vm.expect_eoi(id, vector).map_err(host("a route for an interrupt"))?;
    }
    vcpu.vm.ext_int.store(state.lapic.lint0_level, std::sync::atomic::Ordering::SeqCst);
    let debug = kb::kvm_debugregs {
        db: state.debug_addresses,
        dr6: state.dr6 & 0xffff_ffff | 0xffff_0ff0,
        dr7: state.dr7 & 0xffff_ffff | 0x400,
        ..kb::kvm_debugregs::default()
    };
    vcpu.fd.set_debug_regs(&debug).map_err(errno).map_err(bad("debug_addresses"))?;
    vcpu.fd.set_regs(&registers::kernel_general(state)).map_err(errno).map_err(bad("regs"))?;
    vcpu.fd.set_vcpu_events(&events::load(&state.events)).map_err(errno).map_err(bad("events"))?;
    set_mp_state(vcpu, events::mp_state(&state.events)).map_err(bad("events"))?;
    if state.events.nmi_pending && state.events.mp_state == MpState::WaitForSipi {
        tracing::debug!("vCPU {id} waits for a SIPI with an NMI pending");
    }
    vcpu.tsc_delta = tsc_delta;
    Ok(())
}

fn set_mp_state(vcpu: &KvmVcpu, mp_state: u32) -> io::Result<()> {
    vcpu.fd.set_mp_state(kb::kvm_mp_state { mp_state }).map_err(errno)
}

fn set_xcr0(vcpu: &KvmVcpu, value: u64) -> io::Result<()> {
    let mut xcrs = kb::kvm_xcrs { nr_xcrs: 1, ..kb::kvm_xcrs::default() };
    xcrs.xcrs[0].value = value | 1;
    match vcpu.fd.set_xcrs(&xcrs) {
        // A vCPU without XSAVE has only this value.
        Err(_) if value | 1 == 1 => Ok(()),
        other => other.map_err(errno),
    }
}
