//! A function's INTx pin.

use irq::IrqLine;
use parking_lot::Mutex;

#[derive(Debug, Default, Clone, Copy)]
struct State {
    /// The device has an interrupt pending, which the status register shows.
    asserted: bool,
    /// The command register disables the pin.
    disabled: bool,
    /// MSI-X is enabled, which forbids INTx (6.1.4).
    msix_enabled: bool,
}

/// A function's INTx pin: what the device asserts, and the gates between it and the line.
#[derive(Debug)]
pub struct Intx {
    line: IrqLine,
    state: Mutex<State>,
}

impl Intx {
    pub(crate) fn new(line: IrqLine) -> Self {
        Self { line, state: Mutex::new(State::default()) }
    }

    /// Asserts or deasserts the pin.
    pub fn set(&self, asserted: bool) {
        self.update(|state| state.asserted = asserted);
    }

    /// Whether the device asserts the pin, gated or not.
    pub fn asserted(&self) -> bool {
        self.state.lock().asserted
    }

    pub(crate) fn set_gates(&self, disabled: bool, msix_enabled: bool) {
        self.update(|state| {
            state.disabled = disabled;
            state.msix_enabled = msix_enabled;
        });
    }

    /// The lock is held while the line changes, so that two threads' changes reach it in order. Nothing
    /// behind an interrupt line asks a PCI function about its pin.
    fn update(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock();
        change(&mut state);
        self.line.set(state.asserted && !state.disabled && !state.msix_enabled);
    }
}
