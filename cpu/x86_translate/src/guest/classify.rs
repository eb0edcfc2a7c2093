//! Which instructions are translated, and in which way.

use super::class::Class;
use super::fpu;
use super::operand::{is_mmx, is_plain, is_vector, width_of};
use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic};
use x86_core::cpuid::host_has_avx512;

/// How an instruction is translated as far as that hangs on its code alone.
pub(super) fn classify(insn: &Instruction) -> Class {
    use Mnemonic as M;
    let code = insn.code();
    let op_code = code.op_code();
    let kinds = op_code.op_kinds();
    if let Some(class) = by_code(code) {
        return class;
    }
    if let Some(class) = fpu::classify(insn) {
        return if supported(code.cpuid_features()) { class } else { Class::Interpret };
    }
    if insn.is_jcc_short_or_near() {
        return Class::Jcc;
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
        M::Pushfq | M::Pushfd => return Class::Pushf,
        M::Popfq | M::Popfd => return Class::Popf,
        M::Iretq => return Class::Iret,
        M::Lea => return Class::Lea,
        M::Cld => return Class::Cld,
        M::Std => return Class::Std,
        M::Vzeroupper | M::Vzeroall if supported(code.cpuid_features()) => return Class::Verbatim,
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
        EncodingKind::VEX | EncodingKind::EVEX if vector => !is_masked(code.mnemonic()),
        EncodingKind::VEX => is_integer(code.mnemonic()),
        _ => false,
    };
    if fits { Class::Generic } else { Class::Interpret }
}

/// The ways of instructions that are known by their codes: the stack, jumps, and others by themselves.
fn by_code(code: Code) -> Option<Class> {
    use Code as C;
    Some(match code {
        C::Call_rel32_64 | C::Call_rel32_32 | C::Call_rel16 => Class::Call,
        C::Call_rm64 | C::Call_rm32 | C::Call_rm16 => Class::CallIndirect,
        C::Jmp_rel8_64 | C::Jmp_rel32_64 | C::Jmp_rel8_32 | C::Jmp_rel32_32 => Class::Jmp,
        C::Jmp_rel8_16 | C::Jmp_rel16 => Class::Jmp,
        C::Jmp_rm64 | C::Jmp_rm32 | C::Jmp_rm16 => Class::JmpIndirect,
        C::Retnq | C::Retnq_imm16 | C::Retnd | C::Retnd_imm16 => Class::Ret,
        C::Retnw | C::Retnw_imm16 => Class::Ret,
        C::Push_r64 | C::Push_rm64 | C::Push_r32 | C::Push_rm32 => Class::Push,
        C::Push_r16 | C::Push_rm16 => Class::Push,
        C::Pushq_imm8 | C::Pushq_imm32 | C::Pushd_imm8 | C::Pushd_imm32 => Class::PushImm,
        C::Pushw_imm8 | C::Push_imm16 => Class::PushImm,
        C::Pop_r64 | C::Pop_r32 | C::Pop_r16 => Class::Pop,
        C::Leaveq | C::Leaved => Class::Leave,
        C::Inc_r32 | C::Dec_r32 | C::Inc_r16 | C::Dec_r16 => Class::IncDec,
        C::Syscall => Class::Syscall,
        C::Sysretq => Class::Sysret,
        C::Rdtsc | C::Rdtscp => Class::Rdtsc,
        C::Mov_r32m16_Sreg | C::Mov_r64m16_Sreg => Class::MovSeg,
        C::Div_rm32 | C::Div_rm64 => Class::Div,
        C::Idiv_rm32 | C::Idiv_rm64 => Class::Idiv,
        // Some processors read four bytes, of which two are meant.
        C::Movsxd_r16_rm16 => Class::Interpret,
        C::Mov_AL_moffs8 | C::Mov_AX_moffs16 | C::Mov_EAX_moffs32 => Class::Moffs,
        C::Mov_moffs8_AL | C::Mov_moffs16_AX | C::Mov_moffs32_EAX => Class::Moffs,
        C::Mov_RAX_moffs64 => Class::Interpret,
        _ => return None,
    })
}

/// Instructions of which a mask says which parts of their memory operand they access.
fn is_masked(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(mnemonic, M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq | M::Vmaskmovdqu)
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
        F::GFNI => is_x86_feature_detected!("gfni"),
        F::SSE4A => is_x86_feature_detected!("sse4a"),
        F::AVX => is_x86_feature_detected!("avx"),
        F::AVX2 => is_x86_feature_detected!("avx2"),
        F::FMA => is_x86_feature_detected!("fma"),
        F::F16C => is_x86_feature_detected!("f16c"),
        F::VAES => is_x86_feature_detected!("vaes"),
        F::VPCLMULQDQ => is_x86_feature_detected!("vpclmulqdq"),
        F::AVX_VNNI => is_x86_feature_detected!("avxvnni"),
        F::AVX512F | F::AVX512BW | F::AVX512CD | F::AVX512DQ | F::AVX512VL => host_has_avx512(),
        F::AVX512_IFMA => host_has_avx512() && is_x86_feature_detected!("avx512ifma"),
        F::AVX512_VBMI => host_has_avx512() && is_x86_feature_detected!("avx512vbmi"),
        F::AVX512_VBMI2 => host_has_avx512() && is_x86_feature_detected!("avx512vbmi2"),
        F::AVX512_VNNI => host_has_avx512() && is_x86_feature_detected!("avx512vnni"),
        F::AVX512_BITALG => host_has_avx512() && is_x86_feature_detected!("avx512bitalg"),
        F::AVX512_VPOPCNTDQ => host_has_avx512() && is_x86_feature_detected!("avx512vpopcntdq"),
        F::AVX512_BF16 => host_has_avx512() && is_x86_feature_detected!("avx512bf16"),
        _ => false,
    })
}
