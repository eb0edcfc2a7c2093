//! The run loop.

use crate::engine::{self, INTERRUPT_SHADOW, interruptible};
use crate::platform::VcpuPlatform;
use crate::shared::{Requests, VcpuShared};
use crate::vcpu::{DbtVcpu, Events};
use accel::{HaltReason, StopToken, VcpuBus};
use lapic::Lapic;
use std::cell::Cell;
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

/// One call of `run`, apart from the engine.
struct Run<'a> {
    core: Core<'a>,
    platform: &'a VcpuPlatform<'a>,
    lapic: &'a Lapic,
    bus: &'a dyn VcpuBus,
    events: &'a mut Events,
}

impl DbtVcpu {
    /// The run loop: see [`accel::Vcpu::run`].
    pub(crate) fn run_loop(&mut self, bus: &dyn VcpuBus, stop: &StopToken) -> HaltReason {
        let shared = &*self.shared;
        let _attached = stop.attach(self.shared.clone());
        let _running = self.vm.tsc.enter();
        let _in_guest = InGuest::enter(shared);
        // SAFETY: this is the vCPU, and this its only use of the processor until the loop ends.
        let cpu = unsafe { shared.cpu() };
        let tsc_offset = Cell::new(cpu.msrs.tsc_offset);
        let platform = VcpuPlatform { bus, lapic: &self.lapic, tsc: &self.vm.tsc, tsc_offset };
        let core = Core { cpu, memory: &self.vm.memory, platform: &platform };
        let mut run = Run { core, platform: &platform, lapic: &self.lapic, bus, events: &mut self.events };
        loop {
            shared.pass();
            let requests = shared.take();
            if stop.is_stopped() {
                // What was asked besides is not lost: it stays in the events, or with the local APIC.
                run.note(requests);
                return HaltReason::Stopped;
            }
            run.note(requests);
            let executed = match run.next() {
                Ok(Next::Execute) => self.engine.run(&mut run.core, &platform),
                Ok(Next::Step) => engine::step(&mut run.core, &platform).map(|_| ()),
                Ok(Next::Sleep) => {
                    shared.wait();
                    Ok(())
                }
                Err(trap) => Err(trap),
            };
            if let Err(trap) = executed
                && run.deliver(trap).is_err()
            {
                return HaltReason::TripleFault;
            }
            platform.note_tsc_offset(run.core.cpu.msrs.tsc_offset);
        }
    }
}

/// Marks the vCPU as running.
struct InGuest<'a>(&'a VcpuShared);

impl<'a> InGuest<'a> {
    fn enter(shared: &'a VcpuShared) -> Self {
        shared.set_running(true);
        Self(shared)
    }
}

impl Drop for InGuest<'_> {
    fn drop(&mut self) {
        self.0.set_running(false);
    }
}

impl Run<'_> {
    /// Takes over requests into the processor's own state.
    fn note(&mut self, requests: Requests) {
        if requests.has(Requests::FLUSH) {
            self.core.flush_tlb(false);
        }
        self.events.note(requests);
    }

    /// Delivers events in the order of their priority (Intel SDM volume 3, table 6-2), and says what to do
    /// then.
    fn next(&mut self) -> Result<Next, Trap> {
        self.start_up();
        if self.events.waiting {
            return Ok(Next::Sleep);
        }
        if let Some(injected) = self.events.exception.take() {
            let address = self.core.cpu.cr2;
            let exception = Exception { vector: injected.vector, error: injected.error, address };
            return Err(Trap::Exception(exception));
        }
        if let Some(vector) = self.events.interrupt.take() {
            self.core.cpu.halted = false;
            self.core.interrupt(vector)?;
        }
        let shadows = self.core.cpu.interrupt_shadow;
        if shadows & INTERRUPT_SHADOW == 0 {
            if self.events.nmi && shadows & shadow::NMI == 0 {
                self.events.nmi = false;
                self.core.cpu.halted = false;
                self.core.nmi()?;
            }
            if interruptible(&self.core, self.platform) {
                self.take_interrupt()?;
            }
        }
        if self.core.cpu.halted {
            return Ok(Next::Sleep);
        }
        // An NMI waits for the end of a shadow, or for IRET; an interrupt for the end of a shadow.
        let watched = shadows & INTERRUPT_SHADOW != 0 || self.events.nmi;
        Ok(if watched { Next::Step } else { Next::Execute })
    }

    /// INIT and SIPI.
    fn start_up(&mut self) {
        if std::mem::take(&mut self.events.init) {
            self.core.init();
            self.lapic.init();
            // The bootstrap processor starts over at the reset vector (Intel SDM volume 3, 9.4.2).
            self.events.waiting = self.core.cpu.apic_id != 0;
            self.events.nmi = false;
        }
        if let Some(vector) = self.events.sipi.take()
            && self.events.waiting
        {
            self.core.startup(vector);
            self.events.waiting = false;
        }
    }

    fn take_interrupt(&mut self) -> Result<(), Trap> {
        let pending = self.lapic.pending();
        let vector = if pending.ext_int {
            self.lapic.acknowledge_ext_int();
            Some(self.bus.acknowledge_ext_int())
        } else {
            self.lapic.acknowledge()
        };
        let Some(vector) = vector else { return Ok(()) };
        self.core.cpu.halted = false;
        self.core.interrupt(vector)
    }

    /// Delivers an exception.
    fn deliver(&mut self, trap: Trap) -> Result<(), Trap> {
        match trap {
            Trap::Exception(exception) => self.core.deliver(exception),
            Trap::TripleFault => Err(trap),
        }
    }
}
