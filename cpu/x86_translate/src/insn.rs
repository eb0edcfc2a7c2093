//! Guest instructions as the translator sees them: what iced-x86 knows about each, and the raw encoding that
//! is written out again with other registers.

use crate::fpu::{self, Unit};
use dbt_code::{Map, Width};
use iced_x86::{
    Code, CpuidFeature, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpCodeOperandKind as K, OpKind, Register,
};
use std::sync::OnceLock;

/// How an instruction is translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// The same instruction with other registers and the memory operand's host address.
    Generic,
    /// The bytes as they are: no operands but registers that are where they are in the guest.
    Verbatim,
    /// Nothing at all.
    Nop,
    Lea,
    Push,
    PushImm,
    Pop,
    Leave,
    Call,
    CallIndirect,
    Jmp,
    JmpIndirect,
    Jcc,
    Ret,
    Div,
    Idiv,
    Cld,
    Std,
    /// MOVS, repeated or not.
    Movs,
    /// STOS, repeated or not.
    Stos,
    Cli,
    Sti,
    Pushf,
    Popf,
    Iret,
    MovSeg,
    Swapgs,
    Stac,
    Clac,
    /// BT and its like of memory, with the number in a register.
    BitString,
    Fldcw,
    Fninit,
    Syscall,
    Sysret,
    /// RDTSC and RDTSCP.
    Rdtsc,
    /// LODS, not repeated.
    Lods,
    /// SCAS, not repeated.
    Scas,
    /// The interpreter executes it.
    Interpret,
}

/// The place of a general register in an encoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Field {
    /// ModRM.reg.
    Reg,
    /// ModRM.rm.
    Rm,
    /// The low three bits of the opcode.
    Opcode,
    /// VEX.vvvv.
    Vvvv,
}

/// A general-register operand.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Operand {
    pub(crate) field: Field,
    pub(crate) width: Width,
    pub(crate) reads: bool,
    pub(crate) writes: bool,
}

/// What is true of every instruction of one [`Code`].
#[derive(Debug, Clone)]
pub(crate) struct CodeInfo {
    pub(crate) class: Class,
    pub(crate) has_modrm: bool,
    pub(crate) vex: bool,
    /// General-register operands that are encoded, by position.
    pub(crate) operands: [Option<Operand>; 4],
    /// Whether vector registers are involved.
    pub(crate) vector: bool,
    /// What it needs of the x87 unit.
    pub(crate) unit: Unit,
    /// Whether a memory operand is read, and whether written.
    pub(crate) mem_read: bool,
    pub(crate) mem_write: bool,
    /// Whether a 16-byte memory operand must be aligned.
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

fn width_of(kind: K) -> Option<(Field, Width)> {
    Some(match kind {
        K::r8_reg => (Field::Reg, Width::B8),
        K::r16_reg => (Field::Reg, Width::B16),
        K::r32_reg => (Field::Reg, Width::B32),
        K::r64_reg => (Field::Reg, Width::B64),
        K::r8_or_mem => (Field::Rm, Width::B8),
        K::r16_or_mem | K::r16_rm => (Field::Rm, Width::B16),
        K::r32_or_mem | K::r32_rm => (Field::Rm, Width::B32),
        K::r64_or_mem | K::r64_rm => (Field::Rm, Width::B64),
        K::r8_opcode => (Field::Opcode, Width::B8),
        K::r16_opcode => (Field::Opcode, Width::B16),
        K::r32_opcode => (Field::Opcode, Width::B32),
        K::r64_opcode => (Field::Opcode, Width::B64),
        K::r32_vvvv => (Field::Vvvv, Width::B32),
        K::r64_vvvv => (Field::Vvvv, Width::B64),
        _ => return None,
    })
}

fn is_vector(kind: K) -> bool {
    matches!(kind, K::xmm_reg | K::xmm_rm | K::xmm_or_mem)
}

/// Whether an operand is in memory, or could be.
fn is_memory(kind: K) -> bool {
    matches!(
        kind,
        K::mem | K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem | K::xmm_or_mem | K::mm_or_mem
    )
}

fn is_plain(kind: K) -> bool {
    matches!(
        kind,
        K::mem
            | K::al
            | K::cl
            | K::ax
            | K::eax
            | K::rax
            | K::imm8
            | K::imm8_const_1
            | K::imm8sex16
            | K::imm8sex32
            | K::imm8sex64
            | K::imm16
            | K::imm32
            | K::imm32sex64
            | K::imm64
            | K::st0
            | K::sti_opcode
    )
}

fn describe(insn: &Instruction) -> CodeInfo {
    let code = insn.code();
    let op_code = code.op_code();
    let kinds = op_code.op_kinds();
    let mut info = CodeInfo {
        class: classify(insn),
        has_modrm: false,
        vex: op_code.encoding() == EncodingKind::VEX,
        operands: [None; 4],
        vector: kinds.iter().any(|kind| is_vector(*kind)),
        unit: fpu::unit_of(code),
        mem_read: false,
        mem_write: false,
        aligned: false,
        slot_read: false,
        slot_write: false,
    };
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
        if memory || is_vector(*kind) || fpu::is_mmx(*kind) {
            info.has_modrm = true;
        }
        if memory {
            info.mem_read |= reads;
            info.mem_write |= writes;
        }
    }
    info.has_modrm |= info.class == Class::MovSeg;
    let mnemonic = code.mnemonic();
    info.aligned = info.vector && !info.vex && needs_alignment(mnemonic);
    if matches!(mnemonic, Mnemonic::Cmpxchg16b) {
        info.aligned = true;
    }
    info.slot_read = !matches!(mnemonic, Mnemonic::Bt | Mnemonic::Xchg | Mnemonic::Cmpxchg | Mnemonic::Xadd);
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

fn needs_alignment(mnemonic: Mnemonic) -> bool {
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

fn classify(insn: &Instruction) -> Class {
    use Mnemonic as M;
    let code = insn.code();
    let op_code = code.op_code();
    let kinds = op_code.op_kinds();
    match code {
        Code::Call_rel32_64 => return Class::Call,
        Code::Call_rm64 => return Class::CallIndirect,
        Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => return Class::Jmp,
        Code::Jmp_rm64 => return Class::JmpIndirect,
        Code::Retnq | Code::Retnq_imm16 => return Class::Ret,
        Code::Push_r64 | Code::Push_rm64 => return Class::Push,
        Code::Pushq_imm8 | Code::Pushq_imm32 => return Class::PushImm,
        Code::Pop_r64 => return Class::Pop,
        Code::Leaveq => return Class::Leave,
        Code::Syscall => return Class::Syscall,
        Code::Sysretq => return Class::Sysret,
        Code::Rdtsc | Code::Rdtscp => return Class::Rdtsc,
        Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg => return Class::MovSeg,
        Code::Div_rm32 | Code::Div_rm64 => return Class::Div,
        Code::Idiv_rm32 | Code::Idiv_rm64 => return Class::Idiv,
        Code::Mov_AL_moffs8 | Code::Mov_AX_moffs16 | Code::Mov_EAX_moffs32 | Code::Mov_RAX_moffs64 => {
            return Class::Interpret;
        }
        _ => {}
    }
    if let Some(class) = fpu::classify(insn) {
        return if supported(code.cpuid_features()) { class } else { Class::Interpret };
    }
    if insn.is_jcc_short_or_near() {
        let wide = matches!(insn.op0_kind(), OpKind::NearBranch64);
        return if wide { Class::Jcc } else { Class::Interpret };
    }
    if insn.is_string_instruction() {
        return match code.mnemonic() {
            M::Movsb | M::Movsw | M::Movsd | M::Movsq => Class::Movs,
            M::Stosb | M::Stosw | M::Stosd | M::Stosq => Class::Stos,
            M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => Class::Lods,
            M::Scasb | M::Scasw | M::Scasd | M::Scasq => Class::Scas,
            _ => Class::Interpret,
        };
    }
    match code.mnemonic() {
        M::Nop
        | M::Endbr64
        | M::Endbr32
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw => return Class::Nop,
        // The run loop may have something better to do.
        M::Pause => return Class::Interpret,
        M::Cli => return Class::Cli,
        M::Sti => return Class::Sti,
        M::Swapgs => return Class::Swapgs,
        M::Stac => return Class::Stac,
        M::Clac => return Class::Clac,
        M::Pushfq => return Class::Pushf,
        M::Popfq => return Class::Popf,
        M::Iretq => return Class::Iret,
        M::Lea => return Class::Lea,
        M::Cld => return Class::Cld,
        M::Std => return Class::Std,
        M::Emms
        | M::Clc
        | M::Stc
        | M::Cmc
        | M::Cbw
        | M::Cwde
        | M::Cdqe
        | M::Cwd
        | M::Cdq
        | M::Cqo
        | M::Lahf
        | M::Sahf
        | M::Mfence
        | M::Lfence
        | M::Sfence => return Class::Verbatim,
        _ => {}
    }
    if !supported(code.cpuid_features()) {
        return Class::Interpret;
    }
    let operands_fit = kinds
        .iter()
        .all(|kind| width_of(*kind).is_some() || is_vector(*kind) || fpu::is_mmx(*kind) || is_plain(*kind));
    if !operands_fit || insn.is_string_instruction() || code.is_privileged() || code.is_stack_instruction() {
        return Class::Interpret;
    }
    let vector = kinds.iter().any(|kind| is_vector(*kind) || fpu::is_mmx(*kind));
    let fits = match op_code.encoding() {
        EncodingKind::Legacy if vector => !matches!(code.mnemonic(), M::Maskmovdqu | M::Maskmovq),
        EncodingKind::Legacy => is_integer(code.mnemonic()),
        EncodingKind::VEX => !vector && is_integer(code.mnemonic()),
        _ => false,
    };
    if fits { Class::Generic } else { Class::Interpret }
}

/// Integer instructions that do the same in any register and at any address.
fn is_integer(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Mov
            | M::Add
            | M::Or
            | M::Adc
            | M::Sbb
            | M::And
            | M::Sub
            | M::Xor
            | M::Cmp
            | M::Test
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Imul
            | M::Mul
            | M::Shl
            | M::Sal
            | M::Shr
            | M::Sar
            | M::Rol
            | M::Ror
            | M::Rcl
            | M::Rcr
            | M::Shld
            | M::Shrd
            | M::Bt
            | M::Bts
            | M::Btr
            | M::Btc
            | M::Bsf
            | M::Bsr
            | M::Popcnt
            | M::Lzcnt
            | M::Tzcnt
            | M::Bswap
            | M::Xadd
            | M::Xchg
            | M::Cmpxchg
            | M::Cmpxchg8b
            | M::Cmpxchg16b
            | M::Movbe
            | M::Crc32
            | M::Adcx
            | M::Adox
            | M::Andn
            | M::Bextr
            | M::Blsi
            | M::Blsmsk
            | M::Blsr
            | M::Bzhi
            | M::Pdep
            | M::Pext
            | M::Rorx
            | M::Sarx
            | M::Shlx
            | M::Shrx
            | M::Mulx
            | M::Movnti
    ) || is_cmov(mnemonic)
        || is_setcc(mnemonic)
}

/// CMOVcc.
pub(crate) fn is_cmov(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Cmova
            | M::Cmovae
            | M::Cmovb
            | M::Cmovbe
            | M::Cmove
            | M::Cmovg
            | M::Cmovge
            | M::Cmovl
            | M::Cmovle
            | M::Cmovne
            | M::Cmovno
            | M::Cmovnp
            | M::Cmovns
            | M::Cmovo
            | M::Cmovp
            | M::Cmovs
    )
}

fn is_setcc(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Seta
            | M::Setae
            | M::Setb
            | M::Setbe
            | M::Sete
            | M::Setg
            | M::Setge
            | M::Setl
            | M::Setle
            | M::Setne
            | M::Setno
            | M::Setnp
            | M::Setns
            | M::Seto
            | M::Setp
            | M::Sets
    )
}

/// Whether this host has what the instruction needs; where it does not, the interpreter says #UD.
fn supported(features: &[CpuidFeature]) -> bool {
    use CpuidFeature as F;
    features.iter().all(|feature| match feature {
        F::INTEL8086
        | F::INTEL8086_ONLY
        | F::INTEL186
        | F::INTEL286
        | F::INTEL386
        | F::INTEL486
        | F::X64
        | F::CMOV
        | F::CX8
        | F::FPU
        | F::FPU287
        | F::FPU387
        | F::MMX
        | F::SSE
        | F::SSE2
        | F::MULTIBYTENOP => true,
        F::SSE3 => is_x86_feature_detected!("sse3"),
        F::SSSE3 => is_x86_feature_detected!("ssse3"),
        F::SSE4_1 => is_x86_feature_detected!("sse4.1"),
        F::SSE4_2 => is_x86_feature_detected!("sse4.2"),
        F::POPCNT => is_x86_feature_detected!("popcnt"),
        F::LZCNT => is_x86_feature_detected!("lzcnt"),
        F::BMI1 => is_x86_feature_detected!("bmi1"),
        F::BMI2 => is_x86_feature_detected!("bmi2"),
        F::ADX => is_x86_feature_detected!("adx"),
        F::MOVBE => is_x86_feature_detected!("movbe"),
        F::CMPXCHG16B => is_x86_feature_detected!("cmpxchg16b"),
        F::AES => is_x86_feature_detected!("aes"),
        F::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        F::SHA => is_x86_feature_detected!("sha"),
        _ => false,
    })
}

/// A guest instruction's encoding, taken apart.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Raw {
    pub(crate) lock: bool,
    pub(crate) p66: bool,
    pub(crate) p67: bool,
    pub(crate) rep: u8,
    pub(crate) rex: u8,
    pub(crate) map: Map,
    pub(crate) opcode: u8,
    /// VEX.vvvv, W, L and pp.
    pub(crate) vvvv: u8,
    pub(crate) vex_w: bool,
    pub(crate) vex_l: bool,
    pub(crate) pp: u8,
    /// ModRM.reg and ModRM.rm with their extensions; `rm` only if it is a register.
    pub(crate) reg: u8,
    pub(crate) rm: Option<u8>,
    /// Where the immediate begins; it runs to the end of the instruction.
    pub(crate) imm: usize,
}

impl Raw {
    /// Takes `bytes`, one whole valid instruction in 64-bit mode, apart. `None` if it ends too early, or is
    /// encoded in a way that is not translated.
    pub(crate) fn parse(bytes: &[u8], info: &CodeInfo) -> Option<Self> {
        let mut raw = Self {
            lock: false,
            p66: false,
            p67: false,
            rep: 0,
            rex: 0,
            map: Map::One,
            opcode: 0,
            vvvv: 0,
            vex_w: false,
            vex_l: false,
            pp: 0,
            reg: 0,
            rm: None,
            imm: 0,
        };
        let mut at = 0;
        loop {
            let byte = *bytes.get(at)?;
            match byte {
                0xf0 => raw.lock = true,
                0x66 => raw.p66 = true,
                0x67 => raw.p67 = true,
                0xf2 | 0xf3 => raw.rep = byte,
                0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => {}
                0x40..=0x4f => {}
                _ => break,
            }
            // REX counts only right before the opcode.
            raw.rex = if byte & 0xf0 == 0x40 { byte } else { 0 };
            at += 1;
        }
        if info.vex {
            at = raw.parse_vex(bytes, at)?;
        } else {
            if *bytes.get(at)? == 0x0f {
                at += 1;
                raw.map = Map::M0f;
                match *bytes.get(at)? {
                    0x38 => raw.map = Map::M0f38,
                    0x3a => raw.map = Map::M0f3a,
                    _ => at -= 1,
                }
                at += 1;
            }
        }
        raw.opcode = *bytes.get(at)?;
        at += 1;
        if info.has_modrm {
            let modrm = *bytes.get(at)?;
            at += 1;
            raw.reg = modrm >> 3 & 7 | (raw.rex & 4) << 1;
            let rm = modrm & 7;
            let mode = modrm >> 6;
            if mode == 3 {
                raw.rm = Some(rm | (raw.rex & 1) << 3);
            } else {
                let mut base = rm;
                if rm == 4 {
                    base = *bytes.get(at)? & 7;
                    at += 1;
                }
                at += match mode {
                    0 if base == 5 => 4,
                    0 => 0,
                    1 => 1,
                    _ => 4,
                };
            }
        }
        raw.imm = at;
        (at <= bytes.len()).then_some(raw)
    }

    fn parse_vex(&mut self, bytes: &[u8], at: usize) -> Option<usize> {
        match *bytes.get(at)? {
            0xc5 => {
                let p = *bytes.get(at + 1)?;
                self.map = Map::M0f;
                self.rex = (!p >> 7 & 1) << 2;
                self.vvvv = !p >> 3 & 15;
                self.vex_l = p & 4 != 0;
                self.pp = p & 3;
                Some(at + 2)
            }
            0xc4 => {
                let (p, q) = (*bytes.get(at + 1)?, *bytes.get(at + 2)?);
                self.map = match p & 31 {
                    1 => Map::M0f,
                    2 => Map::M0f38,
                    3 => Map::M0f3a,
                    _ => return None,
                };
                self.rex = !p >> 5 & 7;
                self.vvvv = !q >> 3 & 15;
                self.vex_w = q & 0x80 != 0;
                self.vex_l = q & 4 != 0;
                self.pp = q & 3;
                Some(at + 3)
            }
            _ => None,
        }
    }
}
