//! Memory for generated code.

use crate::Emitter;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Why there is no code cache.
#[derive(Debug)]
pub struct CacheError {
    /// The size asked for.
    pub bytes: usize,
    /// The host's error.
    pub source: std::io::Error,
}

impl std::fmt::Display for CacheError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the host cannot provide a code cache of {} bytes: {}", self.bytes, self.source)
    }
}

impl std::error::Error for CacheError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// A range of memory that generated code lives in, mapped once to write and once to execute. Space is given
/// out in pieces, upwards, and taken back all at once.
#[derive(Debug)]
pub struct CodeCache {
    rw: *mut u8,
    rx: *mut u8,
    len: usize,
    next: AtomicUsize,
}

// SAFETY: the pointers stand for mappings that the value owns; pieces given out are disjoint.
unsafe impl Send for CodeCache {}
// SAFETY: as for `Send`; `patch` is an atomic store.
unsafe impl Sync for CodeCache {}

impl CodeCache {
    /// A cache of `len` bytes (rounded up to pages). Memory is only taken as code comes to be; the whole must
    /// be under 2 GiB, as jumps in it are relative.
    ///
    /// # Errors
    /// [`CacheError`] if the host refuses, or `len` is too large.
    pub fn new(len: usize) -> Result<Self, CacheError> {
        let bytes = len;
        let error = |source: std::io::Error| CacheError { bytes, source };
        let len = len.next_multiple_of(4096);
        if len == 0 || len >= 1 << 31 {
            return Err(error(std::io::ErrorKind::InvalidInput.into()));
        }
        let fd = memfd_create("code-cache", MemfdFlags::CLOEXEC).map_err(|e| error(e.into()))?;
        ftruncate(&fd, len as u64).map_err(|e| error(e.into()))?;
        let map = |prot| {
            // SAFETY: a fresh mapping at an address of the kernel's choice replaces nothing.
            unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, &fd, 0) }
                .map_err(|e| error(e.into()))
        };
        let rw = map(ProtFlags::READ | ProtFlags::WRITE)?;
        let rx = match map(ProtFlags::READ | ProtFlags::EXEC) {
            Ok(rx) => rx,
            Err(failed) => {
                // SAFETY: the mapping was just made and nothing points into it.
                let _ = unsafe { munmap(rw, len) };
                return Err(failed);
            }
        };
        Ok(Self { rw: rw.cast(), rx: rx.cast(), len, next: AtomicUsize::new(0) })
    }

    /// Bytes in all.
    pub fn capacity(&self) -> usize {
        self.len
    }

    /// Whether an address lies in the executable mapping.
    pub fn contains(&self, address: u64) -> bool {
        address.wrapping_sub(self.rx as u64) < self.len as u64
    }

    /// A piece of `len` bytes to write code to, or `None` when the cache is full.
    pub fn allocate(&self, len: usize) -> Option<Emitter> {
        let start = self
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
                next.checked_add(len).filter(|end| *end <= self.len)
            })
            .ok()?;
        // SAFETY: `start..start + len` is inside both mappings and was given to nobody else.
        Some(unsafe { Emitter::new(self.rw.add(start), self.rx as u64 + start as u64, len) })
    }

    /// Takes all space from `keep` bytes on back. The caller sees to it that nothing executes there and that
    /// the emitters over it are gone.
    pub fn reset(&self, keep: usize) {
        self.next.store(keep, Ordering::Relaxed);
    }

    /// Replaces the four bytes of code at `address` in one store. They must not cross an 8-byte boundary, so
    /// that a processor that runs there sees the old ones or the new.
    pub fn patch(&self, address: u64, value: u32) {
        let offset = address.wrapping_sub(self.rx as u64);
        assert!(offset + 4 <= self.len as u64 && offset & 7 <= 4, "patch outside of the code cache");
        let target = self.rw.wrapping_add(offset as usize);
        // SAFETY: the target is inside the mapping. It may be unaligned to four bytes, which Rust's atomics do
        // not allow; the processor stores atomically within eight aligned bytes.
        unsafe {
            std::arch::asm!("mov dword ptr [{0}], {1:e}", in(reg) target, in(reg) value,
                options(nostack, preserves_flags));
        }
    }
}

impl Drop for CodeCache {
    fn drop(&mut self) {
        // SAFETY: the mappings are this value's, and whoever runs code in them keeps it alive.
        unsafe {
            let _ = munmap(self.rw.cast::<c_void>(), self.len);
            let _ = munmap(self.rx.cast::<c_void>(), self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gpr;

    #[test]
    fn code_runs_and_is_patched() {
        let cache = CodeCache::new(1 << 16).unwrap();
        let mut code = cache.allocate(4096).unwrap();
        let entry = code.address();
        code.byte(0xb8); // mov eax, imm32
        code.align_patch(0);
        // Whatever padding came after the opcode would break it, so begin anew at an aligned place.
        let mut code = cache.allocate(4096).unwrap();
        assert_ne!(entry, code.address());
        let entry = code.address();
        code.align_patch(1);
        code.byte(0xb8);
        let field = code.address();
        code.dword(41);
        code.ret();
        // SAFETY: the code follows the C calling convention.
        let function: extern "C" fn() -> u32 = unsafe { std::mem::transmute(entry) };
        assert_eq!(function(), 41);
        cache.patch(field, 42);
        assert_eq!(function(), 42);
        assert!(cache.contains(entry) && !cache.contains(0));
        let _ = Gpr::RAX;
    }

    #[test]
    fn space_ends() {
        let cache = CodeCache::new(8192).unwrap();
        assert!(cache.allocate(8192).is_some());
        assert!(cache.allocate(1).is_none());
        cache.reset(4096);
        assert!(cache.allocate(4096).is_some());
        assert!(CodeCache::new(1 << 31).is_err());
    }
}
