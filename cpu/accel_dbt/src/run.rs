//! The run loop.

use crate::engine::{Engine, INTERRUPT_SHADOW, Stop};
use crate::events::Events;
use crate::platform::VcpuPlatform;
use crate::shared::{Requests, VcpuShared};
use crate::vcpu::DbtVcpu;
use accel::{DebugStop, HaltReason, StopToken, VcpuBus};
use guest_memory::GuestMemory;
use std::cell::Cell;
use x86_core::svm::InterruptAction;
use x86_core::{Core, Exception, Flow, Trap, shadow};

/// What the run loop does after a look at events.
enum Next {
    /// Executes instructions.
    Execute,
    /// Executes one instruction, after which there is something to look at.
    Step,
    /// Sleeps until there is a request.
    Sleep,
}

impl DbtVcpu {
    /// The run loop: see [`accel::Vcpu::run`].
    pub(crate) fn run_loop(&mut self, bus: &dyn VcpuBus, stop: &StopToken) -> HaltReason {
        let shared = &*self.shared;
        let _attached = stop.attach(self.shared.clone());
        let _counting = self.vm.tsc.enter();
        let _running = Running::enter(shared);
        // SAFETY: this is the vCPU, and this its only use of the engine until the loop ends.
        let engine = unsafe { shared.engine() };
        let memory = &self.vm.memory;
        let counted = self.vm.counted.as_ref();
        let (lapic, tsc) = (&*self.lapic, &self.vm.tsc);
        let platform = VcpuPlatform { bus, lapic, tsc, counted, pauses: Cell::new(0) };
        let (events, halt_poll, debugging) = (&mut self.events, &mut self.halt_poll, &self.debugging);
        let repeating = &mut self.repeating;
        loop {
            shared.pass();
            let mut requests = shared.take();
            events.note(requests);
            if stop.is_stopped() {
                if requests.has(Requests::FLUSH) {
                    engine.core(memory, &platform).flush_all_tlbs();
                }
                return engine.finish().map_or_else(HaltReason::InternalError, |()| HaltReason::Stopped);
            }
            if let Some(counted) = counted.filter(|_| !*repeating) {
                counted.at_boundary(engine.cpu());
                // What came in may ask for something itself.
                let more = shared.take();
                events.note(more);
                requests = requests.and(more);
                if stop.is_stopped() {
                    continue;
                }
            }
            let mut processor = Processor { engine, memory, platform: &platform };
            let mut next = match *repeating {
                true => Ok(Next::Step),
                false => processor.next(events, requests, debugging.hold_interrupts && counted.is_none()),
            };
            if let Ok(Next::Execute | Next::Step) = next {
                if let Some(stop) = debugging.before(engine) {
                    return HaltReason::Debug(stop);
                }
                if debugging.is_stepwise(engine) {
                    next = Ok(Next::Step);
                }
            }
            let stepped = matches!(next, Ok(Next::Step));
            let executed = match (next, counted) {
                (Ok(Next::Execute), None) => engine.run(memory, &platform),
                (Ok(Next::Execute), Some(counted)) => {
                    let result;
                    (result, *repeating) = engine.run_counted(memory, &platform, counted, counted.end());
                    result
                }
                (Ok(Next::Step), _) => step(engine, memory, &platform, repeating),
                (Ok(Next::Sleep), None) => {
                    shared.wait(halt_poll);
                    Ok(())
                }
                (Ok(Next::Sleep), Some(counted)) => {
                    counted.idle(engine.cpu(), stop, |most| shared.wait_for(most));
                    Ok(())
                }
                (Err(stop), _) => Err(stop),
            };
            let delivered = match executed {
                Err(Stop::Trap(trap)) if trap != Trap::TripleFault => {
                    let delivered = engine.act(memory, &platform, |core| core.deliver_trap(trap));
                    if let (Some(counted), Ok(())) = (counted, &delivered) {
                        counted.count_one();
                    }
                    *repeating = false;
                    delivered
                }
                other => other,
            };
            match delivered {
                Ok(()) => {
                    let step = (stepped && debugging.single_step).then_some(DebugStop::Step);
                    if let Some(stop) = debugging.after(engine).or(step) {
                        return HaltReason::Debug(stop);
                    }
                }
                Err(Stop::Trap(_)) => return HaltReason::TripleFault,
                Err(Stop::Broken(error)) => return HaltReason::InternalError(error),
            }
        }
    }
}

/// Executes one instruction, or a part of a repeated one.
fn step(
    engine: &mut Engine,
    memory: &GuestMemory,
    platform: &VcpuPlatform<'_>,
    repeating: &mut bool,
) -> Result<(), Stop> {
    let mut flow = Flow::Next;
    engine.act(memory, platform, |core| {
        flow = x86_interp::step(core)?;
        Ok(())
    })?;
    if let Some(counted) = platform.counted {
        *repeating = flow == Flow::Again;
        if !*repeating {
            counted.count_one();
        }
    }
    Ok(())
}

/// Marks the vCPU as running.
struct Running<'a>(&'a VcpuShared);

impl<'a> Running<'a> {
    fn enter(shared: &'a VcpuShared) -> Self {
        shared.set_running(true);
        Self(shared)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.set_running(false);
    }
}

/// The processor while it runs.
struct Processor<'a> {
    engine: &'a mut Engine,
    memory: &'a GuestMemory,
    platform: &'a VcpuPlatform<'a>,
}

impl Processor<'_> {
    /// Delivers something, which counts as an instruction.
    fn act(&mut self, act: impl FnMut(&mut Core<'_>) -> Result<(), Trap>) -> Result<(), Stop> {
        self.engine.act(self.memory, self.platform, act)?;
        if let Some(counted) = self.platform.counted {
            counted.count_one();
        }
        Ok(())
    }

    /// Delivers events in the order of their priority (Intel SDM volume 3, table 6-2), and says what to do
    /// then. `hold` holds interrupts back, unless the processor is halted.
    fn next(&mut self, events: &mut Events, requests: Requests, hold: bool) -> Result<Next, Stop> {
        if requests.has(Requests::FLUSH) {
            self.engine.act(self.memory, self.platform, |core| {
                core.flush_all_tlbs();
                Ok(())
            })?;
        }
        self.start_up(events)?;
        if events.waiting {
            return Ok(Next::Sleep);
        }
        if let Some(injected) = events.exception.take() {
            let address = self.engine.cpu().cr2;
            let exception = Exception { vector: injected.vector, error: injected.error, address };
            return Err(Trap::Exception(exception).into());
        }
        if let Some(vector) = events.interrupt.take() {
            self.interrupt(vector)?;
        }
        let shadows = self.engine.cpu().interrupt_shadow;
        let hold = hold && !self.engine.cpu().halted;
        let open = self.engine.cpu().global_interrupts() && !hold;
        if events.smi && open {
            self.take_smi(events)?;
        }
        let open = open && self.engine.cpu().global_interrupts();
        if shadows & INTERRUPT_SHADOW == 0 && open {
            if shadows & shadow::NMI != 0 {
                events.nmis = events.nmis.min(1);
            } else if events.nmis > 0 {
                self.take_nmi(events)?;
            }
        }
        if !hold {
            self.take_interrupt()?;
        }
        if self.engine.cpu().halted {
            return Ok(Next::Sleep);
        }
        // An NMI waits for the end of a shadow, or for IRET; an interrupt for the end of a shadow. STGI says so itself.
        let watched = shadows & INTERRUPT_SHADOW != 0 || events.nmis > 0 && open;
        Ok(if watched { Next::Step } else { Next::Execute })
    }

    /// INIT and SIPI.
    fn start_up(&mut self, events: &mut Events) -> Result<(), Stop> {
        if events.init && self.engine.cpu().global_interrupts() {
            let (mut intercepted, mut redirected) = (false, false);
            self.act(|core| {
                intercepted = core.intercept_init()?;
                redirected = !intercepted && core.redirect_init()?;
                Ok(())
            })?;
            events.init = intercepted;
            if intercepted || redirected {
                return Ok(());
            }
            self.act(|core| {
                core.init();
                Ok(())
            })?;
            self.platform.lapic.init();
            // The bootstrap processor starts over at the reset vector (Intel SDM volume 3, 9.4.2).
            events.waiting = self.engine.cpu().apic_id != 0;
            events.nmis = 0;
        }
        if let Some(vector) = events.sipi.take()
            && events.waiting
        {
            self.act(|core| {
                core.startup(vector);
                Ok(())
            })?;
            events.waiting = false;
        }
        Ok(())
    }

    fn take_smi(&mut self, events: &mut Events) -> Result<(), Stop> {
        self.act(|core| {
            events.smi = core.intercept_smi()?;
            Ok(())
        })
    }

    fn take_nmi(&mut self, events: &mut Events) -> Result<(), Stop> {
        let mut taken = true;
        self.act(|core| {
            taken = !core.intercept_nmi()?;
            if !taken {
                return Ok(());
            }
            core.cpu.halted = false;
            core.nmi()
        })?;
        if taken {
            events.nmis -= 1;
        }
        Ok(())
    }

    /// Does what is to be done about interrupts between two instructions.
    fn take_interrupt(&mut self) -> Result<(), Stop> {
        match self.engine.cpu().interrupt_action(self.platform.lapic.pending().any()) {
            InterruptAction::None => Ok(()),
            InterruptAction::Physical => self.acknowledge_interrupt(),
            InterruptAction::Intercept => self.act(|core| core.intercept_interrupt()),
            InterruptAction::Virtual => self.act(|core| core.virtual_interrupt()),
        }
    }

    fn acknowledge_interrupt(&mut self) -> Result<(), Stop> {
        let vector = if self.platform.lapic.pending().ext_int {
            self.platform.lapic.acknowledge_ext_int();
            Some(self.platform.bus.acknowledge_ext_int())
        } else {
            self.platform.lapic.acknowledge()
        };
        vector.map_or(Ok(()), |vector| self.interrupt(vector))
    }

    fn interrupt(&mut self, vector: u8) -> Result<(), Stop> {
        self.act(|core| {
            core.cpu.halted = false;
            core.interrupt(vector)
        })
    }
}
