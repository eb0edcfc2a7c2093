//! x87, MMX, SSE and AVX instructions of the guest, run as native stubs.
//!
//! The host has these instructions too, so what the guest asks for is done by the very same instruction:
//! [`execute`] puts it into a small native routine (a stub) that loads the registers it needs from the
//! guest's, executes it, and stores the results. Vector registers keep their numbers; a general register is
//! replaced by a scratch one, and a memory operand by a buffer of the host's that is filled before or
//! written to guest memory after. So results, flags and rounding are exact, NaNs and denormals included.
//!
//! What would reveal the host or disturb it is done in Rust: control words, environments (FNSTENV, FXSAVE,
//! XSAVE and the rest), plain moves (for speed) and stores under a mask.

#![allow(unsafe_code)] // generated code is called, and the memory that holds it mapped

mod context;
mod control;
mod emit;
mod engine;
mod environment;
mod features;
mod frame;
mod indexed;
mod masked;
mod masking;
mod moves;
mod operand;
mod run;
mod save;
mod selected;
mod simd_exception;
mod stub;
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
mod x87;
mod x87_run;
mod xsave;

use iced_x86::{Code, Instruction};
use std::sync::LazyLock;
use x86_core::{CodeSize, Core, Flow, Trap};

/// What executes an instruction.
pub type Handler = fn(&mut Core, &Instruction) -> Result<Flow, Trap>;

/// Executes an x87, MMX, SSE or AVX instruction, or one that saves or restores the state of these. Others
/// (see [`handles`]) are #UD, as are those that the CPU model does not announce or the host does not have.
///
/// On [`Trap`] the guest's state is as before, but for the exception flags that #XM leaves in MXCSR.
pub fn execute(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    match handler(insn.code()) {
        Some(handler) => handler(core, insn),
        None => Err(Trap::UD),
    }
}

/// Whether `code` is for [`execute`].
pub fn handles(code: Code) -> bool {
    handler(code).is_some()
}

/// Whether the guest's processor has instructions of `code`, which is one for [`execute`]: its model announces them,
/// and the host has them.
pub fn has(core: &Core<'_>, code: Code) -> bool {
    engine::has(core, code)
}

/// What [`execute`] calls for instructions of `code`, for those who decode once and execute often.
pub fn handler(code: Code) -> Option<Handler> {
    static HANDLERS: LazyLock<Vec<Option<Handler>>> = LazyLock::new(|| {
        Code::values()
            .map(|code| -> Option<Handler> {
                if moves::handles(code) {
                    Some(|core, insn| moves::execute(core, insn).map(|()| Flow::Next))
                } else if control::handles(code) {
                    Some(|core, insn| control::execute(core, insn).map(|()| Flow::Next))
                } else if masked::handles(code) {
                    Some(|core, insn| masked::execute(core, insn).map(|()| Flow::Next))
                } else if indexed::handles(code) {
                    Some(|core, insn| indexed::execute(core, insn).map(|()| Flow::Next))
                } else if stub::handles(code) {
                    Some(|core, insn| run::execute(core, insn).map(|()| Flow::Next))
                } else {
                    None
                }
            })
            .collect()
    });
    HANDLERS[code as usize]
}

/// Whether x87 instructions of `code` are the ones that FOP, FIP and FDP tell of: all but those that deal with
/// the unit's control and environment (Intel SDM volume 1, 8.1.8).
pub fn is_recorded(code: Code) -> bool {
    !control::handles(code) && stub::is_x87(code) && stub::handles(code)
}

/// What FOP is after an x87 instruction of 64-bit code with that escape opcode (D8 to DF) and ModRM byte, of
/// which only the reg field counts if it has a memory operand.
pub fn last_opcode(size: CodeSize, insn: &Instruction, opcode: u8, modrm: u8) -> u16 {
    let fop = u16::from(opcode & 7) << 8 | u16::from(modrm);
    if (0..insn.op_count()).any(|operand| insn.op_kind(operand) == iced_x86::OpKind::Memory) {
        fop & 0x738 | x87_run::addressing(size, insn)
    } else {
        fop
    }
}

/// Makes this thread ready to execute: maps the memory for stubs, which [`execute`] otherwise does when it
/// first needs a stub. There a failure is #UD to the guest; here it is told.
pub fn prepare() -> std::io::Result<()> {
    engine::prepare()
}
