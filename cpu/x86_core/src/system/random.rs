//! RDRAND and RDSEED.

use super::operand;
use crate::cpuid::feature;
use crate::{Core, Flow, Trap, flags};
use iced_x86::{Instruction, Mnemonic, OpKind};
use std::cell::RefCell;

/// Random bytes of the host, in stock so that not every instruction is a system call.
struct Stock {
    bytes: [u8; 256],
    left: usize,
}

thread_local! {
    static STOCK: RefCell<Stock> = const { RefCell::new(Stock { bytes: [0; 256], left: 0 }) };
}

/// 64 random bits of the host, if it has some.
pub fn host_random() -> Option<u64> {
    STOCK.with_borrow_mut(|stock| {
        if stock.left < 8 {
            let got = rustix::rand::getrandom(&mut stock.bytes, rustix::rand::GetRandomFlags::empty());
            stock.left = got.ok()?;
        }
        let end = stock.left;
        let word = stock.bytes.get(end.checked_sub(8)?..end)?;
        let value = u64::from_le_bytes(word.try_into().ok()?);
        // Nothing is given out twice, and nothing that was given out stays.
        stock.bytes[end - 8..end].fill(0);
        stock.left = end - 8;
        Some(value)
    })
}

/// RDRAND and RDSEED: CF says whether there was a number.
pub(super) fn execute(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    let feature = if insn.mnemonic() == Mnemonic::Rdrand { feature::RDRAND } else { feature::RDSEED };
    if !core.cpu.model.has(feature) || insn.op0_kind() != OpKind::Register {
        return Err(Trap::UD);
    }
    let value = core.platform.random();
    operand::set_register(core.cpu, insn.op0_register(), value.unwrap_or(0));
    core.cpu.rflags &= !flags::ARITHMETIC;
    if value.is_some() {
        core.cpu.rflags |= flags::CF;
    }
    Ok(Flow::Next)
}
