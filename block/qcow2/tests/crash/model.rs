//! A load, and what must be in the disk after a crash in the middle of it.

use crate::disk::Log;
use block_graph::{NodeRef, SnapshotInfo, WriteFlags, ZeroFlags};
use futures_util::future::join_all;
use io_loop::IoBuffer;
use std::ops::Range;

/// Numbers that look random and are the same each time (splitmix64).
#[derive(Clone, Debug)]
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// One change of the disk, and the part of the log during which it was done.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) range: Range<u64>,
    /// The byte that fills the range.
    pub(crate) value: u8,
    /// The range may keep what it had, or be zero.
    pub(crate) discard: bool,
    /// How long the log was when the change began.
    pub(crate) began: usize,
}

/// What the disk held when a flush ended.
#[derive(Clone, Debug)]
pub(crate) struct Flushed {
    /// How long the log was when the flush had ended.
    pub(crate) at: usize,
    pub(crate) content: Vec<u8>,
    /// Which changes are in it.
    pub(crate) changes: usize,
    /// Bytes that may be either what is in `content` or zero: they were discarded.
    pub(crate) vague: Vec<bool>,
}

/// A load on a disk.
pub(crate) struct Load {
    pub(crate) node: NodeRef,
    log: Log,
    numbers: Numbers,
    size: u64,
    content: Vec<u8>,
    vague: Vec<bool>,
    value: u8,
    snapshots: Vec<String>,
    pub(crate) changes: Vec<Change>,
    pub(crate) flushes: Vec<Flushed>,
}

impl Load {
    pub(crate) fn new(node: NodeRef, log: Log, seed: u64) -> Self {
        let size = node.len();
        let (content, vague) = (vec![0; size as usize], vec![false; size as usize]);
        let flushed = Flushed { at: log.len(), content: content.clone(), changes: 0, vague: vague.clone() };
        Self {
            node,
            log,
            numbers: Numbers(seed),
            size,
            content,
            vague,
            value: 0,
            snapshots: Vec::new(),
            changes: Vec::new(),
            flushes: vec![flushed],
        }
    }

    fn range(&mut self, part: Range<u64>) -> Range<u64> {
        let unit = [512, 512, 4096, 65536][self.numbers.below(4) as usize];
        let len = part.end - part.start;
        let start = part.start + self.numbers.below(len) / unit * unit;
        let most = [2048, 20_000, 150_000][self.numbers.below(3) as usize];
        let wanted = (self.numbers.below(most) / 512 * 512).max(512);
        start..(start + wanted).min(part.end)
    }

    fn begin(&mut self, range: &Range<u64>, value: u8, discard: bool) {
        self.changes.push(Change { range: range.clone(), value, discard, began: self.log.len() });
        let (start, end) = (range.start as usize, range.end as usize);
        if discard {
            self.vague[start..end].fill(true);
        } else {
            self.content[start..end].fill(value);
            self.vague[start..end].fill(false);
        }
    }

    /// Does one or several things at a time.
    pub(crate) async fn step(&mut self) {
        match self.numbers.below(20) {
            0..=10 => self.write_several().await,
            11..=12 => {
                let range = self.range(0..self.size);
                self.begin(&range, 0, false);
                let flags =
                    if self.numbers.below(2) == 0 { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
                self.node.write_zeroes(range.start, range.end - range.start, flags).await.unwrap();
            }
            13..=14 => {
                let range = self.range(0..self.size);
                self.begin(&range, 0, true);
                self.node.discard(range.start, range.end - range.start).await.unwrap();
            }
            15 => self.snapshot().await,
            16 => self.write_compressed().await,
            _ => self.flush().await,
        }
    }

    /// Writes to several parts of the disk at once.
    async fn write_several(&mut self) {
        let parts = 1 + self.numbers.below(4);
        let mut writes = Vec::new();
        for part in 0..parts {
            let range = self.range(part * self.size / parts..(part + 1) * self.size / parts);
            self.value = self.value % 250 + 1;
            let value = self.value;
            self.begin(&range, value, false);
            let node = self.node.clone();
            let flags = if self.numbers.below(6) == 0 { WriteFlags::FUA } else { WriteFlags::empty() };
            writes.push(async move {
                let bytes = vec![value; (range.end - range.start) as usize];
                node.write(range.start, &IoBuffer::from(&bytes[..]).into_io(), flags).await.unwrap();
            });
        }
        join_all(writes).await;
    }

    async fn write_compressed(&mut self) {
        let cluster = self.node.driver().image().unwrap().info().cluster_size.unwrap();
        let start = self.numbers.below(self.size / cluster) * cluster;
        let range = start..(start + cluster).min(self.size);
        self.value = self.value % 250 + 1;
        let value = self.value;
        let (before, vague) = (self.content.clone(), self.vague.clone());
        self.begin(&range, value, false);
        let bytes = vec![value; (range.end - range.start) as usize];
        let io = IoBuffer::from(&bytes[..]).into_io();
        if let Err(error) = self.node.write(start, &io, WriteFlags::COMPRESSED).await {
            // Over a cluster that has data already.
            assert_eq!(error.errno(), block_graph::Errno::IO);
            self.changes.pop();
            self.content = before;
            self.vague = vague;
        }
    }

    async fn snapshot(&mut self) {
        let image = self.node.driver().image().unwrap();
        if self.snapshots.len() < 3 {
            let name = format!("s{}", self.numbers.next());
            image
                .snapshot_create(SnapshotInfo { name: name.clone(), ..SnapshotInfo::default() })
                .await
                .unwrap();
            self.snapshots.push(name);
        } else {
            let index = self.numbers.below(self.snapshots.len() as u64) as usize;
            image.snapshot_delete(&self.snapshots.remove(index)).await.unwrap();
        }
    }

    pub(crate) async fn flush(&mut self) {
        self.node.flush().await.unwrap();
        let flushed = Flushed {
            at: self.log.len(),
            content: self.content.clone(),
            changes: self.changes.len(),
            vague: self.vague.clone(),
        };
        self.flushes.push(flushed);
    }

    /// Complains about a byte of `found`, a disk after a crash when the log was `at` long, that was never written there
    /// since the last flush, and is not what was there then.
    pub(crate) fn complaint(&self, at: usize, found: &[u8]) -> Option<String> {
        let flushed = self.flushes.iter().rev().find(|flushed| flushed.at <= at)?;
        let since = &self.changes[flushed.changes..];
        let since: Vec<_> = since.iter().filter(|change| change.began <= at).collect();
        for (offset, byte) in found.iter().enumerate() {
            let allowed = *byte == flushed.content[offset]
                || (flushed.vague[offset] && *byte == 0)
                || since.iter().any(|change| {
                    change.range.contains(&(offset as u64)) && (*byte == change.value || change.discard && *byte == 0)
                })
                // What was discarded before may have been written earlier still.
                || flushed.vague[offset] && self.changes[..flushed.changes].iter().any(|change| {
                    change.range.contains(&(offset as u64)) && *byte == change.value
                });
            if !allowed {
                let was = flushed.content[offset];
                let with: Vec<_> =
                    since.iter().filter(|change| change.range.contains(&(offset as u64))).collect();
                return Some(format!(
                    "byte {offset:#x} is {byte}; at the last flush it was {was}, since then {with:?}"
                ));
            }
        }
        None
    }
}
