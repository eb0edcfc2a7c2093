//! New refcount structures in place of ones that cannot be repaired.

use super::references::Claim;
use super::{Checker, REFCOUNT_TABLE_AT};
use crate::format::{MAX_REFCOUNT_TABLE_BYTES, refcount};
use crate::storage::write_all;
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::io;

/// Where the new structures will be.
struct Plan {
    /// Offsets of refcount blocks by their index in the table.
    blocks: BTreeMap<u64, u64>,
    table_cluster: u64,
    table_clusters: u64,
}

impl Checker<'_> {
    /// Writes refcounts that say what was counted, in clusters that nothing references, and makes the header name them.
    ///
    /// The old structures count as referenced still, so that they stay whole until the header is written.
    pub(super) async fn rebuild_refcounts(&mut self) -> io::Result<()> {
        let plan = self.plan_refcounts()?;
        let geometry = self.geometry;
        let per_block = geometry.refcount_block_entries();
        let mut table = vec![0; (plan.table_clusters << geometry.cluster_bits) as usize];
        for (index, offset) in &plan.blocks {
            table[*index as usize * 8..][..8].copy_from_slice(&offset.to_be_bytes());
            let mut block = vec![0; geometry.cluster_size() as usize];
            for number in 0..per_block {
                let count = self.references.get(index * per_block + number);
                if count > 0 {
                    // Counts are never above what a refcount holds.
                    let set = refcount::set(&mut block, geometry.refcount_order, number, count);
                    set.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                }
            }
            let written = write_all(self.file, *offset, &block).await;
            self.or_tell("ERROR writing refblock", written)?;
        }
        let table_offset = plan.table_cluster << geometry.cluster_bits;
        let written = write_all(self.file, table_offset, &table).await;
        self.or_tell("ERROR writing reftable", written)?;
        self.file.flush().await?;
        let mut pointer = table_offset.to_be_bytes().to_vec();
        pointer.extend((plan.table_clusters as u32).to_be_bytes());
        let mut written = self.file.write(REFCOUNT_TABLE_AT, &pointer).await;
        if written.is_ok() {
            written = self.file.flush().await;
        }
        self.or_tell("ERROR setting reftable", written)?;
        self.header.refcount_table_offset = table_offset;
        self.header.refcount_table_clusters = plan.table_clusters as u32;
        self.read_refcount_table().await
    }

    /// Finds room for a block for each range of clusters with references, and for the table of these blocks.
    fn plan_refcounts(&mut self) -> io::Result<Plan> {
        let per_block = self.geometry.refcount_block_entries();
        let per_cluster = self.geometry.cluster_size() / 8;
        let mut blocks = BTreeMap::new();
        let mut placed: Option<(u64, u64)> = None;
        loop {
            self.place_blocks(&mut blocks, per_block)?;
            let entries = blocks.last_key_value().map_or(1, |(last, _)| last + 1);
            let needed = entries.div_ceil(per_cluster);
            if needed > MAX_REFCOUNT_TABLE_BYTES >> self.geometry.cluster_bits {
                return Err(Errno::FBIG.into());
            }
            match placed {
                Some((cluster, count)) if count >= needed => {
                    return Ok(Plan { blocks, table_cluster: cluster, table_clusters: count });
                }
                // Too short now: another place.
                Some((cluster, count)) => {
                    (cluster..cluster + count).for_each(|one| self.references.set(one, 0))
                }
                None => {}
            }
            let cluster = self.references.find_free(0, needed);
            for one in cluster..cluster + needed {
                self.take(one)?;
            }
            placed = Some((cluster, needed));
        }
    }

    /// Gives each range of clusters that has references a block, its own cluster included.
    fn place_blocks(&mut self, blocks: &mut BTreeMap<u64, u64>, per_block: u64) -> io::Result<()> {
        let mut free = 0;
        loop {
            let mut placed = false;
            let ranges = self.references.clusters().div_ceil(per_block);
            for index in 0..ranges {
                let range = index * per_block..((index + 1) * per_block).min(self.references.clusters());
                let is_needed = !blocks.contains_key(&index)
                    && !self.references.is_untouched(&range)
                    && range.into_iter().any(|cluster| self.references.get(cluster) > 0);
                if is_needed {
                    free = self.references.find_free(free, 1);
                    self.take(free)?;
                    blocks.insert(index, free << self.geometry.cluster_bits);
                    placed = true;
                }
            }
            if !placed {
                return Ok(());
            }
        }
    }

    /// Marks a free cluster as used.
    fn take(&mut self, cluster: u64) -> io::Result<()> {
        if cluster > i32::MAX as u64 {
            return Err(Errno::FBIG.into());
        }
        self.references.add(cluster, 1, Claim::Nothing, self.geometry.refcount_max());
        Ok(())
    }

    fn or_tell<T>(&mut self, what: &str, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result {
            let reason = super::strerror(error);
            self.say(format_args!("{what}: {reason}"));
            self.report.check_errors += 1;
        }
        result
    }
}
