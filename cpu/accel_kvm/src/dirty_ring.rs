//! The kernel's rings of written pages (`KVM_CAP_DIRTY_LOG_RING` in Linux's `Documentation/virt/kvm/api.rst`): one
//! for each vCPU, which the kernel fills and this process empties.

use crate::ioctl;
use kvm_bindings as kb;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// Bytes of a ring: 4096 entries. Linux keeps up to 576 of them in reserve on processors that log pages by
/// themselves.
const BYTES: u64 = 64 << 10;

/// States of an entry: written by the kernel, and taken by this process.
const DIRTY: u32 = 1 << 0;
const TAKEN: u32 = 1 << 1;

/// The capability by which this KVM offers rings, if it does, and the bytes that they are to have.
pub(crate) fn offered(kvm: &Kvm) -> Option<(u32, u64)> {
    let most = |cap: u32| u64::try_from(kvm.check_extension_raw(cap.into())).unwrap_or(0);
    // The first says what x86 always keeps to: how the two sides order their accesses.
    [kb::KVM_CAP_DIRTY_LOG_RING_ACQ_REL, kb::KVM_CAP_DIRTY_LOG_RING]
        .into_iter()
        .map(|cap| (cap, most(cap).min(BYTES)))
        .find(|(_, bytes)| *bytes > 0)
}

/// The ring of one vCPU.
pub(crate) struct DirtyRing {
    entries: NonNull<kb::kvm_dirty_gfn>,
    count: u32,
    /// The entry that the kernel writes next, or has written.
    next: u32,
}

// SAFETY: the mapping belongs to this; nobody else in this process accesses it.
unsafe impl Send for DirtyRing {}

impl DirtyRing {
    /// The ring of `vcpu`, of a VM whose rings have `bytes`.
    pub(crate) fn map(vcpu: &VcpuFd, bytes: u64) -> io::Result<Self> {
        // SAFETY: asks for a number.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let offset = libc::off_t::from(kb::KVM_DIRTY_LOG_PAGE_OFFSET) * page;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes as usize,
                access,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                offset,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let entries = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        let count = bytes / size_of::<kb::kvm_dirty_gfn>() as u64;
        Ok(Self { entries, count: count as u32, next: 0 })
    }

    /// Takes all entries, and calls `page` with the slot of each and the page's number in it. Says whether there
    /// were any; [`give_back`] is to follow then.
    pub(crate) fn take(&mut self, mut page: impl FnMut(u32, u64)) -> bool {
        let mut any = false;
        // No more than there are, should the kernel be faster.
        for _ in 0..self.count {
            // SAFETY: within the mapping, as the number is less than the count.
            let entry = unsafe { self.entries.add((self.next % self.count) as usize) }.as_ptr();
            // SAFETY: the field is aligned, and the kernel accesses it as an atomic as well.
            let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
            if flags.load(Ordering::Acquire) != DIRTY {
                break;
            }
            // SAFETY: the kernel leaves the entry alone until it was given back.
            let (slot, offset) = unsafe { ((*entry).slot, (*entry).offset) };
            page(slot, offset);
            flags.store(TAKEN, Ordering::Release);
            self.next = self.next.wrapping_add(1);
            any = true;
        }
        any
    }
}

impl Drop for DirtyRing {
    fn drop(&mut self) {
        let bytes = self.count as usize * size_of::<kb::kvm_dirty_gfn>();
        // SAFETY: this owns the mapping.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), bytes) };
    }
}

/// Gives the entries that were taken of all the VM's rings back to the kernel, which notes the next writes to their
/// pages again.
pub(crate) fn give_back(vm: &VmFd) -> io::Result<()> {
    ioctl::reset_dirty_rings(vm)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ring in anonymous memory, with this test as its kernel.
    fn ring(count: u32) -> DirtyRing {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let bytes = count as usize * size_of::<kb::kvm_dirty_gfn>();
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        DirtyRing { entries: NonNull::new(start.cast()).unwrap(), count, next: 0 }
    }

    #[test]
    fn entries_are_taken_once_and_in_order_around_the_end() {
        let mut ring = ring(256);
        let mut written = 0;
        for round in [3u64, 0, 200, 256, 1] {
            let from = written;
            for page in from..from + round {
                let entry = kb::kvm_dirty_gfn { flags: DIRTY, slot: 7, offset: page };
                // SAFETY: within the mapping.
                unsafe { ring.entries.add((page % 256) as usize).write(entry) };
            }
            written += round;
            let mut taken = Vec::new();
            assert_eq!(ring.take(|slot, page| taken.push((slot, page))), round > 0);
            assert_eq!(taken, (from..written).map(|page| (7, page)).collect::<Vec<_>>());
            assert!(!ring.take(|_, _| panic!("taken twice")));
        }
    }
}
