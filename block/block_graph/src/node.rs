//! The shell around every driver.

use crate::{
    BlockStatus, DirtyBitmap, Driver, Errno, Error, OpenFlags, Result, Truncate, WriteFlags, ZeroFlags,
};
use io_loop::{IoBuffer, IoVec};
use parking_lot::{Mutex, RwLock};
use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Poll, Waker};

/// A node, shared by whoever uses it.
pub type NodeRef = Arc<Node>;

/// The longest disk there is, in bytes: what a host's file offset can say, less what rounding up needs.
pub const MAX_LEN: u64 = (i64::MAX as u64) & !((1 << 30) - 1);

/// The most zeroes that are written at once where a driver has no better way, in bytes.
const ZERO_CHUNK: u64 = 1 << 20;

/// A driver, and what all drivers have in common: requests in flight, drain, dirty bitmaps, and the bounds of requests.
pub struct Node {
    name: String,
    driver: Box<dyn Driver>,
    flags: RwLock<OpenFlags>,
    /// Requests that have begun and not ended.
    in_flight: AtomicUsize,
    /// How many want no new requests.
    drained: AtomicUsize,
    /// Who waits for either of these to become 0.
    waiting: Mutex<Vec<Waker>>,
    bitmaps: RwLock<Vec<Arc<DirtyBitmap>>>,
    has_bitmaps: AtomicBool,
    parents: AtomicUsize,
    closed: AtomicBool,
}

/// A request that has begun.
struct InFlight<'a>(&'a Node);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        if self.0.in_flight.fetch_sub(1, Ordering::SeqCst) == 1 && self.0.drained.load(Ordering::SeqCst) > 0 {
            self.0.wake_waiting();
        }
    }
}

/// As long as this lives, no new request begins at the node.
#[derive(Debug)]
pub struct Drained(NodeRef);

impl Drop for Drained {
    fn drop(&mut self) {
        if self.0.drained.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.wake_waiting();
        }
    }
}

impl Node {
    /// A node of `driver`, with a name that is its own in its graph.
    pub fn new(name: impl Into<String>, driver: Box<dyn Driver>, flags: OpenFlags) -> NodeRef {
        Arc::new(Self {
            name: name.into(),
            driver,
            flags: RwLock::new(flags),
            in_flight: AtomicUsize::new(0),
            drained: AtomicUsize::new(0),
            waiting: Mutex::default(),
            bitmaps: RwLock::default(),
            has_bitmaps: AtomicBool::new(false),
            parents: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
        })
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The driver.
    pub fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    /// The driver, if it is a `T`.
    pub fn driver_as<T: Driver>(&self) -> Option<&T> {
        self.driver.as_any().downcast_ref()
    }

    /// What it was opened with.
    pub fn flags(&self) -> OpenFlags {
        *self.flags.read()
    }

    /// Takes up other flags; the driver has done so.
    pub fn set_flags(&self, flags: OpenFlags) {
        *self.flags.write() = flags;
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        !self.flags().writable
    }

    /// The length in bytes.
    pub fn len(&self) -> u64 {
        self.driver.len()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The file name that opens it again, if there is one.
    pub fn filename(&self) -> Option<String> {
        self.driver.filename()
    }

    pub(crate) fn add_parent(&self) {
        self.parents.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn remove_parent(&self) {
        self.parents.fetch_sub(1, Ordering::SeqCst);
    }

    /// The node below in a role, if there is one.
    pub fn child(&self, role: crate::Role) -> Option<NodeRef> {
        self.driver.edges().iter().find(|edge| edge.role() == role).map(|edge| edge.node())
    }

    /// The node that is read where this one has nothing.
    pub fn backing(&self) -> Option<NodeRef> {
        self.child(crate::Role::Backing)
    }

    fn wake_waiting(&self) {
        let waiting = std::mem::take(&mut *self.waiting.lock());
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Waits until `ready` says so; it is asked again whenever the last request ends or the last drain does.
    async fn wait_until(&self, ready: impl Fn(&Self) -> bool) {
        poll_fn(|context| {
            if ready(self) {
                return Poll::Ready(());
            }
            self.waiting.lock().push(context.waker().clone());
            // What happened before the waker was there woke nobody.
            if ready(self) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    async fn begin(&self) -> InFlight<'_> {
        loop {
            self.in_flight.fetch_add(1, Ordering::SeqCst);
            let request = InFlight(self);
            if self.drained.load(Ordering::SeqCst) == 0 {
                return request;
            }
            drop(request);
            self.wait_until(|node| node.drained.load(Ordering::SeqCst) == 0).await;
        }
    }

    /// Keeps new requests from beginning and waits for those in flight. Requests wait until what is returned is
    /// dropped.
    pub async fn drain(self: &NodeRef) -> Drained {
        self.drained.fetch_add(1, Ordering::SeqCst);
        let drained = Drained(self.clone());
        self.wait_until(|node| node.in_flight.load(Ordering::SeqCst) == 0).await;
        drained
    }

    fn check_end(offset: u64, len: u64) -> Result<u64> {
        let end = offset.checked_add(len).filter(|end| *end <= i64::MAX as u64);
        end.ok_or_else(|| Error::errno_only(Errno::IO))
    }

    fn check_write(&self, offset: u64, len: u64) -> Result<u64> {
        let end = Self::check_end(offset, len)?;
        if self.read_only() {
            return Err(Error::new(Errno::NOT_PERMITTED, format!("node '{}' is read-only", self.name)));
        }
        if end > self.driver.len() && !self.driver.grows() {
            return Err(Error::errno_only(Errno::IO));
        }
        Ok(end)
    }

    fn wrote(&self, offset: u64, len: u64) {
        if self.has_bitmaps.load(Ordering::SeqCst) {
            for bitmap in self.bitmaps.read().iter().filter(|bitmap| bitmap.enabled()) {
                bitmap.set(offset, len);
            }
        }
    }

    /// Fills `into` with what is at `offset`; what is beyond the end is zero.
    ///
    /// # Errors
    /// The driver's; any part of `into` may have been written.
    pub async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        let len = into.len() as u64;
        if len == 0 {
            return Ok(());
        }
        Self::check_end(offset, len)?;
        let _request = self.begin().await;
        let most = self.driver.limits().max_transfer;
        let there = self.driver.len().saturating_sub(offset).min(len);
        if there == len && (most == 0 || len <= most) {
            return self.driver.read(offset, into).await;
        }
        into.zero(there as usize, (len - there) as usize);
        for (at, part) in parts(there, most) {
            self.driver.read(offset + at, &into.slice(at as usize..(at + part) as usize)).await?;
        }
        Ok(())
    }

    /// Writes `from` to `offset`.
    ///
    /// # Errors
    /// The driver's, or if the node is read-only or ends before; any part may have been written.
    pub async fn write(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()> {
        let len = from.len() as u64;
        if len == 0 {
            return if flags.contains(WriteFlags::FUA) { self.flush().await } else { Ok(()) };
        }
        self.check_write(offset, len)?;
        let _request = self.begin().await;
        let most = self.driver.limits().max_transfer;
        let result = if most == 0 || len <= most {
            self.driver.write(offset, from, flags).await
        } else {
            let mut result = Ok(());
            for (at, part) in parts(len, most) {
                let piece = from.slice(at as usize..(at + part) as usize);
                result = self.driver.write(offset + at, &piece, flags).await;
                if result.is_err() {
                    break;
                }
            }
            result
        };
        self.wrote(offset, len);
        result
    }

    /// Makes a range zero, by writing zeroes if there is no better way and the flags allow it.
    ///
    /// # Errors
    /// As those of [`Node::write`].
    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        self.check_write(offset, len)?;
        let _request = self.begin().await;
        let limits = self.driver.limits();
        let mut result = Ok(());
        for (at, part) in parts(len, limits.max_write_zeroes) {
            result = match self.driver.write_zeroes(offset + at, part, flags).await {
                Err(error)
                    if error.errno() == Errno::NOT_SUPPORTED && !flags.contains(ZeroFlags::NO_FALLBACK) =>
                {
                    self.really_write_zeroes(offset + at, part, flags, limits.max_transfer).await
                }
                result => result,
            };
            if result.is_err() {
                break;
            }
        }
        self.wrote(offset, len);
        result
    }

    async fn really_write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags, most: u64) -> Result<()> {
        let most = if most == 0 { ZERO_CHUNK } else { most.min(ZERO_CHUNK) };
        let zeroes = IoBuffer::zeroed(len.min(most) as usize).into_io();
        let write_flags = if flags.contains(ZeroFlags::FUA) { WriteFlags::FUA } else { WriteFlags::empty() };
        for (at, part) in parts(len, most) {
            self.driver.write(offset + at, &zeroes.slice(0..part as usize), write_flags).await?;
        }
        Ok(())
    }

    /// The bytes are no longer needed. What the driver cannot discard stays.
    ///
    /// # Errors
    /// As those of [`Node::write`], save that a driver that cannot discard is no error.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        self.check_write(offset, len)?;
        if !self.flags().unmap {
            return Ok(());
        }
        let _request = self.begin().await;
        let mut result = Ok(());
        for (at, part) in parts(len, self.driver.limits().max_discard) {
            result = match self.driver.discard(offset + at, part).await {
                Err(error) if error.errno() == Errno::NOT_SUPPORTED => Ok(()),
                result => result,
            };
            if result.is_err() {
                break;
            }
        }
        self.wrote(offset, len);
        result
    }

    /// Returns when everything that was written by requests that had ended is on stable storage; at once if the node
    /// was opened to ignore that.
    ///
    /// # Errors
    /// What was written since the last successful flush may be lost.
    pub async fn flush(&self) -> Result<()> {
        if self.read_only() {
            return Ok(());
        }
        let _request = self.begin().await;
        self.driver.flush().await
    }

    /// What a range is; ranges beyond the end are empty.
    ///
    /// # Errors
    /// The driver's.
    pub async fn block_status(&self, offset: u64, len: u64, precise: bool) -> Result<BlockStatus> {
        let end = self.driver.len();
        let there = end.saturating_sub(offset).min(len);
        if there == 0 {
            return Ok(BlockStatus { eof: offset >= end, ..BlockStatus::default() });
        }
        let _request = self.begin().await;
        let mut status = self.driver.block_status(offset, there, precise).await?;
        if status.len == 0 {
            let message = format!("driver '{}' says nothing of byte {offset}", self.driver.format_name());
            return Err(Error::new(Errno::IO, message));
        }
        status.len = status.len.min(there);
        status.eof = offset + status.len == end;
        Ok(status)
    }

    /// Changes the length.
    ///
    /// # Errors
    /// The driver's, or if the node is read-only; the length is then as before.
    pub async fn truncate(&self, len: u64, how: Truncate) -> Result<()> {
        if self.read_only() {
            return Err(Error::new(Errno::ACCESS, "Image is read-only"));
        }
        if len > MAX_LEN {
            return Err(Error::new(
                Errno::TOO_LARGE,
                format!("Required too big image size, it must be not greater than {MAX_LEN}"),
            ));
        }
        let _request = self.begin().await;
        let old = self.driver.len();
        self.driver.truncate(len, how).await?;
        for bitmap in self.bitmaps.read().iter() {
            bitmap.resize(self.driver.len());
        }
        if len > old {
            self.wrote(old, len - old);
        }
        Ok(())
    }

    /// Has a bitmap record the node's writes.
    pub fn add_bitmap(&self, bitmap: Arc<DirtyBitmap>) {
        self.bitmaps.write().push(bitmap);
        self.has_bitmaps.store(true, Ordering::SeqCst);
    }

    /// The bitmaps that record the node's writes.
    pub fn bitmaps(&self) -> Vec<Arc<DirtyBitmap>> {
        self.bitmaps.read().clone()
    }

    /// Waits for requests in flight, flushes, has the driver write what it must, and does the same for the nodes below
    /// that nobody else stands on. Only the first call does anything.
    ///
    /// # Errors
    /// The first that any of this met; the rest is done all the same.
    pub async fn close(self: &NodeRef) -> Result<()> {
        if self.closed.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        let drained = self.drain().await;
        let mut result = self.driver.close().await;
        if !self.read_only() {
            result = result.and(self.driver.flush().await);
        }
        drop(drained);
        for edge in self.driver.edges() {
            let child = edge.node();
            if child.parents.load(Ordering::SeqCst) <= 1 {
                result = result.and(Box::pin(child.close()).await);
            }
        }
        result
    }
}

/// A length in parts of at most `most`: where each begins and how long it is. 0 is no limit.
fn parts(len: u64, most: u64) -> impl Iterator<Item = (u64, u64)> {
    let most = if most == 0 { len.max(1) } else { most };
    (0..len.div_ceil(most)).map(move |n| (n * most, most.min(len - n * most)))
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("name", &self.name).field("driver", &self.driver).finish_non_exhaustive()
    }
}
