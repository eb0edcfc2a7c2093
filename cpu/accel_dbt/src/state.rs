//! Between the processor and the neutral state.

mod svm;

use crate::events::Events;
use accel::{EventState, FpuState, LapicState, MpState, X86State};
use clock::Nanos;
use x86_core::cpuid::{CpuModel, feature};
use x86_core::{Core, Cpu, Msrs, Segment, TableRegister, VecReg, cr0, efer, flags, shadow};

/// Bits of MXCSR that exist; loading others would fault on the host.
const MXCSR_VALID: u32 = 0xffff;
/// Bits of XCR0: upper halves of YMM registers, and of ZMM registers.
const YMM: u64 = 1 << 2;
const ZMM: u64 = 1 << 6;
/// Bits of EFER that exist here.
const EFER_VALID: u64 =
    efer::SCE | efer::LME | efer::LMA | efer::NXE | efer::SVME | efer::FFXSR | efer::AUTOIBRS;

/// Calls `each` with the number and the place of every MSR that stands in [`X86State::msrs`].
fn for_each_msr(msrs: &mut Msrs, each: &mut dyn FnMut(u32, &mut u64)) {
    let Msrs {
        efer: _,
        star,
        lstar,
        cstar,
        sfmask,
        kernel_gs_base,
        sysenter_cs,
        sysenter_esp,
        sysenter_eip,
        pat,
        tsc_aux,
        tsc_offset: _,
        tsc_adjust,
        misc_enable,
        spec_ctrl,
        debugctl,
        mtrr_def_type,
        mtrr_fixed,
        mtrr_variable,
        mcg_status,
        mcg_ctl,
        mc_banks,
        xss,
        pkrs,
        last_branch,
    } = msrs;
    each(0x3b, tsc_adjust);
    each(0x48, spec_ctrl);
    each(0x174, sysenter_cs);
    each(0x175, sysenter_esp);
    each(0x176, sysenter_eip);
    each(0x17a, mcg_status);
    each(0x17b, mcg_ctl);
    each(0x1a0, misc_enable);
    each(0x1d9, debugctl);
    for (number, value) in (0x1db..).zip(last_branch) {
        each(number, value);
    }
    for (number, value) in (0x200..).zip(mtrr_variable.as_flattened_mut()) {
        each(number, value);
    }
    let fixed = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
    for (number, value) in fixed.into_iter().zip(mtrr_fixed) {
        each(number, value);
    }
    each(0x277, pat);
    each(0x2ff, mtrr_def_type);
    for (number, value) in (0x400..).zip(mc_banks.as_flattened_mut()) {
        each(number, value);
    }
    each(0x6e1, pkrs);
    each(0xda0, xss);
    each(0xc000_0081, star);
    each(0xc000_0082, lstar);
    each(0xc000_0083, cstar);
    each(0xc000_0084, sfmask);
    each(0xc000_0102, kernel_gs_base);
    each(0xc000_0103, tsc_aux);
}

fn segment_out(segment: &Segment) -> accel::Segment {
    accel::Segment {
        selector: segment.selector,
        base: segment.base,
        limit: segment.limit,
        rights: segment.attributes as u16 & 0xf0ff,
        unusable: segment.attributes & Segment::UNUSABLE != 0,
    }
}

fn segment_in(segment: &accel::Segment) -> Segment {
    let unusable = if segment.unusable { Segment::UNUSABLE } else { 0 };
    Segment {
        base: segment.base,
        limit: segment.limit,
        attributes: u32::from(segment.rights & 0xf0ff) | unusable,
        selector: segment.selector,
    }
}

fn table_out(table: &TableRegister) -> accel::TableRegister {
    accel::TableRegister { base: table.base, limit: table.limit }
}

fn table_in(table: &accel::TableRegister) -> TableRegister {
    TableRegister { base: table.base, limit: table.limit }
}

fn fpu_out(cpu: &Cpu) -> FpuState {
    let area = &cpu.x87.0;
    let word = |at: usize| u16::from_le_bytes([area[at], area[at + 1]]);
    let quad = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| area[at + byte]));
    let vector = |register: &VecReg| -> [u64; 8] {
        std::array::from_fn(|n| u64::from_le_bytes(std::array::from_fn(|byte| register.0[n * 8 + byte])))
    };
    let mut vectors: Vec<[u64; 8]> = cpu.vectors.iter().map(vector).collect();
    if vectors[16..].iter().flatten().all(|word| *word == 0) {
        vectors.truncate(16);
    }
    FpuState {
        control: word(0),
        status: word(2),
        tag: area[4],
        opcode: word(6),
        instruction_pointer: quad(8),
        data_pointer: quad(16),
        st: std::array::from_fn(|n| std::array::from_fn(|byte| area[32 + 16 * n + byte])),
        mxcsr: cpu.mxcsr,
        vectors,
        opmask: cpu.opmask,
        pkru: cpu.pkru,
    }
}

fn fpu_in(cpu: &mut Cpu, state: &FpuState) {
    let area = &mut cpu.x87.0;
    *area = [0; 512];
    area[0..2].copy_from_slice(&state.control.to_le_bytes());
    area[2..4].copy_from_slice(&state.status.to_le_bytes());
    area[4] = state.tag;
    area[6..8].copy_from_slice(&(state.opcode & 0x7ff).to_le_bytes());
    area[8..16].copy_from_slice(&state.instruction_pointer.to_le_bytes());
    area[16..24].copy_from_slice(&state.data_pointer.to_le_bytes());
    area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    for (n, register) in state.st.iter().enumerate() {
        area[32 + 16 * n..][..10].copy_from_slice(register);
    }
    cpu.mxcsr = state.mxcsr & MXCSR_VALID;
    cpu.pkru = state.pkru;
    cpu.vectors = [VecReg::default(); 32];
    for (register, value) in cpu.vectors.iter_mut().zip(&state.vectors) {
        for (bytes, word) in register.0.chunks_exact_mut(8).zip(value) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }
    cpu.opmask = state.opmask;
    cpu.find_vector_width();
}

/// The neutral state of a processor whose counter reads `tsc` at `tsc_time`.
pub(crate) fn save(cpu: &Cpu, events: &Events, lapic: LapicState, tsc: u64, tsc_time: Nanos) -> X86State {
    let mut segments = cpu.segments;
    // The privilege level is SS's in the neutral state.
    let stack = &mut segments[X86State::SS];
    stack.attributes = stack.attributes & !0x60 | u32::from(cpu.cpl) << 5;
    let mut msrs = Vec::new();
    for_each_msr(&mut cpu.msrs.clone(), &mut |number, value| msrs.push((number, *value)));
    let mp_state = match (events.waiting, cpu.halted) {
        (true, _) => MpState::WaitForSipi,
        (false, true) => MpState::Halted,
        (false, false) => MpState::Runnable,
    };
    X86State {
        regs: cpu.regs,
        rip: cpu.rip,
        rflags: cpu.rflags,
        segments: segments.each_ref().map(segment_out),
        ldtr: segment_out(&cpu.ldtr),
        tr: segment_out(&cpu.tr),
        gdtr: table_out(&cpu.gdtr),
        idtr: table_out(&cpu.idtr),
        cr0: cpu.cr0,
        cr2: cpu.cr2,
        cr3: cpu.cr3,
        cr4: cpu.cr4,
        xcr0: cpu.xcr0,
        efer: cpu.msrs.efer,
        debug_addresses: [cpu.dr[0], cpu.dr[1], cpu.dr[2], cpu.dr[3]],
        dr6: cpu.dr[6],
        dr7: cpu.dr[7],
        pdpte: cpu.pdpte,
        msrs,
        fpu: fpu_out(cpu),
        events: EventState {
            mp_state,
            sti_shadow: cpu.interrupt_shadow & shadow::STI != 0,
            mov_ss_shadow: cpu.interrupt_shadow & shadow::MOV_SS != 0,
            nmi_masked: cpu.interrupt_shadow & shadow::NMI != 0,
            nmi_pending: events.nmis > 0,
            init_pending: events.init,
            sipi_pending: events.sipi,
            exception: events.exception,
            interrupt: events.interrupt,
        },
        lapic,
        tsc,
        tsc_time,
        svm: svm::save(&cpu.svm),
    }
}

/// Says what is wrong with a state, if it is none of a processor of that model: the field and the reason.
pub(crate) fn check(state: &X86State, model: &CpuModel) -> Result<(), (&'static str, String)> {
    let guest = state.svm.as_ref().and_then(|svm| svm.guest.as_ref());
    for efer in [Some(state.efer), guest.map(|guest| guest.host.efer)].into_iter().flatten() {
        if efer & !EFER_VALID != 0 {
            return Err(("efer", format!("{efer:#x}")));
        }
    }
    if state.svm.is_some() && !model.has(feature::SVM) {
        return Err(("svm", "of a processor that has it, which this one has not".into()));
    }
    if !model.xcr0_valid(state.xcr0 | 1) {
        return Err(("xcr0", format!("{:#x}", state.xcr0)));
    }
    let words = match model.xcr0_mask() {
        mask if mask & ZMM != 0 => 8,
        mask if mask & YMM != 0 => 4,
        _ => 2,
    };
    let zero = |words: &[u64]| words.iter().all(|word| *word == 0);
    let (low, high) = state.fpu.vectors.split_at(state.fpu.vectors.len().min(16));
    if low.iter().any(|vector| !zero(&vector[words..]))
        || words < 8 && !high.iter().all(|vector| zero(vector))
    {
        return Err(("fpu.vectors", "of registers that are wider or more than the processor's".into()));
    }
    if words < 8 && state.fpu.opmask != [0; 8] {
        return Err(("fpu.opmask", "mask registers, which the processor lacks".into()));
    }
    state.check()
}

/// The events of a state.
pub(crate) fn events(state: &EventState) -> Events {
    Events {
        waiting: state.mp_state == MpState::WaitForSipi,
        smi: false,
        nmis: state.nmi_pending.into(),
        init: state.init_pending,
        sipi: state.sipi_pending,
        exception: state.exception,
        interrupt: state.interrupt,
    }
}

/// Takes over a state that [`check`] passed into a processor that was just reset.
pub(crate) fn load(core: &mut Core<'_>, state: &X86State, tsc_offset: u64) {
    let cpu = &mut *core.cpu;
    svm::load(&mut cpu.svm, state.svm.as_deref());
    cpu.regs = state.regs;
    cpu.rip = state.rip;
    cpu.segments = state.segments.each_ref().map(segment_in);
    cpu.ldtr = segment_in(&state.ldtr);
    cpu.tr = segment_in(&state.tr);
    cpu.gdtr = table_in(&state.gdtr);
    cpu.idtr = table_in(&state.idtr);
    cpu.cr0 = state.cr0 | cr0::ET;
    cpu.cr2 = state.cr2;
    cpu.cr3 = state.cr3;
    cpu.cr4 = state.cr4;
    cpu.xcr0 = state.xcr0 | 1;
    cpu.msrs.efer = state.efer;
    cpu.msrs.tsc_offset = tsc_offset;
    cpu.dr[..4].copy_from_slice(&state.debug_addresses);
    cpu.dr[6] = state.dr6 & 0xffff_ffff | 0xffff_0ff0;
    cpu.dr[7] = state.dr7 & 0xffff_ffff | 0x400;
    cpu.pdpte = state.pdpte;
    for_each_msr(&mut cpu.msrs, &mut |number, value| *value = state.msr(number).unwrap_or(*value));
    fpu_in(cpu, &state.fpu);
    cpu.cpl = match (state.cr0 & cr0::PE != 0, state.rflags & flags::VM != 0) {
        (false, _) => 0,
        (true, true) => 3,
        (true, false) => (state.segments[X86State::SS].rights >> 5 & 3) as u8,
    };
    let events = &state.events;
    let shadows = [
        (events.sti_shadow, shadow::STI),
        (events.mov_ss_shadow, shadow::MOV_SS),
        (events.nmi_masked, shadow::NMI),
    ];
    cpu.interrupt_shadow =
        shadows.into_iter().filter(|(on, _)| *on).fold(0, |shadows, (_, bit)| shadows | bit);
    cpu.halted = events.mp_state == MpState::Halted;
    core.set_rflags(state.rflags);
    core.flush_all_tlbs();
    core.mode_changed();
}

#[cfg(test)]
mod tests;
