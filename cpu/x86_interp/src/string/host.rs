//! Runs of string elements in host memory.
#![allow(unsafe_code)] // guest pages are reached through the pointers that `Core::host_span` gives

use crate::operand::Width;
use std::marker::PhantomData;
use x86_core::{Core, Seg, Trap};

/// Elements of guest memory that lie in one piece in the host's, and that the guest may access. Other
/// processors may write to them at any time.
pub(super) struct Span<'m, W> {
    ptr: *mut u8,
    len: usize,
    memory: PhantomData<(&'m (), W)>,
}

impl<'m, W: Width> Span<'m, W> {
    /// As many whole elements as lie in one piece at `seg:offset`, at most `count` (of which all offsets must
    /// exist). None if that is not even one.
    pub(super) fn new(
        core: &mut Core<'m>,
        seg: Seg,
        offset: u64,
        count: u64,
        write: bool,
    ) -> Result<Option<Self>, Trap> {
        let bytes = count.min(4096) * W::BYTES as u64;
        let Some((ptr, len)) = core.host_span(seg, offset, bytes, write)? else { return Ok(None) };
        let len = len.min(bytes as usize) / W::BYTES;
        Ok((len > 0).then_some(Self { ptr, len, memory: PhantomData }))
    }

    /// Elements.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    fn load(&self, index: usize) -> W {
        debug_assert!(index < self.len);
        // SAFETY: `host_span` gave `len` elements, which stay mapped while guest memory lives ('m).
        unsafe { W::load(self.ptr.add(index * W::BYTES)) }
    }

    /// Copies upwards, element by element as far as one can tell, as much as both have; gives how many. The
    /// spans must have been made for writing (this) and reading.
    pub(super) fn copy_from(&self, source: &Self) -> usize {
        let count = self.len.min(source.len);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: both are valid for `count` elements. The processor's own instruction does exactly what the
        // guest's would, overlapping or not, and may race with other threads.
        unsafe {
            use std::arch::asm;
            let (to, from) = (self.ptr, source.ptr);
            macro_rules! rep {
                ($instruction:literal) => {
                    asm!($instruction, inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _,
                        options(nostack, preserves_flags))
                };
            }
            match W::BYTES {
                1 => rep!("rep movsb"),
                2 => rep!("rep movsw"),
                4 => rep!("rep movsd"),
                _ => rep!("rep movsq"),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        for index in 0..count {
            let value = source.load(index);
            // SAFETY: as in `load`.
            unsafe { W::store(self.ptr.add(index * W::BYTES), value) };
        }
        count
    }

    /// Fills all of a span made for writing; gives how many.
    pub(super) fn fill(&self, value: W) -> usize {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: valid for `len` elements; the processor's own instruction may race with other threads.
        unsafe {
            use std::arch::asm;
            let (to, count, value) = (self.ptr, self.len, value.wide());
            macro_rules! rep {
                ($instruction:literal) => {
                    asm!($instruction, inout("rcx") count => _, inout("rdi") to => _, in("rax") value,
                        options(nostack, preserves_flags))
                };
            }
            match W::BYTES {
                1 => rep!("rep stosb"),
                2 => rep!("rep stosw"),
                4 => rep!("rep stosd"),
                _ => rep!("rep stosq"),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        for index in 0..self.len {
            // SAFETY: as in `load`.
            unsafe { W::store(self.ptr.add(index * W::BYTES), value) };
        }
        self.len
    }

    /// Goes on while elements are equal to `key` (`while_equal`) or differ from it: how many elements were
    /// looked at, and the last of them.
    pub(super) fn scan(&self, key: W, while_equal: bool) -> (usize, W) {
        let mut last = self.load(0);
        let mut count = 1;
        while (last == key) == while_equal && count < self.len {
            last = self.load(count);
            count += 1;
        }
        (count, last)
    }

    /// Goes on while the elements of both are equal (`while_equal`) or differ: how many pairs were looked at,
    /// and the last of them.
    pub(super) fn compare(&self, other: &Self, while_equal: bool) -> (usize, W, W) {
        let len = self.len.min(other.len);
        let mut last = (self.load(0), other.load(0));
        let mut count = 1;
        while (last.0 == last.1) == while_equal && count < len {
            last = (self.load(count), other.load(count));
            count += 1;
        }
        (count, last.0, last.1)
    }
}
