//! Accesses of elements that a mask selects: those not selected must not fault, and must not be written.

use crate::operand::{self, check_available, check_pending};
use crate::stub::Class;
use crate::{engine, x87};
use iced_x86::{Code, Instruction, OpKind};
use x86_core::{Core, Seg, Trap, width};

/// Whether [`execute`] knows `code`.
pub(crate) fn handles(code: Code) -> bool {
    use Code::*;
    matches!(code, Maskmovq_rDI_mm_mm | Maskmovdqu_rDI_xmm_xmm | VEX_Vmaskmovdqu_rDI_xmm_xmm)
        || vector_move(code).is_some()
        || gather(code).is_some()
}

/// Executes one of these.
pub(crate) fn execute(core: &mut Core, insn: &Instruction) -> Result<(), Trap> {
    engine::require(core, insn)?;
    if let Some(shape) = gather(insn.code()) {
        check_available(core, Class::Avx)?;
        gather_elements(core, insn, shape)
    } else if let Some(shape) = vector_move(insn.code()) {
        check_available(core, Class::Avx)?;
        move_elements(core, insn, shape)
    } else {
        store_bytes(core, insn)
    }
}

/// MASKMOVQ and MASKMOVDQU.
fn store_bytes(core: &mut Core, insn: &Instruction) -> Result<(), Trap> {
    let address = x86_core::effective_address(core.cpu, insn, 0);
    let (data, mask) = (insn.op1_register().number() & 15, insn.op2_register().number() & 15);
    if insn.code() == Code::Maskmovq_rDI_mm_mm {
        check_available(core, Class::Mmx)?;
        check_pending(core)?;
        let mut image = core.cpu.x87;
        x87::enter_mmx(&mut image);
        let register = |number: usize| &image.0[32 + 16 * (number & 7)..][..8];
        store_runs(core, address, register(data), register(mask))?;
        x87::switch_to_mmx(&mut core.cpu.x87);
        return Ok(());
    }
    let vex = insn.code() == Code::VEX_Vmaskmovdqu_rDI_xmm_xmm;
    check_available(core, if vex { Class::Avx } else { Class::Sse })?;
    let (data, mask) = (core.cpu.vectors[data], core.cpu.vectors[mask]);
    store_runs(core, address, &data.0[..16], &mask.0[..16])
}

/// Writes the bytes of `data` whose `mask` byte has its high bit set.
fn store_runs(core: &mut Core, (seg, offset): (Seg, u64), data: &[u8], mask: &[u8]) -> Result<(), Trap> {
    // First all checks, then all writes.
    for write in [false, true] {
        let mut start = 0;
        while start < mask.len() {
            if mask[start] & 0x80 == 0 {
                start += 1;
                continue;
            }
            let len = mask[start..].iter().take_while(|byte| **byte & 0x80 != 0).count();
            let at = offset.wrapping_add(start as u64);
            if write {
                core.write_bytes(seg, at, &data[start..start + len])?;
            } else {
                core.check_write(seg, at, len as u64)?;
            }
            start += len;
        }
    }
    Ok(())
}

/// Length of vector and element in bytes.
#[derive(Debug, Clone, Copy)]
struct Shape {
    vector: usize,
    element: usize,
}

/// VMASKMOVPS/PD and VPMASKMOVD/Q.
fn vector_move(code: Code) -> Option<Shape> {
    use Code::*;
    let (vector, element) = match code {
        VEX_Vmaskmovps_xmm_xmm_m128
        | VEX_Vmaskmovps_m128_xmm_xmm
        | VEX_Vpmaskmovd_xmm_xmm_m128
        | VEX_Vpmaskmovd_m128_xmm_xmm => (16, 4),
        VEX_Vmaskmovps_ymm_ymm_m256
        | VEX_Vmaskmovps_m256_ymm_ymm
        | VEX_Vpmaskmovd_ymm_ymm_m256
        | VEX_Vpmaskmovd_m256_ymm_ymm => (32, 4),
        VEX_Vmaskmovpd_xmm_xmm_m128
        | VEX_Vmaskmovpd_m128_xmm_xmm
        | VEX_Vpmaskmovq_xmm_xmm_m128
        | VEX_Vpmaskmovq_m128_xmm_xmm => (16, 8),
        VEX_Vmaskmovpd_ymm_ymm_m256
        | VEX_Vmaskmovpd_m256_ymm_ymm
        | VEX_Vpmaskmovq_ymm_ymm_m256
        | VEX_Vpmaskmovq_m256_ymm_ymm => (32, 8),
        _ => return None,
    };
    Some(Shape { vector, element })
}

/// Whether element `index` of `mask` has its sign bit set.
fn selected(mask: &[u8; 64], element: usize, index: usize) -> bool {
    mask[(index + 1) * element - 1] & 0x80 != 0
}

fn move_elements(core: &mut Core, insn: &Instruction, shape: Shape) -> Result<(), Trap> {
    let Shape { vector, element } = shape;
    let mask = core.cpu.vectors[insn.op1_register().number() & 15].0;
    let chosen = (0..vector / element).filter(|index| selected(&mask, element, *index));
    if insn.op0_kind() == OpKind::Memory {
        let (seg, offset) = x86_core::effective_address(core.cpu, insn, 0);
        let data = core.cpu.vectors[insn.op2_register().number() & 15].0;
        for index in chosen.clone() {
            core.check_write(seg, offset.wrapping_add((index * element) as u64), element as u64)?;
        }
        for index in chosen {
            let at = index * element;
            operand::write(core, (seg, offset.wrapping_add(at as u64)), &data[at..at + element])?;
        }
        return Ok(());
    }
    let (seg, offset) = x86_core::effective_address(core.cpu, insn, 2);
    core.cpu.vector_width = core.cpu.vector_width.max(width::YMM);
    let mut result = [0; 64];
    for index in chosen {
        let at = index * element;
        operand::read(core, (seg, offset.wrapping_add(at as u64)), &mut result[at..at + element])?;
    }
    core.cpu.vectors[insn.op0_register().number() & 15].0 = result;
    Ok(())
}

/// A gather: elements, their length, and the length of indices, in bytes.
#[derive(Debug, Clone, Copy)]
struct Gather {
    count: usize,
    element: usize,
    index: usize,
}

fn gather(code: Code) -> Option<Gather> {
    use Code::*;
    let (count, element, index) = match code {
        VEX_Vpgatherdd_xmm_vm32x_xmm | VEX_Vgatherdps_xmm_vm32x_xmm => (4, 4, 4),
        VEX_Vpgatherdd_ymm_vm32y_ymm | VEX_Vgatherdps_ymm_vm32y_ymm => (8, 4, 4),
        VEX_Vpgatherdq_xmm_vm32x_xmm | VEX_Vgatherdpd_xmm_vm32x_xmm => (2, 8, 4),
        VEX_Vpgatherdq_ymm_vm32x_ymm | VEX_Vgatherdpd_ymm_vm32x_ymm => (4, 8, 4),
        VEX_Vpgatherqd_xmm_vm64x_xmm | VEX_Vgatherqps_xmm_vm64x_xmm => (2, 4, 8),
        VEX_Vpgatherqd_xmm_vm64y_xmm | VEX_Vgatherqps_xmm_vm64y_xmm => (4, 4, 8),
        VEX_Vpgatherqq_xmm_vm64x_xmm | VEX_Vgatherqpd_xmm_vm64x_xmm => (2, 8, 8),
        VEX_Vpgatherqq_ymm_vm64y_ymm | VEX_Vgatherqpd_ymm_vm64y_ymm => (4, 8, 8),
        _ => return None,
    };
    Some(Gather { count, element, index })
}

/// Gathers element by element. One that faults leaves those before it done: their mask is clear, so that
/// the instruction can be started again (Intel SDM volume 2, VGATHERDPS). What it leaves of the rest of the mask is up to
/// the processor; it is as AMD's have it.
fn gather_elements(core: &mut Core, insn: &Instruction, shape: Gather) -> Result<(), Trap> {
    let Gather { count, element, index } = shape;
    let number = |register: iced_x86::Register| register.number() & 15;
    let destination = number(insn.op0_register());
    let indices = number(insn.memory_index());
    let mask = number(insn.op2_register());
    if destination == indices || destination == mask || indices == mask {
        return Err(Trap::UD);
    }
    // The address without the index: the same operand with the index taken away.
    let mut base = *insn;
    base.set_memory_index(iced_x86::Register::None);
    let narrow = insn.memory_base().is_gpr32()
        || insn.memory_base() == iced_x86::Register::None
            && (insn.memory_displ_size() == 4 && core.code_size() != x86_core::CodeSize::Bits64);
    core.cpu.vector_width = core.cpu.vector_width.max(width::YMM);
    let scale = u64::from(insn.memory_index_scale());
    let offsets = core.cpu.vectors[indices].0;
    let selectors = core.cpu.vectors[mask].0;
    for at in 0..count {
        if !selected(&selectors, element, at) {
            core.cpu.vectors[mask].0[at * element..(at + 1) * element].fill(0);
            continue;
        }
        let bytes = &offsets[at * index..(at + 1) * index];
        let mut value = [0; 8];
        value[..index].copy_from_slice(bytes);
        let value = match index {
            4 => i64::from(u64::from_le_bytes(value) as i32) as u64,
            _ => u64::from_le_bytes(value),
        };
        let (seg, start) = x86_core::effective_address(core.cpu, &base, 1);
        let sum = start.wrapping_add(value.wrapping_mul(scale));
        let address = (seg, if narrow { sum & 0xffff_ffff } else { sum });
        let mut data = [0; 8];
        operand::read(core, address, &mut data[..element])?;
        core.cpu.vectors[destination].0[at * element..(at + 1) * element].copy_from_slice(&data[..element]);
        core.cpu.vectors[mask].0[at * element..(at + 1) * element].fill(0);
    }
    core.cpu.vectors[destination].0[count * element..].fill(0);
    core.cpu.vectors[mask].0.fill(0);
    Ok(())
}
