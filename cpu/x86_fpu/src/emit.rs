//! The few instructions around the guest's in a stub.

use crate::stub::Context;
use std::mem::offset_of;
use x86_core::VecReg;

/// General registers that stubs use, by encoding.
pub(crate) mod gpr {
    pub(crate) const RAX: u8 = 0;
    pub(crate) const RCX: u8 = 1;
    pub(crate) const RDX: u8 = 2;
    /// The memory operand's place.
    pub(crate) const RSI: u8 = 6;
    /// The [`Context`](crate::stub::Context), by the calling convention.
    pub(crate) const RDI: u8 = 7;
    /// The guest's general register operand.
    pub(crate) const R8: u8 = 8;
    /// The guest's vector registers.
    pub(crate) const R11: u8 = 11;
}

/// Bytes of machine code.
#[derive(Debug, Default)]
pub(crate) struct Emitter {
    pub(crate) code: Vec<u8>,
}

impl Emitter {
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    /// ModRM and displacement of `[base + displacement]`.
    fn address(&mut self, register: u8, base: u8, displacement: usize) {
        debug_assert!(base & 7 != 4);
        self.code.push(0x80 | (register & 7) << 3 | base & 7);
        self.code.extend_from_slice(&(displacement as u32).to_le_bytes());
    }

    /// `opcode register, [RDI + displacement]` with REX.W.
    fn context64(&mut self, opcode: u8, register: u8, displacement: usize) {
        self.bytes(&[0x48 | (register >> 3) << 2, opcode]);
        self.address(register, gpr::RDI, displacement);
    }

    /// `0f opcode /register [RDI + displacement]`.
    fn context_0f(&mut self, opcode: u8, register: u8, displacement: usize) {
        self.bytes(&[0x0f, opcode]);
        self.address(register, gpr::RDI, displacement);
    }

    pub(crate) fn load_gpr(&mut self, register: u8, displacement: usize) {
        self.context64(0x8b, register, displacement);
    }

    pub(crate) fn store_gpr(&mut self, register: u8, displacement: usize) {
        self.context64(0x89, register, displacement);
    }

    pub(crate) fn lea(&mut self, register: u8, displacement: usize) {
        self.context64(0x8d, register, displacement);
    }

    pub(crate) fn load_mxcsr(&mut self, displacement: usize) {
        self.context_0f(0xae, 2, displacement);
    }

    pub(crate) fn store_mxcsr(&mut self, displacement: usize) {
        self.context_0f(0xae, 3, displacement);
    }

    /// FXRSTOR64 of the guest's x87 state.
    pub(crate) fn load_x87(&mut self) {
        self.load_gpr(gpr::R11, offset_of!(Context, x87));
        self.bytes(&[0x49, 0x0f, 0xae]);
        self.address(1, gpr::R11, 0);
    }

    /// FXSAVE64 to [`Context::fx`], the x87 unit as the host expects it, and the return: an empty stack, all
    /// exceptions masked. FNINIT would do, but is slow, and needed only if an exception is pending.
    pub(crate) fn store_x87_and_return(&mut self) {
        let image = offset_of!(Context, fx);
        self.code.push(0x48);
        self.context_0f(0xae, 0, image);
        self.code.push(0xf6); // test byte [rdi + image + 2], 0x80
        self.address(0, gpr::RDI, image + 2);
        self.code.push(0x80);
        self.bytes(&[0x75, 9]); // jnz over the next three
        self.leave_mmx();
        self.code.push(0xd9); // fldcw
        self.address(5, gpr::RDI, offset_of!(Context, host_control));
        self.ret();
        self.bytes(&[0xdb, 0xe3]); // fninit
        self.ret();
    }

    fn mmx_place(register: u8) -> usize {
        offset_of!(Context, fx) + 32 + 16 * usize::from(register)
    }

    pub(crate) fn load_mmx(&mut self, register: u8) {
        self.context_0f(0x6f, register, Self::mmx_place(register));
    }

    pub(crate) fn store_mmx(&mut self, register: u8) {
        self.context_0f(0x7f, register, Self::mmx_place(register));
    }

    /// `emms`.
    pub(crate) fn leave_mmx(&mut self) {
        self.bytes(&[0x0f, 0x77]);
    }

    /// RFLAGS from the context.
    pub(crate) fn load_flags(&mut self) {
        self.code.push(0xff); // push [rdi + …]
        self.address(6, gpr::RDI, offset_of!(Context, flags));
        self.code.push(0x9d); // popfq
    }

    /// RFLAGS to the context.
    pub(crate) fn store_flags(&mut self) {
        self.bytes(&[0x9c, 0x8f]); // pushfq; pop [rdi + …]
        self.address(0, gpr::RDI, offset_of!(Context, flags));
    }

    /// Moves between XMM `register` and the guest's of that number, which R11 points to.
    fn xmm(&mut self, opcode: u8, register: u8) {
        self.bytes(&[0x41 | (register >> 3) << 2, 0x0f, opcode]);
        self.address(register, gpr::R11, usize::from(register) * size_of::<VecReg>());
    }

    pub(crate) fn load_xmm(&mut self, register: u8) {
        self.xmm(0x10, register);
    }

    pub(crate) fn store_xmm(&mut self, register: u8) {
        self.xmm(0x11, register);
    }

    /// VMOVUPS between YMM `register` and the guest's.
    fn ymm(&mut self, opcode: u8, register: u8) {
        // VEX.256.0F.WIG with the base extended (B) and, for registers from 8, R.
        self.bytes(&[0xc4, 0x41 | u8::from(register < 8) << 7, 0x7c, opcode]);
        self.address(register, gpr::R11, usize::from(register) * size_of::<VecReg>());
    }

    pub(crate) fn load_ymm(&mut self, register: u8) {
        self.ymm(0x10, register);
    }

    pub(crate) fn store_ymm(&mut self, register: u8) {
        self.ymm(0x11, register);
    }

    /// `vzeroupper`.
    pub(crate) fn leave_avx(&mut self) {
        self.bytes(&[0xc5, 0xf8, 0x77]);
    }

    pub(crate) fn ret(&mut self) {
        self.code.push(0xc3);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Mnemonic, OpKind, Register};

    /// The emitter against the decoder, for each register.
    #[test]
    fn emits_what_it_says() {
        type Emit = fn(&mut Emitter, u8);
        let vectors: [(Emit, Mnemonic, Register, bool); 4] = [
            (Emitter::load_xmm, Mnemonic::Movups, Register::XMM0, true),
            (Emitter::store_xmm, Mnemonic::Movups, Register::XMM0, false),
            (Emitter::load_ymm, Mnemonic::Vmovups, Register::YMM0, true),
            (Emitter::store_ymm, Mnemonic::Vmovups, Register::YMM0, false),
        ];
        for (emit, mnemonic, first, load) in vectors {
            for register in 0..16 {
                let mut emitter = Emitter::default();
                emit(&mut emitter, register);
                let insn = Decoder::new(64, &emitter.code, DecoderOptions::NONE).decode();
                assert_eq!(insn.len(), emitter.code.len());
                assert_eq!(insn.mnemonic(), mnemonic);
                assert_eq!(insn.op_register(u32::from(!load)), first + u32::from(register));
                assert_eq!(insn.op_kind(u32::from(load)), OpKind::Memory);
                assert_eq!(insn.memory_base(), Register::R11);
                assert_eq!(insn.memory_displacement64(), u64::from(register) * 64);
            }
        }
        for register in [gpr::RAX, gpr::RCX, gpr::RDX, gpr::R8, gpr::R11] {
            let mut emitter = Emitter::default();
            emitter.load_gpr(register, 0x1234);
            let insn = Decoder::new(64, &emitter.code, DecoderOptions::NONE).decode();
            assert_eq!(insn.mnemonic(), Mov);
            assert_eq!(insn.op0_register(), Register::RAX + u32::from(register));
            assert_eq!((insn.memory_base(), insn.memory_displacement64()), (Register::RDI, 0x1234));
        }
        let mut emitter = Emitter::default();
        emitter.load_x87();
        emitter.store_x87_and_return();
        emitter.load_flags();
        emitter.store_flags();
        emitter.load_mxcsr(8);
        emitter.store_mxcsr(8);
        emitter.load_mmx(5);
        emitter.store_mmx(5);
        emitter.leave_mmx();
        emitter.leave_avx();
        emitter.ret();
        use Mnemonic::{
            Emms, Fldcw, Fninit, Fxrstor64, Fxsave64, Jne, Ldmxcsr, Mov, Movq, Pop, Popfq, Push, Pushfq, Ret,
            Stmxcsr, Test, Vzeroupper,
        };
        let found: Vec<Mnemonic> =
            Decoder::new(64, &emitter.code, DecoderOptions::NONE).into_iter().map(|i| i.mnemonic()).collect();
        assert_eq!(
            found,
            [
                Mov, Fxrstor64, Fxsave64, Test, Jne, Emms, Fldcw, Ret, Fninit, Ret, Push, Popfq, Pushfq, Pop,
                Ldmxcsr, Stmxcsr, Movq, Movq, Emms, Vzeroupper, Ret
            ]
        );
    }
}
