//! From guest offsets to host offsets.

use super::cache::Slice;
use super::state::Qcow2;
use crate::format::entry::{ClusterKind, L1Entry, L2Entry, SubclusterKind};
use block_graph::Result;

/// A run of guest bytes about which the L2 table says the same, with contiguous host bytes where it has some.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// What the table says.
    pub(crate) kind: SubclusterKind,
    /// Where the first byte is in the file, for normal and allocated kinds.
    pub(crate) host: u64,
    /// Bytes; at least one.
    pub(crate) len: u64,
    /// The entry of the first cluster.
    pub(crate) entry: L2Entry,
}

impl Run {
    /// Whether data can be written where the run is.
    pub(crate) fn in_place(&self) -> bool {
        self.kind == SubclusterKind::Normal && self.entry.copied()
    }
}

/// What is wrong with an L2 entry: the message.
type Flaw = String;

impl Qcow2 {
    /// The L1 entry for a guest offset: zero behind the table's end.
    pub(crate) fn l1_entry(&self, guest: u64) -> L1Entry {
        let index = self.geometry.l1_index(guest) as usize;
        L1Entry(self.l1.read().entries.get(index).copied().unwrap_or(0))
    }

    /// Where the L2 table for a guest offset is; `None` if there is none.
    pub(crate) async fn l2_table(&self, guest: u64) -> Result<Option<L1Entry>> {
        let entry = self.l1_entry(guest);
        if entry.offset() == 0 {
            return Ok(None);
        }
        if self.geometry.in_cluster(entry.offset()) != 0 {
            let (offset, index) = (entry.offset(), self.geometry.l1_index(guest));
            return Err(self
                .corrupt(format!("L2 table offset {offset:#x} unaligned (L1 index: {index:#x})"))
                .await);
        }
        Ok(Some(entry))
    }

    /// Where in the file the L2 entry for a guest offset is, given its table.
    pub(crate) fn l2_entry_offset(&self, table: L1Entry, guest: u64) -> u64 {
        table.offset() + (self.geometry.l2_index(guest) * self.geometry.l2_entry_size()) as u64
    }

    /// The number of a guest offset's entry within its slice.
    pub(crate) fn index_in_slice(&self, guest: u64) -> usize {
        self.geometry.l2_index(guest) & (self.entries_per_slice() - 1)
    }

    /// L2 entries in a slice: a power of two.
    pub(crate) fn entries_per_slice(&self) -> usize {
        self.l2.slice_size() as usize / self.geometry.l2_entry_size()
    }

    /// The guest offset behind the last that the slice of `guest` describes.
    pub(crate) fn slice_end(&self, guest: u64) -> u64 {
        let bytes = (self.entries_per_slice() as u64) << self.geometry.cluster_bits;
        (guest & !(bytes - 1)).saturating_add(bytes)
    }

    /// The first run of guest bytes at `guest`, of at most `len` bytes, if the tables for it are in memory. `None` says
    /// that they are not, or that something is wrong with them, which [`Qcow2::map`] then reports.
    pub(crate) fn map_in_memory(&self, guest: u64, len: u64) -> Option<Run> {
        let entry = self.l1_entry(guest);
        if entry.offset() == 0 {
            return Some(self.unallocated(guest, len));
        }
        if self.geometry.in_cluster(entry.offset()) != 0 {
            return None;
        }
        let slice = self.l2.cached(self.l2_entry_offset(entry, guest))?;
        self.scan(&slice.bytes(), guest, len).ok()
    }

    /// The first run of guest bytes at `guest`, of at most `len` bytes.
    pub(crate) async fn map(&self, guest: u64, len: u64) -> Result<Run> {
        if let Some(run) = self.map_in_memory(guest, len) {
            return Ok(run);
        }
        let Some(table) = self.l2_table(guest).await? else { return Ok(self.unallocated(guest, len)) };
        let slice = self.l2.get(&self.file.node(), self.l2_entry_offset(table, guest)).await?;
        let result = self.scan(&slice.bytes(), guest, len);
        match result {
            Ok(run) => Ok(run),
            Err(flaw) => Err(self.corrupt(self.locate(flaw, table, guest)).await),
        }
    }

    fn locate(&self, flaw: Flaw, table: L1Entry, guest: u64) -> String {
        if flaw.ends_with(')') {
            return flaw;
        }
        format!("{flaw} (L2 offset: {:#x}, L2 index: {:#x})", table.offset(), self.geometry.l2_index(guest))
    }

    /// The run of a guest range that no L2 table describes, as far as the range of that table goes.
    fn unallocated(&self, guest: u64, len: u64) -> Run {
        let table = 1u64 << self.geometry.l1_shift();
        let len = len.min(table - (guest & (table - 1)));
        Run { kind: SubclusterKind::UnallocatedPlain, host: 0, len, entry: L2Entry::UNALLOCATED }
    }

    /// The first run in a slice's bytes.
    fn scan(&self, bytes: &[u8], guest: u64, len: u64) -> std::result::Result<Run, Flaw> {
        let geometry = &self.geometry;
        let (mut index, entries) = (self.index_in_slice(guest), self.entries_per_slice());
        let entry = geometry.l2_entry(bytes, index);
        let first = geometry.subcluster_index(guest);
        let kind = entry.subcluster_kind(geometry, first);
        self.check_entry(entry, kind, geometry.cluster_start(guest))?;
        let in_cluster = geometry.in_cluster(guest);
        let has_host = matches!(
            kind,
            SubclusterKind::Normal | SubclusterKind::ZeroAllocated | SubclusterKind::UnallocatedAllocated
        );
        let host = if has_host { entry.offset() + in_cluster } else { 0 };
        let mut covered = self.same_in_cluster(entry, kind, first) - in_cluster;
        let mut whole = covered + in_cluster == geometry.cluster_size();
        let mut previous = entry;
        while whole && covered < len && index + 1 < entries && kind != SubclusterKind::Compressed {
            index += 1;
            let next = geometry.l2_entry(bytes, index);
            let contiguous = !has_host || next.offset() == previous.offset() + geometry.cluster_size();
            if next.subcluster_kind(geometry, 0) != kind
                || !contiguous
                || next.copied() != entry.copied()
                || self.check_entry(next, kind, geometry.cluster_start(guest + covered)).is_err()
            {
                break;
            }
            let more = self.same_in_cluster(next, kind, 0);
            covered += more;
            whole = more == geometry.cluster_size();
            previous = next;
        }
        Ok(Run { kind, host, len: covered.min(len), entry })
    }

    /// The offset within a cluster at which something else begins than what `entry` says of subcluster `first`.
    fn same_in_cluster(&self, entry: L2Entry, kind: SubclusterKind, first: u32) -> u64 {
        let count = self.geometry.subclusters();
        let same = |index: &u32| entry.subcluster_kind(&self.geometry, *index) == kind;
        let end = first + 1 + (first + 1..count).take_while(same).count() as u32;
        u64::from(end) << self.geometry.subcluster_bits()
    }

    /// Checks an entry that has been read from the file.
    pub(crate) fn check_entry(
        &self,
        entry: L2Entry,
        kind: SubclusterKind,
        guest_cluster: u64,
    ) -> std::result::Result<(), Flaw> {
        let geometry = &self.geometry;
        if kind == SubclusterKind::Invalid {
            return Err("Invalid cluster entry found".into());
        }
        match entry.kind(geometry) {
            ClusterKind::Compressed if geometry.data_file => {
                Err("Compressed cluster entry found in image with external data file".into())
            }
            ClusterKind::ZeroPlain | ClusterKind::ZeroAllocated if self.version_2() => {
                Err("Zero cluster entry found in pre-v3 image".into())
            }
            ClusterKind::Normal | ClusterKind::ZeroAllocated if geometry.in_cluster(entry.offset()) != 0 => {
                Err(format!("Cluster allocation offset {:#x} unaligned", entry.offset()))
            }
            ClusterKind::Normal | ClusterKind::ZeroAllocated
                if geometry.data_file && entry.offset() != guest_cluster =>
            {
                Err(format!(
                    "External data file host cluster offset {:#x} does not match guest cluster offset: \
                     {guest_cluster:#x}, L2 index: {:#x})",
                    entry.offset(),
                    geometry.l2_index(guest_cluster)
                ))
            }
            _ => Ok(()),
        }
    }

    /// The entry for a guest offset in its slice.
    pub(crate) fn entry_in(&self, slice: &Slice, guest: u64) -> L2Entry {
        self.geometry.l2_entry(&slice.bytes(), self.index_in_slice(guest))
    }
}
