//! Copying what is marked, many ranges at once, while the source is written to.

use crate::copy::Copier;
use crate::event::{ErrorAction, JobStatus};
use crate::job::Job;
use crate::parameters::OnError;
use crate::transfer::{CopyError, Transfer};
use block_graph::{
    Change, DirtyBitmap, Granularity, Next, NodeRef, RangeLock, Result, WriteWatcher, async_trait,
};
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How often a copy that is up to date looks whether it still is.
const INTERVAL: Duration = Duration::from_millis(100);
/// How many ranges are copied at once.
const MOST_IN_FLIGHT: usize = 16;

/// What is still to be brought over, and how.
pub(crate) struct Feed {
    transfer: Box<dyn Transfer>,
    /// What is to be brought over, in units.
    pub(crate) dirty: Arc<DirtyBitmap>,
    /// Ranges that are being brought over, or changed.
    busy: RangeLock,
    /// The most bytes at once.
    chunk: u64,
    /// What fails and is ignored is left out, and is the end's error; else it is tried again.
    leaves_out: bool,
    in_flight: usize,
}

impl Feed {
    /// Nothing is to be brought over yet.
    pub(crate) fn new(transfer: impl Transfer + 'static, unit: Granularity, memory: u64) -> Self {
        let chunk = (memory / MOST_IN_FLIGHT as u64).max(unit.bytes());
        let dirty = Arc::new(DirtyBitmap::new(None, transfer.source().len(), unit));
        Self {
            transfer: Box::new(transfer),
            dirty,
            busy: RangeLock::new(),
            chunk: chunk - chunk % unit.bytes(),
            leaves_out: false,
            in_flight: MOST_IN_FLIGHT,
        }
    }

    /// The same, but what fails and is ignored is left out.
    pub(crate) fn leaving_out(self) -> Self {
        Self { leaves_out: true, ..self }
    }

    /// The same, with other bounds where they are not 0.
    pub(crate) fn bounded(self, chunk: u64, in_flight: u32) -> Self {
        let unit = self.dirty.granularity().bytes();
        let chunk = if chunk == 0 { self.chunk } else { (chunk - chunk % unit).max(unit) };
        let in_flight = if in_flight == 0 { self.in_flight } else { in_flight.min(64) as usize };
        Self { chunk, in_flight, ..self }
    }

    /// The units that a range touches.
    pub(crate) fn units(&self, range: Range<u64>) -> Range<u64> {
        let unit = self.dirty.granularity().bytes();
        let end = range.end.checked_next_multiple_of(unit).unwrap_or(u64::MAX);
        range.start - range.start % unit..end.min(self.transfer.source().len()).max(range.start)
    }

    /// Waits until nobody brings over or changes the units of a range, and keeps others from it.
    pub(crate) async fn hold(&self, range: Range<u64>) -> block_graph::RangeGuard<'_> {
        self.busy.lock(range).await
    }

    /// Brings over what is dirty of a range that the caller holds, having entered the source. Returns the bytes.
    pub(crate) async fn clean(&self, range: &Range<u64>) -> std::result::Result<u64, CopyError> {
        let (mut at, mut bytes) = (range.start, 0);
        while let Some(dirty) = self.dirty.next_dirty(at).filter(|dirty| dirty.start < range.end) {
            let part = dirty.start..dirty.end.min(range.end);
            let len = part.end - part.start;
            self.dirty.reset(part.start, len);
            at = part.end;
            if let Err(error) = self.transfer.transfer(part.clone()).await {
                self.dirty.set(part.start, len);
                return Err(error);
            }
            bytes += len;
        }
        Ok(bytes)
    }

    /// Brings over what is dirty of a range.
    async fn bring(&self, range: Range<u64>) -> std::result::Result<u64, CopyError> {
        // Who waits for what somebody holds is in flight at the source: first in flight, then the hold.
        let _entered = self.transfer.source().enter().await;
        let _held = self.hold(range.clone()).await;
        self.clean(&range).await
    }

    /// The next range with something dirty, from `cursor` on.
    fn next(&self, cursor: &mut u64) -> Option<Range<u64>> {
        let found = self.dirty.next_dirty(*cursor)?;
        let start = found.start;
        let range = self.units(start..found.end.min(start.saturating_add(self.chunk)));
        *cursor = range.end.max(start + 1);
        Some(range)
    }

    /// Brings over what is dirty, until nothing is, with the job's pauses and pace.
    pub(crate) async fn run(
        self: &Arc<Self>,
        job: &Job,
        on_read: OnError,
        on_write: OnError,
        left_out: &mut Option<block_graph::Error>,
    ) -> Result<()> {
        let mut in_flight = FuturesUnordered::new();
        let mut cursor = 0;
        loop {
            while in_flight.len() < self.in_flight && !job.is_cancelled() && !job.wants_pause() {
                let Some(range) = self.next(&mut cursor) else { break };
                job.keep_pace(range.end - range.start).await;
                let (feed, brought) = (self.clone(), range.clone());
                // A task: it goes on while this waits for its pace.
                in_flight.push(io_loop::spawn(async move { (range, feed.bring(brought).await) }));
            }
            let Some((range, brought)) = in_flight.next().await else {
                job.pause_point().await?;
                cursor = 0;
                job.set_remaining(self.dirty.dirty_bytes());
                if self.dirty.dirty_bytes() == 0 {
                    return Ok(());
                }
                continue;
            };
            match brought {
                Ok(bytes) => job.add_done(bytes),
                Err(failed) => {
                    let policy = if failed.is_write() { on_write } else { on_read };
                    match job.failed(policy, failed.is_write(), failed.error()).await {
                        ErrorAction::Report => {
                            while in_flight.next().await.is_some() {}
                            return Err(failed.error().clone());
                        }
                        ErrorAction::Ignore if self.leaves_out => {
                            self.dirty.reset(range.start, range.end - range.start);
                            left_out.get_or_insert_with(|| failed.error().clone());
                        }
                        ErrorAction::Ignore | ErrorAction::Stop => {}
                    }
                }
            }
            job.set_remaining(self.dirty.dirty_bytes());
        }
    }

    /// Brings over what is dirty, without more ado.
    pub(crate) async fn catch_up(&self) -> Result<()> {
        let mut cursor = 0;
        while let Some(range) = self.next(&mut cursor) {
            self.bring(range).await.map_err(|failed| failed.error().clone())?;
        }
        Ok(())
    }
}

/// Sees what is written to a node whose content another one gets.
pub(crate) struct Follower {
    pub(crate) feed: Arc<Feed>,
    target: NodeRef,
    /// Writes end when the copy has them.
    active: AtomicBool,
}

#[async_trait(?Send)]
impl WriteWatcher for Follower {
    async fn around(&self, change: Change<'_>, next: Next<'_>) -> Result<()> {
        if !self.is_active() {
            return next.run(change).await;
        }
        let (offset, len) = change.range();
        let range = self.feed.units(offset..offset.saturating_add(len));
        let _held = self.feed.hold(range.clone()).await;
        // The feed's bitmap records the change; what cannot be copied now stays dirty, and the job tries again and says
        // what it is.
        let result = next.run(change).await;
        let _ = self.feed.clean(&range).await;
        result
    }

    fn targets(&self) -> Vec<NodeRef> {
        vec![self.target.clone()]
    }
}

impl Follower {
    pub(crate) fn new(copier: Copier, unit: Granularity, memory: u64) -> Self {
        let target = copier.target.clone();
        Self { feed: Arc::new(Feed::new(copier, unit, memory)), target, active: AtomicBool::new(false) }
    }

    pub(crate) fn is_active(&self) -> bool {
        self.active.load(Ordering::SeqCst)
    }

    /// Has writes that begin from now on end when the copy has them.
    pub(crate) fn be_active(&self) {
        self.active.store(true, Ordering::SeqCst);
    }

    /// Copies what is dirty until somebody ends it: `Ok` if the copy is up to date, and is going to stay so because
    /// writes reach it before they end.
    pub(crate) async fn run(
        &self,
        job: &Job,
        target: &NodeRef,
        on_read: OnError,
        on_write: OnError,
    ) -> Result<()> {
        loop {
            self.feed.run(job, on_read, on_write, &mut None).await?;
            let ends = job.is_completing() || job.is_ended();
            if ends && self.is_active() {
                return Ok(());
            }
            if job.status() != JobStatus::Ready
                && let Err(error) = target.flush().await
            {
                if job.failed(on_write, true, &error).await == ErrorAction::Report {
                    return Err(error);
                }
                continue;
            }
            job.ready();
            if ends {
                self.be_active();
            } else {
                job.sleep(INTERVAL).await;
            }
        }
    }
}
