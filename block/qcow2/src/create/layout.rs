//! Where the parts of a new image are.
//!
//! ```text
//! header | refcount table | refcount blocks | L1 table | encryption header | L2 table, its clusters | L2 table, ...
//! ```
//! The last part is there with preallocation only. Everything up to the end is in use, so every refcount up to the end
//! is 1: the structures are written as they are computed, without an allocator.

use crate::format::{Geometry, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES};

/// The places of an image's parts, in clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    geometry: Geometry,
    /// Clusters of the refcount table, which follows the header.
    pub(super) table_clusters: u64,
    /// Refcount blocks, which follow the refcount table.
    pub(super) blocks: u64,
    /// Entries of the L1 table, which follows the refcount blocks.
    pub(super) l1_entries: u64,
    /// Clusters of the encryption header, which follows the L1 table.
    pub(super) crypto_clusters: u64,
    /// Clusters of the virtual disk that are preallocated: all or none.
    pub(super) mapped: u64,
    /// Whether preallocated clusters are in the image file.
    pub(super) holds_data: bool,
}

impl Layout {
    /// The layout of a disk of `size` bytes; `None` if tables would be larger than the format allows.
    pub(super) fn new(geometry: Geometry, size: u64, crypto_bytes: u64, preallocated: bool) -> Option<Self> {
        let l1_entries = geometry.l1_entries_for(size);
        if l1_entries > MAX_L1_BYTES / 8 {
            return None;
        }
        let mut layout = Self {
            geometry,
            table_clusters: 1,
            blocks: 1,
            l1_entries,
            crypto_clusters: geometry.clusters(crypto_bytes),
            mapped: if preallocated { geometry.clusters(size) } else { 0 },
            holds_data: !geometry.data_file,
        };
        // Blocks and table count themselves, too.
        loop {
            let blocks = layout.end().div_ceil(geometry.refcount_block_entries());
            let table = geometry.clusters(blocks * 8);
            if (blocks, table) == (layout.blocks, layout.table_clusters) {
                break;
            }
            (layout.blocks, layout.table_clusters) =
                (blocks.max(layout.blocks), table.max(layout.table_clusters));
        }
        let fits = layout.table_clusters << geometry.cluster_bits <= MAX_REFCOUNT_TABLE_BYTES
            && geometry.addressable(layout.end() << geometry.cluster_bits);
        fits.then_some(layout)
    }

    /// Where the refcount blocks start.
    pub(super) fn blocks_at(&self) -> u64 {
        1 + self.table_clusters
    }

    /// Where the L1 table is.
    pub(super) fn l1_at(&self) -> u64 {
        self.blocks_at() + self.blocks
    }

    /// Where the encryption header is.
    pub(super) fn crypto_at(&self) -> u64 {
        self.l1_at() + self.geometry.clusters(self.l1_entries * 8)
    }

    /// Where preallocated L2 tables and clusters start.
    fn mapping_at(&self) -> u64 {
        self.crypto_at() + self.crypto_clusters
    }

    /// Where the L2 table number `index` is.
    pub(super) fn l2_at(&self, index: u64) -> u64 {
        let with_data = if self.holds_data { self.geometry.l2_entries() } else { 0 };
        self.mapping_at() + index * (1 + with_data)
    }

    /// How many L2 tables there are.
    pub(super) fn l2_tables(&self) -> u64 {
        self.mapped.div_ceil(self.geometry.l2_entries())
    }

    /// Where the last cluster in use ends.
    pub(super) fn end(&self) -> u64 {
        self.mapping_at() + self.l2_tables() + if self.holds_data { self.mapped } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn all_refcounts_have_a_place(
            cluster_bits in 9u32..=21,
            refcount_order in 0u32..=6,
            size in 0u64..1 << 50,
            crypto in 0u64..3 << 20,
            preallocated: bool,
            data_file: bool,
        ) {
            let geometry = Geometry { cluster_bits, refcount_order, extended_l2: false, data_file };
            if let Some(layout) = Layout::new(geometry, size, crypto, preallocated) {
                prop_assert!(layout.blocks * geometry.refcount_block_entries() >= layout.end());
                prop_assert!(layout.table_clusters << cluster_bits >= layout.blocks * 8);
                prop_assert!(layout.table_clusters << cluster_bits <= MAX_REFCOUNT_TABLE_BYTES);
                if preallocated && layout.l2_tables() > 0 {
                    prop_assert!(layout.l2_at(layout.l2_tables() - 1) < layout.end());
                }
            } else {
                prop_assert!(size >> cluster_bits > 1 << 15);
            }
        }
    }
}
