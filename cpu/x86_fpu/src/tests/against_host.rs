//! Every instruction that has a stub, and most of the others, against the host.

use super::generate::{self, Form, Masks, Random};
use crate::{engine, execute, handles};
use iced_x86::{Code, Decoder, DecoderOptions, EncodingKind, Instruction};
use native_oracle::{End, Mode, NativeState, SCRATCH, SCRATCH_LEN, Tally};
use x86_core::testing::{self, Machine};
use x86_core::{Exception, Flow, Trap, cr4, flags, vector};

/// Guest physical address of the scratch memory.
const SCRATCH_GPA: u64 = testing::DATA + (SCRATCH & 0x1f_ffff);

/// Of a page table that maps it.
const PAGE_TABLE: u64 = 0x50_0000;

/// A processor whose memory has the native scratch memory at the same address.
pub(super) fn machine() -> Machine {
    engine::tests::announce_all();
    let mut machine = Machine::user();
    // Around the scratch memory nothing is mapped.
    for slot in 0..512 {
        let page = if slot == SCRATCH >> 12 & 511 { SCRATCH_GPA | 0x67 } else { 0 };
        machine.poke(PAGE_TABLE + slot * 8, page);
    }
    machine.poke(testing::PAGE_TABLES + 0x2000 + (SCRATCH >> 21 & 511) * 8, PAGE_TABLE | 7);
    machine.cpu.cr4 |= cr4::OSXSAVE;
    machine.cpu.xcr0 = if native_oracle::has_avx512() { 0xe7 } else { 7 };
    machine.core().flush_tlb(false);
    machine
}

pub(super) fn load(machine: &mut Machine, state: &NativeState) {
    let cpu = &mut *machine.cpu;
    cpu.regs = state.regs;
    cpu.rflags = cpu.rflags & !native_oracle::LOADABLE_FLAGS | state.rflags & native_oracle::LOADABLE_FLAGS;
    cpu.mxcsr = state.mxcsr;
    for (vector, native) in cpu.vectors.iter_mut().zip(&state.vectors) {
        vector.0 = *native;
    }
    cpu.opmask = state.opmask;
    cpu.find_vector_width();
    cpu.x87.0[..24].copy_from_slice(&state.x87[..24]);
    cpu.x87.0[32..160].copy_from_slice(&state.x87[32..160]);
    machine.memory.write(SCRATCH_GPA, &state.scratch).unwrap();
}

pub(super) fn store(machine: &Machine, before: &NativeState) -> NativeState {
    let mut state = before.clone();
    let cpu = &machine.cpu;
    state.regs = cpu.regs;
    state.rflags = cpu.rflags;
    state.mxcsr = cpu.mxcsr;
    for (vector, native) in cpu.vectors.iter().zip(&mut state.vectors) {
        *native = vector.0;
    }
    state.opmask = cpu.opmask;
    state.x87[..24].copy_from_slice(&cpu.x87.0[..24]);
    state.x87[32..160].copy_from_slice(&cpu.x87.0[32..160]);
    machine.memory.read(SCRATCH_GPA, &mut state.scratch).unwrap();
    state
}

/// What differs, in words; `None` if nothing does.
fn difference(
    insn: &Instruction,
    native: &native_oracle::Outcome,
    ours: &NativeState,
    end: &Result<Flow, Trap>,
) -> Option<String> {
    let expected = match native.end {
        End::Next => Ok(Flow::Next),
        End::Fault { vector: 14, address, .. } => {
            // The kernel tells of its own half of the address space only that it is none of the program's.
            let Err(Trap::Exception(fault)) = end else { return Some(format!("end {end:?}, natively #PF")) };
            let near = fault.address.abs_diff(address) < 64;
            if fault.vector != vector::PF || !near {
                return Some(format!("end {end:?}, natively #PF at {address:#x}"));
            }
            Err(Trap::Exception(*fault))
        }
        End::Fault { vector, error, .. } => Err(Trap::Exception(Exception {
            vector,
            error: matches!(vector, vector::GP | vector::SS).then_some(error as u32),
            address: 0,
        })),
        End::Jumped(_) => return Some("jumped".into()),
    };
    if *end != expected {
        return Some(format!("end {end:?}, natively {expected:?} ({:?})", native.end));
    }
    let theirs = &native.state;
    let mut parts = Vec::new();
    let (registers, mask) =
        if insn.code_size() == iced_x86::CodeSize::Code64 { (16, !0) } else { (8, 0xffff_ffff) };
    for register in 0..registers {
        if (ours.regs[register] ^ theirs.regs[register]) & mask != 0 {
            parts.push(format!("r{register} {:x}/{:x}", ours.regs[register], theirs.regs[register]));
        }
    }
    for (register, (ours, theirs)) in ours.vectors.iter().zip(&theirs.vectors).enumerate() {
        if ours != theirs {
            let at: Vec<usize> = (0..64).filter(|at| ours[*at] != theirs[*at]).collect();
            let pick = |from: &[u8; 64]| at.iter().map(|at| from[*at]).collect::<Vec<u8>>();
            parts.push(format!("vector {register} at {at:?} {:x?}/{:x?}", pick(ours), pick(theirs)));
        }
    }
    if ours.opmask != theirs.opmask {
        parts.push(format!("mask registers {:x?}/{:x?}", ours.opmask, theirs.opmask));
    }
    if (ours.rflags ^ theirs.rflags) & flags::ARITHMETIC != 0 {
        parts.push(format!("flags {:x}/{:x}", ours.rflags, theirs.rflags));
    }
    if (ours.mxcsr ^ theirs.mxcsr) & !blurred(insn, theirs, end) != 0 {
        parts.push(format!("mxcsr {:x}/{:x}", ours.mxcsr, theirs.mxcsr));
    }
    x87_difference(ours, theirs, &mut parts);
    if ours.scratch != theirs.scratch {
        let at = (0..SCRATCH_LEN).find(|at| ours.scratch[*at] != theirs.scratch[*at]).unwrap();
        let base = theirs.regs[generate::BASE].wrapping_sub(SCRATCH);
        let count = (0..SCRATCH_LEN).filter(|at| ours.scratch[*at] != theirs.scratch[*at]).count();
        parts.push(format!(
            "{count} bytes of memory from {:+}: {:x?}/{:x?}",
            at as i64 - base as i64,
            &ours.scratch[at..(at + 16).min(SCRATCH_LEN)],
            &theirs.scratch[at..(at + 16).min(SCRATCH_LEN)]
        ));
    }
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// Flags of MXCSR that can't be told from a masked execution if an exception is delivered.
fn blurred(insn: &Instruction, theirs: &NativeState, end: &Result<Flow, Trap>) -> u32 {
    use iced_x86::Mnemonic::{Dppd, Dpps, Vdppd, Vdpps};
    match end {
        Ok(_) => 0,
        // Several operations in sequence, of which an exception ends the rest.
        Err(_) if matches!(insn.mnemonic(), Dppd | Dpps | Vdppd | Vdpps) => 0x3f,
        // Whether what over- or underflowed would have been inexact with an exponent of any size.
        Err(_) if theirs.mxcsr & 0x408 == 8 || theirs.mxcsr & 0x810 == 0x10 => 0x20,
        Err(_) => 0,
    }
}

fn x87_difference(ours: &NativeState, theirs: &NativeState, parts: &mut Vec<String>) {
    // Some processors save pointers only while an exception is pending.
    let pending = theirs.x87[2] & 0x80 != 0;
    let fields =
        [("fcw", 0..2), ("fsw", 2..4), ("ftw", 4..5), ("fop", 6..8), ("fip", 8..16), ("fdp", 16..24)];
    for (name, range) in fields.into_iter().take(if pending { 6 } else { 3 }) {
        if ours.x87[range.clone()] != theirs.x87[range.clone()] {
            parts.push(format!("{name} {:x?}/{:x?}", &ours.x87[range.clone()], &theirs.x87[range]));
        }
    }
    for register in 0..8 {
        let range = 32 + 16 * register..42 + 16 * register;
        if ours.x87[range.clone()] != theirs.x87[range.clone()] {
            parts.push(format!("st{register} {:x?}/{:x?}", &ours.x87[range.clone()], &theirs.x87[range]));
        }
    }
}

/// Executes natively and by us, and compares.
pub(super) fn compare(machine: &mut Machine, bytes: &[u8], state: &NativeState, bits: u32) -> Option<String> {
    compare_with(machine, bytes, state, bits, |_| {})
}

/// As [`compare`]; `adapt` may change what the native execution left to what is expected of us.
///
/// What differs is compared again: if the host runs another thread between the load of the state and the
/// instruction, AMD's processors lose the pointers to the last instruction and its data.
pub(super) fn compare_with(
    machine: &mut Machine,
    bytes: &[u8],
    state: &NativeState,
    bits: u32,
    adapt: impl Fn(&mut NativeState),
) -> Option<String> {
    const TIMES: usize = 3;
    let mut difference = None;
    for _ in 0..TIMES {
        difference = Some(compare_once(machine, bytes, state, bits, &adapt)?);
    }
    difference
}

fn compare_once(
    machine: &mut Machine,
    bytes: &[u8],
    state: &NativeState,
    bits: u32,
    adapt: impl Fn(&mut NativeState),
) -> Option<String> {
    let start = mode(bits).start();
    let insn = Decoder::with_ip(bits, bytes, start, DecoderOptions::NONE).decode();
    let mut native = match bits {
        64 => native_oracle::run(bytes, state),
        32 => native_oracle::run32(bytes, state),
        _ => native_oracle::run16(bytes, state),
    };
    adapt(&mut native.state);
    load(machine, state);
    machine.cpu.rip = start;
    let end = execute(&mut machine.core(), &insn);
    let ours = store(machine, state);
    difference(&insn, &native, &ours, &end).map(|text| format!("{:?} {bytes:02x?}: {text}", insn.code()))
}

/// The mode that executes code of so many bits.
pub(super) fn mode(bits: u32) -> Mode {
    match bits {
        64 => Mode::Bits64,
        32 => Mode::Bits32,
        _ => Mode::Bits16,
    }
}

/// Codes for [`execute`] that user mode can execute on this host.
fn codes(bits: u32) -> impl Iterator<Item = Code> {
    let host = crate::features::Features::host();
    Code::values().filter(move |code| {
        handles(*code)
            && match bits {
                64 => code.op_code().mode64(),
                32 => code.op_code().mode32(),
                _ => code.op_code().mode16(),
            }
            && code.op_code().is_instruction()
            && crate::features::Features::needed_by(*code).is_some_and(|needs| host.contains(needs))
            && !privileged(*code)
            && !with_wait(*code)
            && !image(*code)
    })
}

/// AMD's processors take misaligned operands here, against the manual.
fn sha(code: Code) -> bool {
    code.cpuid_features().contains(&iced_x86::CpuidFeature::SHA)
}

fn privileged(code: Code) -> bool {
    use Code::*;
    matches!(code, Xsaves_mem | Xsaves64_mem | Xrstors_mem | Xrstors64_mem)
}

/// Assembler names for two instructions, the first of them FWAIT.
fn with_wait(code: Code) -> bool {
    use Code::*;
    matches!(
        code,
        Fstenv_m14byte
            | Fstenv_m28byte
            | Fstcw_m2byte
            | Feni
            | Fdisi
            | Fclex
            | Finit
            | Fsetpm
            | Fsave_m94byte
            | Fsave_m108byte
            | Fstsw_m2byte
            | Fstsw_AX
    )
}

/// Those that load images with reserved fields, or save what hosts save differently: tested on their own.
fn image(code: Code) -> bool {
    use Code::*;
    matches!(code, Fxrstor_m512byte | Fxrstor64_m512byte | Ldmxcsr_m32 | VEX_Vldmxcsr_m32)
        || matches!(code, Fxsave_m512byte | Fxsave64_m512byte)
        || crate::xsave::handles(code)
}

fn compare_all(bits: u32, masks: Masks, rounds: usize, seed: u64, only: impl Fn(Code) -> bool) {
    let mut machine = super::modes::machine_for(bits);
    let mut random = Random::new(seed);
    let mut tally = Tally::new(mode(bits));
    let rounds = rounds * native_oracle::rounds() as usize;
    // See `to_probe_underflow`.
    let masked_only = |code: Code| code.mnemonic() == iced_x86::Mnemonic::Vcvtps2ph;
    for code in codes(bits).filter(|code| only(*code) && !(masks != Masks::All && masked_only(*code))) {
        let mut compared = 0;
        for round in 0..rounds {
            let form = Form { memory: round % 2 == 0, low_registers: bits != 64, bitness: bits };
            let Some(bytes) = generate::instruction(code, form, &mut random) else { continue };
            // Now and then a misaligned operand.
            let offset = if round % 8 == 6 && !sha(code) { random.pick(&[1, 4, 8, 16, 32, 56]) } else { 0 };
            let mut state = generate::state(&mut random, masks, offset);
            let vsib = Decoder::new(bits, &bytes, 0).decode().is_vsib();
            if vsib {
                limit_indices(&mut state);
            }
            if bits == 16 {
                generate::within_segments(&mut random, &mut state, !vsib);
            }
            compared += 1;
            if let Some(text) = compare(&mut machine, &bytes, &state, bits) {
                tally.fail(code, text);
            }
        }
        assert!(compared > 0, "no {code:?} could be made");
        tally.add(code, compared);
    }
    tally.finish();
}

/// Makes all elements of all vectors small, so that gathers stay in the scratch memory.
fn limit_indices(state: &mut NativeState) {
    for element in state.vectors.iter_mut().flat_map(|vector| vector.chunks_mut(8)) {
        let value = i64::from(element[0] as i8);
        element.copy_from_slice(&value.to_le_bytes());
    }
}

#[test]
fn legacy_instructions_equal_the_hosts() {
    compare_all(64, Masks::All, 48, 1, |code| code.encoding() == EncodingKind::Legacy);
}

#[test]
fn vex_instructions_equal_the_hosts() {
    compare_all(64, Masks::All, 24, 2, |code| code.encoding() == EncodingKind::VEX);
}

#[test]
fn evex_instructions_equal_the_hosts() {
    compare_all(64, Masks::All, 48, 6, |code| code.encoding() == EncodingKind::EVEX);
}

/// Operands that reach beyond the end of the memory: what a mask does not select does not fault.
#[test]
fn operands_at_the_end_of_memory_equal_the_hosts() {
    let mut machine = machine();
    let mut random = Random::new(7);
    let mut tally = Tally::new(Mode::Bits64);
    let vector = |code: &Code| matches!(code.encoding(), EncodingKind::VEX | EncodingKind::EVEX);
    for code in codes(64).filter(vector) {
        let mut compared = 0;
        for _ in 0..24 * native_oracle::rounds() {
            let form = Form { memory: true, low_registers: false, bitness: 64 };
            let Some(bytes) = generate::instruction(code, form, &mut random) else { continue };
            let insn = Decoder::new(64, &bytes, 0).decode();
            if (0..insn.op_count()).all(|operand| insn.op_kind(operand) != iced_x86::OpKind::Memory) {
                break;
            }
            let mut state = generate::state(&mut random, Masks::All, 0);
            let size = insn.memory_size().size().max(1) as u64;
            let mut beyond = random.below(size) + 1;
            if alignment(&insn) {
                beyond = 0;
            }
            state.regs[generate::BASE] =
                (SCRATCH + SCRATCH_LEN as u64 - size + beyond).wrapping_sub(insn.memory_displacement64());
            if insn.is_vsib() {
                limit_indices(&mut state);
            }
            for mask in &mut state.opmask {
                // Few bits, and the low ones more often.
                *mask = (random.next() & random.next()) >> random.below(64);
            }
            compared += 1;
            if let Some(text) = compare(&mut machine, &bytes, &state, 64) {
                tally.fail(code, text);
            }
        }
        if compared != 0 {
            tally.add(code, compared);
        }
    }
    tally.finish();
}

/// Whether the operand must be aligned, so that it cannot cross the end of a page.
fn alignment(insn: &Instruction) -> bool {
    crate::stub::alignment(insn.code(), 64) > 1
}

#[test]
fn unmasked_exceptions_equal_the_hosts() {
    compare_all(64, Masks::Some, 48, 3, |_| true);
}

#[test]
fn pending_exceptions_equal_the_hosts() {
    compare_all(64, Masks::Pending, 32, 4, |code| {
        !code.cpuid_features().iter().all(|feature| format!("{feature:?}").starts_with("AVX"))
    });
}

#[test]
fn compatibility_mode_equals_the_hosts() {
    compare_all(32, Masks::All, 16, 5, |_| true);
}

#[test]
fn code_of_16_bits_equals_the_hosts() {
    assert!(native_oracle::has_16_bit(), "the kernel makes no 16-bit segments");
    compare_all(16, Masks::All, 16, 8, |_| true);
    compare_all(16, Masks::Some, 8, 9, |code| code.encoding() == EncodingKind::Legacy);
}
