//! Big-endian numbers in byte slices.

/// The `u16` at `at`.
///
/// # Panics
/// If the slice ends before it: callers have checked the length of what they decode.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

/// The `u32` at `at`; panics as [`u16_at`] does.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// The `u64` at `at`; panics as [`u16_at`] does.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
