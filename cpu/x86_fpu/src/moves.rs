//! Plain moves of XMM registers, without a stub: by far the most frequent SSE instructions.

use crate::engine;
use crate::operand::{check_alignment, check_available};
use crate::stub::Class;
use iced_x86::{Code, Instruction, OpKind, Register};
use x86_core::{Core, Cpu, Trap};

fn low(cpu: &Cpu, register: Register) -> u128 {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&cpu.vectors[register.number() & 31].0[..16]);
    u128::from_le_bytes(bytes)
}

fn set_low(cpu: &mut Cpu, register: Register, value: u128) {
    cpu.vectors[register.number() & 31].0[..16].copy_from_slice(&value.to_le_bytes());
}

/// Executes `insn` if it is one of these.
pub(crate) fn execute(core: &mut Core, insn: &Instruction) -> Result<bool, Trap> {
    use Code::*;
    let (aligned, len) = match insn.code() {
        Movaps_xmm_xmmm128 | Movapd_xmm_xmmm128 | Movdqa_xmm_xmmm128 | Movaps_xmmm128_xmm
        | Movapd_xmmm128_xmm | Movdqa_xmmm128_xmm | Movntdq_m128_xmm | Movntps_m128_xmm
        | Movntpd_m128_xmm => (true, 16),
        Movups_xmm_xmmm128 | Movupd_xmm_xmmm128 | Movdqu_xmm_xmmm128 | Movups_xmmm128_xmm
        | Movupd_xmmm128_xmm | Movdqu_xmmm128_xmm => (false, 16),
        Movq_xmm_xmmm64 | Movq_xmmm64_xmm => (false, 8),
        _ => return Ok(false),
    };
    engine::require(core, insn)?;
    check_available(core, Class::Sse)?;
    let memory = (0..2).find(|operand| insn.op_kind(*operand) == OpKind::Memory);
    let Some(operand) = memory else {
        let value = low(core.cpu, insn.op1_register());
        let value = if len == 8 { u128::from(value as u64) } else { value };
        set_low(core.cpu, insn.op0_register(), value);
        return Ok(true);
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
    Ok(true)
}
