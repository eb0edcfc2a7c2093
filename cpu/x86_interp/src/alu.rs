//! ADD to CMP, TEST, INC, DEC, NEG, NOT, ADCX and ADOX, and the carry-flag instructions.

use crate::flags::{self, add, sign_zero_parity, sub};
use crate::operand::{Width, modify, source};
use iced_x86::{Instruction, OpKind};
use x86_core::flags::{ARITHMETIC, CF, OF};
use x86_core::{Core, Flow, Trap, effective_address};

/// An operation with two operands. Operands are zero-extended.
pub(crate) trait Binary {
    /// Whether the result goes to the first operand.
    const STORES: bool = true;
    /// The result and all arithmetic flags, given the flags before.
    fn apply<W: Width>(a: u64, b: u64, flags: u64) -> (u64, u64);
}

macro_rules! binary {
    ($($name:ident $stores:literal |$w:ident, $a:ident, $b:ident, $flags:pat_param| $value:expr;)*) => {$(
        pub(crate) struct $name;
        impl Binary for $name {
            const STORES: bool = $stores;
            #[inline(always)]
            fn apply<$w: Width>($a: u64, $b: u64, $flags: u64) -> (u64, u64) {
                $value
            }
        }
    )*};
}

binary! {
    Add true |W, a, b, _| add::<W>(a, b, 0);
    Adc true |W, a, b, flags| add::<W>(a, b, flags & CF);
    Sub true |W, a, b, _| sub::<W>(a, b, 0);
    Sbb true |W, a, b, flags| sub::<W>(a, b, flags & CF);
    Cmp false |W, a, b, _| sub::<W>(a, b, 0);
    And true |W, a, b, _| (a & b, sign_zero_parity::<W>(a & b));
    Or true |W, a, b, _| (a | b, sign_zero_parity::<W>(a | b));
    Xor true |W, a, b, _| (a ^ b, sign_zero_parity::<W>(a ^ b));
    Test false |W, a, b, _| (0, sign_zero_parity::<W>(a & b));
}

/// ADD, ADC, SUB, SBB, AND, OR, XOR, CMP, TEST.
pub(crate) fn binary<O: Binary, W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let b = source::<W>(core, insn, 1)?.wide();
    let before = core.cpu.rflags;
    let after = if insn.op0_kind() == OpKind::Register {
        let register = insn.op0_register();
        let (result, after) = O::apply::<W>(W::get(core.cpu, register).wide(), b, before);
        if O::STORES {
            W::set(core.cpu, register, W::of(result));
        }
        after
    } else {
        let (seg, offset) = effective_address(core.cpu, insn, 0);
        if O::STORES {
            let mut after = 0;
            core.update::<W>(seg, offset, insn.has_lock_prefix(), |a| {
                let (result, flags) = O::apply::<W>(a.wide(), b, before);
                after = flags;
                Some(W::of(result))
            })?;
            after
        } else {
            let a = core.read::<W>(seg, offset)?;
            O::apply::<W>(a.wide(), b, before).1
        }
    };
    flags::set_all(core.cpu, after);
    Ok(Flow::Next)
}

/// INC and DEC, which leave CF.
pub(crate) fn step<W: Width, const DOWN: bool>(
    core: &mut Core<'_>,
    insn: &Instruction,
) -> Result<Flow, Trap> {
    let after = modify::<W, _>(core, insn, insn.has_lock_prefix(), |a| {
        let (result, flags) = if DOWN { sub::<W>(a, 1, 0) } else { add::<W>(a, 1, 0) };
        (Some(result), flags)
    })?;
    flags::set(core.cpu, ARITHMETIC & !CF, after);
    Ok(Flow::Next)
}

/// NEG.
pub(crate) fn neg<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let after = modify::<W, _>(core, insn, insn.has_lock_prefix(), |a| {
        let (result, flags) = sub::<W>(0, a, 0);
        (Some(result), flags)
    })?;
    flags::set_all(core.cpu, after);
    Ok(Flow::Next)
}

/// NOT.
pub(crate) fn not<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    modify::<W, _>(core, insn, insn.has_lock_prefix(), |a| (Some(!a), ()))?;
    Ok(Flow::Next)
}

/// ADCX (carry in CF) and ADOX (carry in OF), which touch no other flag.
pub(crate) fn add_with<W: Width, const FLAG: u64>(
    core: &mut Core<'_>,
    insn: &Instruction,
) -> Result<Flow, Trap> {
    const { assert!(FLAG == CF || FLAG == OF) };
    let b = source::<W>(core, insn, 1)?.wide();
    let register = insn.op0_register();
    let a = W::get(core.cpu, register).wide();
    let (result, after) = add::<W>(a, b, u64::from(core.cpu.rflags & FLAG != 0));
    W::set(core.cpu, register, W::of(result));
    flags::set(core.cpu, FLAG, flags::when(after & CF != 0, FLAG));
    Ok(Flow::Next)
}

/// CLC.
pub(crate) fn clc(core: &mut Core<'_>, _: &Instruction) -> Result<Flow, Trap> {
    core.cpu.rflags &= !CF;
    Ok(Flow::Next)
}

/// STC.
pub(crate) fn stc(core: &mut Core<'_>, _: &Instruction) -> Result<Flow, Trap> {
    core.cpu.rflags |= CF;
    Ok(Flow::Next)
}

/// CMC.
pub(crate) fn cmc(core: &mut Core<'_>, _: &Instruction) -> Result<Flow, Trap> {
    core.cpu.rflags ^= CF;
    Ok(Flow::Next)
}

/// CLD and STD.
pub(crate) fn direction<const DOWN: bool>(core: &mut Core<'_>, _: &Instruction) -> Result<Flow, Trap> {
    use x86_core::flags::DF;
    flags::set(core.cpu, DF, flags::when(DOWN, DF));
    Ok(Flow::Next)
}
