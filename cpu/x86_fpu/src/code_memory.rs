//! Memory for generated code, mapped once for writing and once for execution.

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::{io, ptr};

/// An append-only buffer of machine code. No page is ever writable and executable through the same mapping.
#[derive(Debug)]
pub(crate) struct CodeMemory {
    writable: *mut u8,
    executable: *const u8,
    size: usize,
    used: usize,
}

impl CodeMemory {
    /// Maps `size` bytes (a multiple of the page size).
    pub(crate) fn new(size: usize) -> io::Result<Self> {
        let file = memfd_create("x86-stubs", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, size as u64)?;
        // SAFETY: a new mapping at an address that the kernel chooses disturbs nothing.
        let map = |protection| unsafe {
            mmap(ptr::null_mut(), size, protection, MapFlags::SHARED, &file, 0).map(|at| at.cast::<u8>())
        };
        let writable = map(ProtFlags::READ | ProtFlags::WRITE)?;
        let executable = match map(ProtFlags::READ | ProtFlags::EXEC) {
            Ok(at) => at,
            Err(error) => {
                // SAFETY: the mapping made above, which nothing refers to.
                let _ = unsafe { munmap(writable.cast(), size) };
                return Err(error.into());
            }
        };
        Ok(Self { writable, executable, size, used: 0 })
    }

    /// Appends code and returns its address, or `None` if it does not fit.
    pub(crate) fn append(&mut self, code: &[u8]) -> Option<*const u8> {
        let start = self.used.next_multiple_of(16);
        if code.len() > self.size.checked_sub(start)? {
            return None;
        }
        // SAFETY: inside the writable mapping, as just checked; that nobody else has a pointer to.
        unsafe { ptr::copy_nonoverlapping(code.as_ptr(), self.writable.add(start), code.len()) };
        self.used = start + code.len();
        serialize();
        // SAFETY: inside the executable mapping of the same size.
        Some(unsafe { self.executable.add(start) })
    }

    /// Forgets all code. None of it may be executed any more.
    pub(crate) fn clear(&mut self) {
        self.used = 0;
    }
}

/// Has the processor forget instructions that it fetched ahead: code that was written through another
/// address needs it (Intel SDM volume 3, 9.1.3).
fn serialize() {
    #[cfg(target_arch = "x86_64")]
    let _ = std::arch::x86_64::__cpuid(0);
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: the two mappings that `new` made; no stub runs while its engine is dropped.
        unsafe {
            let _ = munmap(self.writable.cast(), self.size);
            let _ = munmap(self.executable.cast_mut().cast(), self.size);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn appends_until_full_and_runs() {
        let mut memory = CodeMemory::new(4096).unwrap();
        let code = [0xb8, 42, 0, 0, 0, 0xc3]; // mov eax, 42; ret
        let mut count = 0;
        while let Some(at) = memory.append(&code) {
            // SAFETY: the code follows the calling convention and touches nothing but EAX.
            let run: extern "C" fn() -> i32 = unsafe { std::mem::transmute(at) };
            assert_eq!(run(), 42);
            count += 1;
        }
        assert_eq!(count, 4096 / 16);
        memory.clear();
        assert!(memory.append(&[0; 4097]).is_none());
        assert!(memory.append(&[0xc3; 4096]).is_some());
        assert!(memory.append(&[0xc3]).is_none());
    }
}
