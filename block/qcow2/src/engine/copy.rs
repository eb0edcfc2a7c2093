//! Copy on write: what is written around data when only a part of a cluster is written.

use super::cache::Slice;
use super::state::Qcow2;
use crate::format::entry::{ClusterKind, L2Entry, SubclusterKind};
use block_graph::Result;
use futures_util::future::try_join;
use io_loop::{IoBuffer, IoVec};
use std::ops::Range;
use std::sync::Arc;

/// So many bytes between two that are to be copied are read with them, rather than in two requests.
const READ_ALONG: u64 = 16 << 10;

/// Bytes around data that are to be written with them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Around {
    /// None.
    Nothing,
    /// None, since what is there reads as zeros already.
    ZerosAlready,
    /// Zeros.
    Zeros(Range<u64>),
    /// What the guest range reads as now.
    Copy(Range<u64>),
}

/// What is to be written for data in clusters that are new, or not allocated as a whole.
#[derive(Clone, Debug)]
pub(crate) struct CopyPlan {
    /// The guest offset of the first cluster.
    pub(crate) guest_cluster: u64,
    /// Where the first cluster is in the file.
    pub(crate) host_cluster: u64,
    /// The guest offset of the data.
    pub(crate) guest: u64,
    /// Before the data.
    pub(crate) head: Around,
    /// Behind the data.
    pub(crate) tail: Around,
}

/// Entries that an L2 slice is to have.
#[derive(Clone, Debug)]
pub(crate) struct NewEntries {
    /// Index of the first in its slice.
    pub(crate) first: usize,
    /// The entries.
    pub(crate) entries: Vec<L2Entry>,
    /// Whether what the entries named before is named no longer.
    pub(crate) replace: bool,
}

impl Qcow2 {
    /// Plans to write `len` bytes of guest data at `guest` to clusters from `host` on, all in one slice. `new` says that
    /// they are not those that the entries name now, and `fresh` that they read as zeros.
    pub(crate) fn plan_copy(
        &self,
        slice: &Arc<Slice>,
        guest: u64,
        len: u64,
        host: u64,
        new: bool,
        fresh: bool,
    ) -> (CopyPlan, NewEntries) {
        let geometry = &self.geometry;
        let first = geometry.cluster_start(guest);
        let last = geometry.cluster_start(guest + len - 1);
        let end = guest + len;
        let (head_entry, tail_entry) = (self.entry_in(slice, first), self.entry_in(slice, last));
        let start = first + self.written_from(head_entry, geometry.in_cluster(guest), new);
        let stop = last + self.written_to(tail_entry, end - last, new);
        let head = self.around(head_entry, start..guest, fresh);
        let tail = self.around(tail_entry, end..stop, fresh);
        let count = ((last - first) >> geometry.cluster_bits) + 1;
        let entries = (0..count).map(|index| {
            let at = index << geometry.cluster_bits;
            let entry = L2Entry::normal(host + at, geometry.extended_l2);
            if !geometry.extended_l2 {
                return entry;
            }
            let old = self.entry_in(slice, first + at);
            let from = start.saturating_sub(first + at) >> geometry.subcluster_bits();
            let to = (stop - first - at).min(geometry.cluster_size()) >> geometry.subcluster_bits();
            let written = bits(from as u32..to as u32);
            let (allocated, zero) = match old.kind(geometry) {
                ClusterKind::Compressed => (0, 0),
                _ => (old.allocated_bits(), old.zero_bits()),
            };
            entry.with_bitmaps(allocated | written, zero & !written)
        });
        let entries =
            NewEntries { first: self.index_in_slice(first), entries: entries.collect(), replace: new };
        (CopyPlan { guest_cluster: first, host_cluster: host, guest, head, tail }, entries)
    }

    /// From where in the cluster of `entry` it is written, for data that begin at `data`.
    fn written_from(&self, entry: L2Entry, data: u64, new: bool) -> u64 {
        let geometry = &self.geometry;
        let bits = geometry.subcluster_bits();
        let first = (data >> bits) as u32;
        let moved = |index: &u32| self.must_move(entry, *index, new);
        match (0..first).find(moved) {
            Some(index) => u64::from(index) << bits,
            // What is there already stays: others may be writing to it.
            None if !new && entry.subcluster_kind(geometry, first) == SubclusterKind::Normal => data,
            None => data >> bits << bits,
        }
    }

    /// To where in the cluster of `entry` it is written, for data that end at `data`.
    fn written_to(&self, entry: L2Entry, data: u64, new: bool) -> u64 {
        let geometry = &self.geometry;
        let bits = geometry.subcluster_bits();
        let behind = data.div_ceil(1 << bits) as u32;
        let moved = |index: &u32| self.must_move(entry, *index, new);
        match (behind..geometry.subclusters()).rev().find(moved) {
            Some(index) => u64::from(index + 1) << bits,
            None if !new && entry.subcluster_kind(geometry, behind - 1) == SubclusterKind::Normal => data,
            None => u64::from(behind) << bits,
        }
    }

    /// Whether a subcluster's data must be copied because its cluster gets another host cluster.
    fn must_move(&self, entry: L2Entry, index: u32, new: bool) -> bool {
        new && matches!(
            entry.subcluster_kind(&self.geometry, index),
            SubclusterKind::Normal | SubclusterKind::Compressed
        )
    }

    /// What is to be written to a range around data, all in the cluster of `entry`.
    fn around(&self, entry: L2Entry, range: Range<u64>, fresh: bool) -> Around {
        if range.is_empty() {
            return Around::Nothing;
        }
        let geometry = &self.geometry;
        let (from, to) = (geometry.subcluster_index(range.start), geometry.subcluster_index(range.end - 1));
        let backed = self.backing_node().is_some_and(|backing| backing.len() > range.start);
        let zero = (from..=to).all(|index| match entry.subcluster_kind(geometry, index) {
            SubclusterKind::ZeroPlain | SubclusterKind::ZeroAllocated => true,
            SubclusterKind::UnallocatedPlain | SubclusterKind::UnallocatedAllocated => !backed,
            _ => false,
        });
        match (zero, fresh) {
            (true, true) => Around::ZerosAlready,
            (true, false) => Around::Zeros(range),
            (false, _) => Around::Copy(range),
        }
    }

    /// Writes data with what is around them.
    pub(crate) async fn copy_and_write(&self, plan: &CopyPlan, data: IoVec) -> Result<()> {
        let (head, tail) = match (&plan.head, &plan.tail) {
            // What the data will cover is read along: one request takes less than two.
            (Around::Copy(before), Around::Copy(behind)) if behind.start - before.end <= READ_ALONG => {
                let all = self.fill(&Around::Copy(before.start..behind.end)).await?;
                let (head_len, tail_at) =
                    ((before.end - before.start) as usize, (behind.start - before.start) as usize);
                (all.slice(0..head_len), all.slice(tail_at..all.len()))
            }
            (head, tail) => try_join(self.fill(head), self.fill(tail)).await?,
        };
        let start = plan.guest - head.len() as u64;
        let host = plan.host_cluster + (start - plan.guest_cluster);
        let all = if head.is_empty() && tail.is_empty() { data } else { IoVec::chain([head, data, tail]) };
        if plan.head != Around::Nothing || plan.tail != Around::Nothing {
            self.event("cow_write");
        }
        self.write_host(host, start, &all).await
    }

    async fn fill(&self, around: &Around) -> Result<IoVec> {
        match around {
            Around::Nothing | Around::ZerosAlready => Ok(IoVec::default()),
            Around::Zeros(range) => Ok(IoBuffer::zeroed((range.end - range.start) as usize).into_io()),
            Around::Copy(range) => {
                let into = IoBuffer::scratch((range.end - range.start) as usize).into_io();
                self.event("cow_read");
                self.read_guest(range.start, &into).await?;
                Ok(into)
            }
        }
    }
}

/// The bits of a range of subclusters.
pub(crate) fn bits(range: Range<u32>) -> u32 {
    let below = |count: u32| ((1u64 << count) - 1) as u32;
    below(range.end) & !below(range.start)
}
