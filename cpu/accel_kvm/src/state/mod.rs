//! Between KVM's structures and the neutral state.

mod events;
mod lapic;
mod msrs;
mod registers;
mod xsave;

pub(crate) use msrs::{TSC, host_microcode, saved_msrs, set_microcode};
pub(crate) use xsave::Layout as XsaveLayout;

use crate::error::{errno, host};
use accel::{AccelError, MpState, X86State};
use clock::Nanos;
use kvm_bindings as kb;
use kvm_ioctls::VcpuFd;
use lapic::Timer;
use msrs::TSC_DEADLINE;
use std::io;

type Host<T> = Result<T, AccelError>;

/// A vCPU of the kernel's, and that part of its state that the kernel does not keep.
pub(crate) struct KernelVcpu {
    pub(crate) id: u32,
    pub(crate) fd: VcpuFd,
    /// The vector of the 8259 pair that was last handed to the kernel.
    pub(crate) offered: Option<u8>,
    /// Whether the last run ended with a window for the 8259 pair's interrupts.
    pub(crate) ready_for_interrupt: bool,
    has_sregs2: bool,
    xsave: XsaveLayout,
    /// The MSRs that are saved.
    msrs: Vec<u32>,
    /// What the APIC's timer is up to; while the vCPU does not run, the kernel's is switched off.
    timer: Timer,
    power_on: Option<Box<X86State>>,
}

impl KernelVcpu {
    /// The vCPU `id`, which is as the kernel made it. Of the MSRs `msrs` those are saved that it has.
    pub(crate) fn new(id: u32, fd: VcpuFd, xsave: &XsaveLayout, has_sregs2: bool, msrs: &[u32]) -> Self {
        let msrs = msrs::readable_msrs(&fd, msrs);
        Self {
            id,
            fd,
            offered: None,
            ready_for_interrupt: false,
            has_sregs2,
            xsave: xsave.clone(),
            msrs,
            timer: Timer::default(),
            power_on: None,
        }
    }

    /// The state after power-on, once it was set.
    pub(crate) fn power_on(&self) -> Option<&X86State> {
        self.power_on.as_deref()
    }

    /// Sets the state after power-on.
    pub(crate) fn set_power_on(&mut self, state: X86State) {
        self.power_on = Some(Box::new(state));
    }

    /// Reads one MSR.
    pub(crate) fn msr(&self, index: u32) -> io::Result<u64> {
        msrs::read_msr(&self.fd, index)
    }

    /// Writes one MSR.
    pub(crate) fn set_msr(&self, index: u32, value: u64) -> io::Result<()> {
        msrs::write_msr(&self.fd, index, value)
    }

    /// Switches the kernel's APIC timer off at `now`.
    pub(crate) fn stop_timer(&mut self, now: Nanos) -> io::Result<()> {
        self.timer = lapic::stop_timer(&self.fd, now)?;
        Ok(())
    }

    /// Has the kernel's APIC timer go on at `now`. The time-stamp counter must run already; it is `ahead` of what the
    /// timer's deadline was set by.
    pub(crate) fn start_timer(&mut self, now: Nanos, ahead: u64) -> io::Result<()> {
        let timer = match std::mem::take(&mut self.timer) {
            Timer::Deadline(deadline) => Timer::Deadline(deadline.wrapping_add(ahead)),
            other => other,
        };
        lapic::start_timer(&self.fd, timer, now)
    }

    /// The 8259 pair's interrupt, if the kernel was handed it and has not delivered it: it tells nobody of it
    /// then. It was handed over when interrupts were on, so that it was delivered if they are off.
    fn offered(&self, regs: &kb::kvm_regs, events: &kb::kvm_vcpu_events) -> Option<u8> {
        let vector = self.offered?;
        (events::takes_interrupts(regs, events) && !self.ready_for_interrupt).then_some(vector)
    }
}

/// The neutral state of a vCPU that does not run: without the counter, whose time the VM has, and without the
/// level of the 8259 pair's output.
pub(crate) fn save(vcpu: &KernelVcpu) -> Host<X86State> {
    let fd = &vcpu.fd;
    let failed = host("a vCPU's state");
    // Asking for this has the kernel deal with INITs and SIPIs, so it comes before all else.
    let mp_state = fd.get_mp_state().map_err(errno).map_err(&failed)?;
    let regs = fd.get_regs().map_err(errno).map_err(&failed)?;
    let sregs = registers::sregs(fd, vcpu.has_sregs2).map_err(&failed)?;
    let debug = fd.get_debug_regs().map_err(errno).map_err(&failed)?;
    let xcrs = match fd.get_xcrs() {
        // The host has no XSAVE, nor has the guest.
        Err(error) if error.errno() == libc::EINVAL => kb::kvm_xcrs::default(),
        other => other.map_err(errno).map_err(&failed)?,
    };
    let area = fd.get_xsave().map_err(errno).map_err(&failed)?;
    let kernel_events = fd.get_vcpu_events().map_err(errno).map_err(&failed)?;
    let kernel_lapic = fd.get_lapic().map_err(errno).map_err(&failed)?;
    let mut events = events::save(&kernel_events, mp_state);
    if events.interrupt.is_none() {
        events.interrupt = vcpu.offered(&regs, &kernel_events);
    }
    let lapic = lapic::save(&kernel_lapic, sregs.apic_base, &vcpu.timer);
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
        msrs: msrs::read_msrs(fd, &vcpu.msrs).map_err(&failed)?,
        fpu: xsave::save(&area, &vcpu.xsave),
        events,
        lapic,
        tsc: 0,
        tsc_time: 0,
        svm: None,
    };
    state.msrs.sort_unstable();
    Ok(state)
}

/// Takes over a state, but for what [`save`] leaves out. Gives the vectors of level-triggered interrupts whose ends
/// are to be reported.
pub(crate) fn restore(vcpu: &mut KernelVcpu, state: &X86State) -> Host<Vec<u8>> {
    let id = vcpu.id;
    let bad = |field: &'static str| {
        move |error: io::Error| AccelError::BadState { id, field, reason: format!("refused by KVM: {error}") }
    };
    let not = |field: &'static str, reason: String| AccelError::BadState { id, field, reason };
    state.check().map_err(|(field, reason)| not(field, reason))?;
    if state.svm.is_some() {
        return Err(not("svm", "guests of guests are not offered under KVM".into()));
    }
    if state.lapic.id != id {
        return Err(not("lapic", format!("of APIC {}, and this is APIC {id}", state.lapic.id)));
    }
    vcpu.offered = None;
    // A vCPU that waits for a SIPI takes no state; and the local APIC's mode decides what its registers mean.
    set_mp_state(&vcpu.fd, kb::KVM_MP_STATE_RUNNABLE).map_err(bad("events"))?;
    registers::set_sregs(&vcpu.fd, vcpu.has_sregs2, state)
        .map_err(bad("cr0 to cr4, efer, segments or apic_base"))?;
    set_xcr0(&vcpu.fd, state.xcr0).map_err(bad("xcr0"))?;
    let area = xsave::load(&state.fpu, &vcpu.xsave).map_err(|reason| not("fpu", reason))?;
    // SAFETY: no feature is in use whose state is beyond the 4096 bytes of this structure.
    unsafe { vcpu.fd.set_xsave(&area) }.map_err(errno).map_err(bad("fpu"))?;
    // An MSR that is missing is as after power-on.
    let power_on = |msr: &u32| vcpu.power_on()?.msr(*msr);
    let known = |msr: &u32| state.msr(*msr).or_else(|| power_on(msr)).map(|value| (*msr, value));
    let wanted: Vec<(u32, u64)> = vcpu.msrs.iter().filter_map(known).collect();
    msrs::restore(&vcpu.fd, &wanted).map_err(|reason| not("msrs", reason))?;
    vcpu.timer = lapic::timer_of(&state.lapic);
    vcpu.fd.set_lapic(&lapic::load(&state.lapic)).map_err(errno).map_err(bad("lapic"))?;
    vcpu.set_msr(TSC_DEADLINE, 0).map_err(bad("lapic"))?;
    let debug = kb::kvm_debugregs {
        db: state.debug_addresses,
        dr6: state.dr6 & 0xffff_ffff | 0xffff_0ff0,
        dr7: state.dr7 & 0xffff_ffff | 0x400,
        ..kb::kvm_debugregs::default()
    };
    vcpu.fd.set_debug_regs(&debug).map_err(errno).map_err(bad("debug_addresses"))?;
    vcpu.fd.set_regs(&registers::kernel_general(state)).map_err(errno).map_err(bad("regs"))?;
    vcpu.fd.set_vcpu_events(&events::load(&state.events)).map_err(errno).map_err(bad("events"))?;
    set_mp_state(&vcpu.fd, events::mp_state(&state.events)).map_err(bad("events"))?;
    if state.events.nmi_pending && state.events.mp_state == MpState::WaitForSipi {
        tracing::debug!("vCPU {id} waits for a SIPI with an NMI pending");
    }
    Ok(lapic::level_vectors(&state.lapic))
}

fn set_mp_state(fd: &VcpuFd, mp_state: u32) -> io::Result<()> {
    fd.set_mp_state(kb::kvm_mp_state { mp_state }).map_err(errno)
}

fn set_xcr0(fd: &VcpuFd, value: u64) -> io::Result<()> {
    let mut xcrs = kb::kvm_xcrs { nr_xcrs: 1, ..kb::kvm_xcrs::default() };
    xcrs.xcrs[0].value = value | 1;
    match fd.set_xcrs(&xcrs) {
        // A vCPU without XSAVE has only this value.
        Err(_) if value | 1 == 1 => Ok(()),
        other => other.map_err(errno),
    }
}
