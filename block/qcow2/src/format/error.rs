//! What can be wrong with an image.

use rustix::io::Errno;
use thiserror::Error;

/// A contiguous table that a header or snapshot points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// The active L1 table.
    ActiveL1,
    /// A snapshot's L1 table.
    SnapshotL1,
    /// The refcount table.
    Refcount,
    /// The snapshot table.
    Snapshots,
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::ActiveL1 => "Active L1 table",
            Self::SnapshotL1 => "Snapshot L1 table",
            Self::Refcount => "Reference count table",
            Self::Snapshots => "Snapshot table",
        })
    }
}

/// Why bytes are no valid part of an image. The texts are those of QEMU where it has one, for scripts that look at
/// them.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs)] // each says it in its message
pub enum Qcow2Error {
    #[error("Image is not in qcow2 format")]
    NotQcow2,
    #[error("Unsupported qcow2 version {0}")]
    Version(u32),
    #[error("Unsupported cluster size: 2^{0}")]
    ClusterBits(u32),
    #[error("qcow2 header too short")]
    HeaderTooShort,
    #[error("qcow2 header exceeds cluster size")]
    HeaderTooLong,
    #[error("Could not read qcow2 header: the file ends within it")]
    HeaderCut,
    #[error("Invalid backing file offset")]
    BackingOffset,
    #[error("Backing file name too long")]
    BackingNameTooLong,
    #[error("qcow2: unknown compression type: {0}")]
    CompressionType(u8),
    #[error("qcow2: Compression type incompatible feature bit must not be set")]
    CompressionBitSet,
    #[error("qcow2: Compression type incompatible feature bit must be set")]
    CompressionBitUnset,
    #[error("Unsupported qcow2 feature(s): {0}")]
    UnknownFeatures(String),
    #[error("qcow2: Image is corrupt; cannot be opened read/write")]
    Corrupt,
    #[error("Unsupported subcluster size: {0}")]
    SubclusterSize(u32),
    #[error("Reference count entry width too large; may not exceed 64 bits")]
    RefcountOrder(u32),
    #[error("Image does not contain a reference count table")]
    NoRefcountTable,
    #[error("{0} too large")]
    TableTooLarge(Table),
    #[error("{0} offset invalid")]
    TableOffset(Table),
    #[error("Image is too big")]
    TooBig,
    #[error("L1 table is too small")]
    L1TooSmall,
    #[error("Unsupported encryption method {0}")]
    CryptMethod(u32),
    #[error("Header extension too large")]
    ExtensionTooLarge,
    #[error("ERROR: ext_backing_format: len={0} too large (>=16)")]
    BackingFormatTooLong(u32),
    #[error("CRYPTO header extension only expected with LUKS encryption method")]
    UnexpectedCryptoHeader,
    #[error("CRYPTO header extension size {0}, but expected size 16")]
    CryptoHeaderLength(u32),
    #[error("Encryption header offset '{offset}' is not a multiple of cluster size '{cluster_size}'")]
    CryptoHeaderOffset { offset: u64, cluster_size: u64 },
    #[error("bitmaps_ext: Invalid extension length")]
    BitmapsLength,
    #[error("bitmaps_ext: Reserved field is not zero")]
    BitmapsReserved,
    #[error("bitmaps_ext: Image has {0} bitmaps, exceeding the QEMU supported maximum of 65535")]
    TooManyBitmaps(u32),
    #[error("found bitmaps extension with zero bitmaps")]
    NoBitmaps,
    #[error("bitmaps_ext: invalid bitmap directory offset")]
    BitmapDirectoryOffset,
    #[error("bitmaps_ext: bitmap directory size ({0}) exceeds the maximum supported size (67107840)")]
    BitmapDirectorySize(u64),
    #[error("Invalid bitmap directory: {0}")]
    BitmapDirectory(String),
    #[error("Invalid bitmap table entry {index}: {value:#x}")]
    BitmapTableEntry { index: u64, value: u64 },
    #[error("Header extensions and backing file name do not fit into the first cluster")]
    HeaderFull,
    #[error("Snapshot table is too large")]
    SnapshotTableTooLarge,
    #[error("Snapshot table is cut off in entry {0}")]
    SnapshotTableCut(u32),
    #[error("Too much extra metadata in snapshot table entry {0}")]
    SnapshotExtraData(u32),
    #[error("Reference count block is too short")]
    RefcountBlockCut,
    #[error("Reference count {value} does not fit into {bits} bits")]
    RefcountOverflow { value: u64, bits: u32 },
}

impl Qcow2Error {
    /// The error number that callers without interest in the reason see.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Version(_) | Self::CompressionType(_) | Self::UnknownFeatures(_) => Errno::NOTSUP,
            Self::Corrupt => Errno::ACCESS,
            Self::TableTooLarge(_) | Self::TooBig | Self::SnapshotTableTooLarge => Errno::FBIG,
            Self::HeaderFull => Errno::NOSPC,
            Self::RefcountOverflow { .. } => Errno::RANGE,
            _ => Errno::INVAL,
        }
    }
}

impl From<Qcow2Error> for block_graph::Error {
    fn from(error: Qcow2Error) -> Self {
        Self::of(block_graph::Errno::new(error.errno().raw_os_error()), error)
    }
}
