//! Guest memory in this process's address space, and what the host's kernel is told about it.

use crate::backing::Backing;
use crate::options::{Lock, NodeBinding, NodePolicy};
use crate::{MemoryError, host};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MlockFlags, ProtFlags};
use std::ffi::c_void;
use std::io;
use std::ops::Range;

/// What mappings are aligned to at least, so that transparent huge pages fit.
const LEAST_ALIGN: usize = 2 << 20;

/// One mapping; dropping it unmaps.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: *mut c_void,
    len: usize,
}

// SAFETY: a range of addresses; nothing in it is accessed through this type.
unsafe impl Send for Mapping {}
// SAFETY: as for `Send`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes from `offset` of `backing`, at an address that is a multiple of its page size and
    /// of 2 MiB.
    pub(crate) fn new(backing: &Backing, offset: u64, len: usize) -> io::Result<Self> {
        let align = usize::try_from(backing.page_size).map_err(io::Error::other)?.max(LEAST_ALIGN);
        let reserved = len.checked_add(align).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let start =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), reserved, ProtFlags::empty(), flags) }?;
        let skip = start.align_offset(align);
        let unmap = |from: *mut c_void, len: usize| {
            if len > 0 {
                // SAFETY: a part of the reservation made above, which nobody has seen yet.
                let _ = unsafe { rustix::mm::munmap(from, len) };
            }
        };
        unmap(start, skip);
        let aligned = start.wrapping_byte_add(skip);
        unmap(aligned.wrapping_byte_add(len), reserved - skip - len);
        // From here on what is left of the reservation is unmapped when an error is returned.
        let mapping = Self { start: aligned, len };
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let mut flags = MapFlags::FIXED;
        flags |= if backing.shared { MapFlags::SHARED } else { MapFlags::PRIVATE };
        if backing.huge {
            // Without MAP_NORESERVE: the kernel sets the pages aside now, so that none is missing later.
            if backing.file.is_none() {
                let shift = backing.page_size.trailing_zeros();
                flags |= MapFlags::HUGETLB | MapFlags::from_bits_retain(shift << 26);
            }
        } else {
            flags |= MapFlags::NORESERVE;
        }
        // SAFETY: it replaces the reservation made above, which nobody has seen yet.
        unsafe {
            match &backing.file {
                Some(file) => rustix::mm::mmap(aligned, len, access, flags, file, offset),
                None => rustix::mm::mmap_anonymous(aligned, len, access, flags),
            }
        }?;
        Ok(mapping)
    }

    /// Its first byte.
    pub(crate) fn start(&self) -> *mut u8 {
        self.start.cast()
    }

    /// The part of it, cut to where it ends, that begins at `offset`.
    fn part(&self, offset: usize, len: usize) -> (*mut c_void, usize) {
        let offset = offset.min(self.len);
        (self.start.wrapping_byte_add(offset), len.min(self.len - offset))
    }

    fn advise(&self, offset: usize, len: usize, advice: Advice) -> Result<(), Errno> {
        let (start, len) = self.part(offset, len);
        loop {
            // SAFETY: within the mapping; the advice given in this file changes no content that anybody
            // relies on: see `discard`.
            match unsafe { rustix::mm::madvise(start, len, advice) } {
                Err(Errno::INTR | Errno::AGAIN) => {}
                other => return other,
            }
        }
    }

    /// Advice on all of it.
    pub(crate) fn advise_all(&self, what: &'static str, advice: Advice) -> Result<(), MemoryError> {
        self.advise(0, self.len, advice).map_err(|errno| MemoryError::Advice { what, source: errno.into() })
    }

    /// Allocates a part of it.
    pub(crate) fn populate(&self, offset: usize, len: usize) -> Result<(), Errno> {
        self.advise(offset, len, Advice::LinuxPopulateWrite)
    }

    /// Gives a part of private anonymous memory back to the host; it then reads as zeros.
    pub(crate) fn discard(&self, offset: usize, len: usize) -> Result<(), Errno> {
        self.advise(offset, len, Advice::LinuxDontNeed)
    }

    /// Keeps it in RAM.
    pub(crate) fn lock(&self, lock: Lock) -> Result<(), Errno> {
        let flags = match lock {
            Lock::Off => return Ok(()),
            Lock::On => MlockFlags::empty(),
            Lock::OnFault => MlockFlags::ONFAULT,
        };
        // SAFETY: within the mapping; no content changes.
        unsafe { rustix::mm::mlock_with(self.start, self.len, flags) }
    }

    /// Has the pages of a part of it come from NUMA nodes. The part begins at guest physical address `gpa`.
    pub(crate) fn bind(
        &self,
        offset: usize,
        range: Range<u64>,
        binding: &NodeBinding,
    ) -> Result<(), MemoryError> {
        /// Modes and flags of mbind(2).
        const PREFERRED: i32 = 1;
        const BIND: i32 = 2;
        const INTERLEAVE: i32 = 3;
        const PREFERRED_MANY: i32 = 5;
        const STRICT_AND_MOVE: u32 = 0b11;
        host::check_nodes(&binding.nodes)?;
        let mode = match binding.policy {
            NodePolicy::Bind => BIND,
            NodePolicy::Interleave => INTERLEAVE,
            NodePolicy::Preferred if binding.nodes.len() > 1 => PREFERRED_MANY,
            NodePolicy::Preferred => PREFERRED,
        };
        let mut mask = [0u64; 16];
        for node in &binding.nodes {
            if let Some(word) = mask.get_mut(*node as usize / 64) {
                *word |= 1 << (node % 64);
            }
        }
        let (start, len) = self.part(offset, (range.end - range.start) as usize);
        // SAFETY: the range is within the mapping; no content changes; the mask outlives the call and has
        // as many bits as it is said to have, one fewer than are counted.
        let done = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                start,
                len,
                mode,
                mask.as_ptr(),
                mask.len() * 64 + 1,
                STRICT_AND_MOVE,
            )
        };
        if done == 0 {
            return Ok(());
        }
        let nodes: Vec<_> = binding.nodes.iter().map(u32::to_string).collect();
        Err(MemoryError::Bind { range, nodes: nodes.join(","), source: io::Error::last_os_error() })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this owns the mapping, and those who use it hold on to this.
        let _ = unsafe { rustix::mm::munmap(self.start, self.len) };
    }
}
