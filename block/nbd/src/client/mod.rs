//! The client: connections to servers, and the driver `nbd` over them.

mod address;
mod connection;
mod driver;
pub mod handshake;
mod link;

pub use address::Address;
pub use driver::{NbdKind, TlsObjects};
pub use link::{LinkOptions, dial_list};
