//! Guest memory as what requests read into and write from.

use io_loop::{IoVec, Segment};
use std::any::Any;
use std::sync::Arc;
use virtio::GuestSlice;
use vm_memory::bitmap::Bitmap;

/// The memory of `slices`, which `keep` keeps where it is.
pub(crate) fn memory(slices: &[GuestSlice<'_>], keep: &Arc<dyn Any + Send + Sync>) -> IoVec {
    let segment =
        |slice: &GuestSlice<'_>| Segment { start: slice.ptr_guard_mut().as_ptr(), len: slice.len() };
    // SAFETY: `keep` is the guest's memory, which stays mapped as long as it; guest memory is never a Rust reference.
    unsafe { IoVec::from_raw(slices.iter().map(segment), keep.clone()) }
}

/// Says that the host wrote to `slices`.
pub(crate) fn written(slices: &[GuestSlice<'_>]) {
    for slice in slices {
        slice.bitmap().mark_dirty(0, slice.len());
    }
}
