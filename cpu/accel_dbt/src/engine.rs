//! What executes instructions between two looks of the run loop.

use crate::counted::Counted;
use crate::platform::VcpuPlatform;
use guest_memory::GuestMemory;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use x86_core::svm::InterruptAction;
use x86_core::{Core, Cpu, Flow, Platform, Trap, flags, shadow};
use x86_lockstep::Lockstep;
use x86_translate::TranslatorVcpu;

/// Shadows that hold off interrupts.
pub(crate) const INTERRUPT_SHADOW: u8 = shadow::STI | shadow::MOV_SS;

/// One vCPU's engine, with the processor.
pub(crate) enum Engine {
    /// T0: one instruction at a time.
    Interpreter(Box<Cpu>),
    /// T1: translated code.
    Translator(Box<TranslatorVcpu>),
    /// Both, every block compared.
    Lockstep(Box<Lockstep>),
}

/// Why the engine stopped in the middle of something.
pub(crate) enum Stop {
    /// An exception to deliver, or a triple fault. The state is at an instruction boundary.
    Trap(Trap),
    /// The engine cannot go on.
    Broken(String),
}

impl From<Trap> for Stop {
    fn from(trap: Trap) -> Self {
        Self::Trap(trap)
    }
}

impl From<x86_lockstep::Stop> for Stop {
    fn from(stop: x86_lockstep::Stop) -> Self {
        match stop {
            x86_lockstep::Stop::Trap(trap) => Self::Trap(trap),
            x86_lockstep::Stop::Mismatch(mismatch) => Self::Broken(mismatch.to_string()),
        }
    }
}

impl Engine {
    /// The processor.
    pub(crate) fn cpu(&self) -> &Cpu {
        match self {
            Self::Interpreter(cpu) => cpu,
            Self::Translator(vcpu) => vcpu.cpu(),
            Self::Lockstep(lockstep) => lockstep.cpu(),
        }
    }

    /// Where the processor is, for as long as the engine lives.
    pub(crate) fn place(&mut self) -> NonNull<Cpu> {
        match self {
            Self::Interpreter(cpu) => NonNull::from(&mut **cpu),
            Self::Translator(vcpu) => NonNull::from(vcpu.cpu_mut()),
            Self::Lockstep(lockstep) => NonNull::from(lockstep.cpu_mut()),
        }
    }

    /// The processor with its surroundings, while it does not run.
    pub(crate) fn core<'a>(&'a mut self, memory: &'a GuestMemory, platform: &'a dyn Platform) -> Core<'a> {
        match self {
            Self::Interpreter(cpu) => Core { cpu, memory, platform },
            Self::Translator(vcpu) => vcpu.core(platform),
            Self::Lockstep(lockstep) => lockstep.core(platform),
        }
    }

    /// Does something between instructions while the processor runs. `act` may be called twice, for two
    /// processors.
    pub(crate) fn act(
        &mut self,
        memory: &GuestMemory,
        platform: &dyn Platform,
        mut act: impl FnMut(&mut Core<'_>) -> Result<(), Trap>,
    ) -> Result<(), Stop> {
        match self {
            Self::Lockstep(lockstep) => Ok(lockstep.act(platform, &mut act)?),
            Self::Translator(vcpu) => Ok(vcpu.act(platform, act)?),
            Self::Interpreter(_) => Ok(act(&mut self.core(memory, platform))?),
        }
    }

    /// Executes instructions until the processor's exit flag is set, an interrupt can be taken, or the
    /// processor halts.
    ///
    /// # Errors
    /// [`Stop`].
    pub(crate) fn run(&mut self, memory: &GuestMemory, platform: &VcpuPlatform<'_>) -> Result<(), Stop> {
        match self {
            Self::Interpreter(cpu) => Ok(interpret(&mut Core { cpu, memory, platform }, platform)?),
            Self::Translator(vcpu) => {
                // One that comes later sets the exit flag.
                let waits = platform.lapic.pending().any();
                vcpu.set_interrupt_window(vcpu.cpu().wants_interrupt_window(waits));
                vcpu.run(platform)?;
                Ok(())
            }
            Self::Lockstep(lockstep) => Ok(lockstep.run(platform, &|cpu| interruptible(cpu, platform))?),
        }
    }

    /// As [`Engine::run`], until the count of instructions is `end` at the latest; says whether a repeated instruction
    /// has paused.
    pub(crate) fn run_counted(
        &mut self,
        memory: &GuestMemory,
        platform: &VcpuPlatform<'_>,
        counted: &Counted,
        end: u64,
    ) -> (Result<(), Stop>, bool) {
        match self {
            Self::Translator(vcpu) => {
                vcpu.count_up_to(counted.counter.count(), end);
                let waits = platform.lapic.pending().any();
                vcpu.set_interrupt_window(vcpu.cpu().wants_interrupt_window(waits));
                let result = vcpu.run(platform);
                counted.counter.set_count(vcpu.count());
                (result.map(|_| ()).map_err(Stop::Trap), vcpu.paused())
            }
            Self::Interpreter(cpu) => {
                let mut core = Core { cpu, memory, platform };
                let mut paused = false;
                let result = interpret_counted(&mut core, platform, counted, end, &mut paused);
                (result.map_err(Stop::Trap), paused)
            }
            Self::Lockstep(_) => (Err(Stop::Broken("lockstep does not count".into())), false),
        }
    }

    /// What a debugger watches and an instruction used, as [`x86_core::Cpu::take_watch_met`] says it.
    pub(crate) fn take_watch_met(&mut self) -> Option<usize> {
        match self {
            Self::Interpreter(cpu) => cpu.take_watch_met(),
            Self::Translator(vcpu) => vcpu.cpu_mut().take_watch_met(),
            Self::Lockstep(lockstep) => lockstep.cpu_mut().take_watch_met(),
        }
    }

    /// The VM stops for now: says what the engine has to say.
    ///
    /// # Errors
    /// What is wrong.
    pub(crate) fn finish(&mut self) -> Result<(), String> {
        if let Self::Lockstep(lockstep) = self {
            let summary = lockstep.finish().map_err(|mismatch| mismatch.to_string())?;
            eprintln!("lockstep: {summary}");
        }
        Ok(())
    }
}

/// Whether there is something to do about interrupts now.
#[inline]
fn interruptible(cpu: &Cpu, platform: &VcpuPlatform<'_>) -> bool {
    if cpu.svm.guest || !cpu.svm.gif {
        return cpu.interrupt_action(platform.lapic.pending().any()) != InterruptAction::None;
    }
    cpu.rflags & flags::IF != 0
        && cpu.interrupt_shadow & INTERRUPT_SHADOW == 0
        && platform.lapic.pending().any()
}

fn interpret(core: &mut Core<'_>, platform: &VcpuPlatform<'_>) -> Result<(), Trap> {
    while core.cpu.exit_request.load(Ordering::Relaxed) == 0 {
        if x86_interp::step(core)? == Flow::Halt || interruptible(core.cpu, platform) {
            break;
        }
    }
    Ok(())
}

fn interpret_counted(
    core: &mut Core<'_>,
    platform: &VcpuPlatform<'_>,
    counted: &Counted,
    end: u64,
    paused: &mut bool,
) -> Result<(), Trap> {
    while core.cpu.exit_request.load(Ordering::Relaxed) == 0 && counted.counter.count() < end {
        *paused = false;
        let flow = x86_interp::step(core)?;
        *paused = flow == Flow::Again;
        if !*paused {
            counted.count_one();
        }
        if flow == Flow::Halt || core.cpu.is_watch_met() || interruptible(core.cpu, platform) {
            break;
        }
    }
    Ok(())
}
