//! The sizes that follow from a header.

use super::entry::{L2_OFFSET_MASK, L2Entry};
use super::{Qcow2Error, SUBCLUSTERS, Table};

/// Sizes and shifts of an image's structures: fixed while an image is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Base-2 logarithm of a cluster's size in bytes.
    pub cluster_bits: u32,
    /// Base-2 logarithm of the number of bits of a refcount.
    pub refcount_order: u32,
    /// Whether L2 entries have 128 bits and clusters 32 subclusters.
    pub extended_l2: bool,
    /// Whether guest data is in another file, at the guest's offsets.
    pub data_file: bool,
}

impl Geometry {
    /// A cluster's size in bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Subclusters in a cluster: 32, or 1 without extended L2 entries.
    pub fn subclusters(&self) -> u32 {
        if self.extended_l2 { SUBCLUSTERS } else { 1 }
    }

    /// Base-2 logarithm of a subcluster's size in bytes.
    pub fn subcluster_bits(&self) -> u32 {
        self.cluster_bits - self.subclusters().trailing_zeros()
    }

    /// A subcluster's size in bytes; a cluster's without extended L2 entries.
    pub fn subcluster_size(&self) -> u64 {
        1 << self.subcluster_bits()
    }

    /// Size of an entry of an L2 table in bytes: 8, or 16 when extended.
    pub fn l2_entry_size(&self) -> usize {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Base-2 logarithm of the entries of an L2 table.
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - self.l2_entry_size().trailing_zeros()
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        1 << self.l2_bits()
    }

    /// Base-2 logarithm of the guest bytes that an L2 table describes.
    pub fn l1_shift(&self) -> u32 {
        self.cluster_bits + self.l2_bits()
    }

    /// Bits of a refcount.
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// The largest refcount.
    pub fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// Base-2 logarithm of the refcounts in a refcount block.
    pub fn refcount_block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// Refcounts in a refcount block.
    pub fn refcount_block_entries(&self) -> u64 {
        1 << self.refcount_block_bits()
    }

    /// The part of an offset within its cluster.
    pub fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// The offset at which `offset`'s cluster starts.
    pub fn cluster_start(&self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    /// Clusters that `bytes` bytes take, rounded up.
    pub fn clusters(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// Index into the L1 table for a guest offset.
    pub fn l1_index(&self, guest: u64) -> u64 {
        guest >> self.l1_shift()
    }

    /// Index into the L2 table for a guest offset.
    pub fn l2_index(&self, guest: u64) -> usize {
        ((guest >> self.cluster_bits) & (self.l2_entries() - 1)) as usize
    }

    /// Number of the subcluster of a guest offset within its cluster.
    pub fn subcluster_index(&self, guest: u64) -> u32 {
        (self.in_cluster(guest) >> self.subcluster_bits()) as u32
    }

    /// Entries of an L1 table for a disk of `size` bytes, rounded up.
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(1 << self.l1_shift())
    }

    /// The bits of a compressed cluster's descriptor that are its offset: `62 - (cluster_bits - 8)`.
    pub fn compressed_offset_bits(&self) -> u32 {
        62 - (self.cluster_bits - 8)
    }

    /// Whether a host offset of a cluster can be named by an L2 entry.
    pub fn addressable(&self, host: u64) -> bool {
        host & !L2_OFFSET_MASK == 0
    }

    /// Checks that a table of `entries` entries of `entry_size` bytes, of at most `max_bytes`, can stand at `offset`.
    ///
    /// # Errors
    /// [`Qcow2Error::TableTooLarge`], [`Qcow2Error::TableOffset`] if the offset is no cluster's or the end is past 2^63.
    pub fn check_table(
        &self,
        table: Table,
        offset: u64,
        entries: u64,
        entry_size: u64,
        max_bytes: u64,
    ) -> Result<(), Qcow2Error> {
        if entries > max_bytes / entry_size {
            return Err(Qcow2Error::TableTooLarge(table));
        }
        if self.in_cluster(offset) != 0 || offset > i64::MAX as u64 - entries * entry_size {
            return Err(Qcow2Error::TableOffset(table));
        }
        Ok(())
    }

    /// The L2 entry number `index` of a table's bytes.
    ///
    /// # Panics
    /// If the table ends before it.
    pub fn l2_entry(&self, table: &[u8], index: usize) -> L2Entry {
        L2Entry::read(&table[index * self.l2_entry_size()..], self.extended_l2)
    }

    /// Sets the L2 entry number `index` of a table's bytes.
    ///
    /// # Panics
    /// If the table ends before it.
    pub fn set_l2_entry(&self, table: &mut [u8], index: usize, entry: L2Entry) {
        entry.write(&mut table[index * self.l2_entry_size()..], self.extended_l2);
    }
}
