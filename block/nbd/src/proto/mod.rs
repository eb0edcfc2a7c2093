//! The messages of the protocol, as bytes and as values. No I/O.

mod constants;
mod error;
mod option;
mod reader;
mod reply;
mod request;
mod status;

pub use constants::*;
pub use error::ProtocolError;
pub use option::{
    BlockSizes, ExportInfo, GoRequest, Hello, InfoReply, MetaContextReply, MetaContextRequest, OptionHeader,
    OptionReply, OptionReplyHeader, ServerReply, write_option, write_option_reply,
};
pub use reader::Reader;
pub use reply::{Chunk, ErrorChunk, HeaderMode, ReadCoverage, ReplyHeader};
pub use request::Request;
pub use status::{Extent, StatusChunk};
