//! Network block devices: the protocol, server and client.
//!
//! The specification is the NBD project's `doc/proto.md` with its extension `EXTENDED_HEADERS`; names are the ones it
//! uses, without the prefix `NBD_`. [`proto`] is a codec without I/O: it bounds every length that a peer sends before
//! anyone takes memory for it. [`server`] exports nodes of the block graph, and [`client`] is the driver `nbd`.

pub mod client;
pub mod proto;
pub mod server;
mod tls;
mod transport;

pub use tls::{ClientCredentials, CredentialsError, ServerCredentials};
