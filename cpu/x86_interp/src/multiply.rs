//! MUL, IMUL, DIV, IDIV (Intel SDM volume 2), with those flags that are undefined left alone or set as AMD
//! processors do.

use crate::flags::{self, when};
use crate::operand::{Width, numbered, set_numbered, source};
use iced_x86::Instruction;
use x86_core::flags::{AF, ARITHMETIC, CF, OF};
use x86_core::reg::{RAX, RDX};
use x86_core::{Core, Flow, Trap};

/// Reads the double-width pair AX, DX:AX, EDX:EAX or RDX:RAX.
fn pair<W: Width>(core: &Core<'_>) -> u128 {
    if W::BITS == 8 {
        return u128::from(numbered::<u16>(core.cpu, RAX));
    }
    u128::from(numbered::<W>(core.cpu, RDX)) << W::BITS | u128::from(numbered::<W>(core.cpu, RAX))
}

/// Writes it.
fn set_pair<W: Width>(core: &mut Core<'_>, low: u64, high: u64) {
    if W::BITS == 8 {
        set_numbered::<u16>(core.cpu, RAX, (high & 0xff) << 8 | low & 0xff);
    } else {
        set_numbered::<W>(core.cpu, RAX, low);
        set_numbered::<W>(core.cpu, RDX, high);
    }
}

/// CF and OF are both set if the upper half counts; the others stay.
fn set_flags(core: &mut Core<'_>, overflow: bool) {
    flags::set(core.cpu, CF | OF, when(overflow, CF | OF));
}

/// MUL.
pub(crate) fn mul<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let b = source::<W>(core, insn, 0)?.wide();
    let product = u128::from(numbered::<W>(core.cpu, RAX)) * u128::from(b);
    let high = (product >> W::BITS) as u64;
    set_pair::<W>(core, product as u64, high);
    set_flags(core, high != 0);
    Ok(Flow::Next)
}

/// IMUL with one operand.
pub(crate) fn imul<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let b = source::<W>(core, insn, 0)?.signed();
    let a = W::of(core.cpu.regs[RAX]).signed();
    let product = i128::from(a) * i128::from(b);
    set_pair::<W>(core, product as u64, (product >> W::BITS) as u64);
    set_flags(core, product != i128::from(W::of(product as u64).signed()));
    Ok(Flow::Next)
}

/// IMUL with two or three operands: the product of operands `A` and `A + 1` goes to the first.
pub(crate) fn imul_to<W: Width, const A: u32>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let a = source::<W>(core, insn, A)?.signed();
    let b = source::<W>(core, insn, A + 1)?.signed();
    let product = i128::from(a) * i128::from(b);
    let result = W::of(product as u64);
    W::set(core.cpu, insn.op0_register(), result);
    set_flags(core, product != i128::from(result.signed()));
    Ok(Flow::Next)
}

/// What divisions change; all flags are undefined, but AMD processors set AF and leave CF and OF.
const DIVIDE_FLAGS: u64 = ARITHMETIC & !(CF | OF);

/// DIV.
pub(crate) fn div<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let divisor = u128::from(source::<W>(core, insn, 0)?.wide());
    let dividend = pair::<W>(core);
    let quotient = dividend.checked_div(divisor).ok_or(Trap::DE)?;
    if quotient > u128::from(W::MASK) {
        return Err(Trap::DE);
    }
    set_pair::<W>(core, quotient as u64, (dividend % divisor) as u64);
    flags::set(core.cpu, DIVIDE_FLAGS, AF);
    Ok(Flow::Next)
}

/// IDIV.
pub(crate) fn idiv<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let divisor = i128::from(source::<W>(core, insn, 0)?.signed());
    let unused = 128 - 2 * W::BITS;
    let dividend = (pair::<W>(core) << unused) as i128 >> unused;
    let quotient = dividend.checked_div(divisor).ok_or(Trap::DE)?;
    if quotient != i128::from(W::of(quotient as u64).signed()) {
        return Err(Trap::DE);
    }
    set_pair::<W>(core, quotient as u64, (dividend % divisor) as u64);
    flags::set(core.cpu, DIVIDE_FLAGS, AF);
    Ok(Flow::Next)
}
