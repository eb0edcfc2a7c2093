//! Debugging a vCPU: see [`accel::DebugSettings`].
//!
//! The translator's code ends before breakpoints, and leaves pages that are watched to the interpreter; single steps
//! are the interpreter's. The other tiers execute instruction by instruction while they are debugged.

use crate::engine::Engine;
use accel::{DebugSettings, DebugStop, WatchKind, Watchpoint};
use x86_core::Watch;

/// How a vCPU is debugged.
#[derive(Debug, Default)]
pub(crate) struct Debugging {
    pub(crate) single_step: bool,
    pub(crate) hold_interrupts: bool,
    /// Linear addresses, ascending.
    pub(crate) breakpoints: Vec<u64>,
    watchpoints: Vec<Watchpoint>,
}

impl Debugging {
    pub(crate) fn new(settings: &DebugSettings) -> Self {
        let mut breakpoints = [&settings.breakpoints[..], &settings.hardware_breakpoints[..]].concat();
        breakpoints.sort_unstable();
        breakpoints.dedup();
        Self {
            single_step: settings.single_step,
            hold_interrupts: settings.single_step && settings.hold_interrupts,
            breakpoints,
            watchpoints: settings.watchpoints.clone(),
        }
    }

    /// What the processor is to watch.
    pub(crate) fn watches(&self) -> Vec<Watch> {
        let watch = |point: &Watchpoint| Watch {
            address: point.address,
            len: point.len,
            reads: point.kind != WatchKind::Write,
            writes: point.kind != WatchKind::Read,
        };
        self.watchpoints.iter().map(watch).collect()
    }

    /// Whether other memory is watched than before.
    pub(crate) fn watches_differ(&self, before: &Self) -> bool {
        self.watchpoints != before.watchpoints
    }

    /// Whether `engine` has to execute one instruction at a time.
    pub(crate) fn is_stepwise(&self, engine: &Engine) -> bool {
        let nothing = self.breakpoints.is_empty() && self.watchpoints.is_empty();
        self.single_step || !(nothing || matches!(engine, Engine::Translator(_)))
    }

    /// Whether there is a breakpoint at the next instruction.
    pub(crate) fn before(&self, engine: &Engine) -> Option<DebugStop> {
        if self.breakpoints.is_empty() {
            return None;
        }
        let address = engine.cpu().code_address();
        self.breakpoints.binary_search(&address).ok()?;
        Some(DebugStop::Breakpoint { address })
    }

    /// What was met by the instructions executed since this was last asked.
    pub(crate) fn after(&self, engine: &mut Engine) -> Option<DebugStop> {
        if self.watchpoints.is_empty() {
            return None;
        }
        let met = engine.take_watch_met()?;
        self.watchpoints.get(met).copied().map(DebugStop::Watchpoint)
    }
}
