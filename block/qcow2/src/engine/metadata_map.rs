//! Which clusters of the file hold metadata: no guest data may be written there, whatever a corrupt image says.

use std::collections::HashMap;
use std::ops::Range;

/// What a cluster of the file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Metadata {
    Header,
    ActiveL1,
    ActiveL2,
    RefcountTable,
    RefcountBlock,
    SnapshotTable,
    InactiveL1,
    InactiveL2,
    BitmapDirectory,
}

impl Metadata {
    /// The name in messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Header => "qcow2_header",
            Self::ActiveL1 => "active L1 table",
            Self::ActiveL2 => "active L2 table",
            Self::RefcountTable => "refcount table",
            Self::RefcountBlock => "refcount block",
            Self::SnapshotTable => "snapshot table",
            Self::InactiveL1 => "inactive L1 table",
            Self::InactiveL2 => "inactive L2 table",
            Self::BitmapDirectory => "bitmap directory",
        }
    }
}

/// The clusters of the file that hold metadata. Its size is bounded by that of the tables it is made of.
#[derive(Debug, Default)]
pub(crate) struct MetadataMap {
    cluster_bits: u32,
    /// Long tables, by first and last-plus-one cluster.
    ranges: Vec<(Range<u64>, Metadata)>,
    /// Tables of one cluster each, by cluster.
    single: HashMap<u64, Metadata>,
}

impl MetadataMap {
    pub(crate) fn new(cluster_bits: u32) -> Self {
        Self { cluster_bits, ..Self::default() }
    }

    fn clusters(&self, offset: u64, length: u64) -> Range<u64> {
        let first = offset >> self.cluster_bits;
        first..offset.saturating_add(length.max(1) - 1).checked_shr(self.cluster_bits).unwrap_or(0) + 1
    }

    /// Says that a table of `length` bytes is at `offset`.
    pub(crate) fn add(&mut self, offset: u64, length: u64, what: Metadata) {
        let clusters = self.clusters(offset, length);
        match what {
            Metadata::ActiveL2 | Metadata::RefcountBlock | Metadata::InactiveL2 => {
                self.single.extend(clusters.map(|cluster| (cluster, what)));
            }
            _ if length > 0 => self.ranges.push((clusters, what)),
            _ => (),
        }
    }

    /// Says that there is no table at `offset` any more.
    pub(crate) fn remove(&mut self, offset: u64, length: u64) {
        let clusters = self.clusters(offset, length);
        self.ranges.retain(|(range, _)| *range != clusters);
        if clusters.end - clusters.start <= self.single.len() as u64 {
            for cluster in clusters {
                self.single.remove(&cluster);
            }
        } else {
            self.single.retain(|cluster, _| !clusters.contains(cluster));
        }
    }

    /// What metadata some of `length` bytes at `offset` hold, if any do.
    pub(crate) fn overlap(&self, offset: u64, length: u64) -> Option<Metadata> {
        let clusters = self.clusters(offset, length);
        let hit = |range: &Range<u64>| range.start < clusters.end && clusters.start < range.end;
        if let Some((_, what)) = self.ranges.iter().find(|(range, _)| hit(range)) {
            return Some(*what);
        }
        clusters.into_iter().find_map(|cluster| self.single.get(&cluster).copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlaps_are_found_until_the_table_goes() {
        let mut map = MetadataMap::new(16);
        map.add(0x30000, 0x20000, Metadata::ActiveL1);
        map.add(0x80000, 0x10000, Metadata::ActiveL2);
        assert_eq!(map.overlap(0x20000, 0x10000), None);
        assert_eq!(map.overlap(0x20000, 0x10001), Some(Metadata::ActiveL1));
        assert_eq!(map.overlap(0x4ffff, 1), Some(Metadata::ActiveL1));
        assert_eq!(map.overlap(0x8fe00, 512), Some(Metadata::ActiveL2));
        assert_eq!(map.overlap(0x90000, 512), None);
        map.remove(0x80000, 0x10000);
        map.remove(0x30000, 0x20000);
        assert_eq!(map.overlap(0, 1 << 30), None);
    }
}
