//! Where characters of serial ports and consoles come from and go to on the host: the terminal, a
//! pseudo-terminal, a file, a socket.

mod endpoint;
mod escape;
mod gate;
mod port;
mod socket;
mod spec;
mod terminal;

pub use endpoint::{ChardevError, Endpoint, InputEvent};
pub use escape::{EscapeKeys, HELP as ESCAPE_HELP};
pub use gate::{Gate, PortGate, PortInput, Receiver};
pub use port::{PortConnection, PortEvents, Surroundings, connect_console, connect_output, connect_serial};
pub use socket::bind_unix;
pub use spec::{ChardevSpec, ChardevSpecError};
pub use terminal::RawTerminal;

#[cfg(test)]
mod tests;
