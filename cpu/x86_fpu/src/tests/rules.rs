//! What user mode can't show: control registers, faults on memory, real mode, the CPU model.

use super::against_host::machine;
use crate::{engine, execute, handles, x87};
use iced_x86::{Code, Decoder, DecoderOptions};
use x86_core::cpuid::CpuModel;
use x86_core::testing::{DATA, MMIO, Machine};
use x86_core::{Cpu, Flow, Trap, cr0, cr4, efer, reg, vector};

fn run(machine: &mut Machine, bits: u32, bytes: &[u8]) -> Result<Flow, Trap> {
    let rip = machine.cpu.rip;
    let insn = Decoder::with_ip(bits, bytes, rip, DecoderOptions::NONE).decode();
    assert_eq!(insn.len(), bytes.len());
    assert!(handles(insn.code()), "{:?}", insn.code());
    execute(&mut machine.core(), &insn)
}

const FLD1: &[u8] = &[0xd9, 0xe8];
const FWAIT: &[u8] = &[0x9b];
const PXOR_MM: &[u8] = &[0x0f, 0xef, 0xc1];
const PXOR_XMM: &[u8] = &[0x66, 0x0f, 0xef, 0xc1];
const MOVAPS: &[u8] = &[0x0f, 0x28, 0xc1];
const EMMS: &[u8] = &[0x0f, 0x77];
const STMXCSR: &[u8] = &[0x0f, 0xae, 0x1b];
const FXSAVE: &[u8] = &[0x0f, 0xae, 0x03];
const FNSTSW: &[u8] = &[0xdf, 0xe0];
const PSHUFB_MM: &[u8] = &[0x0f, 0x38, 0x00, 0xc1];
const CVTPI2PS: &[u8] = &[0x0f, 0x2a, 0xc1];
const CVTTSS2SI_MEM: &[u8] = &[0xf3, 0x0f, 0x2c, 0x03];
const VPXOR: &[u8] = &[0xc5, 0xf1, 0xef, 0xc2];
const MOVNTI: &[u8] = &[0x0f, 0xc3, 0x03];
const XSAVE: &[u8] = &[0x0f, 0xae, 0x23];

/// A machine at CPL 0 with RBX at aligned data.
fn ready() -> Machine {
    let mut machine = machine();
    machine.cpu.regs[reg::RBX] = DATA;
    machine.cpu.cr0 &= !(cr0::EM | cr0::TS);
    machine.cpu.cr0 |= cr0::MP | cr0::NE;
    machine
}

#[test]
fn control_registers_decide() {
    let ud = Err(Trap::UD);
    let nm = Err(Trap::NM);
    let ok = Ok(Flow::Next);
    // With nothing set, EM, TS, OSFXSR clear, OSXSAVE clear.
    let table = [
        (FLD1, [ok, nm, nm, ok, ok]),
        (FWAIT, [ok, ok, nm, ok, ok]),
        (FNSTSW, [ok, nm, nm, ok, ok]),
        (PXOR_MM, [ok, ud, nm, ok, ok]),
        (EMMS, [ok, ud, nm, ok, ok]),
        (PSHUFB_MM, [ok, ud, nm, ok, ok]),
        (PXOR_XMM, [ok, ud, nm, ud, ok]),
        (MOVAPS, [ok, ud, nm, ud, ok]),
        (CVTPI2PS, [ok, ud, nm, ud, ok]),
        (CVTTSS2SI_MEM, [ok, ud, nm, ud, ok]),
        (STMXCSR, [ok, ud, nm, ud, ok]),
        (FXSAVE, [ok, nm, nm, ok, ok]),
        (MOVNTI, [ok, ok, ok, ok, ok]),
        (VPXOR, [ok, ok, nm, ok, ud]),
        (XSAVE, [ok, ok, nm, ok, ud]),
    ];
    type Change = fn(&mut Cpu);
    let changes: [Change; 5] = [
        |_| {},
        |cpu| cpu.cr0 |= cr0::EM,
        |cpu| cpu.cr0 |= cr0::TS,
        |cpu| cpu.cr4 &= !cr4::OSFXSR,
        |cpu| cpu.cr4 &= !cr4::OSXSAVE,
    ];
    for (bytes, expected) in table {
        for (change, expected) in changes.iter().zip(expected) {
            let mut machine = ready();
            change(&mut machine.cpu);
            assert_eq!(run(&mut machine, 64, bytes), expected, "{bytes:x?}");
        }
    }
    // FWAIT minds TS only with MP.
    let mut machine = ready();
    machine.cpu.cr0 = machine.cpu.cr0 & !cr0::MP | cr0::TS;
    assert_eq!(run(&mut machine, 64, FWAIT), ok);
    // AVX needs its state enabled, and protected mode.
    let mut machine = ready();
    machine.cpu.xcr0 = 3;
    assert_eq!(run(&mut machine, 64, VPXOR), ud);
}

#[test]
fn simd_exceptions_without_osxmmexcpt_are_invalid_opcodes() {
    let mut machine = ready();
    machine.cpu.mxcsr = 0x1f80 & !0x200;
    machine.cpu.vectors[0].0[..4].copy_from_slice(&1f32.to_le_bytes());
    let before = machine.cpu.vectors[0];
    let divss = [0xf3, 0x0f, 0x5e, 0xc1];
    assert_eq!(run(&mut machine, 64, &divss), Err(Trap::plain(vector::XM)));
    assert_eq!(machine.cpu.mxcsr, 0x1f84 & !0x200);
    assert_eq!(machine.cpu.vectors[0], before);
    machine.cpu.cr4 &= !cr4::OSXMMEXCPT;
    assert_eq!(run(&mut machine, 64, &divss), Err(Trap::UD));
}

#[test]
fn pending_exceptions_are_ignored_without_ne() {
    let mut machine = ready();
    // 1/0 with zero-divide unmasked.
    machine.cpu.x87.0[..2].copy_from_slice(&0x37bu16.to_le_bytes());
    for bytes in [FLD1, &[0xd9, 0xee], &[0xde, 0xf9]] {
        assert_eq!(run(&mut machine, 64, bytes), Ok(Flow::Next));
    }
    assert_eq!(x87::status_word(&machine.cpu.x87) & 0x8084, 0x8084);
    for bytes in [FLD1, FWAIT, PXOR_MM, EMMS] {
        assert_eq!(run(&mut machine, 64, bytes), Err(Trap::plain(vector::MF)), "{bytes:x?}");
    }
    assert_eq!(run(&mut machine, 64, FNSTSW), Ok(Flow::Next));
    machine.cpu.cr0 &= !cr0::NE;
    let top = x87::top(&machine.cpu.x87);
    assert_eq!(run(&mut machine, 64, FLD1), Ok(Flow::Next));
    assert_eq!(x87::top(&machine.cpu.x87), (top + 7) & 7);
    assert_eq!(x87::status_word(&machine.cpu.x87) & 0x8084, 0x8084);
    assert_eq!(run(&mut machine, 64, PXOR_MM), Ok(Flow::Next));
}

#[test]
fn faulting_accesses_change_nothing() {
    // RBX is where the last page before unmapped memory ends: addresses from 4 GiB on.
    let end = 1u64 << 32;
    let cases: [&[u8]; 12] = [
        &[0xdd, 0x1b],                      // fstp qword
        &[0xdb, 0x3b],                      // fstp tbyte
        &[0xdf, 0x33],                      // fbstp
        &[0xdd, 0x03],                      // fld qword
        &[0x0f, 0x10, 0x0b],                // movups load
        &[0x0f, 0x11, 0x0b],                // movups store
        &[0x0f, 0x7f, 0x0b],                // movq store
        &[0x66, 0x0f, 0x3a, 0x16, 0x0b, 1], // pextrd
        &[0xd9, 0x33],                      // fnstenv
        &[0xdd, 0x33],                      // fnsave
        &[0xdd, 0x23],                      // frstor
        &[0xc4, 0xe3, 0x79, 0x1d, 0x03, 0], // vcvtps2ph
    ];
    for bytes in cases {
        let mut machine = ready();
        machine.cpu.regs[reg::RBX] = end - 3;
        for (register, vector) in machine.cpu.vectors.iter_mut().enumerate() {
            vector.0.fill(register as u8 + 0x33);
        }
        assert_eq!(run(&mut machine, 64, FLD1), Ok(Flow::Next));
        let (x87, vectors, mxcsr) = (machine.cpu.x87, machine.cpu.vectors, machine.cpu.mxcsr);
        let end = run(&mut machine, 64, bytes);
        let Err(Trap::Exception(exception)) = end else { panic!("{bytes:x?}: {end:?}") };
        assert_eq!((exception.vector, exception.address), (vector::PF, 1 << 32), "{bytes:x?}");
        assert!(machine.cpu.x87 == x87 && machine.cpu.vectors == vectors && machine.cpu.mxcsr == mxcsr);
    }
}

#[test]
fn masked_stores_touch_only_what_is_selected() {
    let mut machine = ready();
    let end = 1u64 << 32;
    machine.cpu.regs[reg::RDI] = end - 8;
    // The first eight bytes are selected, the others, on no page, are not.
    machine.cpu.vectors[1].0[..8].fill(0x80);
    machine.cpu.vectors[0].0[..16].fill(0x5a);
    let maskmovdqu = [0x66, 0x0f, 0xf7, 0xc1];
    assert_eq!(run(&mut machine, 64, &maskmovdqu), Ok(Flow::Next));
    let written: Vec<_> = machine.platform.mmio.borrow().keys().copied().collect();
    assert_eq!(written.len(), 8);
    machine.cpu.vectors[1].0[8] = 0x80;
    assert!(run(&mut machine, 64, &maskmovdqu).is_err());
    // As do vector moves: four bytes on the last page.
    machine.cpu.regs[reg::RBX] = end - 4;
    machine.cpu.vectors[2].0[..16].fill(0);
    machine.cpu.vectors[2].0[3] = 0x80;
    let vmaskmovps = [0xc4, 0xe2, 0x69, 0x2c, 0x03];
    assert_eq!(run(&mut machine, 64, &vmaskmovps), Ok(Flow::Next));
    machine.cpu.vectors[2].0[7] = 0x80;
    assert!(run(&mut machine, 64, &vmaskmovps).is_err());
}

#[test]
fn gathers_restart_where_they_faulted() {
    let mut machine = ready();
    machine.cpu.regs[reg::RBX] = DATA;
    machine.poke(DATA, 0x1111_2222_3333_4444);
    machine.poke(DATA + 8, 0x5555_6666_7777_8888);
    // vpgatherdd xmm0, [rbx + xmm1], xmm2: the third element lies nowhere.
    for (index, offset) in [0i32, 8, -(DATA as i32) - 0x1000, 4].into_iter().enumerate() {
        machine.cpu.vectors[1].0[4 * index..][..4].copy_from_slice(&offset.to_le_bytes());
    }
    machine.cpu.vectors[2].0[..16].fill(0xff);
    let gather = [0xc4, 0xe2, 0x69, 0x90, 0x04, 0x0b];
    assert!(run(&mut machine, 64, &gather).is_err());
    assert_eq!(machine.cpu.vectors[0].0[..8], [0x44, 0x44, 0x33, 0x33, 0x88, 0x88, 0x77, 0x77]);
    assert_eq!(machine.cpu.vectors[2].0[..16], [[0; 8], [0xff; 8]].concat()[..]);
    machine.cpu.vectors[1].0[8..12].fill(0);
    assert_eq!(run(&mut machine, 64, &gather), Ok(Flow::Next));
    assert_eq!(machine.cpu.vectors[0].0[8..16], [0x44, 0x44, 0x33, 0x33, 0x22, 0x22, 0x11, 0x11]);
    assert_eq!(machine.cpu.vectors[2].0, [0; 64]);
}

#[test]
fn mmio_operands_are_read_and_written() {
    let mut machine = ready();
    machine.cpu.regs[reg::RBX] = MMIO;
    machine.cpu.vectors[1].0[..16].copy_from_slice(&(0..16).collect::<Vec<u8>>());
    assert_eq!(run(&mut machine, 64, &[0x0f, 0x29, 0x0b]), Ok(Flow::Next)); // movaps [rbx], xmm1
    assert_eq!(run(&mut machine, 64, &[0x66, 0x0f, 0x6f, 0x13]), Ok(Flow::Next)); // movdqa xmm2, [rbx]
    assert_eq!(machine.cpu.vectors[2].0[..16], machine.cpu.vectors[1].0[..16]);
}

#[test]
fn misaligned_operands_fault_whatever_the_host_does() {
    let mut machine = ready();
    machine.cpu.regs[reg::RBX] = DATA + 8;
    let sha1msg1 = [0x0f, 0x38, 0xc9, 0x0b];
    assert_eq!(run(&mut machine, 64, &sha1msg1), Err(Trap::gp(0)));
    // The linear address counts.
    machine.cpu.segments[x86_core::Seg::Fs as usize].base = 8;
    assert_eq!(run(&mut machine, 64, &[0x64, 0x0f, 0x28, 0x0b]), Ok(Flow::Next));
    machine.cpu.regs[reg::RBX] = DATA;
    assert_eq!(run(&mut machine, 64, &[0x64, 0x0f, 0x28, 0x0b]), Err(Trap::gp(0)));
}

#[test]
fn fxsave_leaves_out_what_it_is_told_to() {
    let save = |change: fn(&mut Cpu)| {
        let mut machine = Machine::long();
        engine::tests::announce_all();
        machine.cpu.regs[reg::RBX] = DATA;
        machine.cpu.vectors.iter_mut().for_each(|vector| vector.0.fill(7));
        change(&mut machine.cpu);
        assert_eq!(run(&mut machine, 64, &[0x48, 0x0f, 0xae, 0x03]), Ok(Flow::Next));
        (machine.peek(DATA + 160), machine.peek(DATA + 24), machine.peek(DATA + 400))
    };
    let sevens = 0x0707_0707_0707_0707;
    let mxcsr = 0xffff_0000_1f80;
    assert_eq!(save(|_| {}), (sevens, mxcsr, sevens));
    assert_eq!(save(|cpu| cpu.msrs.efer |= efer::FFXSR), (0, mxcsr, 0));
    assert_eq!(save(|cpu| cpu.cr4 &= !cr4::OSFXSR), (0, mxcsr, 0));
    let user = |cpu: &mut Cpu| {
        cpu.msrs.efer |= efer::FFXSR;
        cpu.cpl = 3;
    };
    assert_eq!(save(user), (sevens, mxcsr, sevens));
}

#[test]
fn real_mode_environments() {
    engine::tests::announce_all();
    let mut machine = Machine::real();
    machine.cpu.cr0 |= cr0::NE;
    machine.cpu.segments[x86_core::Seg::Ds as usize].base = 0x2_0000;
    machine.cpu.segments[x86_core::Seg::Cs as usize].base = 0x3_0000;
    machine.cpu.rip = 0x1234;
    machine.cpu.regs[reg::RBX] = 0x100;
    machine.memory.write(0x2_0108, &2f32.to_le_bytes()).unwrap();
    assert_eq!(run(&mut machine, 16, &[0xd9, 0x47, 0x08]), Ok(Flow::Next)); // fld dword [bx+8]
    assert_eq!(run(&mut machine, 16, &[0xd9, 0x37]), Ok(Flow::Next)); // fnstenv [bx]
    let mut bytes = [0; 28];
    machine.memory.read(0x2_0100, &mut bytes).unwrap();
    let field = |at: usize| u16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]);
    let fields: Vec<u16> = (0..7).map(field).collect();
    // Opcode d9 /0 with mod 1, r/m 7 is 0x147.
    assert_eq!(fields, [0x37f, 7 << 11, 0x3fff, 0x1234, 0x3147, 0x0108, 0x2000]);
    // And back, from the 32-bit layout.
    assert_eq!(run(&mut machine, 16, &[0x66, 0xd9, 0x37]), Ok(Flow::Next));
    let before = machine.cpu.x87;
    assert_eq!(run(&mut machine, 16, &[0xdb, 0xe3]), Ok(Flow::Next));
    assert_ne!(machine.cpu.x87.0[..24], before.0[..24]);
    assert_eq!(run(&mut machine, 16, &[0x66, 0xd9, 0x27]), Ok(Flow::Next));
    assert_eq!(machine.cpu.x87, before);
    // FNSAVE and FRSTOR of all registers.
    assert_eq!(run(&mut machine, 16, &[0xdd, 0x37]), Ok(Flow::Next));
    assert_eq!(machine.cpu.x87.0[4], 0);
    assert_eq!(run(&mut machine, 16, &[0xdd, 0x27]), Ok(Flow::Next));
    assert_eq!(machine.cpu.x87, before);
}

#[test]
fn others_are_not_ours() {
    for code in [Code::Add_r32_rm32, Code::Crc32_r32_rm32, Code::Prefetchnta_m8, Code::VEX_Andn_r32_r32_rm32]
    {
        assert!(!handles(code), "{code:?}");
    }
    for code in [Code::EVEX_Vaddph_zmm_k1z_zmm_zmmm512b16_er, Code::Xgetbv] {
        assert!(!handles(code), "{code:?}");
    }
    let mut machine = ready();
    let insn = Decoder::new(64, &[0x01, 0xc0], 0).decode();
    assert_eq!(execute(&mut machine.core(), &insn), Err(Trap::UD));
}

/// More stubs than fit, so that all are thrown away meanwhile.
#[test]
fn stubs_are_bounded() {
    let mut machine = ready();
    for first in 0..16u8 {
        for second in 0..16u8 {
            for selector in 0..=255 {
                // pshufd
                let prefix = 0x40 | first >> 3 << 2 | second >> 3;
                let bytes = [0x66, prefix, 0x0f, 0x70, 0xc0 | (first & 7) << 3 | second & 7, selector];
                assert_eq!(run(&mut machine, 64, &bytes), Ok(Flow::Next));
            }
        }
    }
    assert_eq!(run(&mut machine, 64, PXOR_XMM), Ok(Flow::Next));
    machine.cpu.vectors[1].0[..4].copy_from_slice(&[1, 2, 3, 4]);
    machine.cpu.vectors[0].0[..16].fill(0);
    assert_eq!(run(&mut machine, 64, PXOR_XMM), Ok(Flow::Next));
    assert_eq!(machine.cpu.vectors[0].0[..4], [1, 2, 3, 4]);
}

#[test]
fn models_decide() {
    let run_on = |model: &str, bytes: &[u8]| {
        let mut machine = Machine::long();
        machine.cpu.model = std::sync::Arc::new(CpuModel::by_name(model).unwrap());
        machine.cpu.regs[reg::RBX] = DATA;
        run(&mut machine, 64, bytes)
    };
    for bytes in [FLD1, PXOR_MM, PXOR_XMM, MOVAPS, FXSAVE, STMXCSR, EMMS, FWAIT] {
        for model in ["max", "x86-64-v1", "x86-64-v2", "qemu64"] {
            assert_eq!(run_on(model, bytes), Ok(Flow::Next), "{bytes:x?} on {model}");
        }
    }
    assert_eq!(run_on("x86-64-v1", PSHUFB_MM), Err(Trap::UD));
    assert_eq!(run_on("x86-64-v2", PSHUFB_MM), Ok(Flow::Next));
    assert_eq!(run_on("x86-64-v2", XSAVE), Err(Trap::UD));
    let insertq = [0xf2, 0x0f, 0x79, 0xc1];
    assert_eq!(run_on("x86-64-v2", &insertq), Err(Trap::UD));
}
