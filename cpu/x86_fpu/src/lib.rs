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

mod code_memory;
mod control;
mod emit;
mod engine;
mod environment;
mod features;
mod masked;
mod moves;
mod operand;
mod run;
mod save;
mod simd_exception;
mod stub;
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
mod x87;
mod xsave;

pub use xsave::{XSAVE_COMPONENTS, XsaveComponent, xsave_area_size};

use iced_x86::{Code, Instruction};
use x86_core::{Core, Flow, Trap};

/// Executes an x87, MMX, SSE or AVX instruction, or one that saves or restores the state of these. Others
/// (see [`handles`]) are #UD, as are those that the CPU model does not announce or the host does not have.
///
/// On [`Trap`] the guest's state is as before, but for the exception flags that #XM leaves in MXCSR.
pub fn execute(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    if !moves::execute(core, insn)? && !control::execute(core, insn)? && !masked::execute(core, insn)? {
        run::execute(core, insn)?;
    }
    Ok(Flow::Next)
}

/// Whether `code` is for [`execute`].
pub fn handles(code: Code) -> bool {
    use std::sync::OnceLock;
    static TABLE: OnceLock<Vec<bool>> = OnceLock::new();
    let table = TABLE.get_or_init(|| {
        Code::values()
            .map(|code| control::handles(code) || masked::handles(code) || stub::handles(code))
            .collect()
    });
    table[code as usize]
}

/// Makes this thread ready to execute: maps the memory for stubs, which [`execute`] otherwise does when it
/// first needs a stub. There a failure is #UD to the guest; here it is told.
pub fn prepare() -> std::io::Result<()> {
    engine::prepare()
}
