//! The operand sizes that guest memory is accessed in, and how the host accesses them.

use std::sync::Mutex;

/// Serializes locked accesses that the host cannot do in one atomic instruction: those across cache lines
/// (pages, MMIO). Only such accesses are atomic against each other.
pub(crate) static SPLIT_LOCK: Mutex<()> = Mutex::new(());

mod sealed {
    pub trait Sealed {}
    impl Sealed for u8 {}
    impl Sealed for u16 {}
    impl Sealed for u32 {}
    impl Sealed for u64 {}
    impl Sealed for u128 {}
}

/// An unsigned integer that memory holds: `u8`, `u16`, `u32`, `u64` or `u128`.
pub trait Scalar: sealed::Sealed + Copy + Eq + Default + std::fmt::Debug + 'static {
    /// Its size.
    const BYTES: usize;

    /// The value of the low bits of `value`.
    fn truncate(value: u128) -> Self;
    /// Zero-extended.
    fn extend(self) -> u128;

    /// The value that little-endian `bytes` (exactly [`Scalar::BYTES`] of them) are.
    fn from_bytes(bytes: &[u8]) -> Self {
        let mut all = [0; 16];
        all[..Self::BYTES].copy_from_slice(&bytes[..Self::BYTES]);
        Self::truncate(u128::from_le_bytes(all))
    }

    /// The value as little-endian bytes, of which the first [`Scalar::BYTES`] count.
    fn to_bytes(self) -> [u8; 16] {
        self.extend().to_le_bytes()
    }

    /// Loads from memory that others may write at the same time; a single host access if it is aligned and
    /// no longer than 8 bytes.
    ///
    /// # Safety
    /// `ptr` must be valid for reads of [`Scalar::BYTES`] bytes. It need not be aligned.
    unsafe fn load(ptr: *const u8) -> Self;

    /// Stores to memory that others may read at the same time; a single host access if it is aligned and no
    /// longer than 8 bytes.
    ///
    /// # Safety
    /// `ptr` must be valid for writes of [`Scalar::BYTES`] bytes. It need not be aligned.
    unsafe fn store(ptr: *mut u8, value: Self);

    /// Stores `new` if memory holds `old`, atomically for all processors, and returns what memory held.
    /// `None`: the host cannot do that at this address.
    ///
    /// # Safety
    /// `ptr` must be valid for reads and writes of [`Scalar::BYTES`] bytes. It need not be aligned.
    unsafe fn compare_exchange(ptr: *mut u8, old: Self, new: Self) -> Option<Self>;
}

#[cfg(target_arch = "x86_64")]
macro_rules! scalar {
    ($type:ty, $atomic:ident, $reg:ident, $modifier:tt, $accumulator:tt) => {
        impl Scalar for $type {
            const BYTES: usize = size_of::<$type>();

            #[inline(always)]
            fn truncate(value: u128) -> Self {
                value as $type
            }

            #[inline(always)]
            fn extend(self) -> u128 {
                u128::from(self)
            }

            #[inline(always)]
            unsafe fn load(ptr: *const u8) -> Self {
                let value: $type;
                // SAFETY: a plain load of memory that the caller vouches for. As an instruction of the host
                // it may race with other writers, which a Rust load may not.
                unsafe {
                    std::arch::asm!(
                        concat!("mov {value", $modifier, "}, [{ptr}]"),
                        value = out($reg) value,
                        ptr = in(reg) ptr,
                        options(nostack, preserves_flags, readonly)
                    );
                }
                value
            }

            #[inline(always)]
            unsafe fn store(ptr: *mut u8, value: Self) {
                // SAFETY: as in `load`.
                unsafe {
                    std::arch::asm!(
                        concat!("mov [{ptr}], {value", $modifier, "}"),
                        value = in($reg) value,
                        ptr = in(reg) ptr,
                        options(nostack, preserves_flags)
                    );
                }
            }

            #[inline(always)]
            unsafe fn compare_exchange(ptr: *mut u8, old: Self, new: Self) -> Option<Self> {
                // Across a cache line the host would lock its bus, or trap if it detects split locks.
                if (ptr as usize & 63) + Self::BYTES > 64 {
                    return None;
                }
                let found: $type;
                // SAFETY: a locked access to memory that the caller vouches for.
                unsafe {
                    std::arch::asm!(
                        concat!("lock cmpxchg [{ptr}], {new", $modifier, "}"),
                        new = in($reg) new,
                        ptr = in(reg) ptr,
                        inout($accumulator) old => found,
                        options(nostack)
                    );
                }
                Some(found)
            }
        }
    };
}

#[cfg(not(target_arch = "x86_64"))]
macro_rules! scalar {
    ($type:ty, $atomic:ident, $reg:ident, $modifier:tt, $accumulator:tt) => {
        impl Scalar for $type {
            const BYTES: usize = size_of::<$type>();

            fn truncate(value: u128) -> Self {
                value as $type
            }

            fn extend(self) -> u128 {
                u128::from(self)
            }

            unsafe fn load(ptr: *const u8) -> Self {
                use std::sync::atomic::{AtomicU8, Ordering, $atomic};
                if ptr as usize % Self::BYTES == 0 {
                    // SAFETY: aligned, and valid as the caller says.
                    return Self::from_le_order(
                        unsafe { $atomic::from_ptr(ptr as *mut $type) }.load(Ordering::Relaxed),
                    );
                }
                let mut bytes = [0; 16];
                for (index, byte) in bytes[..Self::BYTES].iter_mut().enumerate() {
                    // SAFETY: valid as the caller says.
                    *byte = unsafe { AtomicU8::from_ptr(ptr.add(index) as *mut u8) }.load(Ordering::Relaxed);
                }
                Self::from_bytes(&bytes)
            }

            unsafe fn store(ptr: *mut u8, value: Self) {
                use std::sync::atomic::{AtomicU8, Ordering, $atomic};
                if ptr as usize % Self::BYTES == 0 {
                    // SAFETY: aligned, and valid as the caller says.
                    unsafe { $atomic::from_ptr(ptr as *mut $type) }
                        .store(value.to_le_order(), Ordering::Relaxed);
                    return;
                }
                for (index, byte) in value.to_bytes()[..Self::BYTES].iter().enumerate() {
                    // SAFETY: valid as the caller says.
                    unsafe { AtomicU8::from_ptr(ptr.add(index)) }.store(*byte, Ordering::Relaxed);
                }
            }

            unsafe fn compare_exchange(ptr: *mut u8, old: Self, new: Self) -> Option<Self> {
                use std::sync::atomic::{Ordering, $atomic};
                if ptr as usize % Self::BYTES != 0 {
                    return None;
                }
                // SAFETY: aligned, and valid as the caller says.
                let cell = unsafe { $atomic::from_ptr(ptr as *mut $type) };
                let found = cell.compare_exchange(
                    old.to_le_order(),
                    new.to_le_order(),
                    Ordering::SeqCst,
                    Ordering::SeqCst,
                );
                Some(Self::from_le_order(found.unwrap_or_else(|other| other)))
            }
        }
    };
}

#[cfg(not(target_arch = "x86_64"))]
trait Order: Sized {
    fn to_le_order(self) -> Self;
    fn from_le_order(self) -> Self;
}

#[cfg(not(target_arch = "x86_64"))]
macro_rules! order {
    ($($type:ty)*) => {$(
        impl Order for $type {
            fn to_le_order(self) -> Self { <$type>::to_le(self) }
            fn from_le_order(self) -> Self { <$type>::from_le(self) }
        }
    )*};
}
#[cfg(not(target_arch = "x86_64"))]
order!(u8 u16 u32 u64);

scalar!(u8, AtomicU8, reg_byte, "", "al");
scalar!(u16, AtomicU16, reg, ":x", "ax");
scalar!(u32, AtomicU32, reg, ":e", "eax");
scalar!(u64, AtomicU64, reg, ":r", "rax");

impl Scalar for u128 {
    const BYTES: usize = 16;

    #[inline(always)]
    fn truncate(value: u128) -> Self {
        value
    }

    #[inline(always)]
    fn extend(self) -> u128 {
        self
    }

    #[inline(always)]
    unsafe fn load(ptr: *const u8) -> Self {
        // SAFETY: both halves are valid as the caller says.
        let (low, high) = unsafe { (u64::load(ptr), u64::load(ptr.add(8))) };
        u128::from(high) << 64 | u128::from(low)
    }

    #[inline(always)]
    unsafe fn store(ptr: *mut u8, value: Self) {
        // SAFETY: both halves are valid as the caller says.
        unsafe {
            u64::store(ptr, value as u64);
            u64::store(ptr.add(8), (value >> 64) as u64);
        }
    }

    unsafe fn compare_exchange(ptr: *mut u8, old: Self, new: Self) -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if ptr as usize & 15 == 0 && std::arch::is_x86_feature_detected!("cmpxchg16b") {
            let (mut low, mut high) = (old as u64, (old >> 64) as u64);
            // SAFETY: aligned, the host has the instruction, memory is valid as the caller says. RBX, which
            // the compiler reserves, is swapped in and out; other operands are named lest one be RBX.
            unsafe {
                std::arch::asm!(
                    "xchg rbx, rsi",
                    "lock cmpxchg16b [rdi]",
                    "mov rbx, rsi",
                    inout("rsi") new as u64 => _,
                    in("rdi") ptr,
                    in("rcx") (new >> 64) as u64,
                    inout("rax") low,
                    inout("rdx") high,
                    options(nostack)
                );
            }
            return Some(u128::from(high) << 64 | u128::from(low));
        }
        let _ = (ptr, old, new);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_at_every_alignment() {
        let mut memory = [0u8; 128];
        for offset in 0..100 {
            let ptr = memory.as_mut_ptr().wrapping_add(offset);
            // SAFETY: inside `memory`.
            unsafe {
                u64::store(ptr, 0x1122_3344_5566_7788);
                assert_eq!(u64::load(ptr), 0x1122_3344_5566_7788);
                assert_eq!(u16::load(ptr), 0x7788);
                u8::store(ptr, 0x99);
                assert_eq!(u32::load(ptr), 0x5566_7799);
                u128::store(ptr, 5 << 100 | 7);
                assert_eq!(u128::load(ptr), 5 << 100 | 7);
            }
        }
    }

    #[test]
    fn compare_exchange_swaps_only_on_equality() {
        #[repr(align(64))]
        struct Line([u8; 128]);
        let mut line = Line([0; 128]);
        let ptr = line.0.as_mut_ptr();
        // SAFETY: inside `line`.
        unsafe {
            assert_eq!(u32::compare_exchange(ptr, 0, 7), Some(0));
            assert_eq!(u32::compare_exchange(ptr, 0, 9), Some(7));
            assert_eq!(u32::load(ptr), 7);
            assert_eq!(u64::compare_exchange(ptr.add(60), 0, 1), None);
            let wide = u128::compare_exchange(ptr.add(16), 0, 3 << 70 | 1);
            if let Some(found) = wide {
                assert_eq!(found, 0);
                assert_eq!(u128::compare_exchange(ptr.add(16), 1, 2), Some(3 << 70 | 1));
                assert_eq!(u128::load(ptr.add(16)), 3 << 70 | 1);
            }
            assert_eq!(u128::compare_exchange(ptr.add(24), 0, 1), None);
        }
    }
}
