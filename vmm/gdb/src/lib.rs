//! A stub for gdb: guests debugged through its remote serial protocol.
//!
//! Each vCPU is a thread; when one stops, all do. What gdb asks for ends in [`accel::Vcpu`]'s debug surface, so that
//! it is the same under every accelerator. What a client sends is untrusted: any bytes are answered, or end the
//! connection, in bounded memory.
//!
//! The modules are layers; each uses only those before it:
//! - `endpoint`: where the stub listens
//! - `registers`: gdb's registers in the neutral state of a processor, and their description
//! - `architecture`: the same as the protocol's crate wants it
//! - `session`: what one client has set up, and what its packets do
//! - `monitor`: the commands of gdb's `monitor`
//! - `target`: a session as the protocol's crate wants it
//! - `feed`: connections, and what comes in on them
//! - `server`: the VM's run with a debugger
//! - [`fuzzing`]: a client's bytes without one

mod architecture;
mod endpoint;
mod feed;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod monitor;
mod registers;
mod server;
mod session;
mod target;

#[cfg(test)]
mod tests;

pub use endpoint::{Endpoint, EndpointError, Listener};
pub use registers::Architecture;
pub use server::{Start, run};
pub use session::{Debuggee, Session, SessionError};
pub use target::PACKET_BYTES;
