//! Recordings of what came to a VM from outside, and when: the file format.
//!
//! A recording goes with a machine whose clock counts instructions. It holds what that machine was, in words, and then
//! events in the order in which they happened, each with its [`Stamp`]. All numbers are little-endian.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `VIREOREC` |
//! | 4 | the version, [`VERSION`] |
//! | … | frames to the end of the file |
//!
//! A frame is its kind (1 byte), the length of what it holds (4 bytes), that, and the CRC-32 of all these (4 bytes).
//! The first frame is the header, and only that is; what it holds is JSON: a list of pairs of strings. The others are
//! events. What they hold begins with the count of instructions and the VM's time in nanoseconds (8 bytes each):
//!
//! | kind | event | then |
//! |---|---|---|
//! | 0 | header | see above |
//! | 1 | input | the port's number (2 bytes), and the characters |
//! | 2 | break condition | the port's number (2 bytes) |
//! | 3 | check | a digest of registers, and one of all output so far (8 bytes each) |
//! | 4 | end | the same, and why the VM ended (2 bytes, see [`Event::End`]) |
//!
//! Events are written as they happen: a file that ends anywhere behind its header is a recording up to there. Nothing
//! comes after the end.

mod format;
mod reader;
mod writer;

pub use format::{Digests, Event, MAX_HEADER, MAX_INPUT, Reason, Stamp, VERSION};
pub use reader::{Reader, RecordingError};
pub use writer::Writer;
