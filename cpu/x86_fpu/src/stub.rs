//! Building stubs: the guest's instruction with other operands, between loads and stores of registers.

use crate::context::Context;
use crate::emit::{self, Length, context};
use crate::features::Features;
use crate::masking::{self, Masking};
use dbt_code::{Emitter, Gpr, Width};
use iced_x86::{
    Code, Encoder, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpCodeOperandKind,
    OpKind, Register, RflagsBits, RoundingControl, UsedRegister,
};
use std::mem::offset_of;

/// Code that runs one instruction.
pub(crate) type Entry = unsafe extern "sysv64" fn(*mut Context);

/// Which checks an instruction is subject to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// x87.
    X87,
    /// MMX registers alone.
    Mmx,
    /// Legacy encoding with XMM registers.
    Sse,
    /// VEX encoding.
    Avx,
    /// EVEX encoding, and VEX with mask registers.
    Avx512,
}

/// How an instruction uses its memory operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MemoryUse {
    /// The operand's number.
    pub(crate) operand: u8,
    /// Bytes.
    pub(crate) size: u8,
    /// It writes, else reads.
    pub(crate) write: bool,
    /// The alignment that it must have.
    pub(crate) align: u8,
    /// A mask register says which parts of it are accessed.
    pub(crate) masking: Option<Masking>,
}

/// A stub and what must be known to run it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stub {
    pub(crate) entry: Entry,
    pub(crate) class: Class,
    pub(crate) needs: Features,
    pub(crate) memory: Option<MemoryUse>,
    /// The guest's register that is the general operand.
    pub(crate) operand: Option<u8>,
    /// RAX, RCX and RDX (by bit number) are used without being named.
    pub(crate) implicit: u8,
    /// Arithmetic flags are read or written.
    pub(crate) flags: bool,
    /// It runs under the guest's MXCSR.
    pub(crate) mxcsr: bool,
    /// It raises no SIMD exceptions: suppressed, or an approximation.
    pub(crate) quiet: bool,
    /// MMX registers are used: the x87 unit goes to MMX mode.
    pub(crate) mmx: bool,
    /// MMX registers written.
    pub(crate) mmx_written: u8,
    /// Vector registers written.
    pub(crate) vectors_written: u32,
    /// Last opcode and ModRM as FOP holds them (x87); of a memory operand only the reg field counts.
    pub(crate) fop: u16,
}

/// The instruction, as far as its stub depends on it: code, registers, immediates, and what EVEX encodes beside.
pub(crate) fn key(insn: &Instruction) -> u128 {
    let (mut registers, mut immediates) = (0u64, 0u64);
    for operand in 0..insn.op_count() {
        match insn.op_kind(operand) {
            OpKind::Register => registers |= (insn.op_register(operand) as u64) << (8 * (operand & 3)),
            OpKind::Immediate8 => immediates |= u64::from(insn.immediate8()),
            OpKind::Immediate8_2nd => immediates |= u64::from(insn.immediate8_2nd()) << 8,
            _ => {}
        }
    }
    let evex = u64::from(insn.op_mask() as u8) // none is 0, the others are registers
        | u64::from(insn.zeroing_masking()) << 8
        | u64::from(insn.is_broadcast()) << 9
        | u64::from(insn.suppress_all_exceptions()) << 10
        | u64::from(insn.rounding_control() as u8) << 11;
    u128::from((insn.code() as u64) << 48 | registers << 16 | immediates) | u128::from(evex) << 64
}

/// Whether there is a stub for `code`.
pub(crate) fn handles(code: Code) -> bool {
    let op_code = code.op_code();
    if !op_code.is_instruction() || Features::needed_by(code).is_none() {
        return false;
    }
    match code.encoding() {
        EncodingKind::Legacy => is_x87(code) || has_xmm(code) || has_mmx(code),
        EncodingKind::VEX | EncodingKind::EVEX => true,
        _ => false,
    }
}

/// Whether an operand is an XMM register, or could be one in place of memory.
fn has_xmm(code: Code) -> bool {
    use OpCodeOperandKind::{xmm_or_mem, xmm_reg, xmm_rm};
    let op_code = code.op_code();
    (0..op_code.op_count()).any(|operand| matches!(op_code.op_kind(operand), xmm_reg | xmm_rm | xmm_or_mem))
}

/// Whether an operand is an MMX register, or could be one in place of memory.
fn has_mmx(code: Code) -> bool {
    use OpCodeOperandKind::{mm_or_mem, mm_reg, mm_rm};
    let op_code = code.op_code();
    (0..op_code.op_count()).any(|operand| matches!(op_code.op_kind(operand), mm_reg | mm_rm | mm_or_mem))
}

/// Whether an operand is a mask register.
fn has_mask(code: Code) -> bool {
    use OpCodeOperandKind::{k_or_mem, k_reg, k_rm, k_vvvv, kp1_reg};
    code.op_code().op_kinds().iter().any(|kind| matches!(kind, k_reg | k_rm | k_vvvv | k_or_mem | kp1_reg))
}

/// Which checks instructions of `code` are subject to.
fn class(code: Code) -> Class {
    if is_x87(code) {
        Class::X87
    } else if code.encoding() == EncodingKind::EVEX || has_mask(code) {
        Class::Avx512
    } else if code.encoding() == EncodingKind::VEX {
        Class::Avx
    } else if has_xmm(code) {
        Class::Sse
    } else {
        Class::Mmx
    }
}

pub(crate) fn is_x87(code: Code) -> bool {
    use iced_x86::CpuidFeature::{FPU, FPU287, FPU387};
    code.cpuid_features().iter().any(|feature| matches!(feature, FPU | FPU287 | FPU387))
}

/// The number of the general register that `register` is, or is the low part of.
fn general_register(register: Register) -> Option<u8> {
    (register.is_gpr() && !matches!(register, Register::AH | Register::CH | Register::DH | Register::BH))
        .then(|| (register.full_register() as u32 - Register::RAX as u32) as u8)
}

/// The instruction with its general register replaced by R8 and its memory operand by `[RSI]`.
fn rename(insn: &Instruction) -> Option<(Instruction, Option<u8>, Option<u8>)> {
    let mut renamed = *insn;
    renamed.set_has_lock_prefix(false);
    renamed.set_has_rep_prefix(false);
    renamed.set_has_repne_prefix(false);
    let (mut general, mut memory) = (None, None);
    for operand in 0..insn.op_count() {
        match insn.op_kind(operand) {
            OpKind::Register => {
                let register = insn.op_register(operand);
                if let Some(number) = general_register(register) {
                    if general.replace(number).is_some() {
                        return None;
                    }
                    let scratch = match register.size() {
                        1 => Register::R8L,
                        2 => Register::R8W,
                        4 => Register::R8D,
                        _ => Register::R8,
                    };
                    renamed.set_op_register(operand, scratch);
                }
            }
            OpKind::Memory => memory = Some(operand as u8),
            OpKind::Immediate8 | OpKind::Immediate8_2nd => {}
            _ => return None,
        }
    }
    if memory.is_some() {
        if insn.is_vsib() {
            return None;
        }
        renamed.set_segment_prefix(Register::None);
        renamed.set_memory_base(Register::RSI);
        renamed.set_memory_index(Register::None);
        renamed.set_memory_index_scale(1);
        renamed.set_memory_displ_size(0);
        renamed.set_memory_displacement64(0);
    }
    Some((renamed, general, memory))
}

/// Registers in a set that are read or written, and those written, by number.
#[derive(Debug, Default)]
struct Used {
    used: u32,
    written: u32,
}

impl Used {
    fn add(&mut self, number: u32, access: OpAccess) {
        self.used |= 1 << number;
        if !matches!(access, OpAccess::Read | OpAccess::CondRead) {
            self.written |= 1 << number;
        }
    }

    fn numbers(set: u32) -> impl Iterator<Item = u8> {
        (0..32).filter(move |number| set >> number & 1 != 0)
    }
}

/// The registers that an instruction uses, by kind.
#[derive(Debug, Default)]
struct Registers {
    vectors: Used,
    masks: Used,
    mmx: Used,
    implicit: Used,
}

/// All registers of a renamed instruction; `None` if it uses one that stubs don't provide.
fn used_registers(registers: &[UsedRegister]) -> Option<Registers> {
    let mut all = Registers::default();
    let Registers { vectors, masks, mmx, implicit } = &mut all;
    for used in registers {
        let register = used.register();
        if register.is_vector_register() {
            // A write to any part of a vector register is told as one to the whole.
            vectors.add(register.number() as u32, used.access());
        } else if register.is_k() {
            masks.add(register.number() as u32, used.access());
        } else if register.is_mm() {
            mmx.add(register.number() as u32, used.access());
        } else if let Some(number) = general_register(register) {
            match number {
                0..=2 => implicit.add(u32::from(number), used.access()),
                _ if Gpr(number) == emit::OPERAND || Gpr(number) == emit::GENERAL => {}
                _ => return None,
            }
        } else if !register.is_st() && !register.is_segment_register() {
            return None;
        }
    }
    Some(all)
}

/// Writes the stub of an instruction, and gives all but its entry, which is where `e` stood; `None` if it is
/// none of ours.
pub(crate) fn write(e: &mut Emitter, insn: &Instruction) -> Option<Stub> {
    let code = insn.code();
    if !handles(code) {
        return None;
    }
    let (renamed, operand, memory_operand) = rename(insn)?;
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(&renamed);
    let registers = used_registers(info.used_registers())?;
    let memory = match memory_operand {
        None => None,
        Some(operand) => {
            let write = match info.op_access(u32::from(operand)) {
                OpAccess::Read | OpAccess::CondRead => false,
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadCondWrite | OpAccess::ReadWrite => true,
                _ => return None,
            };
            let size = renamed.memory_size().size() as u8;
            if size == 0 || size > 64 {
                return None;
            }
            let masking = masking::of(&renamed, write);
            Some(MemoryUse { operand, size, write, align: alignment(code, size), masking })
        }
    };
    let arithmetic =
        RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;
    let class = class(code);
    let mut stub = Stub {
        entry: no_entry,
        class,
        needs: Features::needed_by(code)?,
        memory,
        operand,
        implicit: registers.implicit.used as u8,
        flags: (renamed.rflags_read() | renamed.rflags_modified()) & arithmetic != 0,
        mxcsr: matches!(class, Class::Sse | Class::Avx | Class::Avx512) && depends_on_mxcsr(code.mnemonic()),
        quiet: renamed.suppress_all_exceptions()
            || renamed.rounding_control() != RoundingControl::None
            || matches!(code.mnemonic(), Mnemonic::Vrcp14ps | Mnemonic::Vrcp14pd | Mnemonic::Vrcp14ss)
            || matches!(code.mnemonic(), Mnemonic::Vrcp14sd),
        mmx: registers.mmx.used != 0,
        mmx_written: registers.mmx.written as u8,
        vectors_written: registers.vectors.written,
        fop: 0,
    };
    let mut encoder = Encoder::new(64);
    encoder.encode(&renamed, 0).ok()?;
    let encoded = encoder.take_buffer();
    if class == Class::X87 {
        stub.fop = fop(&encoded)?;
    }
    surround(e, &encoded, &stub, &registers);
    Some(stub)
}

/// The stub around the encoded instruction.
fn surround(e: &mut Emitter, encoded: &[u8], stub: &Stub, registers: &Registers) {
    let Registers { vectors, masks, mmx, implicit } = registers;
    const IMPLICIT: [(Gpr, usize); 3] = [
        (Gpr::RAX, offset_of!(Context, rax)),
        (Gpr::RCX, offset_of!(Context, rcx)),
        (Gpr::RDX, offset_of!(Context, rdx)),
    ];
    let length = match stub.class {
        Class::Avx => Length::Ymm,
        Class::Avx512 => Length::Zmm,
        _ => Length::Xmm,
    };
    if stub.flags {
        emit::load_flags(e);
    }
    if stub.class == Class::X87 {
        emit::load_x87(e);
    }
    Used::numbers(mmx.used).for_each(|register| emit::load_mmx(e, register));
    if vectors.used != 0 {
        e.load(emit::STATE, context(offset_of!(Context, vectors)));
    }
    Used::numbers(vectors.used).for_each(|register| emit::load_vector(e, register, length));
    if masks.used != 0 {
        e.load(emit::MASKS, context(offset_of!(Context, masks)));
    }
    Used::numbers(masks.used).for_each(|register| emit::load_mask(e, register));
    if stub.memory.is_some() {
        e.lea(emit::OPERAND, context(offset_of!(Context, memory)));
    }
    if stub.operand.is_some() {
        e.load(emit::GENERAL, context(offset_of!(Context, operand)));
    }
    for (register, place) in IMPLICIT {
        if implicit.used >> register.0 & 1 != 0 {
            e.load(register, context(place));
        }
    }
    if stub.mxcsr {
        e.ldmxcsr(context(offset_of!(Context, mxcsr)));
    }
    e.bytes(encoded);
    if stub.mxcsr {
        e.stmxcsr(context(offset_of!(Context, mxcsr)));
        e.ldmxcsr(context(offset_of!(Context, host_mxcsr)));
    }
    if stub.flags {
        emit::store_flags(e);
    }
    for (register, place) in IMPLICIT {
        if implicit.used >> register.0 & 1 != 0 {
            e.store(Width::B64, context(place), register);
        }
    }
    if stub.operand.is_some() {
        e.store(Width::B64, context(offset_of!(Context, operand)), emit::GENERAL);
    }
    Used::numbers(vectors.written).for_each(|register| emit::store_vector(e, register, length));
    Used::numbers(masks.written).for_each(|register| emit::store_mask(e, register));
    if length != Length::Xmm {
        emit::leave_avx(e);
    }
    if mmx.used != 0 {
        Used::numbers(mmx.written).for_each(|register| emit::store_mmx(e, register));
        emit::leave_mmx(e);
    }
    if stub.class == Class::X87 {
        emit::store_x87_and_return(e);
    } else {
        e.ret();
    }
}

/// Stands for the entry until there is one.
unsafe extern "sysv64" fn no_entry(_: *mut Context) {}

/// The eleven bits of opcode and ModRM that FOP holds (Intel SDM volume 1, 8.1.9).
fn fop(encoded: &[u8]) -> Option<u16> {
    let escape = encoded.iter().position(|byte| (0xd8..=0xdf).contains(byte))?;
    Some(u16::from(encoded[escape] & 7) << 8 | u16::from(*encoded.get(escape + 1)?))
}

/// The alignment that the memory operand of `code` must have (Intel SDM volume 2, 2.4: exception types 1, 2
/// and 4 without VEX, type 1 with; the exceptions are 2.4.1's type 4 footnotes).
pub(crate) fn alignment(code: Code, size: u8) -> u8 {
    use Mnemonic::*;
    match code.encoding() {
        EncodingKind::Legacy => match code.mnemonic() {
            Movups | Movupd | Movdqu | Lddqu | Pcmpestri | Pcmpestri64 | Pcmpestrm | Pcmpestrm64
            | Pcmpistri | Pcmpistrm => 1,
            _ if size == 16 => 16,
            _ => 1,
        },
        EncodingKind::VEX | EncodingKind::EVEX => match code.mnemonic() {
            Vmovaps | Vmovapd | Vmovdqa | Vmovdqa32 | Vmovdqa64 | Vmovntps | Vmovntpd | Vmovntdq
            | Vmovntdqa => size,
            _ => 1,
        },
        _ => 1,
    }
}

/// Whether MXCSR bears on the instruction, or the instruction on MXCSR. Integer operations and moves have
/// nothing to do with it; all others are taken to.
fn depends_on_mxcsr(mnemonic: Mnemonic) -> bool {
    const INDEPENDENT: [&str; 24] = [
        "p",
        "k",
        "align",
        "compress",
        "expand",
        "dbpsadbw",
        "mov",
        "and",
        "or",
        "xor",
        "unpck",
        "shuf",
        "aes",
        "sha",
        "gf2",
        "blend",
        "insert",
        "extract",
        "broadcast",
        "perm",
        "lddqu",
        "maskmov",
        "test",
        "extrq",
    ];
    let name = format!("{mnemonic:?}").to_ascii_lowercase();
    let name = name.strip_prefix('v').unwrap_or(&name);
    !INDEPENDENT.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_floating_point_depends_on_mxcsr() {
        use Mnemonic::*;
        for mnemonic in
            [Addps, Cvtsi2sd, Vfmadd231sd, Comiss, Cvtdq2ps, Roundss, Cmpps, Haddpd, Vcvtph2ps, Dppd]
        {
            assert!(depends_on_mxcsr(mnemonic), "{mnemonic:?}");
        }
        for mnemonic in
            [Paddb, Vpaddb, Movd, Vmovups, Xorps, Vperm2f128, Pcmpistri, Aesenc, Vbroadcastss, Ptest]
        {
            assert!(!depends_on_mxcsr(mnemonic), "{mnemonic:?}");
        }
    }

    #[test]
    fn keys_tell_stubs_apart() {
        let decode = |bytes: &[u8]| iced_x86::Decoder::new(64, bytes, 0).decode();
        let same = [&[0x66, 0x0f, 0xef, 0x08][..], &[0x66, 0x0f, 0xef, 0x4b, 0x10]]; // pxor xmm1, [rax], [rbx+16]
        assert_eq!(key(&decode(same[0])), key(&decode(same[1])));
        let others: [&[u8]; 6] = [
            &[0x66, 0x0f, 0xef, 0xc8],
            &[0x66, 0x0f, 0xef, 0xc9],
            &[0x66, 0x0f, 0xef, 0x00],
            &[0x66, 0x0f, 0x70, 0xc0, 1],
            &[0x66, 0x0f, 0x70, 0xc0, 2],
            &[0x66, 0x44, 0x0f, 0xef, 0xc9],
        ];
        let mut keys: Vec<u128> = others.iter().map(|bytes| key(&decode(bytes))).collect();
        keys.push(key(&decode(same[0])));
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), 7);
    }
}
