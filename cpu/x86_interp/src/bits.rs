//! Bit tests and scans, counts, CRC32.

use crate::flags::{self, sign_zero_parity, when};
use crate::operand::{Width, address_mask, source};
use iced_x86::{Instruction, OpKind};
use x86_core::flags::{ARITHMETIC, CF, OF, PF, ZF};
use x86_core::{Core, Flow, Trap, effective_address};

/// What BT, BTS, BTR and BTC do with the bit.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    None,
    Set,
    Reset,
    Complement,
}

const CHANGES: [Change; 4] = [Change::None, Change::Set, Change::Reset, Change::Complement];

/// BT, BTS, BTR, BTC, by `CHANGE`, an index into [`Change`]. A bit offset in a register reaches beyond a
/// memory operand (Intel SDM volume 1, 3.1.1.9 of volume 2: bit strings); only CF changes.
pub(crate) fn test_bit<W: Width, const CHANGE: usize>(
    core: &mut Core<'_>,
    insn: &Instruction,
) -> Result<Flow, Trap> {
    let change = CHANGES[CHANGE];
    let offset = source::<W>(core, insn, 1)?;
    let bit = offset.wide() & u64::from(W::BITS - 1);
    let mask = 1 << bit;
    let changed = |old: u64| match change {
        Change::None => old,
        Change::Set => old | mask,
        Change::Reset => old & !mask,
        Change::Complement => old ^ mask,
    };
    let old = if insn.op0_kind() == OpKind::Register {
        let register = insn.op0_register();
        let old = W::get(core.cpu, register).wide();
        if change != Change::None {
            W::set(core.cpu, register, W::of(changed(old)));
        }
        old
    } else {
        let (seg, mut address) = effective_address(core.cpu, insn, 0);
        if insn.op1_kind() == OpKind::Register {
            let units = offset.signed() >> W::BITS.trailing_zeros();
            address = address.wrapping_add((units * W::BYTES as i64) as u64) & address_mask(insn);
        }
        if change == Change::None {
            core.read::<W>(seg, address)?.wide()
        } else {
            core.update::<W>(seg, address, insn.has_lock_prefix(), |old| Some(W::of(changed(old.wide()))))?
                .wide()
        }
    };
    flags::set(core.cpu, CF, when(old & mask != 0, CF));
    Ok(Flow::Next)
}

/// BSF and BSR. Of zero they leave the destination, all of it. But for ZF the flags are undefined; AMD
/// processors set PF by the result and clear the others.
pub(crate) fn scan<W: Width, const REVERSE: bool>(
    core: &mut Core<'_>,
    insn: &Instruction,
) -> Result<Flow, Trap> {
    let value = source::<W>(core, insn, 1)?.wide();
    if value == 0 {
        flags::set_all(core.cpu, ZF | PF);
        return Ok(Flow::Next);
    }
    let found = u64::from(if REVERSE { 63 - value.leading_zeros() } else { value.trailing_zeros() });
    W::set(core.cpu, insn.op0_register(), W::of(found));
    flags::set_all(core.cpu, sign_zero_parity::<W>(found) & PF);
    Ok(Flow::Next)
}

/// TZCNT and LZCNT. But for CF and ZF the flags are undefined; AMD processors clear all but OF.
pub(crate) fn count_zeros<W: Width, const LEADING: bool>(
    core: &mut Core<'_>,
    insn: &Instruction,
) -> Result<Flow, Trap> {
    let value = source::<W>(core, insn, 1)?.wide();
    let count =
        if LEADING { value.leading_zeros() - (64 - W::BITS) } else { value.trailing_zeros().min(W::BITS) };
    W::set(core.cpu, insn.op0_register(), W::of(u64::from(count)));
    flags::set(core.cpu, ARITHMETIC & !OF, when(value == 0, CF) | when(count == 0, ZF));
    Ok(Flow::Next)
}

/// POPCNT.
pub(crate) fn popcnt<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let value = source::<W>(core, insn, 1)?.wide();
    W::set(core.cpu, insn.op0_register(), W::of(u64::from(value.count_ones())));
    flags::set(core.cpu, ARITHMETIC, when(value == 0, ZF));
    Ok(Flow::Next)
}

/// ANDN.
pub(crate) fn andn<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let a = source::<W>(core, insn, 1)?.wide();
    let b = source::<W>(core, insn, 2)?.wide();
    let result = !a & b;
    W::set(core.cpu, insn.op0_register(), W::of(result));
    flags::set(core.cpu, ARITHMETIC, sign_zero_parity::<W>(result));
    Ok(Flow::Next)
}

/// The CRC-32C (polynomial 0x11edc6f41, reflected) of each byte.
const CRC32C: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

/// CRC32.
pub(crate) fn crc32<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let value = source::<W>(core, insn, 1)?.wide();
    let destination = insn.op0_register();
    let wide = destination.size() == 8;
    let mut crc = if wide { u64::get(core.cpu, destination) as u32 } else { u32::get(core.cpu, destination) };
    for byte in &value.to_le_bytes()[..W::BYTES] {
        crc = crc >> 8 ^ CRC32C[usize::from(crc as u8 ^ byte)];
    }
    if wide {
        u64::set(core.cpu, destination, crc.into());
    } else {
        u32::set(core.cpu, destination, crc);
    }
    Ok(Flow::Next)
}
