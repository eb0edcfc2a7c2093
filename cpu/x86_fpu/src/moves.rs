//! Plain moves of XMM registers, without a stub: by far the most frequent SSE instructions.

use crate::operand::{self, check_alignment, check_available};
use crate::stub::Class;
use iced_x86::{Code, Instruction, OpKind, Register};
use x86_core::{Core, Cpu, Trap};

fn low(cpu: &Cpu, register: Register) -> u128 {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&cpu.vectors[register.number() & 31].0[..16]);
    u128::from_le_bytes(bytes)
}

fn set_low(cpu: &mut Cpu, register: Register, value: u128) {
    if let Some(place) = cpu.vectors[register.number() & 31].0.first_chunk_mut() {
        operand::set_wide(place, value);
    }
}

/// Whether the memory operand must be aligned, and how many bytes are moved; `None` if `code` is not one of
/// these moves.
fn shape(code: Code) -> Option<(bool, usize)> {
    use Code::*;
    match code {
        Movaps_xmm_xmmm128 | Movapd_xmm_xmmm128 | Movdqa_xmm_xmmm128 | Movaps_xmmm128_xmm
        | Movapd_xmmm128_xmm | Movdqa_xmmm128_xmm | Movntdq_m128_xmm | Movntps_m128_xmm
        | Movntpd_m128_xmm => Some((true, 16)),
        Movups_xmm_xmmm128 | Movupd_xmm_xmmm128 | Movdqu_xmm_xmmm128 | Movups_xmmm128_xmm
        | Movupd_xmmm128_xmm | Movdqu_xmmm128_xmm => Some((false, 16)),
        Movq_xmm_xmmm64 | Movq_xmmm64_xmm => Some((false, 8)),
        _ => None,
    }
}

/// Whether [`execute`] knows `code`.
pub(crate) fn handles(code: Code) -> bool {
    shape(code).is_some()
}

/// Executes one of these. SSE and SSE2 are part of the 64-bit architecture: no model is without.
pub(crate) fn execute(core: &mut Core, insn: &Instruction) -> Result<(), Trap> {
    let (aligned, len) = shape(insn.code()).ok_or(Trap::UD)?;
    check_available(core, Class::Sse)?;
    let memory = (0..2).find(|operand| insn.op_kind(*operand) == OpKind::Memory);
    let Some(operand) = memory else {
        let value = low(core.cpu, insn.op1_register());
        let value = if len == 8 { u128::from(value as u64) } else { value };
        set_low(core.cpu, insn.op0_register(), value);
        return Ok(());
    };
    let (seg, offset) = x86_core::effective_address(core.cpu, insn, operand);
    if aligned {
        check_alignment(core, (seg, offset), 16)?;
    }
    match (operand, len) {
        (0, 8) => core.write(seg, offset, low(core.cpu, insn.op1_register()) as u64)?,
        (0, _) => core.write(seg, offset, low(core.cpu, insn.op1_register()))?,
        (_, 8) => {
            let value: u64 = core.read(seg, offset)?;
            set_low(core.cpu, insn.op0_register(), u128::from(value));
        }
        _ => {
            let value: u128 = core.read(seg, offset)?;
            set_low(core.cpu, insn.op0_register(), value);
        }
    }
    Ok(())
}
