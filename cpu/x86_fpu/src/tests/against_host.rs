//! Every instruction that has a stub, and most of the others, against the host.

use super::generate::{self, Form, Masks, Random};
use crate::{engine, execute, handles};
use iced_x86::{Code, Decoder, DecoderOptions, EncodingKind, Instruction};
use native_oracle::{End, NativeState, SCRATCH, SCRATCH_LEN};
use std::collections::BTreeMap;
use x86_core::testing::{self, Machine};
use x86_core::{Exception, Flow, Trap, cr4, flags, vector};

/// Guest physical address of the scratch memory.
const SCRATCH_GPA: u64 = testing::DATA + (SCRATCH & 0x1f_ffff);

/// A processor whose memory has the native scratch memory at the same address.
pub(super) fn machine() -> Machine {
    engine::tests::announce_all();
    let mut machine = Machine::user();
    // The 2 MiB page of the scratch memory.
    machine.poke(testing::PAGE_TABLES + 0x2000 + (SCRATCH >> 21 & 511) * 8, testing::DATA | 0xe7);
    machine.cpu.cr4 |= cr4::OSXSAVE;
    machine.cpu.xcr0 = 7;
    machine.core().flush_tlb(false);
    machine
}

pub(super) fn load(machine: &mut Machine, state: &NativeState) {
    let cpu = &mut *machine.cpu;
    cpu.regs = state.regs;
    cpu.rip = native_oracle::CODE;
    cpu.rflags = cpu.rflags & !native_oracle::LOADABLE_FLAGS | state.rflags & native_oracle::LOADABLE_FLAGS;
    cpu.mxcsr = state.mxcsr;
    for (vector, ymm) in cpu.vectors.iter_mut().zip(&state.ymm) {
        vector.0[..32].copy_from_slice(ymm);
    }
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
    for (vector, ymm) in cpu.vectors.iter().zip(&mut state.ymm) {
        ymm.copy_from_slice(&vector.0[..32]);
    }
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
        End::Fault { vector: 14, .. } => return Some(format!("the test is wrong: {:?}", native.end)),
        End::Fault { vector, error, .. } => Err(Trap::Exception(Exception {
            vector,
            error: (vector == vector::GP).then_some(error as u32),
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
    for register in 0..16 {
        if ours.ymm[register] != theirs.ymm[register] {
            parts.push(format!("ymm{register} {:x?}/{:x?}", ours.ymm[register], theirs.ymm[register]));
        }
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
        let base = theirs.regs[generate::BASE] - SCRATCH;
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
    let insn = Decoder::with_ip(bits, bytes, native_oracle::CODE, DecoderOptions::NONE).decode();
    let mut native = match bits {
        64 => native_oracle::run(bytes, state),
        _ => native_oracle::run32(bytes, state),
    };
    adapt(&mut native.state);
    load(machine, state);
    let end = execute(&mut machine.core(), &insn);
    let ours = store(machine, state);
    difference(&insn, &native, &ours, &end).map(|text| format!("{:?} {bytes:02x?}: {text}", insn.code()))
}

/// Comparisons by extension, and what failed.
#[derive(Default)]
pub(super) struct Tally {
    counts: BTreeMap<String, (usize, usize)>,
    failures: BTreeMap<Code, Vec<String>>,
}

impl Tally {
    pub(super) fn fail(&mut self, code: Code, text: String) {
        self.failures.entry(code).or_default().push(text);
    }

    pub(super) fn add(&mut self, code: Code, compared: usize) {
        let features: Vec<String> = code.cpuid_features().iter().map(|f| format!("{f:?}")).collect();
        let encoding = if code.encoding() == EncodingKind::VEX { "VEX " } else { "" };
        let entry = self.counts.entry(format!("{encoding}{}", features.join("+"))).or_default();
        entry.0 += 1;
        entry.1 += compared;
    }

    pub(super) fn finish(self) {
        for (extension, (codes, comparisons)) in &self.counts {
            println!("{extension}: {codes} instructions, {comparisons} comparisons");
        }
        let codes: usize = self.counts.values().map(|(codes, _)| codes).sum();
        let comparisons: usize = self.counts.values().map(|(_, comparisons)| comparisons).sum();
        println!("in all {codes} instructions, {comparisons} comparisons");
        for (code, texts) in &self.failures {
            println!("{code:?}: {} failures", texts.len());
            texts.iter().take(3).for_each(|text| println!("    {text}"));
        }
        assert!(self.failures.is_empty(), "{} instructions differ from the host's", self.failures.len());
    }
}

/// Codes for [`execute`] that user mode can execute on this host.
fn codes(bits: u32) -> impl Iterator<Item = Code> {
    let host = crate::features::Features::host();
    Code::values().filter(move |code| {
        handles(*code)
            && if bits == 64 { code.op_code().mode64() } else { code.op_code().mode32() }
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
    let mut machine = if bits == 64 { machine() } else { super::modes::compatibility_machine() };
    let mut random = Random::new(seed);
    let mut tally = Tally::default();
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
            if Decoder::new(bits, &bytes, 0).decode().is_vsib() {
                limit_indices(&mut state);
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
    for element in state.ymm.iter_mut().flat_map(|ymm| ymm.chunks_mut(8)) {
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
