//! Lines whose level is computed from a device's state, with several threads changing that state.

use crate::IrqLine;
use std::sync::{Mutex, PoisonError};

/// An [`IrqLine`] whose level follows a device's state, however many threads change it.
///
/// A device must not hold the lock of its state while it drives a line. But if it computes the level, lets
/// go of the lock and then drives the line, two threads can do so in the wrong order, and the line keeps the
/// older level for good. Here the level is computed and driven in one step that is ordered on its own.
#[derive(Debug)]
pub struct OrderedLine {
    line: IrqLine,
    order: Mutex<()>,
}

impl OrderedLine {
    /// An ordered use of `line`.
    pub fn new(line: IrqLine) -> Self {
        Self { line, order: Mutex::new(()) }
    }

    /// Drives the line to what `level` computes from the device's state now. The sink must not call the
    /// device back from within.
    pub fn update(&self, level: impl FnOnce() -> bool) {
        let _order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        self.line.set(level());
    }

    /// A rising and a falling edge, not torn apart by another thread's.
    pub fn pulse(&self) {
        let _order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        self.line.pulse();
    }

    /// The level that the line is driven to now.
    pub fn level(&self) -> bool {
        self.line.level()
    }
}
