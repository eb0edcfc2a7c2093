//! What executes instructions between two looks of the run loop.

use crate::platform::VcpuPlatform;
use std::sync::atomic::Ordering;
use x86_core::{Core, Flow, Trap, flags, shadow};

/// Shadows that hold off interrupts.
pub(crate) const INTERRUPT_SHADOW: u8 = shadow::STI | shadow::MOV_SS;

/// One vCPU's engine.
pub(crate) enum Engine {
    /// T0: one instruction at a time.
    Interpreter,
}

impl Engine {
    /// Executes instructions until the processor's exit flag is set, an interrupt can be taken, or the
    /// processor halts.
    ///
    /// # Errors
    /// An exception to deliver, or a triple fault. The state is at an instruction boundary.
    pub(crate) fn run(&mut self, core: &mut Core<'_>, platform: &VcpuPlatform<'_>) -> Result<(), Trap> {
        match self {
            Self::Interpreter => interpret(core, platform),
        }
    }
}

/// Whether an interrupt waits that the processor may take now.
#[inline]
pub(crate) fn interruptible(core: &Core<'_>, platform: &VcpuPlatform<'_>) -> bool {
    core.cpu.rflags & flags::IF != 0
        && core.cpu.interrupt_shadow & INTERRUPT_SHADOW == 0
        && platform.lapic.pending().any()
}

/// Executes one instruction.
pub(crate) fn step(core: &mut Core<'_>, platform: &VcpuPlatform<'_>) -> Result<Flow, Trap> {
    let flow = x86_interp::step(core);
    platform.note_tsc_offset(core.cpu.msrs.tsc_offset);
    flow
}

fn interpret(core: &mut Core<'_>, platform: &VcpuPlatform<'_>) -> Result<(), Trap> {
    while core.cpu.exit_request.load(Ordering::Relaxed) == 0 {
        if step(core, platform)? == Flow::Halt || interruptible(core, platform) {
            break;
        }
    }
    Ok(())
}
