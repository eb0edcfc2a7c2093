//! The bitmap directory and bitmap tables (section "Bitmaps").

use super::bytes::{u16_at, u32_at, u64_at};
use super::{Geometry, MAX_BITMAP_DIRECTORY_BYTES, Qcow2Error};
use bitflags::bitflags;

/// Bytes of a directory entry before its variable parts.
const ENTRY_BYTES: usize = 24;
/// The type of dirty tracking bitmaps.
pub const DIRTY_TRACKING: u8 = 1;
/// The smallest granularity, as a base-2 logarithm of bytes.
pub const MIN_GRANULARITY_BITS: u8 = 9;
/// The largest granularity, as a base-2 logarithm of bytes.
pub const MAX_GRANULARITY_BITS: u8 = 31;
/// The longest name, in bytes.
pub const MAX_NAME: usize = 1023;
/// The most entries of a bitmap table.
pub const MAX_TABLE_ENTRIES: u32 = 0x800_0000;
/// The largest bitmap, in bytes of its data.
pub const MAX_BITMAP_BYTES: u64 = 0x2000_0000;
/// The bits of a bitmap table's entry that are an offset.
const TABLE_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

bitflags! {
    /// Flags of a bitmap.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct BitmapFlags: u32 {
        /// The bitmap was not saved: it may be inconsistent.
        const IN_USE = 1;
        /// The bitmap is enabled.
        const AUTO = 1 << 1;
        /// Unknown extra data may be ignored.
        const EXTRA_DATA_COMPATIBLE = 1 << 2;
    }
}

/// An entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapEntry {
    /// Where the bitmap table is.
    pub table_offset: u64,
    /// Entries of the bitmap table.
    pub table_entries: u32,
    /// Its flags.
    pub flags: BitmapFlags,
    /// Base-2 logarithm of the bytes of the disk that a bit stands for.
    pub granularity_bits: u8,
    /// Its name.
    pub name: String,
}

impl BitmapEntry {
    /// Bytes that the entry takes, padding included.
    pub fn encoded_length(&self) -> usize {
        (ENTRY_BYTES + self.name.len()).next_multiple_of(8)
    }

    /// Bytes of the data of a bitmap of `granularity_bits` over a disk of `size` bytes.
    pub fn data_bytes(granularity_bits: u8, size: u64) -> u64 {
        size.div_ceil(1 << granularity_bits).div_ceil(8)
    }

    /// Checks what depends on the image: the table's place, and that its length is that of the disk's bitmap, unless
    /// the flags say that the bitmap is not to be trusted.
    ///
    /// # Errors
    /// [`Qcow2Error::BitmapDirectory`].
    pub fn check(&self, geometry: &Geometry, size: u64) -> Result<(), Qcow2Error> {
        let table_bytes = u64::from(self.table_entries) * 8;
        let data = u64::from(self.table_entries) << geometry.cluster_bits;
        let placed = self.table_offset != 0
            && geometry.in_cluster(self.table_offset) == 0
            && self.table_offset < i64::MAX as u64 - table_bytes;
        let sized = self.table_entries != 0
            && self.table_entries <= MAX_TABLE_ENTRIES
            && data <= MAX_BITMAP_BYTES.max(geometry.cluster_size());
        let fits = self.flags.contains(BitmapFlags::IN_USE)
            || u64::from(self.table_entries)
                == geometry.clusters(Self::data_bytes(self.granularity_bits, size));
        if placed && sized && fits {
            return Ok(());
        }
        Err(Qcow2Error::BitmapDirectory(format!("bitmap '{}' doesn't satisfy the constraints", self.name)))
    }
}

/// Reads a bitmap directory of `count` entries.
///
/// # Errors
/// [`Qcow2Error::BitmapDirectory`] with what is wrong.
pub fn parse_directory(bytes: &[u8], count: u32) -> Result<Vec<BitmapEntry>, Qcow2Error> {
    let wrong = |what: &str| Err(Qcow2Error::BitmapDirectory(what.into()));
    if bytes.len() as u64 > MAX_BITMAP_DIRECTORY_BYTES {
        return wrong("too large");
    }
    let mut entries: Vec<BitmapEntry> = Vec::new();
    let mut names = std::collections::HashSet::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        if entries.len() as u64 == u64::from(count) {
            return wrong("more bitmaps than specified in header extension");
        }
        if rest.len() < ENTRY_BYTES {
            return wrong("broken bitmap directory");
        }
        let (name_length, extra) = (usize::from(u16_at(rest, 18)), u32_at(rest, 20) as usize);
        let length = (ENTRY_BYTES + extra + name_length).next_multiple_of(8);
        if length > rest.len() {
            return wrong("broken bitmap directory");
        }
        if extra != 0 {
            return wrong("bitmap extra data is not supported");
        }
        let (flags, granularity_bits) = (u32_at(rest, 12), rest[17]);
        let name = std::str::from_utf8(&rest[ENTRY_BYTES..ENTRY_BYTES + name_length]);
        let (Some(flags), Ok(name)) = (BitmapFlags::from_bits(flags), name) else {
            return wrong("invalid flags or name");
        };
        let in_bounds = name_length != 0
            && name_length <= MAX_NAME
            && rest[16] == DIRTY_TRACKING
            && (MIN_GRANULARITY_BITS..=MAX_GRANULARITY_BITS).contains(&granularity_bits);
        if !in_bounds {
            return wrong(&format!("bitmap '{name}' doesn't satisfy the constraints"));
        }
        if !names.insert(name) {
            return wrong(&format!("bitmap '{name}' is there twice"));
        }
        entries.push(BitmapEntry {
            table_offset: u64_at(rest, 0),
            table_entries: u32_at(rest, 8),
            flags,
            granularity_bits,
            name: name.into(),
        });
        rest = &rest[length..];
    }
    if entries.len() as u64 != u64::from(count) {
        return wrong("less bitmaps than specified in header extension");
    }
    Ok(entries)
}

/// The bytes of a bitmap directory.
///
/// # Errors
/// [`Qcow2Error::BitmapDirectory`] if it or a name is too long.
pub fn encode_directory(entries: &[BitmapEntry]) -> Result<Vec<u8>, Qcow2Error> {
    let mut bytes = Vec::new();
    for entry in entries {
        if entry.name.is_empty() || entry.name.len() > MAX_NAME {
            return Err(Qcow2Error::BitmapDirectory("a name is empty or too long".into()));
        }
        bytes.extend(entry.table_offset.to_be_bytes());
        bytes.extend(entry.table_entries.to_be_bytes());
        bytes.extend(entry.flags.bits().to_be_bytes());
        bytes.extend([DIRTY_TRACKING, entry.granularity_bits]);
        bytes.extend((entry.name.len() as u16).to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(entry.name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        if bytes.len() as u64 > MAX_BITMAP_DIRECTORY_BYTES {
            return Err(Qcow2Error::BitmapDirectory("too large".into()));
        }
    }
    Ok(bytes)
}

/// An entry of a bitmap table: a cluster of a bitmap's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapCluster {
    /// All bits are zero.
    Zeros,
    /// All bits are one.
    Ones,
    /// The bits are in the cluster at this offset.
    At(u64),
}

impl BitmapCluster {
    /// Reads a bitmap table.
    ///
    /// # Errors
    /// [`Qcow2Error::BitmapTableEntry`] for the first entry with reserved bits, or an offset that is no cluster's.
    pub fn parse_table(bytes: &[u8], geometry: &Geometry) -> Result<Vec<Self>, Qcow2Error> {
        let entries = bytes.chunks_exact(8).map(|chunk| u64_at(chunk, 0)).enumerate();
        entries
            .map(|(index, value)| match value & TABLE_OFFSET_MASK {
                0 if value == 0 => Ok(Self::Zeros),
                0 if value == 1 => Ok(Self::Ones),
                offset if offset == value && geometry.in_cluster(offset) == 0 => Ok(Self::At(offset)),
                _ => Err(Qcow2Error::BitmapTableEntry { index: index as u64, value }),
            })
            .collect()
    }

    /// The bytes of a bitmap table.
    pub fn encode_table(table: &[Self]) -> Vec<u8> {
        let entries = table.iter().flat_map(|entry| {
            let value = match entry {
                Self::Zeros => 0,
                Self::Ones => 1,
                Self::At(offset) => offset & TABLE_OFFSET_MASK,
            };
            value.to_be_bytes()
        });
        entries.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry() -> impl Strategy<Value = BitmapEntry> {
        (any::<u64>(), any::<u32>(), 0u32..8, 9u8..=31, "[a-z]{1,40}").prop_map(
            |(table_offset, table_entries, flags, granularity_bits, name)| BitmapEntry {
                table_offset,
                table_entries,
                flags: BitmapFlags::from_bits_truncate(flags),
                granularity_bits,
                name,
            },
        )
    }

    proptest! {
        #[test]
        fn directories_survive_a_round_trip(mut entries in proptest::collection::vec(entry(), 0..6)) {
            for (index, entry) in entries.iter_mut().enumerate() {
                entry.name.push_str(&index.to_string());
            }
            let bytes = encode_directory(&entries).unwrap();
            prop_assert_eq!(bytes.len(), entries.iter().map(BitmapEntry::encoded_length).sum::<usize>());
            prop_assert_eq!(parse_directory(&bytes, entries.len() as u32).unwrap(), entries);
        }

        #[test]
        fn any_bytes_parse_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), count in 0u32..4) {
            let _ = parse_directory(&bytes, count);
            let geometry = Geometry { cluster_bits: 9, refcount_order: 4, extended_l2: false, data_file: false };
            if let Ok(table) = BitmapCluster::parse_table(&bytes, &geometry) {
                prop_assert_eq!(&BitmapCluster::encode_table(&table)[..], &bytes[..bytes.len() / 8 * 8]);
            }
        }
    }

    #[test]
    fn a_bitmap_must_be_as_long_as_the_disk_wants() {
        let geometry = Geometry { cluster_bits: 16, refcount_order: 4, extended_l2: false, data_file: false };
        let entry = BitmapEntry {
            table_offset: 0x10000,
            table_entries: 1,
            flags: BitmapFlags::AUTO,
            granularity_bits: 16,
            name: "b".into(),
        };
        assert_eq!(entry.check(&geometry, 1 << 30), Ok(()));
        assert!(entry.check(&geometry, 1 << 40).is_err());
        assert_eq!(
            BitmapEntry { flags: BitmapFlags::IN_USE, ..entry.clone() }.check(&geometry, 1 << 40),
            Ok(())
        );
        assert!(BitmapEntry { table_offset: 512, ..entry.clone() }.check(&geometry, 1 << 30).is_err());
        assert!(
            BitmapEntry { table_entries: u32::MAX, flags: BitmapFlags::IN_USE, ..entry }
                .check(&geometry, 1 << 30)
                .is_err()
        );
    }

    #[test]
    fn names_are_unique() {
        let entry = BitmapEntry {
            table_offset: 0,
            table_entries: 1,
            flags: BitmapFlags::empty(),
            granularity_bits: 16,
            name: "b".into(),
        };
        let bytes = encode_directory(&[entry.clone(), entry]).unwrap();
        assert_eq!(
            parse_directory(&bytes, 2).unwrap_err().to_string(),
            "Invalid bitmap directory: bitmap 'b' is there twice"
        );
    }
}
