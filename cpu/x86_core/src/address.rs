//! Effective addresses.

use crate::{Cpu, Seg, reg};
use iced_x86::{Instruction, OpKind, Register};

/// The segment register that `register` is.
pub fn segment_index(register: Register) -> Option<Seg> {
    Some(match register {
        Register::ES => Seg::Es,
        Register::CS => Seg::Cs,
        Register::SS => Seg::Ss,
        Register::DS => Seg::Ds,
        Register::FS => Seg::Fs,
        Register::GS => Seg::Gs,
        _ => return None,
    })
}

/// Segment and offset of memory operand `operand` of `insn`, the implied ones of string instructions
/// included. The offset is cut to the address size; for operands that are not in memory it is 0.
#[inline]
pub fn effective_address(cpu: &Cpu, insn: &Instruction, operand: u32) -> (Seg, u64) {
    let segment = segment_index(insn.memory_segment()).unwrap_or(Seg::Ds);
    let (rsi, rdi) = (cpu.regs[reg::RSI], cpu.regs[reg::RDI]);
    match insn.op_kind(operand) {
        OpKind::Memory => (segment, memory_offset(cpu, insn)),
        OpKind::MemorySegSI => (segment, rsi & 0xffff),
        OpKind::MemorySegESI => (segment, rsi & 0xffff_ffff),
        OpKind::MemorySegRSI => (segment, rsi),
        OpKind::MemorySegDI => (segment, rdi & 0xffff),
        OpKind::MemorySegEDI => (segment, rdi & 0xffff_ffff),
        OpKind::MemorySegRDI => (segment, rdi),
        OpKind::MemoryESDI => (Seg::Es, rdi & 0xffff),
        OpKind::MemoryESEDI => (Seg::Es, rdi & 0xffff_ffff),
        OpKind::MemoryESRDI => (Seg::Es, rdi),
        _ => (segment, 0),
    }
}

/// base + index * scale + displacement, cut to the address size: what LEA computes.
#[inline]
pub fn memory_offset(cpu: &Cpu, insn: &Instruction) -> u64 {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let displacement = insn.memory_displacement64();
    // The decoder gives RIP-relative addresses as absolute displacements.
    if base == Register::RIP {
        return displacement;
    }
    if base == Register::EIP {
        return displacement & 0xffff_ffff;
    }
    let mut offset = displacement;
    let mut size = 0;
    if base != Register::None {
        offset = offset.wrapping_add(cpu.regs[base.number()]);
        size = base.size();
    }
    // A vector index (VSIB) is added by the instruction itself.
    if index != Register::None && index.size() <= 8 {
        offset = offset.wrapping_add(cpu.regs[index.number()] << insn.memory_index_scale().trailing_zeros());
        size = size.max(index.size());
    }
    if size == 0 {
        size = insn.memory_displ_size() as usize;
    }
    match size {
        8 => offset,
        2 => offset & 0xffff,
        _ => offset & 0xffff_ffff,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Machine;
    use iced_x86::{Decoder, DecoderOptions};

    fn address(bits: u32, code: &[u8]) -> (Seg, u64) {
        let mut machine = Machine::long();
        for (index, register) in machine.cpu.regs.iter_mut().enumerate() {
            *register = 0x1111_2222_3333_0000 + index as u64 * 0x10;
        }
        let insn = Decoder::with_ip(bits, code, 0x1000, DecoderOptions::NONE).decode();
        assert!(!insn.is_invalid(), "{code:x?}");
        let operand = (0..insn.op_count())
            .find(|&index| !matches!(insn.op_kind(index), OpKind::Register | OpKind::Immediate8));
        effective_address(&machine.cpu, &insn, operand.expect("a memory operand"))
    }

    #[test]
    fn forms_of_addressing() {
        // mov eax, [rbx + rcx*4 - 8]
        let sum = 0x1111_2222_3333_0030u64.wrapping_add(0x1111_2222_3333_0010 << 2).wrapping_sub(8);
        assert_eq!(address(64, &[0x8b, 0x44, 0x8b, 0xf8]), (Seg::Ds, sum));
        // mov eax, [ebx]
        assert_eq!(address(64, &[0x67, 0x8b, 0x03]), (Seg::Ds, 0x3333_0030));
        // mov eax, [rip + 0x10]
        assert_eq!(address(64, &[0x8b, 0x05, 0x10, 0, 0, 0]), (Seg::Ds, 0x1016));
        // mov eax, fs:[-16]
        let code = [0x64, 0x8b, 0x04, 0x25, 0xf0, 0xff, 0xff, 0xff];
        assert_eq!(address(64, &code), (Seg::Fs, (-16i64) as u64));
        // mov eax, [addr32 -16]
        let code = [0x67, 0x8b, 0x04, 0x25, 0xf0, 0xff, 0xff, 0xff];
        assert_eq!(address(64, &code), (Seg::Ds, 0xffff_fff0));
        // mov ax, [bp + si + 0x7fff]
        assert_eq!(address(16, &[0x8b, 0x82, 0xff, 0x7f]), (Seg::Ss, 0x80af));
        // mov eax, [0x12345678]
        assert_eq!(address(32, &[0xa1, 0x78, 0x56, 0x34, 0x12]), (Seg::Ds, 0x1234_5678));
        // lodsb; stosb; es cmpsb
        assert_eq!(address(64, &[0xac]), (Seg::Ds, 0x1111_2222_3333_0060));
        assert_eq!(address(16, &[0xaa]), (Seg::Es, 0x70));
        assert_eq!(address(32, &[0x26, 0xa6]), (Seg::Es, 0x3333_0060));
    }
}
