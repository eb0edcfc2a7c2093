//! The header: the first bytes of the first cluster (section "Header").

use super::bytes::{u32_at, u64_at};
use super::feature_name::FeatureName;
use super::{
    Geometry, MAX_BACKING_NAME, MAX_CLUSTER_BITS, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, MAX_SNAPSHOTS,
    MIN_CLUSTER_BITS, Qcow2Error, Table,
};
use bitflags::bitflags;

/// The first four bytes: "QFI" and 0xfb.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of a header of version 2.
pub const LENGTH_V2: usize = 72;
/// The fewest bytes of a header of version 3.
pub const MIN_LENGTH_V3: usize = 104;
/// Bytes of the header of version 3 that this implementation knows: through the padding after the compression type.
pub const LENGTH_V3: usize = 112;
/// The size of a snapshot table's entry without its variable parts.
const SNAPSHOT_ENTRY: u64 = 40;

bitflags! {
    /// Features that a program must know to open an image.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Incompatible: u64 {
        /// Refcounts may be wrong; check before use.
        const DIRTY = 1;
        /// Something in the image is wrong; it must not be written to.
        const CORRUPT = 1 << 1;
        /// Guest data is in another file.
        const DATA_FILE = 1 << 2;
        /// Compressed clusters are not zlib's.
        const COMPRESSION = 1 << 3;
        /// L2 entries have 128 bits.
        const EXTENDED_L2 = 1 << 4;
        /// The bits of unknown features are kept.
        const _ = !0;
    }

    /// Features that a program may ignore.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Compatible: u64 {
        /// Refcounts may be updated late, with the dirty bit set meanwhile.
        const LAZY_REFCOUNTS = 1;
        /// The bits of unknown features are kept.
        const _ = !0;
    }

    /// Features that a program that does not know them must clear before it writes.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Autoclear: u64 {
        /// The bitmaps extension is consistent.
        const BITMAPS = 1;
        /// The external data file is a raw image by itself.
        const DATA_FILE_RAW = 1 << 1;
        /// The bits of unknown features are kept.
        const _ = !0;
    }
}

impl Incompatible {
    /// What this implementation knows.
    pub const KNOWN: Self = Self::DIRTY
        .union(Self::CORRUPT)
        .union(Self::DATA_FILE)
        .union(Self::COMPRESSION)
        .union(Self::EXTENDED_L2);
}

impl Autoclear {
    /// What this implementation knows.
    pub const KNOWN: Self = Self::BITMAPS.union(Self::DATA_FILE_RAW);
}

/// How guest data is encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CryptMethod {
    /// It is not.
    #[default]
    None,
    /// AES-128-CBC with the password as key (legacy).
    Aes,
    /// By a LUKS header in the image.
    Luks,
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate with a window of 4 KiB.
    #[default]
    Zlib,
    /// A zstd frame.
    Zstd,
}

impl Compression {
    /// The name that options use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

/// The header's fields. Offsets and sizes are in bytes unless they say otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Where the backing file's name is; 0 for none.
    pub backing_name_offset: u64,
    /// Length of the backing file's name.
    pub backing_name_length: u32,
    /// Base-2 logarithm of a cluster's size.
    pub cluster_bits: u32,
    /// The virtual disk's size.
    pub size: u64,
    /// How data is encrypted.
    pub crypt_method: CryptMethod,
    /// Entries of the active L1 table.
    pub l1_entries: u32,
    /// Where the active L1 table is.
    pub l1_offset: u64,
    /// Where the refcount table is.
    pub refcount_table_offset: u64,
    /// Clusters that the refcount table takes.
    pub refcount_table_clusters: u32,
    /// Entries of the snapshot table.
    pub snapshots: u32,
    /// Where the snapshot table is.
    pub snapshots_offset: u64,
    /// Incompatible features.
    pub incompatible: Incompatible,
    /// Compatible features.
    pub compatible: Compatible,
    /// Autoclear features.
    pub autoclear: Autoclear,
    /// Base-2 logarithm of a refcount's bits.
    pub refcount_order: u32,
    /// How long the header is in the file: header extensions follow it.
    pub header_length: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// What the header has behind [`LENGTH_V3`] bytes: preserved.
    pub unknown_fields: Vec<u8>,
}

impl Header {
    /// Whether bytes at the beginning of a file look like an image of any version of this format.
    pub fn probe(head: &[u8]) -> bool {
        head.len() >= LENGTH_V3 - 8 && head[..4] == MAGIC && u32_at(head, 4) >= 2
    }

    /// Reads a header from a file's first bytes, which must go through the header's end: the first cluster, or the file
    /// if it is shorter.
    ///
    /// What depends on extensions or on how the image is opened is not checked: see [`Header::check_features`] and
    /// [`Header::check_tables`].
    ///
    /// # Errors
    /// Everything that is out of bounds by itself.
    pub fn parse(bytes: &[u8]) -> Result<Self, Qcow2Error> {
        if bytes.len() < 8 || bytes[..4] != MAGIC {
            return Err(Qcow2Error::NotQcow2);
        }
        let version = u32_at(bytes, 4);
        if !(2..=3).contains(&version) {
            return Err(Qcow2Error::Version(version));
        }
        if bytes.len() < if version == 2 { LENGTH_V2 } else { MIN_LENGTH_V3 } {
            return Err(Qcow2Error::HeaderCut);
        }
        let cluster_bits = u32_at(bytes, 20);
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return Err(Qcow2Error::ClusterBits(cluster_bits));
        }
        let cluster_size = 1u64 << cluster_bits;
        let mut header = Self {
            version,
            backing_name_offset: u64_at(bytes, 8),
            backing_name_length: u32_at(bytes, 16),
            cluster_bits,
            size: u64_at(bytes, 24),
            crypt_method: CryptMethod::None,
            l1_entries: u32_at(bytes, 36),
            l1_offset: u64_at(bytes, 40),
            refcount_table_offset: u64_at(bytes, 48),
            refcount_table_clusters: u32_at(bytes, 56),
            snapshots: u32_at(bytes, 60),
            snapshots_offset: u64_at(bytes, 64),
            incompatible: Incompatible::empty(),
            compatible: Compatible::empty(),
            autoclear: Autoclear::empty(),
            refcount_order: 4,
            header_length: LENGTH_V2 as u32,
            compression: Compression::Zlib,
            unknown_fields: Vec::new(),
        };
        let mut compression = 0;
        if version == 3 {
            compression = header.parse_v3(bytes, cluster_size)?;
        }
        if header.backing_name_offset > cluster_size {
            return Err(Qcow2Error::BackingOffset);
        }
        header.set_compression(compression)?;
        header.crypt_method = match u32_at(bytes, 32) {
            0 => CryptMethod::None,
            1 => CryptMethod::Aes,
            2 => CryptMethod::Luks,
            other if header.incompatible.difference(Incompatible::KNOWN).is_empty() => {
                return Err(Qcow2Error::CryptMethod(other));
            }
            // The unknown feature is the better reason, and refuses the image anyway.
            _ => CryptMethod::None,
        };
        Ok(header)
    }

    /// The fields that version 3 added; returns the compression type's number.
    fn parse_v3(&mut self, bytes: &[u8], cluster_size: u64) -> Result<u8, Qcow2Error> {
        self.incompatible = Incompatible::from_bits_retain(u64_at(bytes, 72));
        self.compatible = Compatible::from_bits_retain(u64_at(bytes, 80));
        self.autoclear = Autoclear::from_bits_retain(u64_at(bytes, 88));
        self.refcount_order = u32_at(bytes, 96);
        self.header_length = u32_at(bytes, 100);
        if (self.header_length as usize) < MIN_LENGTH_V3 {
            return Err(Qcow2Error::HeaderTooShort);
        }
        if u64::from(self.header_length) > cluster_size {
            return Err(Qcow2Error::HeaderTooLong);
        }
        let length = self.header_length as usize;
        if bytes.len() < length {
            return Err(Qcow2Error::HeaderCut);
        }
        if length > LENGTH_V3 {
            self.unknown_fields = bytes[LENGTH_V3..length].to_vec();
        }
        Ok(if length > MIN_LENGTH_V3 { bytes[MIN_LENGTH_V3] } else { 0 })
    }

    fn set_compression(&mut self, number: u8) -> Result<(), Qcow2Error> {
        self.compression = match number {
            0 => Compression::Zlib,
            1 => Compression::Zstd,
            other => return Err(Qcow2Error::CompressionType(other)),
        };
        match (self.compression, self.incompatible.contains(Incompatible::COMPRESSION)) {
            (Compression::Zlib, true) => Err(Qcow2Error::CompressionBitSet),
            (Compression::Zstd, false) => Err(Qcow2Error::CompressionBitUnset),
            _ => Ok(()),
        }
    }

    /// Refuses features that are unknown, by the names that the image gives them.
    ///
    /// # Errors
    /// [`Qcow2Error::UnknownFeatures`], [`Qcow2Error::SubclusterSize`], [`Qcow2Error::RefcountOrder`].
    pub fn check_features(&self, names: &[FeatureName]) -> Result<(), Qcow2Error> {
        let mut unknown = self.incompatible.difference(Incompatible::KNOWN).bits();
        if unknown != 0 {
            let mut features = Vec::new();
            for name in names.iter().filter(|name| name.kind == 0 && name.bit < 64) {
                if unknown & (1 << name.bit) != 0 {
                    features.push(name.text());
                    unknown &= !(1 << name.bit);
                }
            }
            if unknown != 0 {
                features.push(format!("Unknown incompatible feature: {unknown:x}"));
            }
            return Err(Qcow2Error::UnknownFeatures(features.join(", ")));
        }
        let geometry = self.geometry();
        if geometry.extended_l2 && geometry.cluster_bits < MIN_CLUSTER_BITS + 5 {
            return Err(Qcow2Error::SubclusterSize(1 << (geometry.cluster_bits - 5)));
        }
        if self.refcount_order > 6 {
            return Err(Qcow2Error::RefcountOrder(self.refcount_order));
        }
        Ok(())
    }

    /// Checks the places and sizes of the tables that the header names, so that reading them takes bounded memory.
    /// `repairing` leaves out what a repair mends: a missing refcount table, and the snapshot table.
    ///
    /// # Errors
    /// The first table that is out of bounds.
    pub fn check_tables(&self, repairing: bool) -> Result<(), Qcow2Error> {
        let geometry = self.geometry();
        if self.refcount_table_clusters == 0 && !repairing {
            return Err(Qcow2Error::NoRefcountTable);
        }
        geometry.check_table(
            Table::Refcount,
            self.refcount_table_offset,
            self.refcount_table_clusters.into(),
            geometry.cluster_size(),
            MAX_REFCOUNT_TABLE_BYTES,
        )?;
        if !repairing {
            geometry.check_table(
                Table::Snapshots,
                self.snapshots_offset,
                self.snapshots.into(),
                SNAPSHOT_ENTRY,
                SNAPSHOT_ENTRY * u64::from(MAX_SNAPSHOTS),
            )?;
        }
        geometry.check_table(Table::ActiveL1, self.l1_offset, self.l1_entries.into(), 8, MAX_L1_BYTES)?;
        let needed = geometry.l1_entries_for(self.size);
        if needed > i32::MAX as u64 {
            return Err(Qcow2Error::TooBig);
        }
        if u64::from(self.l1_entries) < needed {
            return Err(Qcow2Error::L1TooSmall);
        }
        Ok(())
    }

    /// The backing file's name in the first cluster's bytes, if there is one.
    ///
    /// # Errors
    /// [`Qcow2Error::BackingNameTooLong`] if it is longer than the format allows or goes past the cluster or the bytes.
    pub fn backing_name<'a>(&self, cluster: &'a [u8]) -> Result<Option<&'a [u8]>, Qcow2Error> {
        if self.backing_name_offset == 0 {
            return Ok(None);
        }
        let length = self.backing_name_length as usize;
        let start = self.backing_name_offset;
        if length > MAX_BACKING_NAME || start + length as u64 > 1 << self.cluster_bits {
            return Err(Qcow2Error::BackingNameTooLong);
        }
        let start = start as usize;
        cluster.get(start..start + length).map(Some).ok_or(Qcow2Error::BackingNameTooLong)
    }

    /// Where header extensions end at the latest.
    pub fn extensions_end(&self) -> u64 {
        if self.backing_name_offset != 0 { self.backing_name_offset } else { 1 << self.cluster_bits }
    }

    /// The sizes that follow from this header. Only meaningful after [`Header::check_features`].
    pub fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            extended_l2: self.incompatible.contains(Incompatible::EXTENDED_L2),
            data_file: self.incompatible.contains(Incompatible::DATA_FILE),
        }
    }

    /// The header's length when this implementation writes it.
    pub fn encoded_length(&self) -> usize {
        if self.version == 2 { LENGTH_V2 } else { LENGTH_V3 + self.unknown_fields.len() }
    }

    /// The header's bytes: [`Header::encoded_length`] of them. `header_length` is taken from that, not from the field.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.encoded_length());
        bytes.extend(MAGIC);
        bytes.extend(self.version.to_be_bytes());
        bytes.extend(self.backing_name_offset.to_be_bytes());
        bytes.extend(self.backing_name_length.to_be_bytes());
        bytes.extend(self.cluster_bits.to_be_bytes());
        bytes.extend(self.size.to_be_bytes());
        let crypt_method: u32 = match self.crypt_method {
            CryptMethod::None => 0,
            CryptMethod::Aes => 1,
            CryptMethod::Luks => 2,
        };
        bytes.extend(crypt_method.to_be_bytes());
        bytes.extend(self.l1_entries.to_be_bytes());
        bytes.extend(self.l1_offset.to_be_bytes());
        bytes.extend(self.refcount_table_offset.to_be_bytes());
        bytes.extend(self.refcount_table_clusters.to_be_bytes());
        bytes.extend(self.snapshots.to_be_bytes());
        bytes.extend(self.snapshots_offset.to_be_bytes());
        if self.version > 2 {
            bytes.extend(self.incompatible.bits().to_be_bytes());
            bytes.extend(self.compatible.bits().to_be_bytes());
            bytes.extend(self.autoclear.bits().to_be_bytes());
            bytes.extend(self.refcount_order.to_be_bytes());
            bytes.extend((self.encoded_length() as u32).to_be_bytes());
            let compression: u64 = match self.compression {
                Compression::Zlib => 0,
                Compression::Zstd => 1,
            };
            bytes.extend((compression << 56).to_be_bytes());
            bytes.extend(&self.unknown_fields);
        }
        bytes
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(in crate::format) fn header() -> impl Strategy<Value = Header> {
        let places = (any::<u64>(), any::<u32>(), any::<u64>(), any::<u64>(), any::<u32>(), any::<u64>());
        let rest = (9u32..=21, any::<u64>(), 0u64..32, any::<u64>(), any::<u64>(), 0u32..=6, 0usize..10);
        (any::<bool>(), places, rest, 0u32..3).prop_map(|(v3, places, rest, crypt)| {
            let incompatible =
                if v3 { Incompatible::from_bits_retain(rest.2) } else { Incompatible::empty() };
            let zstd = incompatible.contains(Incompatible::COMPRESSION);
            Header {
                version: if v3 { 3 } else { 2 },
                backing_name_offset: 0,
                backing_name_length: 0,
                cluster_bits: rest.0,
                size: rest.1,
                crypt_method: [CryptMethod::None, CryptMethod::Aes, CryptMethod::Luks][crypt as usize],
                l1_entries: places.1,
                l1_offset: places.0,
                refcount_table_offset: places.2,
                refcount_table_clusters: places.4,
                snapshots: places.1,
                snapshots_offset: places.5,
                incompatible,
                compatible: Compatible::from_bits_retain(if v3 { rest.3 } else { 0 }),
                autoclear: Autoclear::from_bits_retain(if v3 { rest.4 } else { 0 }),
                refcount_order: if v3 { rest.5 } else { 4 },
                header_length: if v3 { 112 + rest.6 as u32 * 8 } else { 72 },
                compression: if zstd { Compression::Zstd } else { Compression::Zlib },
                unknown_fields: vec![0x5a; if v3 { rest.6 * 8 } else { 0 }],
            }
        })
    }

    fn minimal() -> Vec<u8> {
        let mut bytes = vec![0; 512];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[7] = 3;
        bytes[23] = 9;
        bytes[103] = 104;
        bytes
    }

    proptest! {
        #[test]
        fn headers_survive_a_round_trip(header in header()) {
            prop_assert_eq!(Header::parse(&header.encode()).unwrap(), header);
        }

        #[test]
        fn any_bytes_parse_or_are_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), version in 2u8..4) {
            if bytes.len() >= 24 {
                bytes[..8].copy_from_slice(&[b'Q', b'F', b'I', 0xfb, 0, 0, 0, version]);
                let bits = 9 + bytes[23] % 13;
                bytes[20..24].copy_from_slice(&[0, 0, 0, bits]);
            }
            if let Ok(header) = Header::parse(&bytes) {
                let _ = header.backing_name(&bytes);
                if header.check_features(&[]).is_ok() && header.check_tables(false).is_ok() {
                    prop_assert!(u64::from(header.l1_entries) * 8 <= MAX_L1_BYTES);
                    prop_assert!(header.geometry().l1_entries_for(header.size) <= header.l1_entries.into());
                }
            }
        }
    }

    #[test]
    fn each_bound_has_its_error() {
        let parse = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = minimal();
            change(&mut bytes);
            Header::parse(&bytes)
        };
        assert!(parse(&|_| ()).is_ok());
        assert_eq!(parse(&|b| b[0] = 0).unwrap_err(), Qcow2Error::NotQcow2);
        assert_eq!(parse(&|b| b[7] = 4).unwrap_err(), Qcow2Error::Version(4));
        assert_eq!(parse(&|b| b[23] = 8).unwrap_err(), Qcow2Error::ClusterBits(8));
        assert_eq!(parse(&|b| b[23] = 22).unwrap_err(), Qcow2Error::ClusterBits(22));
        assert_eq!(parse(&|b| b[103] = 96).unwrap_err(), Qcow2Error::HeaderTooShort);
        assert_eq!(parse(&|b| b[102] = 3).unwrap_err(), Qcow2Error::HeaderTooLong);
        assert_eq!(parse(&|b| b.truncate(100)).unwrap_err(), Qcow2Error::HeaderCut);
        assert_eq!(parse(&|b| b[14] = 3).unwrap_err(), Qcow2Error::BackingOffset);
        assert_eq!(parse(&|b| b[35] = 3).unwrap_err(), Qcow2Error::CryptMethod(3));
        assert_eq!(parse(&|b| b[79] = 8).unwrap_err(), Qcow2Error::CompressionBitSet);
        let zstd = |b: &mut Vec<u8>| (b[103], b[104]) = (112, 1);
        assert_eq!(parse(&zstd).unwrap_err(), Qcow2Error::CompressionBitUnset);
        assert_eq!(parse(&|b| (b[103], b[104]) = (112, 2)).unwrap_err(), Qcow2Error::CompressionType(2));
    }

    #[test]
    fn unknown_features_are_named_as_the_image_names_them() {
        let mut bytes = minimal();
        bytes[78] = 3; // bits 8 and 9
        let header = Header::parse(&bytes).unwrap();
        let names = [FeatureName::new(0, 8, "flying saucers"), FeatureName::new(1, 9, "no matter")];
        assert_eq!(
            header.check_features(&names).unwrap_err().to_string(),
            "Unsupported qcow2 feature(s): flying saucers, Unknown incompatible feature: 200"
        );
    }

    #[test]
    fn tables_are_bounded() {
        let mut header = Header::parse(&minimal()).unwrap();
        assert_eq!(header.check_tables(false), Err(Qcow2Error::NoRefcountTable));
        assert_eq!(header.check_tables(true), Ok(()));
        header.refcount_table_clusters = 1;
        assert_eq!(header.check_tables(false), Ok(()));
        header.size = u64::MAX;
        assert_eq!(header.check_tables(false), Err(Qcow2Error::TooBig));
        header.size = 1 << 30;
        assert_eq!(header.check_tables(false), Err(Qcow2Error::L1TooSmall));
        header.l1_entries = u32::MAX;
        assert_eq!(header.check_tables(false), Err(Qcow2Error::TableTooLarge(Table::ActiveL1)));
        header.l1_entries = 1 << 20;
        header.l1_offset = !511;
        assert_eq!(header.check_tables(false), Err(Qcow2Error::TableOffset(Table::ActiveL1)));
        header.refcount_table_clusters = u32::MAX;
        assert_eq!(header.check_tables(false), Err(Qcow2Error::TableTooLarge(Table::Refcount)));
    }
}
