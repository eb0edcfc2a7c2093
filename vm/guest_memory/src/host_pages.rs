//! The host's pages under guest memory: giving them back, and telling which there are.

use crate::{GuestMemory, PAGE_SIZE};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

impl GuestMemory {
    /// Says that the guest does not need the content of `range`, and gives its pages back to the host where
    /// that is possible: they then read as zeros. They stay, with their content, if memory is locked,
    /// consists of reserved huge pages, or is a private copy of a file. What of the range is no memory does
    /// not count. The dirty log and the hooks are told.
    ///
    /// # Errors
    /// The host's, if it does not take pages back.
    pub fn discard(&self, range: Range<u64>) -> io::Result<()> {
        if self.locked || self.backing.huge || (self.backing.file.is_some() && !self.backing.shared) {
            return Ok(());
        }
        // The regions stand in the file one after the other.
        let mut offset = 0;
        for region in self.regions.iter() {
            let start = range.start.max(region.gpa).next_multiple_of(PAGE_SIZE);
            let end = range.end.min(region.gpa + region.len) & !(PAGE_SIZE - 1);
            if start < end {
                let within = start - region.gpa;
                match &self.backing.file {
                    Some(file) => punch(file, offset + within, end - start)?,
                    None => region.pages.mapping().discard(within as usize, (end - start) as usize)?,
                }
                // Their content changed: for the dirty log, and for code translated from them.
                self.changed(start, end - start);
            }
            offset += region.len;
        }
        Ok(())
    }

    /// The addresses of the pages that the host has given memory to, ascending: all that are not among them
    /// hold zeros. Of a private copy of a file these are all pages.
    ///
    /// # Errors
    /// The host's, if it does not tell.
    pub fn pages_in_use(&self) -> io::Result<Vec<u64>> {
        let mut pages = Vec::new();
        let mut offset = 0;
        for region in self.regions.iter() {
            let all = region.gpa..region.gpa + region.len;
            match &self.backing.file {
                None => in_page_map(region.host as u64, all, &mut pages)?,
                Some(file) if self.backing.shared => data_in_file(file, offset, all, &mut pages),
                Some(_) => pages.extend(all.step_by(PAGE_SIZE as usize)),
            }
            offset += region.len;
        }
        Ok(pages)
    }
}

fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    loop {
        match fallocate(file, how, offset, len) {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// Adds the pages of `range`, which begins at `offset` of the file, that are no holes of it.
fn data_in_file(file: &File, offset: u64, range: Range<u64>, pages: &mut Vec<u64>) {
    let end = offset + (range.end - range.start);
    let mut at = offset;
    while at < end {
        // An error says that there is no more data.
        let Ok(data) = seek(file, SeekFrom::Data(at)) else { break };
        let hole = seek(file, SeekFrom::Hole(data)).unwrap_or(end);
        let (start, stop) = (data & !(PAGE_SIZE - 1), hole.min(end));
        pages.extend((start..stop).step_by(PAGE_SIZE as usize).map(|at| range.start + at - offset));
        at = hole.max(at + PAGE_SIZE);
    }
}

/// Adds the pages of `range`, which stands at address `host` of this process, that are in RAM or in swap
/// (proc_pid_pagemap(5)).
fn in_page_map(host: u64, range: Range<u64>, pages: &mut Vec<u64>) -> io::Result<()> {
    const IN_RAM_OR_SWAP: u64 = 0b11 << 62;
    /// Pages looked at in one read.
    const BATCH: u64 = 4096;
    let map = File::open("/proc/self/pagemap")?;
    let mut entries = vec![0; BATCH as usize * 8];
    let count = (range.end - range.start) / PAGE_SIZE;
    for first in (0..count).step_by(BATCH as usize) {
        let some = &mut entries[..(count - first).min(BATCH) as usize * 8];
        map.read_exact_at(some, (host / PAGE_SIZE + first) * 8)?;
        for (index, entry) in some.as_chunks::<8>().0.iter().enumerate() {
            if u64::from_le_bytes(*entry) & IN_RAM_OR_SWAP != 0 {
                pages.push(range.start + (first + index as u64) * PAGE_SIZE);
            }
        }
    }
    Ok(())
}
