//! Which parts of a disk were written.

use parking_lot::Mutex;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes that one bit stands for: a power of two from 512 bytes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Granularity(u32);

impl Granularity {
    /// What is taken where nobody says anything: 64 KiB.
    pub const DEFAULT: Self = Self(16);

    /// The granularity of `bytes`, if there is one.
    pub fn from_bytes(bytes: u64) -> Option<Self> {
        (bytes.is_power_of_two() && (9..=31).contains(&bytes.ilog2())).then(|| Self(bytes.ilog2()))
    }

    /// Bytes for each bit.
    pub fn bytes(self) -> u64 {
        1 << self.0
    }

    /// The binary logarithm of the bytes.
    pub fn bits(self) -> u32 {
        self.0
    }
}

const WORD: u64 = u64::BITS as u64;
/// Words of a page of bits: bits come into being page by page, so that a large clean disk costs nothing.
const PAGE_WORDS: usize = 512;
const PAGE_BITS: u64 = PAGE_WORDS as u64 * WORD;

struct Bits {
    /// Bits of the disk.
    count: u64,
    pages: Vec<Option<Box<[u64; PAGE_WORDS]>>>,
    set: u64,
}

impl Bits {
    fn new(count: u64) -> Self {
        let pages = usize::try_from(count.div_ceil(PAGE_BITS)).unwrap_or(usize::MAX);
        Self { count, pages: (0..pages).map(|_| None).collect(), set: 0 }
    }

    /// Calls `body` with every word that has bits of `range`, and the mask of those.
    fn words(&mut self, range: Range<u64>, create: bool, mut body: impl FnMut(&mut u64, u64)) {
        let mut at = range.start;
        while at < range.end {
            let page_end = (at / PAGE_BITS + 1) * PAGE_BITS;
            let end = range.end.min(page_end);
            let page = &mut self.pages[(at / PAGE_BITS) as usize];
            if page.is_none() && create {
                *page = Some(Box::new([0; PAGE_WORDS]));
            }
            let Some(page) = page else {
                at = end;
                continue;
            };
            while at < end {
                let until = end.min((at / WORD + 1) * WORD);
                let mask = (u64::MAX >> (WORD - (until - at))) << (at % WORD);
                body(&mut page[(at / WORD) as usize % PAGE_WORDS], mask);
                at = until;
            }
        }
    }

    fn change(&mut self, range: Range<u64>, on: bool) {
        let mut change = 0;
        self.words(range, on, |word, mask| {
            let before = (*word & mask).count_ones();
            if on {
                *word |= mask;
                change += u64::from(mask.count_ones() - before);
            } else {
                *word &= !mask;
                change += u64::from(before);
            }
        });
        if on {
            self.set += change;
        } else {
            self.set -= change;
        }
    }

    /// The first bit from `at` on that is `on`.
    fn find(&self, mut at: u64, on: bool) -> Option<u64> {
        while at < self.count {
            let Some(page) = &self.pages[(at / PAGE_BITS) as usize] else {
                if !on {
                    return Some(at);
                }
                at = (at / PAGE_BITS + 1) * PAGE_BITS;
                continue;
            };
            let word = page[(at / WORD) as usize % PAGE_WORDS];
            let word = (if on { word } else { !word }) & (u64::MAX << (at % WORD));
            if word != 0 {
                let found = at / WORD * WORD + u64::from(word.trailing_zeros());
                return (found < self.count).then_some(found);
            }
            at = (at / WORD + 1) * WORD;
        }
        None
    }
}

/// Which parts of a disk were written since some time: a bit for so many bytes.
pub struct DirtyBitmap {
    name: Option<String>,
    granularity: Granularity,
    enabled: AtomicBool,
    bits: Mutex<(Bits, u64)>,
}

impl DirtyBitmap {
    /// A bitmap of a disk of `len` bytes with nothing dirty, which records writes.
    pub fn new(name: Option<&str>, len: u64, granularity: Granularity) -> Self {
        let bits = Bits::new(len.div_ceil(granularity.bytes()));
        Self {
            name: name.map(Into::into),
            granularity,
            enabled: AtomicBool::new(true),
            bits: Mutex::new((bits, len)),
        }
    }

    /// The name, if it has one.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Bytes for each bit.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// The disk's length in bytes.
    pub fn len(&self) -> u64 {
        self.bits.lock().1
    }

    /// Whether the disk has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it records writes.
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::SeqCst)
    }

    /// Has it record writes, or not.
    pub fn set_enabled(&self, enabled: bool) {
        self.enabled.store(enabled, Ordering::SeqCst);
    }

    /// Bytes that are dirty, in whole bits.
    pub fn dirty_bytes(&self) -> u64 {
        self.bits.lock().0.set.saturating_mul(self.granularity.bytes())
    }

    fn bits_of(&self, bits: &Bits, offset: u64, len: u64) -> Range<u64> {
        let end = offset.saturating_add(len).div_ceil(self.granularity.bytes()).min(bits.count);
        (offset >> self.granularity.bits()).min(end)..end
    }

    /// Makes a range of bytes dirty: all bits that stand for any of it.
    pub fn set(&self, offset: u64, len: u64) {
        let mut state = self.bits.lock();
        let range = self.bits_of(&state.0, offset, len);
        state.0.change(range, true);
    }

    /// Makes a range of bytes clean: all bits that stand for any of it.
    pub fn reset(&self, offset: u64, len: u64) {
        let mut state = self.bits.lock();
        let range = self.bits_of(&state.0, offset, len);
        state.0.change(range, false);
    }

    /// Makes all clean.
    pub fn clear(&self) {
        let mut state = self.bits.lock();
        state.0 = Bits::new(state.0.count);
    }

    /// Whether the byte at `offset` is dirty.
    pub fn get(&self, offset: u64) -> bool {
        let state = self.bits.lock();
        let bit = offset >> self.granularity.bits();
        state.0.find(bit, true) == Some(bit)
    }

    /// The first dirty range in bytes that begins at `from` or later, or holds it; at most to the disk's end.
    pub fn next_dirty(&self, from: u64) -> Option<Range<u64>> {
        let state = self.bits.lock();
        let (bits, len) = (&state.0, state.1);
        if from >= len {
            return None;
        }
        let start = bits.find(from >> self.granularity.bits(), true)?;
        let end = bits.find(start, false).unwrap_or(bits.count);
        let bytes = |bit: u64| bit.saturating_mul(self.granularity.bytes()).min(len);
        Some(bytes(start).max(from)..bytes(end))
    }

    /// Makes dirty what is dirty in `other`, whatever its granularity.
    pub fn merge(&self, other: &Self) {
        let mut at = 0;
        while let Some(range) = other.next_dirty(at) {
            self.set(range.start, range.end - range.start);
            at = range.end;
        }
    }

    /// Has it be of a disk of `len` bytes. What is new is clean.
    pub fn resize(&self, len: u64) {
        let mut state = self.bits.lock();
        let count = len.div_ceil(self.granularity.bytes());
        if count < state.0.count {
            let gone = count..state.0.count;
            state.0.change(gone, false);
        }
        let pages = usize::try_from(count.div_ceil(PAGE_BITS)).unwrap_or(usize::MAX);
        state.0.pages.resize_with(pages, || None);
        state.0.count = count;
        state.1 = len;
    }

    /// The bits of a range of bytes that starts at a multiple of eight bits, as bytes: bit 0 of the first byte is the
    /// first.
    pub fn to_bytes(&self, offset: u64, out: &mut [u8]) {
        let state = self.bits.lock();
        let first = offset >> self.granularity.bits();
        for (n, byte) in out.iter_mut().enumerate() {
            let bit = first + n as u64 * 8;
            let page = state.0.pages.get((bit / PAGE_BITS) as usize).and_then(Option::as_ref);
            *byte = page.map_or(0, |page| (page[(bit / WORD) as usize % PAGE_WORDS] >> (bit % WORD)) as u8);
        }
    }

    /// Takes the bits of a range as [`DirtyBitmap::to_bytes`] gives them; bits beyond the disk's end do not count.
    pub fn take_bytes(&self, offset: u64, bytes: &[u8]) {
        let mut state = self.bits.lock();
        let first = offset >> self.granularity.bits();
        for (n, byte) in bytes.iter().enumerate() {
            for bit in 0..8 {
                let at = first + n as u64 * 8 + bit;
                if at < state.0.count && byte >> bit & 1 != 0 {
                    state.0.change(at..at + 1, true);
                }
            }
        }
    }
}

impl fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyBitmap")
            .field("name", &self.name)
            .field("granularity", &self.granularity.bytes())
            .field("dirty_bytes", &self.dirty_bytes())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_like_a_list_of_bools(ops in prop::collection::vec((any::<bool>(), 0..5_000_000u64, 0..400_000u64), 1..40)) {
            let (len, granularity) = (4_000_111, Granularity::from_bytes(512).unwrap());
            let bitmap = DirtyBitmap::new(Some("b"), len, granularity);
            let count = len.div_ceil(512) as usize;
            let mut model = vec![false; count];
            for (on, offset, length) in ops {
                if on { bitmap.set(offset, length) } else { bitmap.reset(offset, length) }
                let end = ((offset + length).div_ceil(512) as usize).min(count);
                let start = ((offset / 512) as usize).min(end);
                model[start..end].fill(on);
            }
            prop_assert_eq!(bitmap.dirty_bytes(), model.iter().filter(|b| **b).count() as u64 * 512);
            let mut found = vec![false; count];
            let mut at = 0;
            while let Some(range) = bitmap.next_dirty(at) {
                found[(range.start / 512) as usize..range.end.div_ceil(512) as usize].fill(true);
                at = range.end;
            }
            prop_assert_eq!(&found, &model);
            let mut bytes = vec![0; count.div_ceil(8)];
            bitmap.to_bytes(0, &mut bytes);
            let again = DirtyBitmap::new(None, len, granularity);
            again.take_bytes(0, &bytes);
            prop_assert!((0..count as u64).all(|bit| again.get(bit * 512) == model[bit as usize]));
            let coarse = DirtyBitmap::new(None, len, Granularity::DEFAULT);
            coarse.merge(&bitmap);
            prop_assert!((0..count as u64).all(|bit| !model[bit as usize] || coarse.get(bit * 512)));
            bitmap.resize(1_000_000);
            prop_assert_eq!(bitmap.dirty_bytes(), model[..1954].iter().filter(|b| **b).count() as u64 * 512);
        }
    }
}
