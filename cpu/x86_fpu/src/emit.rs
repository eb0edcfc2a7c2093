//! The few instructions around the guest's in a stub.

use crate::context::Context;
use dbt_code::{Emitter, Enc, Evex, Gpr, Map, Mem, Rm};
use std::mem::offset_of;
use x86_core::VecReg;

/// The memory operand's place.
pub(crate) const OPERAND: Gpr = Gpr::RSI;
/// The [`Context`], by the calling convention.
const CONTEXT: Gpr = Gpr::RDI;
/// The guest's general register operand.
pub(crate) const GENERAL: Gpr = Gpr::R8;
/// The guest's vector registers, or its x87 state.
pub(crate) const STATE: Gpr = Gpr::R11;

/// The guest's mask registers.
pub(crate) const MASKS: Gpr = Gpr::R9;

/// A field of the context.
pub(crate) fn context(displacement: usize) -> Mem {
    Mem::base(CONTEXT, displacement as i32)
}

/// FXRSTOR64 of the guest's x87 state.
pub(crate) fn load_x87(e: &mut Emitter) {
    e.load(STATE, context(offset_of!(Context, x87)));
    e.op(Enc::m0f(0xae).wide(), 1, Rm::Mem(Mem::base(STATE, 0)));
}

/// FXSAVE64 to [`Context::fx`], the x87 unit as the host expects it, and the return: an empty stack, all
/// exceptions masked. FNINIT would do, but is slow, and needed only if an exception is pending.
pub(crate) fn store_x87_and_return(e: &mut Emitter) {
    const PENDING: u8 = 0x80;
    let image = offset_of!(Context, fx);
    e.op(Enc::m0f(0xae).wide(), 0, Rm::Mem(context(image)));
    e.op(Enc::one(0xf6), 0, Rm::Mem(context(image + 2))); // test
    e.byte(PENDING);
    let pending = e.jcc(dbt_code::Cond::NE);
    leave_mmx(e);
    e.op(Enc::one(0xd9), 5, Rm::Mem(context(offset_of!(Context, host_control)))); // fldcw
    e.ret();
    let here = e.address();
    e.link(pending, here);
    e.bytes(&[0xdb, 0xe3]); // fninit
    e.ret();
}

fn mmx(e: &mut Emitter, opcode: u8, register: u8) {
    let place = offset_of!(Context, fx) + 32 + 16 * usize::from(register);
    e.op(Enc::m0f(opcode), register, Rm::Mem(context(place)));
}

/// MOVQ of an MMX register from the context.
pub(crate) fn load_mmx(e: &mut Emitter, register: u8) {
    mmx(e, 0x6f, register);
}

/// The same to it.
pub(crate) fn store_mmx(e: &mut Emitter, register: u8) {
    mmx(e, 0x7f, register);
}

/// EMMS.
pub(crate) fn leave_mmx(e: &mut Emitter) {
    e.bytes(&[0x0f, 0x77]);
}

/// RFLAGS from the context.
pub(crate) fn load_flags(e: &mut Emitter) {
    e.op(Enc::one(0xff), 6, Rm::Mem(context(offset_of!(Context, flags)))); // push
    e.byte(0x9d); // popfq
}

/// RFLAGS to the context.
pub(crate) fn store_flags(e: &mut Emitter) {
    e.byte(0x9c); // pushfq
    e.op(Enc::one(0x8f), 0, Rm::Mem(context(offset_of!(Context, flags)))); // pop
}

/// How much of a vector register a stub loads and stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Length {
    Xmm,
    Ymm,
    Zmm,
}

/// MOVUPS or VMOVUPS between vector `register` and the guest's of that number, which [`STATE`] points to.
fn vector(e: &mut Emitter, opcode: u8, register: u8, length: Length) {
    let place = Rm::Mem(Mem::base(STATE, (usize::from(register) * size_of::<VecReg>()) as i32));
    match length {
        Length::Xmm => e.op(Enc::m0f(opcode), register, place),
        Length::Ymm => e.vex(Map::M0f, 0, false, true, opcode, register, 0, place),
        Length::Zmm => e.evex(Evex::m0f(0, false, 2, opcode), register, place),
    }
}

/// Loads vector `register` at that length.
pub(crate) fn load_vector(e: &mut Emitter, register: u8, length: Length) {
    vector(e, 0x10, register, length);
}

/// Stores the same.
pub(crate) fn store_vector(e: &mut Emitter, register: u8, length: Length) {
    vector(e, 0x11, register, length);
}

/// The place of a mask register, which [`MASKS`] points to.
fn mask(register: u8) -> Mem {
    Mem::base(MASKS, i32::from(register) * 8)
}

/// Loads mask `register`.
pub(crate) fn load_mask(e: &mut Emitter, register: u8) {
    e.load_mask(register, mask(register));
}

/// Stores the same.
pub(crate) fn store_mask(e: &mut Emitter, register: u8) {
    e.store_mask(mask(register), register);
}

/// VZEROUPPER.
pub(crate) fn leave_avx(e: &mut Emitter) {
    e.bytes(&[0xc5, 0xf8, 0x77]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use dbt_code::CodeCache;
    use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

    /// What `emit` writes, decoded.
    fn decoded(emit: impl Fn(&mut Emitter)) -> Vec<Instruction> {
        let cache = CodeCache::new(4096).unwrap();
        let mut emitter = cache.allocate(4096).unwrap();
        let start = emitter.address();
        emit(&mut emitter);
        // SAFETY: the emitter wrote these bytes of the cache, which is readable.
        let code =
            unsafe { std::slice::from_raw_parts(start as *const u8, (emitter.address() - start) as usize) };
        Decoder::new(64, code, DecoderOptions::NONE).into_iter().collect()
    }

    /// The vector moves against the decoder, for each register.
    #[test]
    fn moves_vectors() {
        for (length, mnemonic, first) in [
            (Length::Xmm, Mnemonic::Movups, Register::XMM0),
            (Length::Ymm, Mnemonic::Vmovups, Register::YMM0),
            (Length::Zmm, Mnemonic::Vmovups, Register::ZMM0),
        ] {
            for register in 0..if length == Length::Zmm { 32 } else { 16 } {
                let insns = decoded(|e| {
                    load_vector(e, register, length);
                    store_vector(e, register, length);
                });
                assert_eq!(insns.len(), 2);
                for (insn, load) in insns.iter().zip([true, false]) {
                    assert_eq!(insn.mnemonic(), mnemonic);
                    assert_eq!(insn.op_register(u32::from(!load)), first + u32::from(register));
                    assert_eq!(insn.op_kind(u32::from(load)), OpKind::Memory);
                    assert_eq!(insn.memory_base(), Register::R11);
                    assert_eq!(insn.memory_displacement64(), u64::from(register) * 64);
                }
            }
        }
    }

    #[test]
    fn emits_what_it_says() {
        use Mnemonic::{
            Emms, Fldcw, Fninit, Fxrstor64, Fxsave64, Jne, Mov, Movq, Pop, Popfq, Push, Pushfq, Ret, Test,
            Vzeroupper,
        };
        let insns = decoded(|e| {
            load_x87(e);
            store_x87_and_return(e);
            load_flags(e);
            store_flags(e);
            load_mmx(e, 5);
            store_mmx(e, 5);
            leave_mmx(e);
            leave_avx(e);
        });
        let found: Vec<Mnemonic> = insns.iter().map(|insn| insn.mnemonic()).collect();
        assert_eq!(
            found,
            [
                Mov, Fxrstor64, Fxsave64, Test, Jne, Emms, Fldcw, Ret, Fninit, Ret, Push, Popfq, Pushfq, Pop,
                Movq, Movq, Emms, Vzeroupper
            ]
        );
        // The jump leads to FNINIT.
        assert_eq!(insns[4].near_branch_target(), insns[8].ip());
    }
}
