//! The flag COPIED of the active tables' entries: set exactly where the refcount is 1.

use super::Checker;
use super::scan::read_tables;
use crate::format::MAX_L1_BYTES;
use crate::format::entry::{
    COMPRESSED, COPIED, L1_OFFSET_MASK, L2_OFFSET_MASK, REFCOUNT_TABLE_OFFSET_MASK, ZERO,
};
use crate::format::refcount;
use crate::storage::{read_vec, write_all};
use futures_util::StreamExt;
use std::collections::HashMap;
use std::io;

/// Bytes of refcount blocks that are kept.
const KEPT: usize = 32 << 20;

/// Refcounts on disk, looked up at random.
#[derive(Default)]
struct Refcounts {
    blocks: HashMap<u64, Option<Vec<u8>>>,
}

impl Refcounts {
    /// The refcount of a cluster; `None` if it cannot be read, which was told of before.
    async fn get(&mut self, checker: &Checker<'_>, cluster: u64) -> Option<u64> {
        let geometry = &checker.geometry;
        let index = cluster >> geometry.refcount_block_bits();
        if !self.blocks.contains_key(&index) {
            if self.blocks.len() * geometry.cluster_size() as usize > KEPT {
                self.blocks.clear();
            }
            let entry = usize::try_from(index).ok().and_then(|index| checker.refcount_table.get(index));
            let block = match entry.copied().unwrap_or(0) & REFCOUNT_TABLE_OFFSET_MASK {
                0 => Some(Vec::new()),
                offset if geometry.in_cluster(offset) != 0 => None,
                offset => read_vec(checker.file, offset, geometry.cluster_size() as usize).await.ok(),
            };
            self.blocks.insert(index, block);
        }
        let block = self.blocks[&index].as_ref()?;
        if block.is_empty() {
            return Some(0);
        }
        refcount::get(block, geometry.refcount_order, cluster & (geometry.refcount_block_entries() - 1)).ok()
    }
}

impl Checker<'_> {
    /// Looks at each entry of the active tables, and repairs it if that is allowed and safe.
    pub(super) async fn check_copied(&mut self) -> io::Result<()> {
        let report = &self.report;
        // Without leave to repair all, only if the refcounts are known to be right now.
        let clean = report.check_errors == 0 && report.corruptions == 0 && report.leaks == 0;
        let repair = self.fix.errors || (self.fix.leaks && clean);
        let mut refcounts = Refcounts::default();
        let l1_offset = self.header.l1_offset;
        let size = (u64::from(self.header.l1_entries) * 8).min(MAX_L1_BYTES);
        let within = self.length.saturating_sub(l1_offset).min(size) & !7;
        let mut l1 = read_vec(self.file, l1_offset, within as usize).await?;
        let mut l2_offsets = Vec::new();
        for (index, bytes) in l1.as_chunks_mut().0.iter_mut().enumerate() {
            let entry = u64::from_be_bytes(*bytes);
            let offset = entry & L1_OFFSET_MASK;
            if offset == 0 {
                continue;
            }
            l2_offsets.push(offset);
            let Some(refcount) = refcounts.get(self, offset >> self.geometry.cluster_bits).await else {
                continue;
            };
            if let Some(right) = self.wrong_flag(entry, refcount, repair, || {
                format!("L2 cluster: l1_index={index} l1_entry={entry:x}")
            }) {
                *bytes = right.to_be_bytes();
                self.file.write(l1_offset + index as u64 * 8, bytes).await?;
                self.report.corruptions_fixed += 1;
            }
        }
        // One that is named twice is looked at once: it was repaired then.
        let mut seen = std::collections::HashSet::new();
        let len = self.length;
        l2_offsets.retain(|offset| *offset < len && seen.insert(*offset));
        self.check_copied_l2(&l2_offsets, &mut refcounts, repair).await?;
        if repair {
            self.file.flush().await?;
        }
        Ok(())
    }

    async fn check_copied_l2(
        &mut self,
        offsets: &[u64],
        refcounts: &mut Refcounts,
        repair: bool,
    ) -> io::Result<()> {
        let table_size = self.geometry.cluster_size() as usize;
        let entry_size = self.geometry.l2_entry_size();
        let mut tables = std::pin::pin!(read_tables(self.file, offsets, table_size));
        while let Some(read) = tables.next().await {
            let (run, mut bytes) = match read {
                Ok(read) => read,
                Err(error) => {
                    let reason = super::strerror(&error);
                    self.say(format_args!("ERROR: Could not read L2 table: {reason}"));
                    self.report.check_errors += 1;
                    return Err(error);
                }
            };
            for (offset, table) in run.iter().zip(bytes.chunks_exact_mut(table_size)) {
                let mut repaired = 0;
                for entry in table.chunks_exact_mut(entry_size) {
                    let raw = u64::from_be_bytes(entry[..8].try_into().expect("eight bytes"));
                    let Some(refcount) = self.data_refcount(raw, refcounts).await else { continue };
                    if let Some(right) =
                        self.wrong_flag(raw, refcount, repair, || format!("data cluster: l2_entry={raw:x}"))
                    {
                        entry[..8].copy_from_slice(&right.to_be_bytes());
                        repaired += 1;
                    }
                }
                if repaired > 0 {
                    self.write_repaired(*offset, table, repaired).await?;
                }
            }
        }
        Ok(())
    }

    /// The refcount of the cluster that an L2 entry names with a flag COPIED that means something.
    async fn data_refcount(&self, raw: u64, refcounts: &mut Refcounts) -> Option<u64> {
        let offset = raw & L2_OFFSET_MASK;
        let data_file = self.geometry.data_file;
        let is_zero = raw & ZERO != 0 && !self.geometry.extended_l2;
        if raw & COMPRESSED != 0 || (offset == 0 && (is_zero || !data_file || raw & COPIED == 0)) {
            return None;
        }
        if data_file {
            return Some(1);
        }
        refcounts.get(self, offset >> self.geometry.cluster_bits).await
    }

    /// Tells of an entry whose flag COPIED is wrong; returns the right entry if it is to be written.
    fn wrong_flag(
        &mut self,
        entry: u64,
        refcount: u64,
        repair: bool,
        what: impl FnOnce() -> String,
    ) -> Option<u64> {
        if (refcount == 1) == (entry & COPIED != 0) {
            return None;
        }
        let verb = if repair { "Repairing" } else { "ERROR" };
        self.say(format_args!("{verb} OFLAG_COPIED {} refcount={refcount}", what()));
        if !repair {
            self.report.corruptions += 1;
            return None;
        }
        Some(entry ^ COPIED)
    }

    async fn write_repaired(&mut self, offset: u64, table: &[u8], repaired: u64) -> io::Result<()> {
        if !self.is_only_a_table(offset) {
            self.say("ERROR: Could not write L2 table; metadata overlap check failed: Input/output error");
            self.report.check_errors += 1;
            self.report.corruptions += repaired;
            return Err(rustix::io::Errno::IO.into());
        }
        if let Err(error) = write_all(self.file, offset, table).await {
            let reason = super::strerror(&error);
            self.say(format_args!("ERROR: Could not write L2 table: {reason}"));
            self.report.check_errors += 1;
            self.report.corruptions += repaired;
            return Err(error);
        }
        self.report.corruptions_fixed += repaired;
        Ok(())
    }
}
