//! The run loop.

use crate::engine::{INTERRUPT_SHADOW, interruptible};
use crate::platform::VcpuPlatform;
use crate::shared::{Requests, VcpuShared};
use crate::vcpu::{DbtVcpu, Events};
use accel::{HaltReason, StopToken, VcpuBus};
use x86_core::{Core, Exception, Trap, shadow};

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
        let platform = VcpuPlatform { bus, lapic: &self.lapic, tsc: &self.vm.tsc };
        let events = &mut self.events;
        loop {
            shared.pass();
            let mut core = engine.core(memory, &platform);
            note(&mut core, events, shared.take());
            if stop.is_stopped() {
                return HaltReason::Stopped;
            }
            let executed = match next(&mut core, events, &platform) {
                Ok(Next::Execute) => engine.run(memory, &platform),
                Ok(Next::Step) => x86_interp::step(&mut core).map(|_| ()),
                Ok(Next::Sleep) => {
                    shared.wait();
                    Ok(())
                }
                Err(trap) => Err(trap),
            };
            let delivered = match executed {
                Ok(()) => Ok(()),
                Err(Trap::Exception(exception)) => engine.core(memory, &platform).deliver(exception),
                Err(trap) => Err(trap),
            };
            if delivered.is_err() {
                return HaltReason::TripleFault;
            }
        }
    }
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

/// Takes over requests into the processor's own state.
fn note(core: &mut Core<'_>, events: &mut Events, requests: Requests) {
    if requests.has(Requests::FLUSH) {
        core.flush_tlb(false);
    }
    events.note(requests);
}

/// Delivers events in the order of their priority (Intel SDM volume 3, table 6-2), and says what to do then.
fn next(core: &mut Core<'_>, events: &mut Events, platform: &VcpuPlatform<'_>) -> Result<Next, Trap> {
    start_up(core, events, platform);
    if events.waiting {
        return Ok(Next::Sleep);
    }
    if let Some(injected) = events.exception.take() {
        let exception = Exception { vector: injected.vector, error: injected.error, address: core.cpu.cr2 };
        return Err(Trap::Exception(exception));
    }
    if let Some(vector) = events.interrupt.take() {
        core.cpu.halted = false;
        core.interrupt(vector)?;
    }
    let shadows = core.cpu.interrupt_shadow;
    if shadows & INTERRUPT_SHADOW == 0 {
        if events.nmi && shadows & shadow::NMI == 0 {
            events.nmi = false;
            core.cpu.halted = false;
            core.nmi()?;
        }
        if interruptible(core, platform) {
            take_interrupt(core, platform)?;
        }
    }
    if core.cpu.halted {
        return Ok(Next::Sleep);
    }
    // An NMI waits for the end of a shadow, or for IRET; an interrupt for the end of a shadow.
    let watched = shadows & INTERRUPT_SHADOW != 0 || events.nmi;
    Ok(if watched { Next::Step } else { Next::Execute })
}

/// INIT and SIPI.
fn start_up(core: &mut Core<'_>, events: &mut Events, platform: &VcpuPlatform<'_>) {
    if std::mem::take(&mut events.init) {
        core.init();
        platform.lapic.init();
        // The bootstrap processor starts over at the reset vector (Intel SDM volume 3, 9.4.2).
        events.waiting = core.cpu.apic_id != 0;
        events.nmi = false;
    }
    if let Some(vector) = events.sipi.take()
        && events.waiting
    {
        core.startup(vector);
        events.waiting = false;
    }
}

fn take_interrupt(core: &mut Core<'_>, platform: &VcpuPlatform<'_>) -> Result<(), Trap> {
    let vector = if platform.lapic.pending().ext_int {
        platform.lapic.acknowledge_ext_int();
        Some(platform.bus.acknowledge_ext_int())
    } else {
        platform.lapic.acknowledge()
    };
    let Some(vector) = vector else { return Ok(()) };
    core.cpu.halted = false;
    core.interrupt(vector)
}
