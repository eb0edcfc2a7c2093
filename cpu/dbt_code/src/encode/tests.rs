//! What is emitted, as a disassembler reads it.

use super::*;
use crate::CodeCache;
use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter};

fn listing(emit: impl FnOnce(&mut Emitter)) -> Vec<String> {
    let cache = CodeCache::new(4096).unwrap();
    let mut code = cache.allocate(4096).unwrap();
    let start = code.address();
    emit(&mut code);
    assert!(!code.overflowed());
    let len = (code.address() - start) as usize;
    // SAFETY: the bytes were just written and nobody writes them now.
    let bytes = unsafe { std::slice::from_raw_parts(start as *const u8, len) };
    let mut decoder = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE);
    let mut formatter = IntelFormatter::new();
    formatter.options_mut().set_space_after_operand_separator(true);
    let mut lines = vec![];
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        let mut line = String::new();
        formatter.format(&instruction, &mut line);
        lines.push(line);
    }
    lines
}

#[test]
fn every_base_index_and_displacement() {
    const NAMES: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
        "r14", "r15",
    ];
    for base in 0..16u8 {
        for index in 0..16u8 {
            for (disp, text) in [(0, ""), (8, "+8"), (-0x80, "-80h"), (0x80, "+80h"), (-0x1000, "-1000h")] {
                let plain = Mem::base(Gpr(base), disp);
                let lines = listing(|code| code.load(Gpr(index), plain));
                assert_eq!(
                    lines,
                    [format!("mov {}, [{}{text}]", NAMES[index as usize], NAMES[base as usize])]
                );
                if index != 4 {
                    let lines =
                        listing(|code| code.lea(Gpr::RAX, Mem::indexed(Gpr(base), Gpr(index), 2, disp)));
                    let (base, index) = (NAMES[base as usize], NAMES[index as usize]);
                    assert_eq!(lines, [format!("lea rax, [{base}+{index}*4{text}]")]);
                }
            }
        }
    }
}

#[test]
fn the_forms_in_use() {
    let lines = listing(|code| {
        code.load(Gpr::R9, Mem::gs(0x1234));
        code.store(Width::B16, Mem::gs(8), Gpr::RAX);
        code.store(Width::B8, Mem::base(Gpr::RAX, 0), Gpr::RSI);
        code.store_imm(Mem::base(Gpr::R13, 0), -1);
        code.mov_imm(Gpr::R9, 1);
        code.mov_imm(Gpr::RAX, u64::MAX);
        code.mov_imm(Gpr::R15, 0x1234_5678_9abc);
        code.rorx(Gpr::R10, Gpr::R9, 7);
        code.alu_imm(Alu::And, Width::B32, Rm::Reg(10), 0x3fe0);
        code.alu_imm(Alu::And, Width::B64, Rm::Reg(9), -4096);
        code.alu(Alu::Cmp, Width::B64, Gpr::R9, Rm::Mem(Mem::indexed(Gpr::R15, Gpr::R10, 0, 8)));
        code.shift_imm(Shift::Shr, Width::B64, Rm::Reg(10), 7);
        code.jmp_rm(Rm::Mem(Mem::gs_indexed(Gpr::R10, 3, 0x40)));
        code.setcc(Cond::O, Gpr::RAX);
        code.load_xmm(9, Mem::gs(0x40));
        code.store_xmm(Mem::gs(0x40), 3);
        code.ldmxcsr(Mem::gs(4));
        code.push(Gpr::R12);
        code.pop(Gpr::RBX);
    });
    let expected = [
        "mov r9, gs:[1234h]",
        "mov gs:[8], ax",
        "mov [rax], sil",
        "mov qword ptr [r13], 0FFFFFFFFFFFFFFFFh",
        "mov r9d, 1",
        "mov rax, 0FFFFFFFFFFFFFFFFh",
        "mov r15, 123456789ABCh",
        "rorx r10, r9, 7",
        "and r10d, 3FE0h",
        "and r9, 0FFFFFFFFFFFFF000h",
        "cmp r9, [r15+r10+8]",
        "shr r10, 7",
        "jmp qword ptr gs:[r10*8+40h]",
        "seto al",
        "movaps xmm9, gs:[40h]",
        "movaps gs:[40h], xmm3",
        "ldmxcsr gs:[4]",
        "push r12",
        "pop rbx",
    ];
    assert_eq!(lines, expected);
}

#[test]
fn nops_are_single_instructions() {
    for len in 1..=8 {
        let lines = listing(|code| code.nop(len));
        assert_eq!(lines.len(), 1, "{lines:?}");
    }
}

#[test]
fn what_does_not_fit_is_not_written() {
    let cache = CodeCache::new(4096).unwrap();
    let mut code = cache.allocate(4).unwrap();
    code.qword(0);
    assert!(code.overflowed());
    let start = code.address();
    code.rewind(start);
    code.dword(1);
    assert!(!code.overflowed() && code.left() == 0);
}

#[test]
fn vector_moves_of_all_lengths() {
    let at = Mem::base(Gpr::R13, 64);
    let lines = listing(|code| {
        code.load_ymm(9, Mem::gs(0x40));
        code.store_ymm(at, 3);
        code.load_zmm(31, Mem::gs(0x40));
        code.store_zmm(at, 17);
        code.store_zmm(Mem::base(Gpr::RSP, 0), 8);
        code.load_mask(5, at);
        code.store_mask(Mem::gs(8), 7);
        code.vzeroupper();
    });
    assert_eq!(
        lines,
        [
            "vmovaps ymm9, gs:[40h]",
            "vmovaps [r13+40h], ymm3",
            "vmovaps zmm31, gs:[40h]",
            "vmovaps [r13+40h], zmm17",
            "vmovaps [rsp], zmm8",
            "kmovq k5, [r13+40h]",
            "kmovq gs:[8], k7",
            "vzeroupper",
        ]
    );
}

#[test]
fn evex_fields() {
    let base = Evex {
        map: 1,
        pp: 0,
        w: false,
        length: 2,
        opcode: 0x58,
        vvvv: 0,
        mask: 0,
        zeroing: false,
        broadcast: false,
    };
    let lines = listing(|code| {
        code.evex(Evex { vvvv: 29, ..base }, 14, Rm::Reg(19));
        code.evex(Evex { mask: 3, zeroing: true, vvvv: 2, length: 1, ..base }, 23, Rm::Reg(9));
        let mem = Mem::indexed(Gpr::R9, Gpr::R10, 3, 8);
        code.evex(Evex { broadcast: true, vvvv: 16, ..base }, 1, Rm::Mem(mem));
        code.evex(
            Evex { map: 2, pp: 1, w: true, opcode: 0x98, vvvv: 7, length: 0, ..base },
            31,
            Rm::Mem(mem),
        );
    });
    assert_eq!(
        lines,
        [
            "vaddps zmm14, zmm29, zmm19",
            "vaddps ymm23{k3}{z}, ymm2, ymm9",
            "vaddps zmm1, zmm16, [r9+r10*8+8]{1to16}",
            "vfmadd132pd xmm31, xmm7, [r9+r10*8+8]",
        ]
    );
}
