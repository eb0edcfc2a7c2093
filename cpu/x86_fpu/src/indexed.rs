//! Gathers and scatters of AVX-512: accesses at addresses of their own for each element.

use crate::engine;
use crate::operand::{self, check_available};
use crate::stub::Class;
use iced_x86::{Code, EncodingKind, Instruction, OpCodeOperandKind, OpKind, Register};
use x86_core::{CodeSize, Core, Trap, width};

/// Bytes of the index vector and of an index in it, if the operand is addressed by such.
fn index_shape(kind: OpCodeOperandKind) -> Option<(usize, usize)> {
    use OpCodeOperandKind::{mem_vsib32x, mem_vsib32y, mem_vsib32z, mem_vsib64x, mem_vsib64y, mem_vsib64z};
    Some(match kind {
        mem_vsib32x => (16, 4),
        mem_vsib32y => (32, 4),
        mem_vsib32z => (64, 4),
        mem_vsib64x => (16, 8),
        mem_vsib64y => (32, 8),
        mem_vsib64z => (64, 8),
        _ => return None,
    })
}

/// Whether [`execute`] knows `code`.
pub(crate) fn handles(code: Code) -> bool {
    let op_code = code.op_code();
    code.encoding() == EncodingKind::EVEX
        && op_code.op_count() == 2
        && op_code.op_kinds().iter().any(|kind| index_shape(*kind).is_some())
}

/// Executes one of these, element by element from the first. One that faults leaves those before it done, with their
/// mask bits clear, so that the instruction can be started again (Intel SDM volume 2, VPGATHERDD and VPSCATTERDD).
pub(crate) fn execute(core: &mut Core, insn: &Instruction) -> Result<(), Trap> {
    engine::require(core, insn)?;
    check_available(core, Class::Avx512)?;
    let scatter = insn.op0_kind() == OpKind::Memory;
    let at = u32::from(!scatter);
    let vector = insn.op_register(1 - at);
    let kinds = insn.code().op_code();
    let (indices, index) = index_shape(kinds.op_kind(at)).ok_or(Trap::UD)?;
    let element = insn.memory_size().element_size();
    if insn.op_mask() == Register::None || !matches!(element, 4 | 8) {
        return Err(Trap::UD);
    }
    let (register, index_register) = (vector.number() & 31, insn.memory_index().number() & 31);
    if !scatter && register == index_register {
        return Err(Trap::UD);
    }
    // What EVEX says of the vectors' length is the longer of the two.
    let length = vector.size().max(indices);
    let count = (vector.size() / element).min(indices / index);
    let mask = insn.op_mask().number() & 7;
    // The address without the index: the same operand with the index taken away.
    let mut base = *insn;
    base.set_memory_index(Register::None);
    let narrow = insn.memory_base().is_gpr32()
        || insn.memory_base() == Register::None
            && (insn.memory_displ_size() == 4 && core.code_size() != CodeSize::Bits64);
    let scale = u64::from(insn.memory_index_scale());
    let offsets = core.cpu.vectors[index_register].0;
    core.cpu.vector_width = width::ZMM;
    for number in 0..count {
        if core.cpu.opmask[mask] >> number & 1 == 0 {
            continue;
        }
        let bytes = &offsets[number * index..(number + 1) * index];
        let value = match index {
            4 => i64::from(i32::from_le_bytes(std::array::from_fn(|byte| bytes[byte]))) as u64,
            _ => u64::from_le_bytes(std::array::from_fn(|byte| bytes[byte])),
        };
        let (seg, start) = x86_core::effective_address(core.cpu, &base, at);
        let sum = start.wrapping_add(value.wrapping_mul(scale));
        let address = (seg, if narrow { sum & 0xffff_ffff } else { sum });
        let place = number * element..(number + 1) * element;
        let mut data = [0; 8];
        if scatter {
            data[..element].copy_from_slice(&core.cpu.vectors[register].0[place]);
            operand::write(core, address, &data[..element])?;
        } else {
            operand::read(core, address, &mut data[..element])?;
            let vector = &mut core.cpu.vectors[register].0;
            vector[place].copy_from_slice(&data[..element]);
            // At once, if the instruction should fault later, as AMD's processors do.
            vector[length..].fill(0);
        }
        core.cpu.opmask[mask] &= !(1 << number);
    }
    core.cpu.opmask[mask] = 0;
    if !scatter {
        core.cpu.vectors[register].0[count * element..].fill(0);
    }
    Ok(())
}
