//! Interrupt lines and message-signalled interrupts.
//!
//! A device holds [`IrqLine`]s and [`MsiTarget`]s and never learns what is behind them: an interrupt
//! controller of this VM, an accelerator's own, or a test's recorder.

mod ordered;

pub use ordered::OrderedLine;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The receiving end of numbered, level-capable interrupt inputs (an I/O APIC's pins, a PIC's inputs, or
/// the board's wiring in front of both).
pub trait IrqSink: Send + Sync {
    /// Sets input `pin` to `level`. Called with every change of level, from any thread.
    fn set_level(&self, pin: u32, level: bool);
}

/// One interrupt line from a device to an input of a controller. Clones drive the same wire.
#[derive(Clone)]
pub struct IrqLine {
    sink: Arc<dyn IrqSink>,
    pin: u32,
    level: Arc<AtomicBool>,
}

impl IrqLine {
    /// A line, initially low, to input `pin` of `sink`.
    pub fn new(sink: Arc<dyn IrqSink>, pin: u32) -> Self {
        Self { sink, pin, level: Arc::new(AtomicBool::new(false)) }
    }

    /// A line that leads nowhere.
    pub fn unconnected() -> Self {
        struct Nowhere;
        impl IrqSink for Nowhere {
            fn set_level(&self, _pin: u32, _level: bool) {}
        }
        Self::new(Arc::new(Nowhere), 0)
    }

    /// Drives the line; the sink hears of it only if the level changes.
    pub fn set(&self, level: bool) {
        if self.level.swap(level, Ordering::SeqCst) != level {
            self.sink.set_level(self.pin, level);
        }
    }

    /// A rising edge followed by a falling one.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }

    /// The level that the line is driven to now.
    pub fn level(&self) -> bool {
        self.level.load(Ordering::SeqCst)
    }

    /// The input of the sink that this line drives.
    pub fn pin(&self) -> u32 {
        self.pin
    }
}

impl fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IrqLine").field("pin", &self.pin).field("level", &self.level()).finish()
    }
}

/// A message-signalled interrupt: what a device writes and where (Intel SDM volume 3, 11.11; on x86 the
/// address lies in `0xFEE0_0000..=0xFEEF_FFFF`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct MsiMessage {
    /// The guest physical address written to.
    pub address: u64,
    /// The value written.
    pub data: u32,
}

/// What accepts message-signalled interrupts: the accelerator's local APICs.
pub trait MsiTarget: Send + Sync {
    /// Delivers `message`. A message that addresses no interrupt controller is dropped.
    fn signal(&self, message: MsiMessage);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    struct Recorder(Mutex<Vec<(u32, bool)>>);
    impl IrqSink for Recorder {
        fn set_level(&self, pin: u32, level: bool) {
            self.0.lock().unwrap().push((pin, level));
        }
    }

    #[test]
    fn only_changes_of_level_reach_the_sink() {
        let recorder = Arc::new(Recorder(Mutex::new(Vec::new())));
        let line = IrqLine::new(recorder.clone(), 4);
        line.set(false);
        line.set(true);
        line.clone().set(true);
        line.set(false);
        line.pulse();
        assert_eq!(*recorder.0.lock().unwrap(), [(4, true), (4, false), (4, true), (4, false)]);
    }
}
