//! Counts what the metadata references (section "Cluster mapping").

use super::references::{Claim, References};
use super::snapshots::Snapshots;
use super::{Checker, Fix};
use crate::format::MAX_L1_BYTES;
use crate::format::entry::{
    COMPRESSED, COPIED, L1_OFFSET_MASK, L1_RESERVED, L2_OFFSET_MASK, L2_RESERVED, REFCOUNT_TABLE_OFFSET_MASK,
    ZERO,
};
use crate::storage::{MAX_TRANSFER, Storage, read_vec};
use futures_util::StreamExt;
use futures_util::stream;
use std::collections::HashMap;
use std::io;

/// The subclusters of an extended L2 entry's bitmap that are allocated.
const ALL_ALLOCATED: u64 = 0xffff_ffff;
/// The most bytes of level-2 tables that are being read at once.
const IN_FLIGHT: usize = 8 << 20;

/// How often a table is referenced.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Visits {
    /// By the active L1 table.
    pub(super) active: u64,
    /// By any L1 table.
    pub(super) all: u64,
}

/// The distinct tables of level 2, in the order in which they were found.
#[derive(Debug, Default)]
pub(super) struct Tables {
    pub(super) order: Vec<u64>,
    visits: HashMap<u64, Visits>,
}

impl Tables {
    fn visit(&mut self, offset: u64, visits: Visits) {
        let entry = self.visits.entry(offset).or_insert_with(|| {
            self.order.push(offset);
            Visits::default()
        });
        entry.active += visits.active;
        entry.all += visits.all;
    }

    pub(super) fn visits(&self, offset: u64) -> Visits {
        self.visits.get(&offset).copied().unwrap_or_default()
    }
}

/// Reads level-2 tables at `offsets`, neighbours at once and several pieces at a time, and gives them in order.
pub(super) fn read_tables<'f>(
    file: &'f dyn Storage,
    offsets: &'f [u64],
    table_size: usize,
) -> impl stream::Stream<Item = io::Result<(&'f [u64], Vec<u8>)>> + 'f {
    let most = (MAX_TRANSFER / table_size).max(1);
    let mut rest = offsets;
    let runs = std::iter::from_fn(move || {
        let mut run = 1;
        while run < most && run < rest.len() && rest[run] == rest[run - 1] + table_size as u64 {
            run += 1;
        }
        let (first, others) = rest.split_at_checked(run)?;
        rest = others;
        Some(first)
    });
    let read = move |run: &'f [u64]| async move {
        let bytes = read_vec(file, run[0], run.len() * table_size).await?;
        Ok((run, bytes))
    };
    stream::iter(runs.map(read)).buffered((IN_FLIGHT / table_size).clamp(2, 64))
}

impl Checker<'_> {
    /// Counts every reference in the image.
    pub(super) async fn calculate(&mut self, snapshots: &Snapshots, fix: Fix) -> io::Result<()> {
        self.length = self.file.len();
        self.references = References::new(self.geometry.clusters(self.length));
        self.tables = Tables::default();
        self.refer(0, self.geometry.cluster_size(), 1, Claim::Nothing);
        let active = Visits { active: 1, all: 1 };
        self.scan_l1(self.header.l1_offset, self.header.l1_entries, active).await?;
        self.scan_snapshots(snapshots).await?;
        self.scan_tables(fix).await?;
        self.refer(snapshots.offset, snapshots.bytes, 1, Claim::Nothing);
        let table = u64::from(self.header.refcount_table_clusters) << self.geometry.cluster_bits;
        self.refer(self.header.refcount_table_offset, table, 1, Claim::Nothing);
        if let Some(place) = self.extensions.crypto {
            self.refer(place.offset, place.length, 1, Claim::Nothing);
        }
        self.scan_bitmaps().await?;
        self.zero_misaligned().await?;
        self.scan_refcount_blocks(fix).await
    }

    /// Counts `times` references to the clusters of `size` bytes at `offset`.
    pub(super) fn refer(&mut self, offset: u64, size: u64, times: u64, claim: Claim) {
        if size == 0 {
            return;
        }
        let cluster_size = self.geometry.cluster_size();
        let end = offset.saturating_add(size);
        // The last cluster need not be all there.
        if end.saturating_sub(self.length) >= cluster_size {
            self.say(format_args!(
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
                 offset 0x{offset:x} size 0x{size:x}"
            ));
            self.report.corruptions += times;
            self.copied_suspect |= claim != Claim::Nothing;
            return;
        }
        let clusters = offset >> self.geometry.cluster_bits..=(end - 1) >> self.geometry.cluster_bits;
        for cluster in clusters {
            let lost = self.references.add(cluster, times, claim, self.geometry.refcount_max());
            if lost > 0 {
                self.overflow(cluster, lost);
            }
        }
    }

    /// Counts references to a cluster, by far the most frequent case.
    #[inline]
    fn refer_cluster(&mut self, offset: u64, times: u64, claim: Claim) {
        if offset >= self.length || self.geometry.in_cluster(offset) != 0 {
            return self.refer(offset, self.geometry.cluster_size(), times, claim);
        }
        let cluster = offset >> self.geometry.cluster_bits;
        let lost = self.references.add(cluster, times, claim, self.geometry.refcount_max());
        if lost > 0 {
            self.overflow(cluster, lost);
        }
    }

    #[cold]
    fn overflow(&mut self, cluster: u64, lost: u64) {
        let offset = cluster << self.geometry.cluster_bits;
        self.say(format_args!("ERROR: overflow cluster offset=0x{offset:x}"));
        self.say(
            "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy \
             if the image cannot be opened for writing",
        );
        self.report.corruptions += lost;
    }

    /// Counts an L1 table and notes the level-2 tables that it names.
    async fn scan_l1(&mut self, offset: u64, entries: u32, visits: Visits) -> io::Result<()> {
        let size = u64::from(entries) * 8;
        self.refer(offset, size, visits.all, Claim::Nothing);
        // What is past the end of the file would read as zeros.
        let within = self.length.saturating_sub(offset).min(size.min(MAX_L1_BYTES)).next_multiple_of(8);
        let table = self.read_or_say(offset, within as usize, "check_refcounts_l1").await?;
        for entry in table.as_chunks().0.iter().map(|entry| u64::from_be_bytes(*entry)) {
            if entry == 0 {
                continue;
            }
            if entry & L1_RESERVED != 0 {
                self.say(format_args!("ERROR found L1 entry with reserved bits set: {entry:x}"));
                self.report.corruptions += visits.all;
            }
            let l2 = entry & L1_OFFSET_MASK;
            let claim = if visits.active > 0 && l2 != 0 { claim(entry) } else { Claim::Nothing };
            self.refer(l2, self.geometry.cluster_size(), visits.all, claim);
            if self.geometry.in_cluster(l2) != 0 {
                self.say(format_args!(
                    "ERROR l2_offset={l2:x}: Table is not cluster aligned; L1 entry corrupted"
                ));
                self.report.corruptions += visits.all;
            }
            if l2 != 0 && l2 < self.length {
                self.tables.visit(l2, visits);
            }
        }
        Ok(())
    }

    async fn scan_snapshots(&mut self, snapshots: &Snapshots) -> io::Result<()> {
        let entries = &snapshots.entries;
        if self.geometry.data_file && !entries.is_empty() {
            self.say(format_args!("ERROR {} snapshots in image with data file", entries.len()));
            self.report.corruptions += 1;
        }
        // A table that several snapshots name, though none should, is read once.
        let mut order = Vec::new();
        let mut times: HashMap<(u64, u32), u64> = HashMap::new();
        for snapshot in entries {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let (id, name) = (text(&snapshot.id), text(&snapshot.name));
            let (offset, size) = (snapshot.l1_offset, snapshot.l1_entries);
            if self.geometry.in_cluster(offset) != 0 {
                self.say(format_args!(
                    "ERROR snapshot {id} ({name}) l1_offset={offset:#x}: L1 table is not cluster aligned; snapshot \
                     table entry corrupted"
                ));
                self.report.corruptions += 1;
            } else if u64::from(size) > MAX_L1_BYTES / 8 {
                self.say(format_args!(
                    "ERROR snapshot {id} ({name}) l1_size={size:#x}: L1 table is too large; snapshot table entry \
                     corrupted"
                ));
                self.report.corruptions += 1;
            } else {
                let times = times.entry((offset, size)).or_insert_with(|| {
                    order.push((offset, size));
                    0
                });
                *times += 1;
            }
        }
        // Tables that do not overlap fit into the file.
        let mut budget = self.length;
        for (offset, size) in order {
            let within = self.length.saturating_sub(offset).min(u64::from(size) * 8);
            if within > budget {
                self.say("ERROR snapshots' L1 tables overlap");
                self.report.corruptions += 1;
                break;
            }
            budget -= within;
            self.scan_l1(offset, size, Visits { active: 0, all: times[&(offset, size)] }).await?;
        }
        Ok(())
    }

    /// Counts what the level-2 tables that were found reference.
    async fn scan_tables(&mut self, fix: Fix) -> io::Result<()> {
        let mut offsets = std::mem::take(&mut self.tables.order);
        // Tables at their right places fit into the file; the others are looked at as long as they would, too.
        let table_size = self.geometry.cluster_size();
        let mut budget = self.length / table_size + 16;
        offsets.retain(|offset| {
            let aligned = self.geometry.in_cluster(*offset) == 0;
            budget = budget.saturating_sub(u64::from(!aligned));
            aligned || budget > 0
        });
        let outcome = {
            let mut tables = std::pin::pin!(read_tables(self.file, &offsets, table_size as usize));
            loop {
                match tables.next().await {
                    None => break Ok(()),
                    Some(Err(error)) => break Err(error),
                    Some(Ok((run, bytes))) => {
                        for (offset, table) in run.iter().zip(bytes.chunks_exact(table_size as usize)) {
                            self.scan_table(*offset, table, fix);
                        }
                    }
                }
            }
        };
        self.tables.order = offsets;
        if outcome.is_err() {
            self.say("ERROR: I/O error in check_refcounts_l2");
            self.report.check_errors += 1;
        }
        outcome
    }

    /// Counts what one level-2 table references.
    fn scan_table(&mut self, at: u64, table: &[u8], fix: Fix) {
        let visits = self.tables.visits(at);
        let entry_size = self.geometry.l2_entry_size();
        let mut expected = 0;
        for (index, entry) in table.chunks_exact(entry_size).enumerate() {
            let raw = u64::from_be_bytes(entry[..8].try_into().expect("eight bytes"));
            let bitmap = match entry.get(8..16) {
                Some(bitmap) => u64::from_be_bytes(bitmap.try_into().expect("eight bytes")),
                None => 0,
            };
            if raw == 0 && bitmap == 0 {
                continue;
            }
            if raw & COMPRESSED != 0 {
                self.scan_compressed(index, raw, bitmap, visits);
            } else {
                self.scan_standard((at, index), raw, bitmap, visits, &mut expected, fix);
            }
        }
    }

    #[inline]
    fn scan_standard(
        &mut self,
        (at, index): (u64, usize),
        raw: u64,
        bitmap: u64,
        visits: Visits,
        expected: &mut u64,
        fix: Fix,
    ) {
        let extended = self.geometry.extended_l2;
        let offset = raw & L2_OFFSET_MASK;
        if raw & L2_RESERVED != 0 {
            self.say(format_args!("ERROR found l2 entry with reserved bits set: {raw:x}"));
            self.report.corruptions += visits.all;
        }
        let is_zero = raw & ZERO != 0 && !extended;
        if offset == 0 && (is_zero || !(self.geometry.data_file && raw & COPIED != 0)) {
            if bitmap & ALL_ALLOCATED != 0 {
                self.report.corruptions += visits.all;
                self.say("ERROR: Unallocated cluster has non-zero subcluster allocation map");
            }
            return;
        }
        if bitmap >> 32 & bitmap != 0 {
            self.report.corruptions += visits.all;
            self.say(format_args!(
                "ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap"
            ));
        }
        if self.geometry.in_cluster(offset) != 0 {
            let holds_data = if extended { bitmap & ALL_ALLOCATED != 0 } else { !is_zero };
            if self.misaligned_cluster((at, index), offset, holds_data, visits, fix) {
                return;
            }
        }
        if visits.active > 0 {
            self.report.allocated_clusters += visits.active;
            if *expected != 0 && offset != *expected {
                self.report.fragmented_clusters += visits.active;
            }
            *expected = offset + self.geometry.cluster_size();
        }
        if self.geometry.data_file {
            self.copied_suspect |= visits.active > 0 && raw & COPIED == 0;
        } else {
            let claim = if visits.active > 0 { claim(raw) } else { Claim::Nothing };
            self.refer_cluster(offset, visits.all, claim);
        }
    }

    /// Tells of a cluster that is not where clusters are; returns whether its entry will be made zero.
    #[cold]
    fn misaligned_cluster(
        &mut self,
        place: (u64, usize),
        offset: u64,
        holds_data: bool,
        visits: Visits,
        fix: Fix,
    ) -> bool {
        if holds_data {
            self.report.corruptions += visits.all;
            self.say(format_args!(
                "ERROR offset={offset:x}: Data cluster is not properly aligned; L2 entry corrupted."
            ));
            return false;
        }
        let verb = if fix.errors { "Repairing" } else { "ERROR" };
        self.say(format_args!(
            "{verb} offset={offset:x}: Preallocated cluster is not properly aligned; L2 entry corrupted."
        ));
        if fix.errors {
            // Written when it is known that nothing else is where the table is.
            self.misaligned.push(place);
        } else {
            self.report.corruptions += visits.all;
        }
        fix.errors
    }

    fn scan_compressed(&mut self, index: usize, raw: u64, bitmap: u64, visits: Visits) {
        let offset_bits = self.geometry.compressed_offset_bits();
        let offset = raw & ((1 << offset_bits) - 1);
        if raw & COPIED != 0 {
            self.say(format_args!(
                "ERROR: coffset=0x{offset:x}: copied flag must never be set for compressed clusters"
            ));
            self.report.corruptions += visits.all;
        }
        let raw = raw & !COPIED;
        if self.geometry.data_file {
            self.say(format_args!("ERROR compressed cluster {index} with data file, entry=0x{raw:x}"));
            self.report.corruptions += visits.all;
            return;
        }
        if bitmap != 0 {
            self.say(format_args!(
                "ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, entry=0x{raw:x}"
            ));
            self.report.corruptions += visits.all;
            return;
        }
        let sectors = ((raw & !COMPRESSED) >> offset_bits) + 1;
        self.refer(offset, sectors * 512 - (offset & 511), visits.all, Claim::Nothing);
        // Compressed clusters always share sectors with their neighbours.
        self.report.allocated_clusters += visits.active;
        self.report.compressed_clusters += visits.active;
        self.report.fragmented_clusters += visits.active;
    }

    /// Makes the entries zero that [`Checker::misaligned_cluster`] noted.
    async fn zero_misaligned(&mut self) -> io::Result<()> {
        let entry_size = self.geometry.l2_entry_size();
        for (table, index) in std::mem::take(&mut self.misaligned) {
            let at = table + (index * entry_size) as u64;
            if !self.is_only_a_table(table) {
                self.say("ERROR: Overlap check failed");
                self.report.check_errors += 1;
                self.report.corruptions += 1;
                continue;
            }
            let mut entry = vec![0; entry_size];
            self.file.read(at, &mut entry).await?;
            match entry.get_mut(8..) {
                Some(bitmap) if !bitmap.is_empty() => {
                    // What was allocated becomes zero.
                    let bits = u64::from_be_bytes(bitmap.try_into().expect("eight bytes"));
                    let zeros = (bits | bits << 32) & !ALL_ALLOCATED;
                    bitmap.copy_from_slice(&zeros.to_be_bytes());
                    entry[..8].fill(0);
                }
                _ => entry.copy_from_slice(&ZERO.to_be_bytes()),
            }
            if let Err(error) = self.file.write(at, &entry).await {
                let reason = super::strerror(&error);
                self.say(format_args!("ERROR: Failed to overwrite L2 table entry: {reason}"));
                self.report.check_errors += 1;
                self.report.corruptions += 1;
                continue;
            }
            self.report.corruptions_fixed += 1;
        }
        Ok(())
    }

    /// Whether the cluster of a level-2 table is nothing else beside, so that it can be written to.
    pub(super) fn is_only_a_table(&self, offset: u64) -> bool {
        let cluster = offset >> self.geometry.cluster_bits;
        self.geometry.in_cluster(offset) == 0
            && self.references.get(cluster) == self.tables.visits(offset).all
    }

    /// Counts the refcount blocks.
    async fn scan_refcount_blocks(&mut self, fix: Fix) -> io::Result<()> {
        let cluster_size = self.geometry.cluster_size();
        for index in 0..self.refcount_table.len() {
            let entry = self.refcount_table[index];
            let offset = entry & REFCOUNT_TABLE_OFFSET_MASK;
            if entry & !REFCOUNT_TABLE_OFFSET_MASK != 0 {
                self.say(format_args!("ERROR refcount table entry {index} has reserved bits set"));
            } else if self.geometry.in_cluster(offset) != 0 {
                self.say(format_args!(
                    "ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted"
                ));
            } else if offset == 0 {
                continue;
            } else if offset >> self.geometry.cluster_bits >= self.references.clusters() {
                self.refcount_block_outside(index, offset, fix).await?;
                continue;
            } else {
                self.refer(offset, cluster_size, 1, Claim::Nothing);
                let count = self.references.get(offset >> self.geometry.cluster_bits);
                if count == 1 {
                    continue;
                }
                self.say(format_args!("ERROR refcount block {index} refcount={count}"));
            }
            self.report.corruptions += 1;
            self.rebuild = true;
        }
        Ok(())
    }

    /// A refcount block past the end of the file: the file is grown if it may be, so that the block is one of zeros.
    async fn refcount_block_outside(&mut self, index: usize, offset: u64, fix: Fix) -> io::Result<()> {
        let verb = if fix.errors { "Repairing" } else { "ERROR" };
        self.say(format_args!("{verb} refcount block {index} is outside image"));
        self.report.corruptions += 1;
        if !fix.errors {
            return Ok(());
        }
        let end = offset.checked_add(self.geometry.cluster_size()).filter(|end| *end <= i64::MAX as u64);
        let grown = match end {
            // The counts below take memory by the file's length.
            Some(end) if end >> self.geometry.cluster_bits <= i32::MAX as u64 => self.file.set_len(end).await,
            _ => Err(rustix::io::Errno::INVAL.into()),
        };
        if let Err(error) = grown {
            self.rebuild = true;
            let reason = super::strerror(&error);
            self.say(format_args!("ERROR could not resize image: {reason}"));
            return Ok(());
        }
        self.length = self.file.len();
        self.references.grow(self.geometry.clusters(self.length));
        self.report.corruptions -= 1;
        self.report.corruptions_fixed += 1;
        self.refer(offset, self.geometry.cluster_size(), 1, Claim::Nothing);
        Ok(())
    }

    pub(super) async fn read_or_say(&mut self, offset: u64, len: usize, place: &str) -> io::Result<Vec<u8>> {
        let bytes = read_vec(self.file, offset, len).await;
        if bytes.is_err() {
            self.say(format_args!("ERROR: I/O error in {place}"));
            self.report.check_errors += 1;
        }
        bytes
    }
}

/// What an entry's flag COPIED says of the refcount.
fn claim(entry: u64) -> Claim {
    if entry & COPIED != 0 { Claim::One } else { Claim::NotOne }
}
