//! Numbers of the protocol: magic values, limits, flags, codes.

use bitflags::bitflags;

/// The port that IANA has reserved.
pub const DEFAULT_PORT: u16 = 10809;

/// The first eight bytes of a server: `NBDMAGIC`.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Newstyle servers' second eight bytes, and the beginning of every option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Oldstyle servers' second eight bytes.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// The beginning of a reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// The beginning of a compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// The beginning of an extended request.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// The beginning of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// The beginning of a structured reply's chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// The beginning of an extended reply's chunk.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// The longest string (names, descriptions, messages) in bytes.
pub const MAX_STRING: usize = 4096;
/// The most bytes of data that an option or the reply to one may have here. Larger ones end the connection.
pub const MAX_OPTION_DATA: u32 = 1 << 20;
/// The most bytes that one read or write may carry: what every implementation supports.
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// The most queries that one request for metadata contexts may have here.
pub const MAX_QUERIES: u32 = 1024;
/// The most extents in one chunk of block status.
pub const MAX_EXTENTS: usize = 1 << 20;
/// Zeroes at the end of an oldstyle handshake, and of `OPT_EXPORT_NAME`'s reply for clients without
/// [`ClientFlags::NO_ZEROES`].
pub const HANDSHAKE_ZEROES: usize = 124;

/// The context of holes and zeroes.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// QEMU's context of how deep in the backing chain data is.
pub const QEMU_ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
/// What the names of QEMU's contexts of dirty bitmaps begin with.
pub const QEMU_DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";

/// `base:allocation`: the extent takes no room.
pub const STATE_HOLE: u64 = 1;
/// `base:allocation`: the extent reads as zeroes.
pub const STATE_ZERO: u64 = 2;
/// `qemu:dirty-bitmap:…`: the extent is dirty.
pub const STATE_DIRTY: u64 = 1;

bitflags! {
    /// What a server says of itself first.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct HandshakeFlags: u16 {
        /// Options have replies.
        const FIXED_NEWSTYLE = 1;
        /// `OPT_EXPORT_NAME`'s reply can do without zeroes at its end.
        const NO_ZEROES = 1 << 1;
    }

    /// What a client answers to [`HandshakeFlags`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ClientFlags: u32 {
        /// Options have replies.
        const FIXED_NEWSTYLE = 1;
        /// `OPT_EXPORT_NAME`'s reply does without zeroes at its end.
        const NO_ZEROES = 1 << 1;
    }

    /// What an export is and can do.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct TransmissionFlags: u16 {
        /// The flags are valid.
        const HAS_FLAGS = 1;
        /// Writes fail.
        const READ_ONLY = 1 << 1;
        /// `CMD_FLUSH` works.
        const SEND_FLUSH = 1 << 2;
        /// [`CommandFlags::FUA`] works.
        const SEND_FUA = 1 << 3;
        /// The medium rotates.
        const ROTATIONAL = 1 << 4;
        /// `CMD_TRIM` works.
        const SEND_TRIM = 1 << 5;
        /// `CMD_WRITE_ZEROES` works.
        const SEND_WRITE_ZEROES = 1 << 6;
        /// [`CommandFlags::DF`] works.
        const SEND_DF = 1 << 7;
        /// What is flushed on one connection is visible on all.
        const CAN_MULTI_CONN = 1 << 8;
        /// An experiment: the export can be resized.
        const SEND_RESIZE = 1 << 9;
        /// `CMD_CACHE` works.
        const SEND_CACHE = 1 << 10;
        /// [`CommandFlags::FAST_ZERO`] works.
        const SEND_FAST_ZERO = 1 << 11;
        /// `CMD_BLOCK_STATUS` takes a payload that names contexts.
        const BLOCK_STATUS_PAYLOAD = 1 << 12;
        const _ = !0;
    }

    /// How a command is to be executed.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CommandFlags: u16 {
        /// Written to the medium before the reply.
        const FUA = 1;
        /// `CMD_WRITE_ZEROES` makes no hole.
        const NO_HOLE = 1 << 1;
        /// `CMD_READ` is answered in one chunk.
        const DF = 1 << 2;
        /// `CMD_BLOCK_STATUS` is answered with one extent for each context.
        const REQ_ONE = 1 << 3;
        /// `CMD_WRITE_ZEROES` fails at once if it is no faster than a write.
        const FAST_ZERO = 1 << 4;
        /// An extended request's length is a payload's.
        const PAYLOAD_LEN = 1 << 5;
        const _ = !0;
    }
}

/// Declares an enumeration of numbers, of which others may come as well.
macro_rules! numbers {
    ($(#[$doc:meta])* $name:ident: $int:ty { $($(#[$item_doc:meta])* $item:ident = $value:expr,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$item_doc])* $item,)*
            /// Another one.
            Other($int),
        }

        impl $name {
            /// The value that a number on the wire stands for.
            pub const fn from_wire(number: $int) -> Self {
                match number {
                    $(value if value == $value => Self::$item,)*
                    other => Self::Other(other),
                }
            }

            /// The number on the wire.
            pub const fn to_wire(self) -> $int {
                match self {
                    $(Self::$item => $value,)*
                    Self::Other(number) => number,
                }
            }
        }
    };
}

numbers! {
    /// Options of the handshake.
    OptionCode: u32 {
        /// Takes an export and begins transmission; errors end the connection.
        ExportName = 1,
        /// Ends the session.
        Abort = 2,
        /// Lists the exports.
        List = 3,
        /// Begins TLS.
        StartTls = 5,
        /// Describes an export.
        Info = 6,
        /// Takes an export and begins transmission.
        Go = 7,
        /// Asks for structured replies.
        StructuredReply = 8,
        /// Lists the metadata contexts of an export.
        ListMetaContext = 9,
        /// Selects metadata contexts of an export.
        SetMetaContext = 10,
        /// Asks for extended headers.
        ExtendedHeaders = 11,
    }
}

/// The bit that replies to options have which say that something is wrong.
pub const REPLY_ERROR_BIT: u32 = 1 << 31;

numbers! {
    /// Types of replies to options.
    ReplyType: u32 {
        /// Done.
        Ack = 1,
        /// An export's name and description.
        Server = 2,
        /// Something about an export.
        Info = 3,
        /// A metadata context.
        MetaContext = 4,
        /// The option is unknown.
        ErrUnsupported = REPLY_ERROR_BIT + 1,
        /// Forbidden by policy.
        ErrPolicy = REPLY_ERROR_BIT + 2,
        /// Nonsense.
        ErrInvalid = REPLY_ERROR_BIT + 3,
        /// Not on this platform.
        ErrPlatform = REPLY_ERROR_BIT + 4,
        /// TLS first.
        ErrTlsRequired = REPLY_ERROR_BIT + 5,
        /// No such export.
        ErrUnknown = REPLY_ERROR_BIT + 6,
        /// The server goes down.
        ErrShutdown = REPLY_ERROR_BIT + 7,
        /// The client must ask for the block sizes.
        ErrBlockSizeRequired = REPLY_ERROR_BIT + 8,
        /// Too large.
        ErrTooBig = REPLY_ERROR_BIT + 9,
        /// Extended headers first.
        ErrExtHeaderRequired = REPLY_ERROR_BIT + 10,
    }
}

impl ReplyType {
    /// Whether the reply says that something is wrong.
    pub const fn is_error(self) -> bool {
        self.to_wire() & REPLY_ERROR_BIT != 0
    }
}

numbers! {
    /// What `OPT_INFO` and `OPT_GO` can tell.
    InfoType: u16 {
        /// Size and flags.
        Export = 0,
        /// The canonical name.
        Name = 1,
        /// The description.
        Description = 2,
        /// Constraints of sizes.
        BlockSize = 3,
    }
}

numbers! {
    /// Commands of the transmission phase.
    Command: u16 {
        /// Reads.
        Read = 0,
        /// Writes.
        Write = 1,
        /// Ends the session; without reply.
        Disconnect = 2,
        /// What was written goes to the medium.
        Flush = 3,
        /// Data are no longer needed.
        Trim = 4,
        /// Data will be needed.
        Cache = 5,
        /// Writes zeroes.
        WriteZeroes = 6,
        /// Asks for extents of the metadata contexts.
        BlockStatus = 7,
    }
}

/// The bit that chunks have which say that something went wrong.
pub const CHUNK_ERROR_BIT: u16 = 1 << 15;

numbers! {
    /// Types of chunks of structured and extended replies.
    ChunkType: u16 {
        /// Nothing but the end.
        None = 0,
        /// Bytes at an offset.
        OffsetData = 1,
        /// Zeroes at an offset.
        OffsetHole = 2,
        /// Extents of a metadata context, of 32 bits.
        BlockStatus = 5,
        /// Extents of a metadata context, of 64 bits.
        BlockStatusExt = 6,
        /// An error.
        Error = CHUNK_ERROR_BIT + 1,
        /// An error at an offset.
        ErrorOffset = CHUNK_ERROR_BIT + 2,
    }
}

impl ChunkType {
    /// Whether the chunk says that something went wrong.
    pub const fn is_error(self) -> bool {
        self.to_wire() & CHUNK_ERROR_BIT != 0
    }
}

/// The flag of a reply's last chunk.
pub const REPLY_FLAG_DONE: u16 = 1;

numbers! {
    /// Errors of commands.
    ErrorCode: u32 {
        /// No error.
        Success = 0,
        /// Operation not permitted.
        Perm = 1,
        /// Input/output error.
        Io = 5,
        /// Cannot allocate memory.
        NoMem = 12,
        /// Invalid argument.
        Inval = 22,
        /// No space left on device.
        NoSpc = 28,
        /// Value too large.
        Overflow = 75,
        /// Operation not supported.
        NotSup = 95,
        /// The server goes down.
        Shutdown = 108,
    }
}

impl ErrorCode {
    /// The code for a Linux `errno`. What the protocol has no code for is [`ErrorCode::Inval`], as QEMU has it.
    pub const fn from_errno(errno: i32) -> Self {
        match errno {
            0 => Self::Success,
            // EPERM, EACCES, EROFS
            1 | 13 | 30 => Self::Perm,
            5 => Self::Io,
            12 => Self::NoMem,
            // ENOSPC, EDQUOT, EFBIG
            28 | 122 | 27 => Self::NoSpc,
            75 => Self::Overflow,
            95 => Self::NotSup,
            108 => Self::Shutdown,
            _ => Self::Inval,
        }
    }

    /// The Linux `errno` for a code. Codes that the protocol does not know are `EINVAL`.
    pub const fn errno(self) -> i32 {
        match self {
            Self::Other(_) => 22,
            known => known.to_wire() as i32,
        }
    }
}
