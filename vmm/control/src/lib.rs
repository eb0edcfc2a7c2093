//! The control socket of a running VM: QMP's protocol, commands and events, so that programs made for QEMU drive it.
//!
//! A thread of its own ([`Server`]) has the clients, and carries their commands out one after the other. A command is a
//! name, the types of its arguments and answer, and a small asynchronous function (`Command`); the types are checked
//! against what clients send and shown to them by `query-qmp-schema`. Events come from any thread through the [`Hub`].
//!
//! What clients send is untrusted: messages have limits of size and depth, and a client that does not read what it is
//! told is not listened to, and in the end lost.
//!
//! The modules are layers; each uses only those before it:
//! - `error`, `framing`, `message`, `version`: the protocol's grammar
//! - `schema`: the types of commands
//! - `outbox`, `events`, `vm_events`, `block_events`, `ear`: what clients are told
//! - `context`: what commands work on
//! - `command`, `commands`: the table of commands, and all of them
//! - `monitor`, `wire`, `endpoint`, `server`: clients
//! - [`client`]: the other side
//! - `fuzzing`: a client's bytes without a socket

mod block_events;
pub mod client;
mod command;
mod commands;
mod context;
mod ear;
mod endpoint;
mod error;
mod events;
mod framing;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod message;
mod monitor;
mod outbox;
mod schema;
mod server;
mod version;
mod vm_events;
mod wire;

#[cfg(test)]
mod tests;

pub use context::{Machine, VmFacts};
pub use ear::Ear;
pub use endpoint::{Address, Bound, Endpoint, EndpointError};
pub use error::{ErrorClass, QmpError};
pub use events::{Event, Hub};
pub use server::Server;
