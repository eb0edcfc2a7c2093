//! What executes instructions between two looks of the run loop.

use crate::platform::VcpuPlatform;
use guest_memory::GuestMemory;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use x86_core::{Core, Cpu, Flow, Platform, Trap, flags, shadow};
use x86_translate::TranslatorVcpu;

/// Shadows that hold off interrupts.
pub(crate) const INTERRUPT_SHADOW: u8 = shadow::STI | shadow::MOV_SS;

/// One vCPU's engine, with the processor.
pub(crate) enum Engine {
    /// T0: one instruction at a time.
    Interpreter(Box<Cpu>),
    /// T1: translated code.
    Translator(Box<TranslatorVcpu>),
}

impl Engine {
    /// The processor.
    pub(crate) fn cpu(&self) -> &Cpu {
        match self {
            Self::Interpreter(cpu) => cpu,
            Self::Translator(vcpu) => vcpu.cpu(),
        }
    }

    /// Where the processor is, for as long as the engine lives.
    pub(crate) fn place(&mut self) -> NonNull<Cpu> {
        match self {
            Self::Interpreter(cpu) => NonNull::from(&mut **cpu),
            Self::Translator(vcpu) => NonNull::from(vcpu.cpu_mut()),
        }
    }

    /// The processor with its surroundings.
    pub(crate) fn core<'a>(&'a mut self, memory: &'a GuestMemory, platform: &'a dyn Platform) -> Core<'a> {
        match self {
            Self::Interpreter(cpu) => Core { cpu, memory, platform },
            Self::Translator(vcpu) => vcpu.core(platform),
        }
    }

    /// Executes instructions until the processor's exit flag is set, an interrupt can be taken, or the
    /// processor halts.
    ///
    /// # Errors
    /// An exception to deliver, or a triple fault. The state is at an instruction boundary.
    pub(crate) fn run(&mut self, memory: &GuestMemory, platform: &VcpuPlatform<'_>) -> Result<(), Trap> {
        match self {
            Self::Interpreter(cpu) => interpret(&mut Core { cpu, memory, platform }, platform),
            Self::Translator(vcpu) => {
                // One that comes later sets the exit flag.
                vcpu.set_interrupt_window(platform.lapic.pending().any());
                vcpu.run(platform).map(|_| ())
            }
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

fn interpret(core: &mut Core<'_>, platform: &VcpuPlatform<'_>) -> Result<(), Trap> {
    while core.cpu.exit_request.load(Ordering::Relaxed) == 0 {
        if x86_interp::step(core)? == Flow::Halt || interruptible(core, platform) {
            break;
        }
    }
    Ok(())
}
