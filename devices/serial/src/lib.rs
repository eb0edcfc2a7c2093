//! The 16550A serial port (National Semiconductor PC16550D), as a PC wires it.
//!
//! Characters take no time on the wire: what the guest sends goes to the [`SerialBackend`] at once, and the
//! idle time after which a receiver with less than its trigger level reports a "character timeout" has
//! always passed. What the backend refuses stays in the transmitter, and the guest sees it as busy.
//! In the other direction [`Serial::receive`] takes what the receiver has room for, and the backend is told
//! when there is room again: no input is ever overrun.

mod backend;
mod registers;
mod state;

#[cfg(test)]
mod tests;

pub use backend::{BufferedOutput, SerialBackend};
pub use state::FIFO_LEN;

use device::{Device, PioDevice, SavedState, StateError, decode, encode};
use irq::{IrqLine, OrderedLine};
use parking_lot::Mutex;
use state::{Effects, UartState};
use std::fmt;
use std::sync::Arc;

/// How many I/O ports one serial port has.
pub const PORT_COUNT: u16 = 8;
/// First I/O port and ISA interrupt of the first serial port, Linux's `ttyS0`.
pub const COM1: (u16, u32) = (0x3f8, 4);
/// First I/O port and ISA interrupt of the second serial port.
pub const COM2: (u16, u32) = (0x2f8, 3);
/// First I/O port and ISA interrupt of the third serial port.
pub const COM3: (u16, u32) = (0x3e8, 4);
/// First I/O port and ISA interrupt of the fourth serial port.
pub const COM4: (u16, u32) = (0x2e8, 3);

/// The levels of the modem's outputs, the UART's inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModemInputs {
    /// Clear to send.
    pub clear_to_send: bool,
    /// Data set ready.
    pub data_set_ready: bool,
    /// Ring indicator.
    pub ring: bool,
    /// Data carrier detect.
    pub carrier_detect: bool,
}

impl Default for ModemInputs {
    /// A terminal that is connected and ready.
    fn default() -> Self {
        Self { clear_to_send: true, data_set_ready: true, ring: false, carrier_detect: true }
    }
}

/// One 16550A.
pub struct Serial {
    // Host glue.
    line: OrderedLine,
    backend: Arc<dyn SerialBackend>,
    /// Held while bytes go from the transmitter to the backend, so that they stay in order.
    transmitting: Mutex<()>,
    /// What the guest can see, and whether input had to be refused.
    shared: Mutex<Shared>,
}

struct Shared {
    uart: UartState,
    /// Host glue: [`Serial::receive`] took less than it was offered, and the backend waits to hear of room.
    input_refused: bool,
}

impl Serial {
    /// The port's kind in saved states.
    pub const KIND: &'static str = "serial-16550";
    const VERSION: u32 = 1;

    /// A port after power-on, interrupting by `line`, that sends to `backend`.
    pub fn new(line: IrqLine, backend: Arc<dyn SerialBackend>) -> Arc<Self> {
        Arc::new(Self {
            line: OrderedLine::new(line),
            backend,
            transmitting: Mutex::new(()),
            shared: Mutex::new(Shared { uart: UartState::new(), input_refused: false }),
        })
    }

    /// Input from the host: puts as much of `bytes` into the receiver as there is room for and returns how
    /// many. If that is not all, the backend's [`SerialBackend::input_room`] is called when there is room
    /// again.
    pub fn receive(&self, bytes: &[u8]) -> usize {
        let taken = {
            let mut shared = self.shared.lock();
            let taken = shared.uart.receive(bytes);
            if taken < bytes.len() {
                shared.input_refused = true;
            }
            taken
        };
        self.update_line();
        taken
    }

    /// How many bytes [`Serial::receive`] would take now.
    pub fn input_room(&self) -> usize {
        self.shared.lock().uart.room()
    }

    /// A break condition from the other end. It says whether there was room for it.
    pub fn receive_break(&self) -> bool {
        let taken = self.shared.lock().uart.receive_break();
        self.update_line();
        taken
    }

    /// Sets the modem's outputs.
    pub fn set_modem_inputs(&self, inputs: ModemInputs) {
        self.shared.lock().uart.set_modem_inputs(inputs);
        self.update_line();
    }

    /// To be called, from any thread, when a backend that refused bytes can take some again.
    pub fn transmit_ready(&self) {
        self.transmit();
        self.update_line();
    }

    /// Hands the transmitter's bytes to the backend until there are none or it refuses.
    fn transmit(&self) {
        let _order = self.transmitting.lock();
        loop {
            let mut bytes = [0; FIFO_LEN];
            let count = self.shared.lock().uart.transmitter_bytes(&mut bytes);
            if count == 0 {
                return;
            }
            let taken = self.backend.write(&bytes[..count]).min(count);
            self.shared.lock().uart.sent(taken);
            if taken == 0 {
                return;
            }
        }
    }

    fn update_line(&self) {
        self.line.update(|| self.shared.lock().uart.interrupt_output());
    }

    /// Does, without the state's lock, what an access asked for.
    fn apply(&self, effects: Effects) {
        if effects.transmit {
            self.transmit();
        }
        self.update_line();
        if let Some((data_terminal_ready, request_to_send)) = effects.modem_outputs {
            self.backend.modem_outputs(data_terminal_ready, request_to_send);
        }
        if let Some(on) = effects.send_break {
            self.backend.send_break(on);
        }
        self.offer_room();
    }

    /// Tells the backend of room in the receiver, if it waits for some.
    fn offer_room(&self) {
        let tell = {
            let mut shared = self.shared.lock();
            let tell = shared.input_refused && shared.uart.room() > 0;
            if tell {
                shared.input_refused = false;
            }
            tell
        };
        if tell {
            self.backend.input_room();
        }
    }
}

impl PioDevice for Serial {
    fn pio_read(&self, offset: u16, data: &mut [u8]) {
        for (register, byte) in (offset..).zip(data) {
            let (value, effects) = self.shared.lock().uart.read(register);
            *byte = value;
            if let Some(effects) = effects {
                self.apply(effects);
            }
        }
    }

    fn pio_write(&self, offset: u16, data: &[u8]) {
        for (register, &byte) in (offset..).zip(data) {
            let effects = self.shared.lock().uart.write(register, byte);
            self.apply(effects);
        }
    }
}

impl Device for Serial {
    fn kind(&self) -> &'static str {
        Self::KIND
    }

    fn version(&self) -> u32 {
        Self::VERSION
    }

    fn reset(&self) {
        self.shared.lock().uart.reset();
        self.update_line();
        self.offer_room();
    }

    fn start(&self) {
        self.transmit_ready();
    }

    fn save(&self) -> SavedState {
        encode(Self::KIND, Self::VERSION, &self.shared.lock().uart.to_saved())
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let restored = decode(Self::KIND, Self::VERSION, state).and_then(UartState::from_saved);
        let result = {
            let mut shared = self.shared.lock();
            match restored {
                Ok(uart) => {
                    shared.uart = uart;
                    Ok(())
                }
                Err(error) => {
                    shared.uart = UartState::new();
                    Err(error)
                }
            }
        };
        self.update_line();
        self.offer_room();
        result
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial").field("line", &self.line).finish_non_exhaustive()
    }
}
