//! Instructions that do nothing for the program, or always fault.

use iced_x86::Instruction;
use std::sync::atomic::{Ordering, fence};
use x86_core::{Core, Flow, Trap, effective_address};

/// NOP, hints.
pub(crate) fn nop(_: &mut Core<'_>, _: &Instruction) -> Result<Flow, Trap> {
    Ok(Flow::Next)
}

/// PAUSE: whoever runs the processor may have something better to do with its thread.
pub(crate) fn pause(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    core.check_pause_intercept(insn)?;
    core.platform.pause();
    Ok(Flow::Next)
}

/// LFENCE, SFENCE, MFENCE: other processors are threads of the host.
pub(crate) fn barrier(_: &mut Core<'_>, _: &Instruction) -> Result<Flow, Trap> {
    fence(Ordering::SeqCst);
    Ok(Flow::Next)
}

/// CLFLUSH, CLFLUSHOPT, CLWB: there is no cache to flush, but they fault as loads do.
pub(crate) fn flush(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let (seg, offset) = effective_address(core.cpu, insn, 0);
    core.read::<u8>(seg, offset)?;
    Ok(Flow::Next)
}

/// UD0, UD1, UD2 and all that does not exist.
pub(crate) fn undefined(_: &mut Core<'_>, _: &Instruction) -> Result<Flow, Trap> {
    Err(Trap::UD)
}
