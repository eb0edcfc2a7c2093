//! Network block devices: the protocol's messages, and the handshakes of both sides.
//!
//! The specification is the NBD project's `doc/proto.md` with its extension `EXTENDED_HEADERS`; names are the ones it
//! uses, without the prefix `NBD_`. [`proto`] is a codec without I/O: it bounds every length that a peer sends before
//! anyone takes memory for it.

pub mod client_handshake;
pub mod proto;
pub mod server_handshake;
