//! Entries of L1, L2 and refcount tables (sections "Cluster mapping", "Extended L2 Entries", "Host cluster
//! management").

use super::Geometry;
use super::bytes::u64_at;

/// The bits of an L1 entry that are the L2 table's offset.
pub const L1_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The bits of an L2 entry of a standard cluster that are its host offset.
pub const L2_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The bits of a refcount table's entry that are the refcount block's offset.
pub const REFCOUNT_TABLE_OFFSET_MASK: u64 = 0xffff_ffff_ffff_fe00;
/// Bit 63 of L1 and L2 entries: the refcount of what is named is exactly one.
pub const COPIED: u64 = 1 << 63;
/// Bit 62 of L2 entries: the cluster is compressed.
pub const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of L2 entries without subclusters: the cluster reads as zeros.
pub const ZERO: u64 = 1;
/// The reserved bits of an L1 entry.
pub const L1_RESERVED: u64 = !(L1_OFFSET_MASK | COPIED);
/// The reserved bits of a standard cluster's L2 entry.
pub const L2_RESERVED: u64 = !(L2_OFFSET_MASK | COPIED | COMPRESSED | ZERO);

/// An entry of an L1 table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// An entry that names an L2 table with refcount one.
    pub fn new(offset: u64) -> Self {
        Self(offset & L1_OFFSET_MASK | COPIED)
    }

    /// Where the L2 table is; 0 if there is none.
    pub fn offset(self) -> u64 {
        self.0 & L1_OFFSET_MASK
    }

    /// Whether the L2 table's refcount is exactly one.
    pub fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// Whether bits are set that must not be.
    pub fn has_reserved_bits(self) -> bool {
        self.0 & L1_RESERVED != 0
    }
}

/// What an L2 entry says of a whole cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClusterKind {
    /// Data are in the backing file, or zeros.
    Unallocated,
    /// Zeros, and no host cluster.
    ZeroPlain,
    /// Zeros, with a host cluster that is not read.
    ZeroAllocated,
    /// Data at a host offset; with subclusters, the bitmaps say which.
    Normal,
    /// Compressed data.
    Compressed,
}

/// What an L2 entry says of a subcluster; of the cluster without extended L2 entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubclusterKind {
    /// Data are in the backing file, or zeros; no host cluster.
    UnallocatedPlain,
    /// Data are in the backing file, or zeros; but there is a host cluster, whose other subclusters are in use.
    UnallocatedAllocated,
    /// Zeros, and no host cluster.
    ZeroPlain,
    /// Zeros, with a host cluster.
    ZeroAllocated,
    /// Data at the host offset.
    Normal,
    /// The cluster is compressed.
    Compressed,
    /// The entry contradicts itself: the image is corrupt.
    Invalid,
}

/// Where a compressed cluster's data are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressedExtent {
    /// Where they start: any byte.
    pub offset: u64,
    /// How many bytes there are at the most: through the end of the last 512-byte sector that has some.
    pub length: u64,
}

impl CompressedExtent {
    /// The first cluster that the data touch, and how many.
    pub fn clusters(&self, geometry: &Geometry) -> (u64, u64) {
        let first = geometry.cluster_start(self.offset);
        (first, geometry.clusters(geometry.in_cluster(self.offset) + self.length))
    }
}

/// An entry of an L2 table: 64 bits, and for extended entries 64 bits of two bitmaps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L2Entry {
    /// Descriptor and flags.
    pub descriptor: u64,
    /// Subcluster bitmaps: bits 0..32 say that a subcluster is allocated, bits 32..64 that it reads as zeros. 0 for
    /// standard entries.
    pub bitmap: u64,
}

impl L2Entry {
    /// An entry of a cluster about which the image says nothing.
    pub const UNALLOCATED: Self = Self { descriptor: 0, bitmap: 0 };

    /// Reads an entry from the beginning of `bytes`.
    ///
    /// # Panics
    /// If there are too few bytes.
    pub fn read(bytes: &[u8], extended: bool) -> Self {
        Self { descriptor: u64_at(bytes, 0), bitmap: if extended { u64_at(bytes, 8) } else { 0 } }
    }

    /// Writes the entry to the beginning of `bytes`.
    ///
    /// # Panics
    /// If there are too few bytes.
    pub fn write(self, bytes: &mut [u8], extended: bool) {
        bytes[..8].copy_from_slice(&self.descriptor.to_be_bytes());
        if extended {
            bytes[8..16].copy_from_slice(&self.bitmap.to_be_bytes());
        }
    }

    /// An entry of a cluster with data at `host`, refcount one; with extended entries, all subclusters allocated.
    pub fn normal(host: u64, extended: bool) -> Self {
        Self {
            descriptor: host & L2_OFFSET_MASK | COPIED,
            bitmap: if extended { u64::from(u32::MAX) } else { 0 },
        }
    }

    /// An entry of a cluster that reads as zeros, with no host cluster.
    pub fn zero_plain(extended: bool) -> Self {
        if extended {
            Self { descriptor: 0, bitmap: u64::from(u32::MAX) << 32 }
        } else {
            Self { descriptor: ZERO, bitmap: 0 }
        }
    }

    /// The entry of a compressed cluster of `length` bytes at `offset`; `None` if the offset is too large for the
    /// descriptor, or the data for its count of sectors.
    pub fn compressed(offset: u64, length: u64, geometry: &Geometry) -> Option<Self> {
        let shift = geometry.compressed_offset_bits();
        let last = offset.checked_add(length.checked_sub(1)?)?;
        let sectors = (last >> 9) - (offset >> 9);
        if offset >> shift.min(56) != 0 || sectors >> (62 - shift) != 0 {
            return None;
        }
        Some(Self { descriptor: COMPRESSED | sectors << shift | offset, bitmap: 0 })
    }

    /// Where the data of a compressed cluster are. Only of meaning if the entry is one.
    pub fn compressed_extent(self, geometry: &Geometry) -> CompressedExtent {
        let shift = geometry.compressed_offset_bits();
        let offset = self.descriptor & ((1 << shift) - 1);
        let sectors = (self.descriptor & (COMPRESSED - 1)) >> shift;
        CompressedExtent { offset, length: (sectors + 1) * 512 - (offset & 511) }
    }

    /// The host offset of a standard cluster; 0 for none (or for the first cluster of an external data file).
    pub fn offset(self) -> u64 {
        self.descriptor & L2_OFFSET_MASK
    }

    /// Whether the entry says that its cluster's refcount is exactly one.
    pub fn copied(self) -> bool {
        self.descriptor & COPIED != 0
    }

    /// The same entry with the flag of [`Self::copied`] set or cleared.
    pub fn with_copied(self, copied: bool) -> Self {
        let descriptor = if copied { self.descriptor | COPIED } else { self.descriptor & !COPIED };
        Self { descriptor, ..self }
    }

    /// The bitmap of allocated subclusters.
    pub fn allocated_bits(self) -> u32 {
        self.bitmap as u32
    }

    /// The bitmap of subclusters that read as zeros.
    pub fn zero_bits(self) -> u32 {
        (self.bitmap >> 32) as u32
    }

    /// The same entry with other bitmaps.
    pub fn with_bitmaps(self, allocated: u32, zero: u32) -> Self {
        Self { bitmap: u64::from(zero) << 32 | u64::from(allocated), ..self }
    }

    /// What the entry says of the cluster.
    pub fn kind(self, geometry: &Geometry) -> ClusterKind {
        if self.descriptor & COMPRESSED != 0 {
            ClusterKind::Compressed
        } else if self.descriptor & ZERO != 0 && !geometry.extended_l2 {
            if self.offset() != 0 { ClusterKind::ZeroAllocated } else { ClusterKind::ZeroPlain }
        } else if self.offset() != 0 || geometry.data_file && self.copied() {
            ClusterKind::Normal
        } else {
            ClusterKind::Unallocated
        }
    }

    /// Whether the entry holds a host cluster that is not a compressed one's.
    pub fn has_host_cluster(self, geometry: &Geometry) -> bool {
        matches!(self.kind(geometry), ClusterKind::Normal | ClusterKind::ZeroAllocated)
    }

    /// What the entry says of subcluster `index` (0 without extended entries).
    pub fn subcluster_kind(self, geometry: &Geometry, index: u32) -> SubclusterKind {
        use SubclusterKind::*;
        let kind = self.kind(geometry);
        if !geometry.extended_l2 {
            return match kind {
                ClusterKind::Unallocated => UnallocatedPlain,
                ClusterKind::ZeroPlain => ZeroPlain,
                ClusterKind::ZeroAllocated => ZeroAllocated,
                ClusterKind::Normal => Normal,
                ClusterKind::Compressed => Compressed,
            };
        }
        let allocated = self.allocated_bits() & 1 << index != 0;
        let zero = self.zero_bits() & 1 << index != 0;
        match (kind, allocated, zero) {
            (ClusterKind::Compressed, ..) if self.bitmap != 0 => Invalid,
            (ClusterKind::Compressed, ..) => Compressed,
            // Zero bits and allocation bits of one subcluster exclude each other, anywhere in the entry.
            _ if self.allocated_bits() & self.zero_bits() != 0 => Invalid,
            (ClusterKind::Unallocated, ..) if self.allocated_bits() != 0 => Invalid,
            (ClusterKind::Unallocated, _, true) => ZeroPlain,
            (ClusterKind::Unallocated, ..) => UnallocatedPlain,
            (_, true, _) => Normal,
            (_, _, true) => ZeroAllocated,
            _ => UnallocatedAllocated,
        }
    }
}

/// An entry of the refcount table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RefcountTableEntry(pub u64);

impl RefcountTableEntry {
    /// Where the refcount block is; 0 if there is none.
    pub fn offset(self) -> u64 {
        self.0 & REFCOUNT_TABLE_OFFSET_MASK
    }

    /// Whether bits are set that must not be.
    pub fn has_reserved_bits(self) -> bool {
        self.0 & !REFCOUNT_TABLE_OFFSET_MASK != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn geometry(cluster_bits: u32, extended_l2: bool) -> Geometry {
        Geometry { cluster_bits, refcount_order: 4, extended_l2, data_file: false }
    }

    proptest! {
        #[test]
        fn entries_survive_a_round_trip(descriptor: u64, bitmap: u64, extended: bool) {
            let entry = L2Entry { descriptor, bitmap: if extended { bitmap } else { 0 } };
            let mut bytes = [0; 16];
            entry.write(&mut bytes, extended);
            prop_assert_eq!(L2Entry::read(&bytes, extended), entry);
        }

        #[test]
        fn compressed_descriptors_survive_a_round_trip(bits in 9u32..=21, offset in 0u64..1 << 48, length in 1u64..1 << 20) {
            let geometry = geometry(bits, false);
            let length = length.min(geometry.cluster_size());
            let entry = L2Entry::compressed(offset, length, &geometry).unwrap();
            prop_assert_eq!(entry.kind(&geometry), ClusterKind::Compressed);
            let extent = entry.compressed_extent(&geometry);
            prop_assert_eq!(extent.offset, offset);
            prop_assert!((length..length + 512).contains(&extent.length));
            prop_assert_eq!((extent.offset + extent.length) % 512, 0);
            let (first, count) = extent.clusters(&geometry);
            prop_assert!(first <= offset && offset + length <= first + count * geometry.cluster_size());
        }

        #[test]
        fn any_descriptor_has_bounded_compressed_data(descriptor: u64, bits in 9u32..=21) {
            let geometry = geometry(bits, false);
            let extent = L2Entry { descriptor, bitmap: 0 }.compressed_extent(&geometry);
            prop_assert!(extent.length <= 2 * geometry.cluster_size());
            prop_assert!(extent.offset.checked_add(extent.length).is_some());
        }
    }

    #[test]
    fn offsets_that_no_descriptor_holds_are_refused() {
        assert!(L2Entry::compressed(1 << 49, 1, &geometry(21, false)).is_none());
        assert!(L2Entry::compressed(1 << 56, 1, &geometry(9, false)).is_none());
        assert!(L2Entry::compressed(0, 0, &geometry(9, false)).is_none());
        assert!(L2Entry::compressed(511, 1026, &geometry(9, false)).is_none());
        assert!(L2Entry::compressed(u64::MAX, 2, &geometry(9, false)).is_none());
    }

    #[test]
    fn subclusters_are_what_the_bitmaps_say() {
        let geometry = geometry(16, true);
        let entry = L2Entry::normal(0x10000, true).with_bitmaps(0b001, 0b010);
        let kinds = [0, 1, 2].map(|index| entry.subcluster_kind(&geometry, index));
        use SubclusterKind::*;
        assert_eq!(kinds, [Normal, ZeroAllocated, UnallocatedAllocated]);
        let plain = L2Entry::UNALLOCATED.with_bitmaps(0, 0b10);
        assert_eq!(
            [0, 1].map(|index| plain.subcluster_kind(&geometry, index)),
            [UnallocatedPlain, ZeroPlain]
        );
        assert_eq!(entry.with_bitmaps(1, 1).subcluster_kind(&geometry, 5), Invalid);
        assert_eq!(L2Entry::UNALLOCATED.with_bitmaps(1, 0).subcluster_kind(&geometry, 0), Invalid);
        let compressed = L2Entry::compressed(0x10000, 5, &geometry).unwrap();
        assert_eq!(compressed.subcluster_kind(&geometry, 7), Compressed);
        assert_eq!(compressed.with_bitmaps(1, 0).subcluster_kind(&geometry, 7), Invalid);
    }

    #[test]
    fn kinds_of_standard_entries() {
        let inside = geometry(16, false);
        let outside = Geometry { data_file: true, ..inside };
        let kind = |descriptor, geometry| L2Entry { descriptor, bitmap: 0 }.kind(geometry);
        assert_eq!(kind(0, &inside), ClusterKind::Unallocated);
        assert_eq!(kind(COPIED, &inside), ClusterKind::Unallocated);
        assert_eq!(kind(COPIED, &outside), ClusterKind::Normal);
        assert_eq!(kind(ZERO, &inside), ClusterKind::ZeroPlain);
        assert_eq!(kind(ZERO | 0x10000 | COPIED, &inside), ClusterKind::ZeroAllocated);
        assert_eq!(kind(0x10000, &inside), ClusterKind::Normal);
        assert_eq!(kind(COMPRESSED | ZERO, &inside), ClusterKind::Compressed);
    }
}
