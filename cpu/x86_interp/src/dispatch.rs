//! Which function executes which instruction. To add an instruction: one arm here, one function in the
//! module of its topic.

use crate::operand::size;
use crate::{alu, bcd, bits, bmi, control, data, exchange, features, misc, multiply, shift, stack, string};
use iced_x86::{Code, EncodingKind, Instruction, Mnemonic, OpKind};
use x86_core::flags::{CF, OF};
use x86_core::{Core, Flow, Trap, cr0, flags};

/// Executes one instruction of the form that it was made for; RIP is still at it.
pub type Handler = fn(&mut Core<'_>, &Instruction) -> Result<Flow, Trap>;

/// The instance of a generic function for an operand size in bytes.
macro_rules! sized {
    ($size:expr, $width:ident => $function:expr) => {
        match $size {
            1 => {
                type $width = u8;
                $function
            }
            2 => {
                type $width = u16;
                $function
            }
            4 => {
                type $width = u32;
                $function
            }
            _ => {
                type $width = u64;
                $function
            }
        }
    };
}

/// The instances of a function for the 16 conditions, by [`Instruction::condition_code`].
macro_rules! conditional {
    ($insn:expr, $code:ident => $function:expr) => {
        conditional!(@ $insn, $code, $function, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $insn:expr, $code:ident, $function:expr, $($value:literal)*) => {
        match ($insn.condition_code() as u8).wrapping_sub(1) {
            $($value => {
                const $code: u8 = $value;
                $function
            })*
            _ => misc::undefined,
        }
    };
}

/// The function that [`execute`](crate::execute) calls for `insn`, and may be called for every other
/// instruction of the same [`Code`] and operand kinds: for those who decode once and execute often.
pub fn handler(insn: &Instruction) -> Handler {
    if features::is_optional(insn.mnemonic()) { gated } else { ungated(insn) }
}

/// Executes an optional instruction, or what it is on processors without it.
fn gated(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let real = core.cpu.cr0 & cr0::PE == 0 || core.cpu.rflags & flags::VM != 0;
    if insn.encoding() != EncodingKind::Legacy && real {
        return Err(Trap::UD);
    }
    if features::has(core, insn) {
        return ungated(insn)(core, insn);
    }
    let before: Handler = match insn.mnemonic() {
        Mnemonic::Tzcnt => scan(insn, false),
        Mnemonic::Lzcnt => scan(insn, true),
        _ => return Err(Trap::UD),
    };
    before(core, insn)
}

/// The function for an instruction that the processor is known to have.
#[allow(clippy::too_many_lines)] // a table
fn ungated(insn: &Instruction) -> Handler {
    use Mnemonic as M;
    let width = || size(insn, 0);
    match insn.mnemonic() {
        M::Mov => mov(insn),
        M::Add => sized!(width(), W => alu::binary::<alu::Add, W>),
        M::Adc => sized!(width(), W => alu::binary::<alu::Adc, W>),
        M::Sub => sized!(width(), W => alu::binary::<alu::Sub, W>),
        M::Sbb => sized!(width(), W => alu::binary::<alu::Sbb, W>),
        M::Cmp => sized!(width(), W => alu::binary::<alu::Cmp, W>),
        M::And => sized!(width(), W => alu::binary::<alu::And, W>),
        M::Or => sized!(width(), W => alu::binary::<alu::Or, W>),
        M::Xor => sized!(width(), W => alu::binary::<alu::Xor, W>),
        M::Test => sized!(width(), W => alu::binary::<alu::Test, W>),
        M::Inc => sized!(width(), W => alu::step::<W, false>),
        M::Dec => sized!(width(), W => alu::step::<W, true>),
        M::Neg => sized!(width(), W => alu::neg::<W>),
        M::Not => sized!(width(), W => alu::not::<W>),
        M::Adcx => sized!(width(), W => alu::add_with::<W, CF>),
        M::Adox => sized!(width(), W => alu::add_with::<W, OF>),
        M::Clc => alu::clc,
        M::Stc => alu::stc,
        M::Cmc => alu::cmc,
        M::Cld => alu::direction::<false>,
        M::Std => alu::direction::<true>,
        M::Lea => sized!(width(), W => data::lea::<W>),
        M::Xchg => sized!(width(), W => data::xchg::<W>),
        M::Movzx => sized!(width(), D => sized!(size(insn, 1), S => data::movzx::<D, S>)),
        M::Movsx | M::Movsxd => sized!(width(), D => sized!(size(insn, 1), S => data::movsx::<D, S>)),
        M::Movbe => sized!(width(), W => data::movbe::<W>),
        M::Movnti => sized!(width(), W => data::mov::<W>),
        M::Bswap => sized!(width(), W => data::bswap::<W>),
        M::Xlatb => data::xlat,
        M::Cbw => data::widen::<u16, u8>,
        M::Cwde => data::widen::<u32, u16>,
        M::Cdqe => data::widen::<u64, u32>,
        M::Cwd => data::widen_to_rdx::<u16>,
        M::Cdq => data::widen_to_rdx::<u32>,
        M::Cqo => data::widen_to_rdx::<u64>,
        M::Lahf => data::lahf,
        M::Sahf => data::sahf,
        M::Salc => data::salc,
        M::Push | M::Pop | M::Pusha | M::Pushad | M::Popa | M::Popad | M::Enter | M::Leave => stack(insn),
        M::Shl | M::Sal => sized!(width(), W => shift::shift::<shift::Shl, W>),
        M::Shr => sized!(width(), W => shift::shift::<shift::Shr, W>),
        M::Sar => sized!(width(), W => shift::shift::<shift::Sar, W>),
        M::Rol => sized!(width(), W => shift::shift::<shift::Rol, W>),
        M::Ror => sized!(width(), W => shift::shift::<shift::Ror, W>),
        M::Rcl => sized!(width(), W => shift::shift::<shift::Rcl, W>),
        M::Rcr => sized!(width(), W => shift::shift::<shift::Rcr, W>),
        M::Shld => sized!(width(), W => shift::double::<W, false>),
        M::Shrd => sized!(width(), W => shift::double::<W, true>),
        M::Mul => sized!(width(), W => multiply::mul::<W>),
        M::Imul => match insn.op_count() {
            1 => sized!(width(), W => multiply::imul::<W>),
            2 => sized!(width(), W => multiply::imul_to::<W, 0>),
            _ => sized!(width(), W => multiply::imul_to::<W, 1>),
        },
        M::Div => sized!(width(), W => multiply::div::<W>),
        M::Idiv => sized!(width(), W => multiply::idiv::<W>),
        M::Bt => sized!(width(), W => bits::test_bit::<W, 0>),
        M::Bts => sized!(width(), W => bits::test_bit::<W, 1>),
        M::Btr => sized!(width(), W => bits::test_bit::<W, 2>),
        M::Btc => sized!(width(), W => bits::test_bit::<W, 3>),
        M::Bsf => scan(insn, false),
        M::Bsr => scan(insn, true),
        M::Tzcnt => sized!(width(), W => bits::count_zeros::<W, false>),
        M::Lzcnt => sized!(width(), W => bits::count_zeros::<W, true>),
        M::Popcnt => sized!(width(), W => bits::popcnt::<W>),
        M::Crc32 => sized!(size(insn, 1), W => bits::crc32::<W>),
        M::Xadd => sized!(width(), W => exchange::xadd::<W>),
        M::Cmpxchg => sized!(width(), W => exchange::cmpxchg::<W>),
        M::Cmpxchg8b => exchange::cmpxchg8b,
        M::Cmpxchg16b => exchange::cmpxchg16b,
        M::Aaa => bcd::ascii::<false>,
        M::Aas => bcd::ascii::<true>,
        M::Aad => bcd::aad,
        M::Aam => bcd::aam,
        M::Daa => bcd::decimal::<false>,
        M::Das => bcd::decimal::<true>,
        M::Pause => misc::pause,
        M::Nop
        | M::Endbr32
        | M::Endbr64
        | M::Rdsspd
        | M::Rdsspq
        | M::Cldemote
        | M::Prefetch
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetchit0
        | M::Prefetchit1 => misc::nop,
        M::Reservednop => match insn.code() {
            // On AMD processors prefetches need a memory operand.
            Code::Reservednop_rm16_r16_0F0D
            | Code::Reservednop_rm32_r32_0F0D
            | Code::Reservednop_rm64_r64_0F0D => misc::undefined,
            _ => misc::nop,
        },
        M::Lfence | M::Sfence | M::Mfence => misc::barrier,
        M::Clflush | M::Clflushopt | M::Clwb => misc::flush,
        M::Ud0 | M::Ud1 | M::Ud2 | M::INVALID => misc::undefined,
        M::Andn | M::Bextr | M::Blsi | M::Blsmsk | M::Blsr | M::Bzhi | M::Mulx | M::Pdep | M::Pext => {
            bmi(insn)
        }
        M::Rorx | M::Sarx | M::Shlx | M::Shrx => bmi(insn),
        _ => by_code(insn),
    }
}

fn mov(insn: &Instruction) -> Handler {
    let general = |operand| match insn.op_kind(operand) {
        OpKind::Register => insn.op_register(operand).is_gpr(),
        _ => true,
    };
    if general(0) && general(1) {
        sized!(size(insn, 0), W => data::mov::<W>)
    } else {
        x86_core::system::execute
    }
}

fn stack(insn: &Instruction) -> Handler {
    if insn.op_count() > 0 && insn.op0_kind() == OpKind::Register && !insn.op0_register().is_gpr() {
        return x86_core::system::execute;
    }
    let moved = insn.stack_pointer_increment().unsigned_abs();
    match insn.mnemonic() {
        Mnemonic::Push => sized!(moved, W => stack::push::<W>),
        Mnemonic::Pop => sized!(moved, W => stack::pop::<W>),
        Mnemonic::Pusha => stack::push_all::<u16>,
        Mnemonic::Pushad => stack::push_all::<u32>,
        Mnemonic::Popa => stack::pop_all::<u16>,
        Mnemonic::Popad => stack::pop_all::<u32>,
        _ => match insn.code() {
            Code::Enterw_imm16_imm8 => stack::enter::<u16>,
            Code::Enterd_imm16_imm8 => stack::enter::<u32>,
            Code::Enterq_imm16_imm8 => stack::enter::<u64>,
            Code::Leavew => stack::leave::<u16>,
            Code::Leaved => stack::leave::<u32>,
            _ => stack::leave::<u64>,
        },
    }
}

/// BSF, and BSR if `reverse`; also what TZCNT and LZCNT are on processors without them.
fn scan(insn: &Instruction, reverse: bool) -> Handler {
    if reverse {
        sized!(size(insn, 0), W => bits::scan::<W, true>)
    } else {
        sized!(size(insn, 0), W => bits::scan::<W, false>)
    }
}

fn bmi(insn: &Instruction) -> Handler {
    // TBM and BEXTR with an immediate are other instructions (XOP).
    if insn.encoding() != EncodingKind::VEX {
        return misc::undefined;
    }
    let width = size(insn, 0);
    match insn.mnemonic() {
        Mnemonic::Andn => sized!(width, W => bits::andn::<W>),
        Mnemonic::Bextr => sized!(width, W => bmi::bextr::<W>),
        Mnemonic::Blsi => sized!(width, W => bmi::blsi::<W>),
        Mnemonic::Blsmsk => sized!(width, W => bmi::blsmsk::<W>),
        Mnemonic::Blsr => sized!(width, W => bmi::blsr::<W>),
        Mnemonic::Bzhi => sized!(width, W => bmi::bzhi::<W>),
        Mnemonic::Mulx => sized!(width, W => bmi::mulx::<W>),
        Mnemonic::Pdep => sized!(width, W => bmi::pdep::<W>),
        Mnemonic::Pext => sized!(width, W => bmi::pext::<W>),
        Mnemonic::Rorx => sized!(width, W => bmi::rorx::<W>),
        Mnemonic::Sarx => sized!(width, W => bmi::shift::<W, { bmi::ARITHMETIC_RIGHT }>),
        Mnemonic::Shlx => sized!(width, W => bmi::shift::<W, { bmi::LEFT }>),
        _ => sized!(width, W => bmi::shift::<W, { bmi::RIGHT }>),
    }
}

/// Instructions whose mnemonic does not tell enough.
fn by_code(insn: &Instruction) -> Handler {
    use control::{ALWAYS, WHILE_EQUAL, WHILE_UNEQUAL};
    use string::{cmps, lods, movs, scas, stos};
    match insn.code() {
        Code::Movsb_m8_m8 => movs::<u8>,
        Code::Movsw_m16_m16 => movs::<u16>,
        Code::Movsd_m32_m32 => movs::<u32>,
        Code::Movsq_m64_m64 => movs::<u64>,
        Code::Stosb_m8_AL => stos::<u8>,
        Code::Stosw_m16_AX => stos::<u16>,
        Code::Stosd_m32_EAX => stos::<u32>,
        Code::Stosq_m64_RAX => stos::<u64>,
        Code::Lodsb_AL_m8 => lods::<u8>,
        Code::Lodsw_AX_m16 => lods::<u16>,
        Code::Lodsd_EAX_m32 => lods::<u32>,
        Code::Lodsq_RAX_m64 => lods::<u64>,
        Code::Scasb_AL_m8 => scas::<u8>,
        Code::Scasw_AX_m16 => scas::<u16>,
        Code::Scasd_EAX_m32 => scas::<u32>,
        Code::Scasq_RAX_m64 => scas::<u64>,
        Code::Cmpsb_m8_m8 => cmps::<u8>,
        Code::Cmpsw_m16_m16 => cmps::<u16>,
        Code::Cmpsd_m32_m32 => cmps::<u32>,
        Code::Cmpsq_m64_m64 => cmps::<u64>,
        Code::Jmp_rel8_16
        | Code::Jmp_rel8_32
        | Code::Jmp_rel8_64
        | Code::Jmp_rel16
        | Code::Jmp_rel32_32
        | Code::Jmp_rel32_64 => control::jmp,
        Code::Jmp_rm16 => control::jmp_indirect::<u16>,
        Code::Jmp_rm32 => control::jmp_indirect::<u32>,
        Code::Jmp_rm64 => control::jmp_indirect::<u64>,
        Code::Call_rel16 => control::call::<u16>,
        Code::Call_rel32_32 => control::call::<u32>,
        Code::Call_rel32_64 => control::call::<u64>,
        Code::Call_rm16 => control::call_indirect::<u16>,
        Code::Call_rm32 => control::call_indirect::<u32>,
        Code::Call_rm64 => control::call_indirect::<u64>,
        Code::Retnw | Code::Retnw_imm16 => control::ret::<u16>,
        Code::Retnd | Code::Retnd_imm16 => control::ret::<u32>,
        Code::Retnq | Code::Retnq_imm16 => control::ret::<u64>,
        Code::Jcxz_rel8_16 | Code::Jcxz_rel8_32 => control::jcxz::<u16>,
        Code::Jecxz_rel8_16 | Code::Jecxz_rel8_32 | Code::Jecxz_rel8_64 => control::jcxz::<u32>,
        Code::Jrcxz_rel8_16 | Code::Jrcxz_rel8_64 => control::jcxz::<u64>,
        Code::Loop_rel8_16_CX | Code::Loop_rel8_32_CX => control::repeat::<u16, ALWAYS>,
        Code::Loop_rel8_16_ECX | Code::Loop_rel8_32_ECX | Code::Loop_rel8_64_ECX => {
            control::repeat::<u32, ALWAYS>
        }
        Code::Loop_rel8_16_RCX | Code::Loop_rel8_64_RCX => control::repeat::<u64, ALWAYS>,
        Code::Loope_rel8_16_CX | Code::Loope_rel8_32_CX => control::repeat::<u16, WHILE_EQUAL>,
        Code::Loope_rel8_16_ECX | Code::Loope_rel8_32_ECX | Code::Loope_rel8_64_ECX => {
            control::repeat::<u32, WHILE_EQUAL>
        }
        Code::Loope_rel8_16_RCX | Code::Loope_rel8_64_RCX => control::repeat::<u64, WHILE_EQUAL>,
        Code::Loopne_rel8_16_CX | Code::Loopne_rel8_32_CX => control::repeat::<u16, WHILE_UNEQUAL>,
        Code::Loopne_rel8_16_ECX | Code::Loopne_rel8_32_ECX | Code::Loopne_rel8_64_ECX => {
            control::repeat::<u32, WHILE_UNEQUAL>
        }
        Code::Loopne_rel8_16_RCX | Code::Loopne_rel8_64_RCX => control::repeat::<u64, WHILE_UNEQUAL>,
        Code::Bound_r16_m1616 => control::bound::<u16>,
        Code::Bound_r32_m3232 => control::bound::<u32>,
        _ => by_class(insn),
    }
}

/// Conditional instructions, then those of others.
fn by_class(insn: &Instruction) -> Handler {
    if insn.is_jcc_short_or_near() {
        conditional!(insn, CODE => control::jcc::<CODE>)
    } else if is_cmov(insn.mnemonic()) {
        sized!(size(insn, 0), W => conditional!(insn, CODE => data::cmov::<W, CODE>))
    } else if is_setcc(insn.mnemonic()) {
        conditional!(insn, CODE => data::set::<CODE>)
    } else {
        x86_fpu::handler(insn.code()).unwrap_or(x86_core::system::execute)
    }
}

fn is_cmov(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    let (a, b) = (M::Cmova, M::Cmovb);
    let (c, d) = (M::Cmove, M::Cmovg);
    [a, b, c, d].contains(&mnemonic)
        || [M::Cmovae, M::Cmovbe, M::Cmovge, M::Cmovl, M::Cmovle, M::Cmovne].contains(&mnemonic)
        || [M::Cmovno, M::Cmovnp, M::Cmovns, M::Cmovo, M::Cmovp, M::Cmovs].contains(&mnemonic)
}

fn is_setcc(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    [M::Seta, M::Setae, M::Setb, M::Setbe, M::Sete, M::Setg, M::Setge, M::Setl].contains(&mnemonic)
        || [M::Setle, M::Setne, M::Setno, M::Setnp, M::Setns, M::Seto, M::Setp, M::Sets].contains(&mnemonic)
}
