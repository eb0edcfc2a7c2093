//! The shell around every driver.

use crate::{
    BlockStatus, Change, DirtyBitmap, Driver, Edge, Errno, Error, Next, OpenFlags, Result, Truncate,
    WriteFlags, WriteWatcher, ZeroFlags,
};
use io_loop::{IoBuffer, IoVec};
use parking_lot::{Mutex, RwLock};
use std::fmt;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
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
    watchers: RwLock<Arc<[Arc<dyn WriteWatcher>]>>,
    /// Writes are recorded or watched.
    observed: AtomicBool,
    parents: Mutex<Vec<Weak<Edge>>>,
    closed: AtomicBool,
}

/// A request that has begun.
struct InFlight<'a>(&'a Node);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// A request of several parts that has begun: until this is dropped the node is not drained, and what is done `within`
/// it does not wait for a drain to end.
#[derive(Debug)]
pub struct Entered(NodeRef);

impl Entered {
    /// The node.
    pub fn node(&self) -> &NodeRef {
        &self.0
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// As long as this lives, no new request begins at the node.
#[derive(Debug)]
pub struct Drained(NodeRef);

impl Drained {
    /// The node.
    pub fn node(&self) -> &NodeRef {
        &self.0
    }
}

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
        let name = name.into();
        driver.named(&name);
        Arc::new(Self {
            name,
            driver,
            flags: RwLock::new(flags),
            in_flight: AtomicUsize::new(0),
            drained: AtomicUsize::new(0),
            waiting: Mutex::default(),
            bitmaps: RwLock::default(),
            watchers: RwLock::new(Arc::new([])),
            observed: AtomicBool::new(false),
            parents: Mutex::default(),
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

    pub(crate) fn add_parent(&self, edge: Weak<Edge>) {
        self.parents.lock().push(edge);
    }

    pub(crate) fn remove_parent(&self, edge: &Edge) {
        let mut parents = self.parents.lock();
        if let Some(at) = parents.iter().position(|parent| std::ptr::eq(parent.as_ptr(), edge)) {
            parents.swap_remove(at);
        }
    }

    /// The edges that lead here.
    pub fn parents(&self) -> Vec<Arc<Edge>> {
        self.parents.lock().iter().filter_map(Weak::upgrade).collect()
    }

    /// Whether it was closed.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
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

    fn end(&self) {
        if self.in_flight.fetch_sub(1, Ordering::SeqCst) == 1 && self.drained.load(Ordering::SeqCst) > 0 {
            self.wake_waiting();
        }
    }

    /// Begins a request of several parts, which are made with `read_within`, `write_within` and the like.
    pub async fn enter(self: &NodeRef) -> Entered {
        self.clone().enter_this().await
    }

    /// [`Node::enter`] for who has a reference to give.
    pub(crate) async fn enter_this(self: NodeRef) -> Entered {
        std::mem::forget(self.begin().await);
        Entered(self)
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

    /// Whether this may be written, and what the node was opened with.
    fn check_write(&self, offset: u64, len: u64) -> Result<OpenFlags> {
        let end = Self::check_end(offset, len)?;
        let flags = self.flags();
        if !flags.writable {
            return Err(Error::new(Errno::NOT_PERMITTED, format!("node '{}' is read-only", self.name)));
        }
        if end > self.driver.len() && !self.driver.grows() {
            return Err(Error::errno_only(Errno::IO));
        }
        Ok(flags)
    }

    fn wrote(&self, offset: u64, len: u64) {
        if self.observed.load(Ordering::SeqCst) {
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
        if into.is_empty() {
            return Ok(());
        }
        let _request = self.begin().await;
        self.read_within(offset, into).await
    }

    /// [`Node::read`] for who has entered the node, or drained it.
    ///
    /// # Errors
    /// As those of [`Node::read`].
    pub async fn read_within(&self, offset: u64, into: &IoVec) -> Result<()> {
        let len = into.len() as u64;
        if len == 0 {
            return Ok(());
        }
        Self::check_end(offset, len)?;
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
        let _request = self.begin().await;
        self.change(Change::Data { offset, from, flags }).await
    }

    /// [`Node::write`] for who has entered the node, or drained it.
    ///
    /// # Errors
    /// As those of [`Node::write`].
    pub async fn write_within(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()> {
        if from.is_empty() { Ok(()) } else { self.change(Change::Data { offset, from, flags }).await }
    }

    /// [`Node::write_zeroes`] for who has entered the node, or drained it.
    ///
    /// # Errors
    /// As those of [`Node::write_zeroes`].
    pub async fn write_zeroes_within(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        if len == 0 { Ok(()) } else { self.change(Change::Zeroes { offset, len, flags }).await }
    }

    /// Stores what a read of the range gives already, for who has entered the node, or drained it: nothing that can be
    /// seen changes, so that it is neither recorded nor watched.
    ///
    /// # Errors
    /// As those of [`Node::write`].
    pub async fn store_within(&self, change: Change<'_>) -> Result<()> {
        let (offset, len) = change.range();
        self.check_write(offset, len)?;
        self.make(change).await
    }

    /// Makes a change, past those who watch.
    async fn change(&self, change: Change<'_>) -> Result<()> {
        let (offset, len) = change.range();
        let change = change.detecting_zeroes(self.check_write(offset, len)?.detect_zeroes);
        if !self.observed.load(Ordering::SeqCst) {
            return self.make(change).await;
        }
        let watchers = self.watchers.read().clone();
        Next::new(self, &watchers).run(change).await
    }

    /// Has the driver make a change, and records it.
    pub(crate) async fn make_recorded(&self, change: Change<'_>) -> Result<()> {
        let (offset, len) = change.range();
        let result = self.make(change).await;
        self.wrote(offset, len);
        result
    }

    async fn make(&self, change: Change<'_>) -> Result<()> {
        match change {
            Change::Data { offset, from, flags } => self.make_data(offset, from, flags).await,
            Change::Zeroes { offset, len, flags } => self.make_zeroes(offset, len, flags).await,
            Change::Discard { offset, len } => self.make_discard(offset, len).await,
        }
    }

    async fn make_data(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()> {
        let len = from.len() as u64;
        let most = self.driver.limits().max_transfer;
        if most == 0 || len <= most {
            return self.driver.write(offset, from, flags).await;
        }
        for (at, part) in parts(len, most) {
            let piece = from.slice(at as usize..(at + part) as usize);
            self.driver.write(offset + at, &piece, flags).await?;
        }
        Ok(())
    }

    /// Makes a range zero, by writing zeroes if there is no better way and the flags allow it.
    ///
    /// # Errors
    /// As those of [`Node::write`].
    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let _request = self.begin().await;
        self.change(Change::Zeroes { offset, len, flags }).await
    }

    async fn make_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let limits = self.driver.limits();
        for (at, part) in aligned_parts(offset, len, limits.write_zeroes_alignment, limits.max_write_zeroes) {
            match self.driver.write_zeroes(offset + at, part, flags).await {
                Err(error)
                    if error.errno() == Errno::NOT_SUPPORTED && !flags.contains(ZeroFlags::NO_FALLBACK) =>
                {
                    self.really_write_zeroes(offset + at, part, flags, limits.max_transfer).await?;
                }
                result => result?,
            }
        }
        Ok(())
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
        let _request = self.begin().await;
        self.discard_within(offset, len).await
    }

    /// [`Node::discard`] for who has entered the node, or drained it.
    ///
    /// # Errors
    /// As those of [`Node::discard`].
    pub async fn discard_within(&self, offset: u64, len: u64) -> Result<()> {
        self.check_write(offset, len)?;
        if len > 0 && self.flags().unmap {
            self.change(Change::Discard { offset, len }).await
        } else {
            Ok(())
        }
    }

    async fn make_discard(&self, offset: u64, len: u64) -> Result<()> {
        let limits = self.driver.limits();
        for (at, part) in aligned_parts(offset, len, limits.discard_alignment, limits.max_discard) {
            match self.driver.discard(offset + at, part).await {
                Err(error) if error.errno() == Errno::NOT_SUPPORTED => {}
                result => result?,
            }
        }
        Ok(())
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

    /// [`Node::flush`] for who has entered the node, or drained it.
    ///
    /// # Errors
    /// As those of [`Node::flush`].
    pub async fn flush_within(&self) -> Result<()> {
        if self.read_only() { Ok(()) } else { self.driver.flush().await }
    }

    /// What a range is; ranges beyond the end are empty.
    ///
    /// # Errors
    /// The driver's.
    pub async fn block_status(&self, offset: u64, len: u64, precise: bool) -> Result<BlockStatus> {
        let _request = self.begin().await;
        self.block_status_within(offset, len, precise).await
    }

    /// [`Node::block_status`] for who has entered the node, or drained it.
    ///
    /// # Errors
    /// As those of [`Node::block_status`].
    pub async fn block_status_within(&self, offset: u64, len: u64, precise: bool) -> Result<BlockStatus> {
        let end = self.driver.len();
        let there = end.saturating_sub(offset).min(len);
        if there == 0 {
            return Ok(BlockStatus { eof: offset >= end, ..BlockStatus::default() });
        }
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
        let _request = self.begin().await;
        self.truncate_within(len, how).await
    }

    /// [`Node::truncate`] for who has entered the node, or drained it.
    ///
    /// # Errors
    /// As those of [`Node::truncate`].
    pub async fn truncate_within(&self, len: u64, how: Truncate) -> Result<()> {
        if self.read_only() {
            return Err(Error::new(Errno::ACCESS, "Image is read-only"));
        }
        if len > MAX_LEN {
            return Err(Error::new(
                Errno::TOO_LARGE,
                format!("Required too big image size, it must be not greater than {MAX_LEN}"),
            ));
        }
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
        self.update_observed();
    }

    /// Has a bitmap record the node's writes no more.
    pub fn remove_bitmap(&self, bitmap: &Arc<DirtyBitmap>) {
        self.bitmaps.write().retain(|other| !Arc::ptr_eq(other, bitmap));
        self.update_observed();
    }

    /// Has every change of the node's content that begins from now on go past `watcher`. Who wants to see all of a time
    /// drains the node meanwhile.
    pub fn add_watcher(&self, watcher: Arc<dyn WriteWatcher>) {
        let mut watchers = self.watchers.write();
        *watchers = watchers.iter().cloned().chain([watcher]).collect();
        drop(watchers);
        self.update_observed();
    }

    /// Has changes go past `watcher` no more. Those under way still may, unless the node is drained.
    pub fn remove_watcher(&self, watcher: &Arc<dyn WriteWatcher>) {
        let mut watchers = self.watchers.write();
        *watchers = watchers.iter().filter(|other| !Arc::ptr_eq(other, watcher)).cloned().collect();
        drop(watchers);
        self.update_observed();
    }

    /// The nodes that changes of this node's content go to beside its driver.
    pub fn watchers_targets(&self) -> Vec<NodeRef> {
        self.watchers.read().iter().flat_map(|watcher| watcher.targets()).collect()
    }

    fn update_observed(&self) {
        let any = !self.bitmaps.read().is_empty() || !self.watchers.read().is_empty();
        self.observed.store(any, Ordering::SeqCst);
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
            if child.parents.lock().len() <= 1 {
                result = result.and(Box::pin(child.close()).await);
            }
        }
        result
    }
}

/// A range in parts of at most `most` bytes, of which those in the middle begin and end at multiples of `alignment`, so
/// that no more than is needed is lost at drivers that work on whole units. 0 says that there is no limit, or no unit.
fn aligned_parts(offset: u64, len: u64, alignment: u64, most: u64) -> impl Iterator<Item = (u64, u64)> {
    let whole = most.checked_div(alignment).map_or(0, |units| units * alignment);
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let unaligned = at.checked_rem(alignment).unwrap_or(0);
        let stop = match (unaligned, whole, most) {
            (_, _, 0) => end,
            (0, 0, most) => at + most.min(end - at),
            (0, whole, _) => at + whole.min(end - at),
            (_, _, most) => at + (alignment - unaligned).min(most).min(end - at),
        };
        let part = (at - offset, stop - at);
        at = stop;
        Some(part)
    })
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
