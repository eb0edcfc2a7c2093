//! Memory that I/O goes to and comes from.

use smallvec::{SmallVec, smallvec};
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::cell::RefCell;
use std::fmt;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

/// What every [`IoBuffer`] is aligned to, in bytes: enough for direct I/O on all devices that Linux has.
pub const BUFFER_ALIGNMENT: usize = 4096;

/// The largest allocation that is kept for later, in bytes.
const RECYCLED_MOST: usize = 4 << 20;
/// How many allocations of one size class a thread keeps.
const RECYCLED_EACH: usize = 32;

/// A block of memory of the host, freed with its last user.
struct Allocation {
    start: NonNull<u8>,
    /// A multiple of [`BUFFER_ALIGNMENT`].
    capacity: usize,
}

// SAFETY: an allocation is plain memory; who may touch it when is what `IoBuffer` and `IoVec` see to.
unsafe impl Send for Allocation {}
// SAFETY: as above.
unsafe impl Sync for Allocation {}

thread_local! {
    /// Allocations that ended on this thread, by the binary logarithm of their size.
    static RECYCLED: RefCell<Vec<Vec<Allocation>>> = const { RefCell::new(Vec::new()) };
}

impl Allocation {
    fn layout(capacity: usize) -> Layout {
        Layout::from_size_align(capacity, BUFFER_ALIGNMENT).expect("sizes are bounded by the address space")
    }

    /// Takes memory of at least `len` bytes; `true` says that it is known to be zero.
    fn take(len: usize) -> (Self, bool) {
        let capacity = len.max(1).next_multiple_of(BUFFER_ALIGNMENT);
        if capacity <= RECYCLED_MOST {
            let capacity = capacity.next_power_of_two();
            let class = capacity.ilog2() as usize;
            let found = RECYCLED
                .try_with(|recycled| recycled.borrow_mut().get_mut(class).and_then(Vec::pop))
                .ok()
                .flatten();
            return found.map_or_else(|| (Self::fresh(capacity), true), |found| (found, false));
        }
        (Self::fresh(capacity), true)
    }

    fn fresh(capacity: usize) -> Self {
        let layout = Self::layout(capacity);
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        Self { start: NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout)), capacity }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.capacity <= RECYCLED_MOST {
            let class = self.capacity.ilog2() as usize;
            let kept = RECYCLED.try_with(|recycled| {
                let mut recycled = recycled.borrow_mut();
                if recycled.len() <= class {
                    recycled.resize_with(class + 1, Vec::new);
                }
                if recycled[class].len() < RECYCLED_EACH {
                    recycled[class].push(Self { start: self.start, capacity: self.capacity });
                    return true;
                }
                false
            });
            if kept == Ok(true) {
                return;
            }
        }
        // SAFETY: it came from `alloc_zeroed` with this layout, and nobody else has it.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.capacity)) }
    }
}

/// Memory of the host for I/O, aligned to [`BUFFER_ALIGNMENT`].
///
/// Requests hold it through [`IoBuffer::io`]; while one does, its bytes cannot be looked at.
pub struct IoBuffer {
    memory: Arc<Allocation>,
    len: usize,
}

impl IoBuffer {
    /// A buffer of `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        let (memory, zero) = Allocation::take(len);
        if !zero {
            // SAFETY: the allocation has at least `len` bytes, and is ours alone.
            unsafe { ptr::write_bytes(memory.start.as_ptr(), 0, len) };
        }
        Self { memory: Arc::new(memory), len }
    }

    /// A buffer of `len` bytes that hold whatever earlier buffers of this thread held: for those that are going
    /// to be written as a whole.
    pub fn scratch(len: usize) -> Self {
        Self { memory: Arc::new(Allocation::take(len).0), len }
    }

    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes.
    ///
    /// # Panics
    /// If a request still holds the buffer.
    pub fn bytes(&self) -> &[u8] {
        assert_eq!(Arc::strong_count(&self.memory), 1, "a request still holds the buffer");
        // What the last request wrote, perhaps on another thread, came before it let go of the buffer.
        fence(Ordering::Acquire);
        // SAFETY: the allocation has `len` initialised bytes; no `IoVec` is there that could change them, and making
        // one takes `&mut self`.
        unsafe { std::slice::from_raw_parts(self.memory.start.as_ptr(), self.len) }
    }

    /// The bytes, to be changed.
    ///
    /// # Panics
    /// If a request still holds the buffer.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let memory = Arc::get_mut(&mut self.memory).expect("a request still holds the buffer");
        // SAFETY: the allocation has `len` initialised bytes, and is ours alone while it is borrowed.
        unsafe { std::slice::from_raw_parts_mut(memory.start.as_ptr(), self.len) }
    }

    /// All of the buffer, for a request.
    pub fn io(&mut self) -> IoVec {
        self.io_range(0..self.len)
    }

    /// A part of the buffer, for a request.
    ///
    /// # Panics
    /// If the range is not within the buffer.
    pub fn io_range(&mut self, range: Range<usize>) -> IoVec {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} bytes", self.len);
        // SAFETY: the start is within the allocation.
        let start = unsafe { self.memory.start.as_ptr().add(range.start) };
        IoVec {
            segments: smallvec![Segment { start, len: range.len() }],
            len: range.len(),
            keep: smallvec![Keep::Buffer(self.memory.clone())],
        }
    }

    /// The buffer as what a request holds, for those that need not look at it again.
    pub fn into_io(mut self) -> IoVec {
        self.io()
    }
}

impl From<&[u8]> for IoBuffer {
    fn from(bytes: &[u8]) -> Self {
        let mut buffer = Self::scratch(bytes.len());
        buffer.bytes_mut().copy_from_slice(bytes);
        buffer
    }
}

impl fmt::Debug for IoBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoBuffer").field("len", &self.len).finish_non_exhaustive()
    }
}

/// What keeps a request's memory where it is.
#[derive(Clone)]
enum Keep {
    Buffer(#[allow(dead_code, reason = "held, not read")] Arc<Allocation>),
    Foreign(#[allow(dead_code, reason = "held, not read")] Arc<dyn Any + Send + Sync>),
}

/// A piece of memory: an address of this process and a length in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it starts.
    pub start: *mut u8,
    /// Its length in bytes; not 0 in an [`IoVec`].
    pub len: usize,
}

/// What a request reads into or writes from: pieces of memory, one after the other, and what keeps them there.
///
/// The memory may be a guest's, which changes it at any time: it is never a Rust slice, only copied from and to.
/// What two threads write at the same time is anything.
#[derive(Clone, Default)]
pub struct IoVec {
    segments: SmallVec<[Segment; 2]>,
    len: usize,
    keep: SmallVec<[Keep; 1]>,
}

// SAFETY: the memory is kept by what `keep` holds, which may go to other threads; accesses are copies of plain
// bytes.
unsafe impl Send for IoVec {}
// SAFETY: as above.
unsafe impl Sync for IoVec {}

impl IoVec {
    /// Memory of somebody else, such as a guest's.
    ///
    /// # Safety
    /// Each segment must be memory that may be read and written as plain bytes as long as `keep` lives, and that no
    /// Rust reference covers.
    pub unsafe fn from_raw(
        segments: impl IntoIterator<Item = Segment>,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        let segments: SmallVec<[Segment; 2]> =
            segments.into_iter().filter(|segment| segment.len > 0).collect();
        let len = segments.iter().map(|segment| segment.len).sum();
        Self { segments, len, keep: smallvec![Keep::Foreign(keep)] }
    }

    /// The parts one after the other as one.
    pub fn chain(parts: impl IntoIterator<Item = Self>) -> Self {
        let mut all = Self::default();
        for part in parts {
            all.segments.extend(part.segments.into_iter().filter(|segment| segment.len > 0));
            all.keep.extend(part.keep);
            all.len += part.len;
        }
        all
    }

    /// The length of all pieces in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Whether all addresses and lengths of pieces are multiples of `alignment`, a power of two.
    pub fn is_aligned(&self, alignment: usize) -> bool {
        self.segments.iter().all(|segment| (segment.start.addr() | segment.len) & (alignment - 1) == 0)
    }

    /// A part of it.
    ///
    /// # Panics
    /// If the range is not within it.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        if range == (0..self.len) {
            return self.clone();
        }
        let mut segments = SmallVec::new();
        self.each(range.start, range.len(), |segment, _| segments.push(segment));
        Self { segments, len: range.len(), keep: self.keep.clone() }
    }

    /// Calls `body` with every piece of the range, and where in the range it is.
    fn each(&self, at: usize, len: usize, mut body: impl FnMut(Segment, usize)) {
        let end = at.checked_add(len).filter(|end| *end <= self.len);
        assert!(end.is_some(), "{len} bytes from {at} of {}", self.len);
        let (mut skip, mut done) = (at, 0);
        for segment in &self.segments {
            if done == len {
                break;
            }
            if skip >= segment.len {
                skip -= segment.len;
                continue;
            }
            let part = (segment.len - skip).min(len - done);
            body(Segment { start: segment.start.wrapping_add(skip), len: part }, done);
            done += part;
            skip = 0;
        }
    }

    /// Copies `out.len()` bytes from `at` on.
    ///
    /// # Panics
    /// If they are not within it.
    pub fn copy_to(&self, at: usize, out: &mut [u8]) {
        let to = out.as_mut_ptr();
        self.each(at, out.len(), |segment, done| {
            // SAFETY: the segment is readable memory that is kept, and `out` has this part; a reference such as
            // `out` never covers a segment, so the two do not overlap.
            unsafe { ptr::copy_nonoverlapping(segment.start, to.add(done), segment.len) };
        });
    }

    /// The bytes as a vector.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.copy_to(0, &mut bytes);
        bytes
    }

    /// Writes `bytes` from `at` on.
    ///
    /// # Panics
    /// If they are not within it.
    pub fn copy_from(&self, at: usize, bytes: &[u8]) {
        let from = bytes.as_ptr();
        self.each(at, bytes.len(), |segment, done| {
            // SAFETY: as in `copy_to`, the other way round.
            unsafe { ptr::copy_nonoverlapping(from.add(done), segment.start, segment.len) };
        });
    }

    /// Copies all of `from`, which may overlap, to `at` on.
    ///
    /// # Panics
    /// If it is not within it.
    pub fn copy_from_vec(&self, at: usize, from: &Self) {
        from.each(0, from.len, |source, source_at| {
            self.each(at + source_at, source.len, |target, done| {
                // SAFETY: both are memory that is kept, of these lengths; they may be the same.
                unsafe { ptr::copy(source.start.wrapping_add(done), target.start, target.len) };
            });
        });
    }

    /// Makes `len` bytes from `at` on zero.
    ///
    /// # Panics
    /// If they are not within it.
    pub fn zero(&self, at: usize, len: usize) {
        self.fill(at, len, 0);
    }

    /// Makes `len` bytes from `at` on `value`.
    ///
    /// # Panics
    /// If they are not within it.
    pub fn fill(&self, at: usize, len: usize, value: u8) {
        self.each(at, len, |segment, _| {
            // SAFETY: the segment is writable memory that is kept.
            unsafe { ptr::write_bytes(segment.start, value, segment.len) };
        });
    }

    /// Whether `len` bytes from `at` on are all zero.
    ///
    /// # Panics
    /// If they are not within it.
    pub fn is_zero(&self, at: usize, len: usize) -> bool {
        let mut zero = true;
        self.each(at, len, |segment, _| zero = zero && segment_is_zero(segment));
        zero
    }
}

/// Whether a piece has only zero bytes: looks at its ends and middle first, then at 64 bytes at a time.
fn segment_is_zero(segment: Segment) -> bool {
    let byte = |at: usize| {
        // SAFETY: `at` is below the length of a segment that is readable and kept.
        unsafe { segment.start.add(at).read() }
    };
    let Some(last) = segment.len.checked_sub(1) else { return true };
    if byte(0) | byte(last) | byte(last / 2) != 0 {
        return false;
    }
    let blocks = segment.len / 64;
    for block in 0..blocks {
        // SAFETY: the 64 bytes are within the segment; any bytes are a value of this type.
        let words: [u64; 8] = unsafe { segment.start.add(block * 64).cast::<[u64; 8]>().read_unaligned() };
        if words.iter().fold(0, |all, word| all | word) != 0 {
            return false;
        }
    }
    (blocks * 64..segment.len).all(|at| byte(at) == 0)
}

impl fmt::Debug for IoVec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoVec").field("len", &self.len).field("segments", &self.segments.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn buffers_are_aligned_and_zero() {
        for len in [0, 1, 512, 4096, 70_000, 5 << 20] {
            let mut buffer = IoBuffer::zeroed(len);
            assert_eq!(buffer.bytes(), vec![0; len]);
            assert!(buffer.io().segments().iter().all(|s| s.start.addr() % BUFFER_ALIGNMENT == 0));
            buffer.bytes_mut().fill(0xaa);
        }
        assert_eq!(IoBuffer::zeroed(512).bytes(), vec![0; 512], "recycled memory is made zero");
    }

    #[test]
    #[should_panic(expected = "a request still holds the buffer")]
    fn bytes_are_out_of_reach_while_a_request_holds_them() {
        let mut buffer = IoBuffer::zeroed(10);
        let _io = buffer.io();
        buffer.bytes();
    }

    #[test]
    fn zero_is_found_at_every_place() {
        let mut buffer = IoBuffer::zeroed(300);
        for at in 0..300 {
            buffer.bytes_mut()[at] = 1;
            let io = buffer.io();
            assert!(!io.is_zero(0, 300) && io.is_zero(0, at) && io.is_zero(at + 1, 299 - at), "{at}");
            drop(io);
            buffer.bytes_mut()[at] = 0;
        }
        assert!(buffer.io().is_zero(0, 300));
    }

    proptest! {
        #[test]
        fn pieces_are_like_one(parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 1..6),
                               a in 0..300usize, b in 0..300usize) {
            let whole: Vec<u8> = parts.concat();
            let io = IoVec::chain(parts.iter().map(|part| IoBuffer::from(&part[..]).into_io()));
            prop_assert_eq!(io.len(), whole.len());
            let (a, b) = (a % (whole.len() + 1), b % (whole.len() + 1));
            let range = a.min(b)..a.max(b);
            let part = io.slice(range.clone());
            prop_assert_eq!(part.to_vec(), &whole[range.clone()]);
            prop_assert_eq!(part.is_zero(0, part.len()), whole[range.clone()].iter().all(|b| *b == 0));
            let copy = IoBuffer::zeroed(range.len()).into_io();
            copy.copy_from_vec(0, &part);
            prop_assert_eq!(copy.to_vec(), &whole[range.clone()]);
            part.zero(0, part.len());
            part.copy_from(0, &vec![7; part.len()]);
            let mut expected = whole;
            expected[range].fill(7);
            prop_assert_eq!(io.to_vec(), expected);
        }
    }
}
