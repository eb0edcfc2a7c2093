//! The snapshot table: read, and written anew where it is incomplete.

use super::references::Claim;
use super::{Checker, SNAPSHOTS_AT};
use crate::format::snapshot::{ENTRY_BYTES, Snapshot, TableReader, encode_table};
use crate::format::{MAX_SNAPSHOTS, Table};
use crate::storage::{read_vec, write_all};
use rustix::io::Errno;
use std::io;

/// The least extra data of an entry in an image of version 3.
const LEAST_EXTRA: u32 = 16;
/// How much of the table is read at least, in bytes.
const FIRST_READ: usize = 64 << 10;

/// The snapshot table as it was read.
#[derive(Debug, Default)]
pub(super) struct Snapshots {
    pub(super) offset: u64,
    /// How many bytes it takes.
    pub(super) bytes: u64,
    pub(super) entries: Vec<Snapshot>,
    /// Entries that must be written anew.
    pub(super) corruptions: u64,
}

impl Checker<'_> {
    /// Reads the snapshot table; with leave to repair, snapshots past the most that there may be are cut off.
    pub(super) async fn read_snapshots(&mut self) -> io::Result<Snapshots> {
        let mut count = self.header.snapshots;
        let overhang = count.saturating_sub(MAX_SNAPSHOTS);
        if overhang > 0 && self.fix.errors {
            self.say(format_args!("Discarding {overhang} overhanging snapshots"));
            count = MAX_SNAPSHOTS;
        }
        let offset = self.header.snapshots_offset;
        let entry = ENTRY_BYTES as u64;
        let most = entry * u64::from(MAX_SNAPSHOTS);
        if let Err(error) = self.geometry.check_table(Table::Snapshots, offset, count.into(), entry, most) {
            self.report.check_errors += 1;
            // The table's name begins no sentence here.
            let text = error.to_string().replacen("Snapshot", "snapshot", 1);
            self.say(format_args!("ERROR {text}"));
            if overhang > 0 {
                self.say(format_args!(
                    "You can force-remove all {overhang} overhanging snapshots with qemu-img check -r all"
                ));
            }
            return Err(if overhang > 0 { Errno::FBIG } else { Errno::INVAL }.into());
        }
        let read = self.read_snapshot_table(offset, count).await;
        let (bytes, entries) = match read {
            Ok(read) => read,
            Err(error) => {
                self.report.check_errors += 1;
                self.say(format_args!("ERROR failed to read the snapshot table: {error}"));
                return Err(error);
            }
        };
        if count < self.header.snapshots {
            self.header.snapshots = count;
            self.file.write(SNAPSHOTS_AT, &count.to_be_bytes()).await?;
            self.file.flush().await?;
            self.report.corruptions_fixed += u64::from(overhang);
        }
        let mut corruptions = 0;
        if self.header.version >= 3 {
            let verb = if self.fix.errors { "Repairing" } else { "ERROR" };
            for (index, snapshot) in entries.iter().enumerate() {
                if snapshot.extra_length < LEAST_EXTRA {
                    corruptions += 1;
                    self.say(format_args!("{verb} snapshot table entry {index} is incomplete"));
                }
            }
        }
        Ok(Snapshots { offset, bytes, entries, corruptions })
    }

    async fn read_snapshot_table(&self, offset: u64, count: u32) -> io::Result<(u64, Vec<Snapshot>)> {
        let mut reader = TableReader::new(count);
        let mut bytes = Vec::new();
        let within = self.file.len().saturating_sub(offset);
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidInput, error);
        while let Some(needed) = reader.read(&bytes).map_err(invalid)? {
            if needed as u64 > within {
                return Err(Errno::INVAL.into());
            }
            let len = needed.next_multiple_of(FIRST_READ).max(bytes.len() * 2).min(within as usize);
            bytes = read_vec(self.file, offset, len).await?;
        }
        Ok((reader.length() as u64, reader.snapshots))
    }

    /// Writes the table anew, with complete entries, where nothing references anything.
    pub(super) async fn repair_snapshots(&mut self, snapshots: &mut Snapshots) -> io::Result<()> {
        if snapshots.corruptions == 0 || !self.fix.errors {
            return Ok(());
        }
        for snapshot in &mut snapshots.entries {
            snapshot.disk_size = snapshot.disk_size.or(Some(self.header.size));
        }
        let written = self.write_snapshot_table(snapshots).await;
        if let Err(error) = written {
            self.report.check_errors += 1;
            let reason = super::strerror(&error);
            self.say(format_args!("ERROR failed to update snapshot table: {reason}"));
            return Err(error);
        }
        self.report.corruptions -= snapshots.corruptions;
        self.report.corruptions_fixed += snapshots.corruptions;
        Ok(())
    }

    /// The new table takes clusters past the end of the file; refcount structures are rebuilt with it in them, and the
    /// header then names both.
    async fn write_snapshot_table(&mut self, snapshots: &Snapshots) -> io::Result<()> {
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        let table = encode_table(&snapshots.entries).map_err(invalid)?;
        let count = self.geometry.clusters(table.len() as u64);
        let first = self.references.find_free(0, count);
        let max = self.geometry.refcount_max();
        for cluster in first..first + count {
            self.references.add(cluster, 1, Claim::Nothing, max);
        }
        let offset = first << self.geometry.cluster_bits;
        write_all(self.file, offset, &table).await?;
        self.rebuild_refcounts().await?;
        let mut pointer = self.header.snapshots.to_be_bytes().to_vec();
        pointer.extend(offset.to_be_bytes());
        self.file.write(SNAPSHOTS_AT, &pointer).await?;
        self.file.flush().await?;
        self.header.snapshots_offset = offset;
        // The old table and the old refcount structures are leaked now.
        let moved = Snapshots {
            offset,
            bytes: table.len() as u64,
            entries: snapshots.entries.clone(),
            corruptions: 0,
        };
        let kept = self.report;
        let say = std::mem::replace(&mut self.quiet, true);
        self.calculate(&moved, super::Fix::NONE).await?;
        self.compare(super::Fix::LEAKS).await?;
        self.quiet = say;
        self.report = kept;
        Ok(())
    }
}
