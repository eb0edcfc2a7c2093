//! Which instructions are translated, and in which way.

use super::class::Class;
use super::fpu;
use super::operand::{is_mmx, is_plain, is_vector, width_of};
use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind};

/// How an instruction is translated as far as that hangs on its code alone.
pub(super) fn classify(insn: &Instruction) -> Class {
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
        // Some processors read four bytes, of which two are meant.
        Code::Movsxd_r16_rm16 => return Class::Interpret,
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
        .all(|kind| width_of(*kind).is_some() || is_vector(*kind) || is_mmx(*kind) || is_plain(*kind));
    if !operands_fit || insn.is_string_instruction() || code.is_privileged() || code.is_stack_instruction() {
        return Class::Interpret;
    }
    let vector = kinds.iter().any(|kind| is_vector(*kind) || is_mmx(*kind));
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
fn is_cmov(mnemonic: Mnemonic) -> bool {
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
