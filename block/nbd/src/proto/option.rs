//! The handshake's messages.

use super::constants::*;
use super::error::ProtocolError;
use super::reader::Reader;

/// What a newstyle server says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// What the server can do.
    pub flags: HandshakeFlags,
}

impl Hello {
    /// Bytes on the wire.
    pub const SIZE: usize = 18;

    /// The message's bytes.
    pub fn encode(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[..8].copy_from_slice(&INIT_MAGIC.to_be_bytes());
        bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        bytes[16..].copy_from_slice(&self.flags.bits().to_be_bytes());
        bytes
    }
}

/// What every option begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// The option.
    pub option: OptionCode,
    /// Bytes of data that follow; at most [`MAX_OPTION_DATA`].
    pub len: u32,
}

impl OptionHeader {
    /// Bytes on the wire.
    pub const SIZE: usize = 16;

    /// The header that `bytes` are, if its length is in bounds.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(bytes, "option");
        expect_magic(reader.u64()?, OPTION_MAGIC, "option")?;
        let option = OptionCode::from_wire(reader.u32()?);
        let len = bounded_option(reader.u32()?, "length of an option's data")?;
        Ok(Self { option, len })
    }
}

/// What every reply to an option begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that is replied to.
    pub option: OptionCode,
    /// What the reply says.
    pub reply: ReplyType,
    /// Bytes of data that follow; at most [`MAX_OPTION_DATA`].
    pub len: u32,
}

impl OptionReplyHeader {
    /// Bytes on the wire.
    pub const SIZE: usize = 20;

    /// The header that `bytes` are, if its length is in bounds.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(bytes, "reply to an option");
        expect_magic(reader.u64()?, OPTION_REPLY_MAGIC, "reply to an option")?;
        let option = OptionCode::from_wire(reader.u32()?);
        let reply = ReplyType::from_wire(reader.u32()?);
        let len = bounded_option(reader.u32()?, "length of a reply to an option")?;
        Ok(Self { option, reply, len })
    }
}

pub(super) fn expect_magic(found: u64, expected: u64, message: &'static str) -> Result<(), ProtocolError> {
    if found == expected { Ok(()) } else { Err(ProtocolError::Magic { message, found }) }
}

fn bounded_option(len: u32, field: &'static str) -> Result<u32, ProtocolError> {
    if len <= MAX_OPTION_DATA {
        return Ok(len);
    }
    Err(ProtocolError::TooLong { field, found: len.into(), limit: MAX_OPTION_DATA.into() })
}

/// Appends an option with its data (at most [`MAX_OPTION_DATA`]) to `out`.
pub fn write_option(option: OptionCode, data: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_wire().to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
}

/// Appends a reply to an option with its data (at most [`MAX_OPTION_DATA`]) to `out`.
pub fn write_option_reply(option: OptionCode, reply: ReplyType, data: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_wire().to_be_bytes());
    out.extend_from_slice(&reply.to_wire().to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
}

fn put_text(text: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(&(text.len() as u32).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// The data of `OPT_INFO` and `OPT_GO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GoRequest {
    /// The export's name.
    pub name: String,
    /// What the client wants to know.
    pub infos: Vec<InfoType>,
}

impl GoRequest {
    /// The request that `data` are.
    pub fn decode(data: &[u8]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(data, "request for an export");
        let name = reader.counted_text("export name")?.to_owned();
        let count = usize::from(reader.u16()?);
        // The list is as long as it says, or the memory for it is not taken.
        let list = reader.bytes(count * 2)?;
        reader.end()?;
        let infos = list.as_chunks().0.iter().map(|pair| InfoType::from_wire(u16::from_be_bytes(*pair)));
        Ok(Self { name, infos: infos.collect() })
    }

    /// The request's data.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(6 + self.name.len() + self.infos.len() * 2);
        put_text(&self.name, &mut out);
        out.extend_from_slice(&(self.infos.len() as u16).to_be_bytes());
        for info in &self.infos {
            out.extend_from_slice(&info.to_wire().to_be_bytes());
        }
        out
    }
}

/// The data of `OPT_LIST_META_CONTEXT` and `OPT_SET_META_CONTEXT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContextRequest {
    /// The export's name.
    pub name: String,
    /// Names of contexts, or patterns that their namespace has. At most [`MAX_QUERIES`].
    pub queries: Vec<String>,
}

impl MetaContextRequest {
    /// The request that `data` are.
    pub fn decode(data: &[u8]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(data, "request for metadata contexts");
        let name = reader.counted_text("export name")?.to_owned();
        let count = reader.u32()?;
        if count > MAX_QUERIES {
            let (found, limit) = (count.into(), MAX_QUERIES.into());
            return Err(ProtocolError::TooLong { field: "number of queries", found, limit });
        }
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(reader.counted_text("query of metadata contexts")?.to_owned());
        }
        reader.end()?;
        Ok(Self { name, queries })
    }

    /// The request's data.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_text(&self.name, &mut out);
        out.extend_from_slice(&(self.queries.len() as u32).to_be_bytes());
        for query in &self.queries {
            put_text(query, &mut out);
        }
        out
    }
}

/// `REP_SERVER`: an export that `OPT_LIST` lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerReply {
    /// The export's name.
    pub name: String,
    /// A description for people; empty if there is none.
    pub description: String,
}

impl ServerReply {
    /// The reply that `data` are.
    pub fn decode(data: &[u8]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(data, "reply with an export");
        let name = reader.counted_text("export name")?.to_owned();
        let description = reader.rest_text("export description")?.to_owned();
        Ok(Self { name, description })
    }

    /// The reply's data.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_text(&self.name, &mut out);
        out.extend_from_slice(self.description.as_bytes());
        out
    }
}

/// Size and flags of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Bytes.
    pub size: u64,
    /// What the export is and can do.
    pub flags: TransmissionFlags,
}

impl ExportInfo {
    /// Bytes of the reply to `OPT_EXPORT_NAME`, without the zeroes at its end.
    pub const SIZE: usize = 10;

    /// The reply to `OPT_EXPORT_NAME` without the zeroes at its end.
    pub fn encode(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[..8].copy_from_slice(&self.size.to_be_bytes());
        bytes[8..].copy_from_slice(&self.flags.bits().to_be_bytes());
        bytes
    }

    /// The value that such a reply has.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(bytes, "export");
        Ok(Self { size: reader.u64()?, flags: TransmissionFlags::from_bits_retain(reader.u16()?) })
    }
}

/// An export's constraints of sizes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// What offsets and lengths are multiples of: a power of two up to 64 KiB.
    pub minimum: u32,
    /// What they had better be multiples of: a power of two of at least 512.
    pub preferred: u32,
    /// The longest payload.
    pub maximum: u32,
}

impl BlockSizes {
    /// What holds without any said.
    pub const DEFAULT: Self = Self { minimum: 1, preferred: 4096, maximum: MAX_PAYLOAD };

    /// The same sizes if they are what the specification allows.
    fn checked(self) -> Result<Self, ProtocolError> {
        let Self { minimum, preferred, maximum } = self;
        if !minimum.is_power_of_two() || minimum > 1 << 16 {
            return Err(ProtocolError::Value { field: "minimum block size", found: minimum.into() });
        }
        if !preferred.is_power_of_two() || preferred < minimum {
            return Err(ProtocolError::Value { field: "preferred block size", found: preferred.into() });
        }
        if maximum < minimum {
            return Err(ProtocolError::Value { field: "maximum block size", found: maximum.into() });
        }
        Ok(self)
    }
}

/// `REP_INFO`: something about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InfoReply {
    /// Size and flags.
    Export(ExportInfo),
    /// The canonical name.
    Name(String),
    /// The description.
    Description(String),
    /// Constraints of sizes.
    BlockSize(BlockSizes),
    /// Something that this implementation does not know.
    Other(u16),
}

impl InfoReply {
    /// The reply that `data` are.
    pub fn decode(data: &[u8]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(data, "information about an export");
        let reply = match InfoType::from_wire(reader.u16()?) {
            InfoType::Export => {
                let size = reader.u64()?;
                Self::Export(ExportInfo { size, flags: TransmissionFlags::from_bits_retain(reader.u16()?) })
            }
            InfoType::Name => Self::Name(reader.rest_text("export name")?.to_owned()),
            InfoType::Description => Self::Description(reader.rest_text("export description")?.to_owned()),
            InfoType::BlockSize => {
                let (minimum, preferred, maximum) = (reader.u32()?, reader.u32()?, reader.u32()?);
                Self::BlockSize(BlockSizes { minimum, preferred, maximum }.checked()?)
            }
            InfoType::Other(number) => return Ok(Self::Other(number)),
        };
        reader.end()?;
        Ok(reply)
    }

    /// The reply's data.
    pub fn encode(&self) -> Vec<u8> {
        let kind = match self {
            Self::Export(_) => InfoType::Export,
            Self::Name(_) => InfoType::Name,
            Self::Description(_) => InfoType::Description,
            Self::BlockSize(_) => InfoType::BlockSize,
            Self::Other(number) => InfoType::Other(*number),
        };
        let mut out = kind.to_wire().to_be_bytes().to_vec();
        match self {
            Self::Export(export) => out.extend_from_slice(&export.encode()),
            Self::Name(text) | Self::Description(text) => out.extend_from_slice(text.as_bytes()),
            Self::BlockSize(BlockSizes { minimum, preferred, maximum }) => {
                for size in [minimum, preferred, maximum] {
                    out.extend_from_slice(&size.to_be_bytes());
                }
            }
            Self::Other(_) => {}
        }
        out
    }
}

/// `REP_META_CONTEXT`: a metadata context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContextReply {
    /// The number that chunks of block status call it; means nothing in a list.
    pub id: u32,
    /// Its name.
    pub name: String,
}

impl MetaContextReply {
    /// The reply that `data` are.
    pub fn decode(data: &[u8]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(data, "reply with a metadata context");
        Ok(Self { id: reader.u32()?, name: reader.rest_text("name of a metadata context")?.to_owned() })
    }

    /// The reply's data.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.id.to_be_bytes().to_vec();
        out.extend_from_slice(self.name.as_bytes());
        out
    }
}

/// A reply to an option with its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionReply {
    /// Done.
    Ack,
    /// An export.
    Server(ServerReply),
    /// Something about an export.
    Info(InfoReply),
    /// A metadata context.
    MetaContext(MetaContextReply),
    /// An error, with the server's words for people (empty, or at most [`MAX_STRING`] bytes).
    Error(ReplyType, String),
}

impl OptionReply {
    /// The reply of type `reply` that `data` are.
    pub fn decode(reply: ReplyType, data: &[u8]) -> Result<Self, ProtocolError> {
        if reply.is_error() {
            // The words are for people: what is not text in them is shown as such, and too many are cut.
            let words = String::from_utf8_lossy(&data[..data.len().min(MAX_STRING)]);
            let words = words.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
            return Ok(Self::Error(reply, words));
        }
        match reply {
            ReplyType::Ack if data.is_empty() => Ok(Self::Ack),
            ReplyType::Ack => {
                Err(ProtocolError::Extra { message: "acknowledgement of an option", extra: data.len() })
            }
            ReplyType::Server => ServerReply::decode(data).map(Self::Server),
            ReplyType::Info => InfoReply::decode(data).map(Self::Info),
            ReplyType::MetaContext => MetaContextReply::decode(data).map(Self::MetaContext),
            other => Err(ProtocolError::Value { field: "type of a reply", found: other.to_wire().into() }),
        }
    }
}
