//! Compares the counted references with the refcounts on disk, and repairs these where they are.

use super::{Checker, Fix};
use crate::format::entry::REFCOUNT_TABLE_OFFSET_MASK;
use crate::format::refcount;
use crate::storage::write_all;
use futures_util::StreamExt;
use rustix::io::Errno;
use std::io;
use std::ops::Range;

/// What one refcount block says, or why it cannot be read.
enum Block {
    /// There is none: all refcounts are 0.
    Absent,
    Refcounts(Vec<u8>),
    Unreadable(io::Error),
}

impl Checker<'_> {
    /// Compares all refcounts, repairing what `fix` says; returns the highest cluster that is in use.
    pub(super) async fn compare(&mut self, fix: Fix) -> io::Result<u64> {
        let clusters = self.references.clusters();
        let per_block = self.geometry.refcount_block_entries();
        let blocks = clusters.div_ceil(per_block);
        let file = self.file;
        let cluster_size = self.geometry.cluster_size() as usize;
        // The table may be longer than the file and shorter than what it must be.
        let table = std::mem::take(&mut self.refcount_table);
        let mut highest = 0;
        let outcome = {
            let places = (0..blocks).map(|index| table.get(index as usize).copied().unwrap_or(0));
            let read = |entry: u64| async move {
                let offset = entry & REFCOUNT_TABLE_OFFSET_MASK;
                match offset {
                    0 => Block::Absent,
                    // Nor can a file be that long.
                    _ if !offset.is_multiple_of(cluster_size as u64)
                        || offset > i64::MAX as u64 - cluster_size as u64 =>
                    {
                        Block::Unreadable(Errno::IO.into())
                    }
                    _ => match crate::storage::read_vec(file, offset, cluster_size).await {
                        Ok(bytes) => Block::Refcounts(bytes),
                        Err(error) => Block::Unreadable(error),
                    },
                }
            };
            let parallel = ((8 << 20) / cluster_size).clamp(2, 64);
            let mut read = std::pin::pin!(futures_util::stream::iter(places.map(read)).buffered(parallel));
            let mut index = 0;
            loop {
                let Some(block) = read.next().await else { break Ok(()) };
                let range = index * per_block..((index + 1) * per_block).min(clusters);
                let offset = table.get(index as usize).copied().unwrap_or(0) & REFCOUNT_TABLE_OFFSET_MASK;
                if let Err(error) = self.compare_block((index, offset), block, range, fix, &mut highest).await
                {
                    break Err(error);
                }
                index += 1;
            }
        };
        self.refcount_table = table;
        outcome?;
        if fix.any() {
            self.file.flush().await?;
        }
        Ok(highest)
    }

    async fn compare_block(
        &mut self,
        (index, offset): (u64, u64),
        block: Block,
        range: Range<u64>,
        fix: Fix,
        highest: &mut u64,
    ) -> io::Result<()> {
        let order = self.geometry.refcount_order;
        let mut bytes = match block {
            Block::Absent if self.references.is_untouched(&range) => return Ok(()),
            Block::Absent => Vec::new(),
            Block::Refcounts(bytes) => bytes,
            Block::Unreadable(error) => {
                self.unreadable((index, offset), range, &error);
                return Ok(());
            }
        };
        let mut changed = false;
        let mut freed: Vec<Range<u64>> = Vec::new();
        for cluster in range.clone() {
            let number = cluster - range.start;
            let on_disk =
                if bytes.is_empty() { 0 } else { refcount::get(&bytes, order, number).unwrap_or(0) };
            let counted = self.references.get(cluster);
            if on_disk | counted != 0 {
                *highest = cluster;
            }
            let mut now = on_disk;
            if on_disk != counted && self.mismatch(cluster, on_disk, counted, fix) {
                changed = refcount::set(&mut bytes, order, number, counted).is_ok();
                now = counted;
                match freed.last_mut() {
                    _ if counted > 0 => {}
                    Some(run) if run.end == cluster => run.end += 1,
                    _ => freed.push(cluster..cluster + 1),
                }
            }
            self.copied_suspect |= self.references.belies(cluster, now);
        }
        if changed {
            write_all(self.file, offset, &bytes).await?;
        }
        for run in freed {
            let (start, end) =
                (run.start << self.geometry.cluster_bits, run.end << self.geometry.cluster_bits);
            if let Err(error) = self.file.discard(start, end - start).await {
                tracing::debug!("discarding {} bytes at {start:#x}: {error}", end - start);
            }
        }
        Ok(())
    }

    /// Tells of a wrong refcount and counts it; returns whether it is to be made right.
    #[cold]
    fn mismatch(&mut self, cluster: u64, on_disk: u64, counted: u64, fix: Fix) -> bool {
        let repair = if on_disk == 0 {
            self.rebuild = true;
            false
        } else {
            if on_disk > counted { fix.leaks } else { fix.errors }
        };
        let (found, fixed, verb) = if on_disk < counted {
            (&mut self.report.corruptions, &mut self.report.corruptions_fixed, "ERROR")
        } else {
            (&mut self.report.leaks, &mut self.report.leaks_fixed, "Leaked")
        };
        *if repair { fixed } else { found } += 1;
        let verb = if repair { "Repairing" } else { verb };
        self.say(format_args!("{verb} cluster {cluster} refcount={on_disk} reference={counted}"));
        repair
    }

    #[cold]
    fn unreadable(&mut self, (index, offset): (u64, u64), range: Range<u64>, error: &io::Error) {
        if self.geometry.in_cluster(offset) != 0 && !self.told_of_misplaced_block {
            self.told_of_misplaced_block = true;
            let (verb, which) = match self.fix.any() {
                true => ("Marking image as corrupt", "corruption"),
                false => ("Image is corrupt", "non-fatal corruption"),
            };
            let number = if index == 0 { "0".to_owned() } else { format!("{index:#x}") };
            self.say(format_args!(
                "qcow2: {verb}: Refblock offset {offset:#x} unaligned (reftable index: {number}); further {which} \
                 events will be suppressed"
            ));
        }
        let reason = super::strerror(error);
        for cluster in range {
            self.say(format_args!("Can't get refcount for cluster {cluster}: {reason}"));
            self.report.check_errors += 1;
        }
    }
}
