//! One vCPU.

use crate::debug::Debugging;
use crate::engine::Engine;
use crate::events::Events;
use crate::halt_poll::HaltPoll;
use crate::platform::{NoBus, VcpuPlatform};
use crate::shared::VcpuShared;
use crate::state;
use crate::vm_shared::VmShared;
use accel::{AccelError, DebugLimits, DebugSettings, HaltReason, StopToken, Vcpu, VcpuBus, X86State};
use lapic::Lapic;
use std::cell::Cell;
use std::sync::Arc;
use x86_core::Core;

/// One vCPU.
pub(crate) struct DbtVcpu {
    pub(crate) id: u32,
    pub(crate) vm: Arc<VmShared>,
    pub(crate) shared: Arc<VcpuShared>,
    pub(crate) lapic: Arc<Lapic>,
    pub(crate) events: Events,
    pub(crate) halt_poll: HaltPoll,
    pub(crate) debugging: Debugging,
    /// In the middle of a repeated string instruction, where instructions are counted.
    pub(crate) repeating: bool,
}

impl DbtVcpu {
    /// Does something with the processor while it does not run.
    fn at_rest<R>(&self, act: impl FnOnce(&mut Core<'_>) -> R) -> R {
        // SAFETY: this is the vCPU, and it does not run.
        let engine = unsafe { self.shared.engine() };
        let platform = VcpuPlatform {
            bus: &NoBus,
            lapic: &self.lapic,
            tsc: &self.vm.tsc,
            counted: self.vm.counted.as_ref(),
            pauses: Cell::new(0),
        };
        act(&mut engine.core(&self.vm.memory, &platform))
    }
}

impl Vcpu for DbtVcpu {
    fn id(&self) -> u32 {
        self.id
    }

    fn run(&mut self, bus: &dyn VcpuBus, stop: &StopToken) -> HaltReason {
        let reason = self.run_loop(bus, stop);
        if let Some(counted) = &self.vm.counted {
            // SAFETY: this is the vCPU, and it does not run any more.
            counted.stopped(unsafe { self.shared.engine() }.cpu());
        }
        reason
    }

    fn reset(&mut self) {
        self.shared.take();
        self.lapic.reset();
        self.events = Events::at_reset(self.id);
        self.repeating = false;
        self.at_rest(|core| core.reset());
    }

    fn save(&self) -> Result<X86State, AccelError> {
        let mut events = self.events;
        events.note(self.shared.peek());
        let time = self.vm.clock.now();
        let tsc = self.vm.tsc.now();
        let mut lapic = self.lapic.save();
        // What the timer owed is with the local APIC now; an NMI that it owed was posted.
        events.note(self.shared.peek());
        // SAFETY: this is the vCPU, and it does not run.
        let cpu = unsafe { self.shared.engine() }.cpu();
        // The local APIC's deadline is without the guest's offset, the neutral state's with it.
        if lapic.tsc_deadline != 0 {
            lapic.tsc_deadline = lapic.tsc_deadline.wrapping_add(cpu.msrs.tsc_offset).max(1);
        }
        Ok(state::save(cpu, &events, lapic, tsc.wrapping_add(cpu.msrs.tsc_offset), time))
    }

    fn restore(&mut self, state: &X86State) -> Result<(), AccelError> {
        self.reset();
        let bad = |id, field, reason| AccelError::BadState { id, field, reason };
        let id = self.id;
        let model = self.at_rest(|core| core.cpu.model.clone());
        state::check(state, &model).map_err(|(field, reason)| bad(id, field, reason))?;
        let source = self.vm.tsc.at(state.tsc_time);
        let offset = state.tsc.wrapping_sub(source);
        let mut lapic = state.lapic.clone();
        if lapic.tsc_deadline != 0 {
            let left = lapic.tsc_deadline.saturating_sub(state.tsc);
            lapic.tsc_deadline = source.saturating_add(left).max(1);
        }
        self.lapic.restore(&lapic, source, state.tsc_time).map_err(|error| bad(id, "lapic", error.reason))?;
        self.vm.tsc.forget();
        self.events = state::events(&state.events);
        self.at_rest(|core| state::load(core, state, offset));
        Ok(())
    }

    fn debug_limits(&self) -> DebugLimits {
        // Where instructions are counted, interrupts come at their counts, debugged or not.
        let hold_interrupts = self.vm.counted.is_none();
        DebugLimits { hardware: None, read_watchpoints: true, hold_interrupts, guest_registers: true }
    }

    fn set_debug(&mut self, settings: &DebugSettings) -> Result<(), AccelError> {
        let debugging = Debugging::new(settings);
        if let Some(translator) = &self.vm.translator {
            let mut breakpoints = self.vm.breakpoints.lock();
            breakpoints.insert(self.id, debugging.breakpoints.clone());
            translator.set_breakpoints(breakpoints.values().flatten().copied());
            // SAFETY: this is the vCPU, and it does not run.
            if let Engine::Translator(vcpu) = unsafe { self.shared.engine() } {
                vcpu.set_breakpoints(debugging.breakpoints.clone());
            }
        }
        if debugging.watches_differ(&self.debugging) {
            self.at_rest(|core| core.set_watches(debugging.watches()));
        }
        self.debugging = debugging;
        Ok(())
    }

    fn translate(&self, address: u64) -> Result<Option<u64>, AccelError> {
        Ok(self.at_rest(|core| core.peek_translation(address)))
    }
}
