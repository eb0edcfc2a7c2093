//! What persistent bitmaps reference.

use super::Checker;
use super::references::Claim;
use crate::format::bitmap::{BitmapCluster, MAX_TABLE_ENTRIES, parse_directory};
use rustix::io::Errno;
use std::io;

impl Checker<'_> {
    /// Counts the bitmap directory, the bitmap tables and the bitmaps' data.
    pub(super) async fn scan_bitmaps(&mut self) -> io::Result<()> {
        let Some(pointer) = self.extensions.bitmaps else { return Ok(()) };
        let directory = pointer.directory;
        self.refer(directory.offset, directory.length, 1, Claim::Nothing);
        let within = self.length.saturating_sub(directory.offset).min(directory.length);
        let bytes = crate::storage::read_vec(self.file, directory.offset, within as usize).await?;
        let Ok(entries) = parse_directory(&bytes, pointer.count) else {
            self.report.corruptions += 1;
            return Err(Errno::INVAL.into());
        };
        // Tables that do not overlap fit into the file.
        let mut budget = self.length;
        for entry in entries {
            let bytes = u64::from(entry.table_entries.min(MAX_TABLE_ENTRIES)) * 8;
            if entry.check(&self.geometry, self.header.size).is_err() || bytes > budget {
                self.report.corruptions += 1;
                return Err(Errno::INVAL.into());
            }
            budget -= bytes;
            self.refer(entry.table_offset, bytes, 1, Claim::Nothing);
            let within = self.length.saturating_sub(entry.table_offset).min(bytes) & !7;
            let table = crate::storage::read_vec(self.file, entry.table_offset, within as usize).await?;
            let Ok(table) = BitmapCluster::parse_table(&table, &self.geometry) else {
                self.report.corruptions += 1;
                return Err(Errno::INVAL.into());
            };
            for cluster in table {
                if let BitmapCluster::At(offset) = cluster {
                    self.refer(offset, self.geometry.cluster_size(), 1, Claim::Nothing);
                }
            }
        }
        Ok(())
    }
}
