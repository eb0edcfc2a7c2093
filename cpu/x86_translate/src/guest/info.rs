//! What iced-x86 knows of each instruction, as the translator needs it.

use super::class::Class;
use super::classify::classify;
use super::fpu::{self, Unit};
use super::operand::{Field, Operand, is_mask, is_memory, is_mmx, is_vector, width_of};
use iced_x86::{
    EncodingKind, Instruction, InstructionInfoFactory, MandatoryPrefix, Mnemonic, OpAccess, OpKind, Register,
};
use std::sync::OnceLock;

/// What is true of every instruction of one [`iced_x86::Code`].
#[derive(Debug, Clone)]
pub(crate) struct CodeInfo {
    pub(crate) class: Class,
    pub(crate) has_modrm: bool,
    pub(crate) vex: bool,
    pub(crate) evex: bool,
    /// It needs the state of AVX-512.
    pub(crate) wide: bool,
    /// General-register operands that are encoded, by position.
    pub(crate) operands: [Option<Operand>; 4],
    /// Whether vector registers are involved.
    pub(crate) vector: bool,
    /// What it needs of the x87 unit.
    pub(crate) unit: Unit,
    /// Whether the instruction has the prefix 0x66 where operands are of 32 bits by default.
    pub(crate) prefix_66: bool,
    /// Whether a memory operand is written.
    pub(crate) mem_write: bool,
    /// Whether a memory operand of 16 bytes or more must be aligned to its size.
    pub(crate) aligned: bool,
    /// A register in ModRM.rm may be replaced by its slot in memory when it is only read.
    pub(crate) slot_read: bool,
    /// The same when it is written, for 64-bit operands.
    pub(crate) slot_write: bool,
}

static TABLE: [OnceLock<CodeInfo>; 8192] = [const { OnceLock::new() }; 8192];

/// What is known of the instruction's code.
pub(crate) fn code_info(insn: &Instruction) -> &'static CodeInfo {
    TABLE[insn.code() as usize].get_or_init(|| describe(insn))
}

fn describe(insn: &Instruction) -> CodeInfo {
    let code = insn.code();
    let op_code = code.op_code();
    let kinds = op_code.op_kinds();
    let mut info = CodeInfo {
        class: classify(insn),
        has_modrm: false,
        vex: op_code.encoding() == EncodingKind::VEX,
        evex: op_code.encoding() == EncodingKind::EVEX,
        wide: op_code.encoding() == EncodingKind::EVEX || kinds.iter().any(|kind| is_mask(*kind)),
        operands: [None; 4],
        vector: kinds.iter().any(|kind| is_vector(*kind)),
        unit: fpu::unit_of(code),
        prefix_66: op_code.operand_size() == 16 || op_code.mandatory_prefix() == MandatoryPrefix::P66,
        mem_write: false,
        aligned: false,
        slot_read: false,
        slot_write: false,
    };
    // They have no operands.
    info.vector |= matches!(code.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall);
    if matches!(
        info.class,
        Class::Movs
            | Class::Stos
            | Class::Cli
            | Class::Sti
            | Class::Pushf
            | Class::Popf
            | Class::Iret
            | Class::Swapgs
            | Class::Stac
            | Class::Clac
            | Class::Fninit
            | Class::Syscall
            | Class::Sysret
            | Class::Rdtsc
            | Class::Lods
            | Class::Scas
    ) {
        return info;
    }
    if info.class == Class::Interpret || kinds.len() > 4 {
        info.class = Class::Interpret;
        return info;
    }
    let mut factory = InstructionInfoFactory::new();
    let plain = distinct(insn);
    let accesses = factory.info(&plain);
    for (index, kind) in kinds.iter().enumerate() {
        let access = accesses.op_access(index as u32);
        let reads = matches!(
            access,
            OpAccess::Read
                | OpAccess::CondRead
                | OpAccess::ReadWrite
                | OpAccess::ReadCondWrite
                | OpAccess::CondWrite
        );
        let writes = matches!(
            access,
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        );
        if let Some((field, width)) = width_of(*kind) {
            info.has_modrm |= field != Field::Opcode;
            info.operands[index] = Some(Operand { field, width, reads, writes });
        }
        let memory = is_memory(*kind);
        if memory || is_vector(*kind) || is_mmx(*kind) {
            info.has_modrm = true;
        }
        info.mem_write |= memory && writes;
    }
    info.has_modrm |= info.class == Class::MovSeg;
    let mnemonic = code.mnemonic();
    info.aligned = info.vector && needs_alignment(mnemonic, info.vex || info.evex);
    if matches!(mnemonic, Mnemonic::Cmpxchg16b) {
        info.aligned = true;
    }
    // There are forms with registers alone, and some of which EVEX.b means something else with memory.
    info.slot_read =
        !info.wide && !matches!(mnemonic, Mnemonic::Bt | Mnemonic::Xchg | Mnemonic::Cmpxchg | Mnemonic::Xadd);
    info.slot_write = matches!(
        mnemonic,
        Mnemonic::Add
            | Mnemonic::Or
            | Mnemonic::Adc
            | Mnemonic::Sbb
            | Mnemonic::And
            | Mnemonic::Sub
            | Mnemonic::Xor
            | Mnemonic::Mov
            | Mnemonic::Inc
            | Mnemonic::Dec
            | Mnemonic::Neg
            | Mnemonic::Not
            | Mnemonic::Shl
            | Mnemonic::Shr
            | Mnemonic::Sar
    );
    info
}

/// The instruction with no register twice: iced-x86 describes `xor eax, eax` and its like as not reading.
fn distinct(insn: &Instruction) -> Instruction {
    let mut out = *insn;
    for index in 1..out.op_count() {
        if out.op_kind(index) != OpKind::Register {
            continue;
        }
        let register = out.op_register(index);
        if (0..index)
            .any(|before| out.op_kind(before) == OpKind::Register && out.op_register(before) == register)
        {
            let base = register as u32;
            let group = |r: Register| (r.is_gpr8(), r.is_gpr16(), r.is_gpr32(), r.is_gpr64(), r.is_xmm());
            let other = [base.wrapping_add(1), base.wrapping_sub(1)]
                .into_iter()
                .find_map(|n| Register::try_from(n as usize).ok().filter(|r| group(*r) == group(register)));
            out.set_op_register(index, other.unwrap_or(register));
        }
    }
    out
}

/// Whether instructions with vector registers and such a mnemonic want their operand in memory aligned.
fn needs_alignment(mnemonic: Mnemonic, vex: bool) -> bool {
    if vex {
        return matches!(
            mnemonic,
            Mnemonic::Vmovaps
                | Mnemonic::Vmovapd
                | Mnemonic::Vmovdqa
                | Mnemonic::Vmovdqa32
                | Mnemonic::Vmovdqa64
                | Mnemonic::Vmovntps
                | Mnemonic::Vmovntpd
                | Mnemonic::Vmovntdq
                | Mnemonic::Vmovntdqa
        );
    }
    !matches!(
        mnemonic,
        Mnemonic::Movups
            | Mnemonic::Movupd
            | Mnemonic::Movdqu
            | Mnemonic::Lddqu
            | Mnemonic::Pcmpestri
            | Mnemonic::Pcmpestrm
            | Mnemonic::Pcmpistri
            | Mnemonic::Pcmpistrm
    )
}
