//! Backups: copies of what there was when they began. What is about to be overwritten is copied first.

use crate::bitmaps;
use crate::blockers::Op;
use crate::copy::{Copier, Kind, cluster_size};
use crate::event::JobType;
use crate::feed::Feed;
use crate::inner::Inner;
use crate::job::{Job, Work};
use crate::nodes::image_of;
use crate::parameters::{
    Action, Backup, BitmapMode, BlockdevBackup, CompletionMode, DriveBackup, NewImageMode, OnCbwError,
    OnError, SyncMode,
};
use crate::storage::Storage;
use block_graph::{
    Change, DirtyBitmap, Errno, Error, Granularity, Next, NodeRef, Quiesced, Result, WriteWatcher,
    async_trait,
};
use parking_lot::Mutex;
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

/// The least that is copied at once, in bytes.
const LEAST_UNIT: u64 = 65536;
/// Memory for copies, in bytes.
const BUFFER: u64 = 16 << 20;
/// The bytes of a status that is asked for at once.
const MOST_STATUS: u64 = 1 << 30;

/// Copies what is overwritten.
struct Saver {
    feed: Arc<Feed>,
    target: NodeRef,
    on_error: OnCbwError,
    /// Why the backup is not what it is to be.
    broken: Mutex<Option<Error>>,
}

#[async_trait(?Send)]
impl WriteWatcher for Saver {
    async fn around(&self, change: Change<'_>, next: Next<'_>) -> Result<()> {
        let (offset, len) = change.range();
        let range = self.feed.units(offset..offset.saturating_add(len));
        let is_broken = self.broken.lock().is_some();
        if !is_broken {
            let held = self.feed.hold(range.clone()).await;
            let saved = self.feed.clean(&range).await;
            drop(held);
            if let Err(failed) = saved {
                match self.on_error {
                    OnCbwError::BreakGuestWrite => return Err(failed.error().clone()),
                    OnCbwError::BreakSnapshot => {
                        self.broken.lock().get_or_insert(failed.error().clone());
                    }
                }
            }
        }
        next.run(change).await
    }

    fn targets(&self) -> Vec<NodeRef> {
        vec![self.target.clone()]
    }
}

/// A bitmap that a backup goes by.
struct SyncBitmap {
    name: String,
    mode: BitmapMode,
    /// What was written since the backup began.
    since: Arc<DirtyBitmap>,
}

/// The work of a backup.
pub(crate) struct BackupWork {
    inner: Rc<Inner>,
    copier: Copier,
    saver: Arc<Saver>,
    sync: SyncMode,
    bitmap: Option<SyncBitmap>,
    begun: Cell<bool>,
    on_read: OnError,
    on_write: OnError,
}

impl BackupWork {
    fn source(&self) -> &NodeRef {
        &self.copier.source
    }

    fn watcher(&self) -> Arc<dyn WriteWatcher> {
        self.saver.clone()
    }

    /// The moment of which the target gets the content: nothing is in flight.
    fn begin(&self, of_bitmap: Option<&DirtyBitmap>) {
        let dirty = &self.saver.feed.dirty;
        match (self.sync, of_bitmap) {
            (SyncMode::Incremental | SyncMode::Bitmap, Some(bitmap)) => dirty.merge(bitmap),
            _ => dirty.set(0, self.source().len()),
        }
        if let Some(bitmap) = &self.bitmap {
            bitmap.since.clear();
            self.source().add_bitmap(bitmap.since.clone());
        }
        self.source().add_watcher(self.watcher());
        self.begun.set(true);
    }

    /// Leaves out what need not be copied.
    async fn look(&self, job: &Job) -> Result<()> {
        let feed = &self.saver.feed;
        let (len, unit) = (self.source().len(), feed.dirty.granularity().bytes());
        let mut at = 0;
        while let Some(range) = feed.dirty.next_dirty(at) {
            job.pause_point().await?;
            let most = MOST_STATUS.min(range.end - range.start);
            let _entered = self.source().enter().await;
            // Nobody changes it while it is looked at.
            let _held = feed.hold(range.start..range.start + most).await;
            let (kind, alike) = self.copier.find_out(range.start, most).await?;
            let end = range.start + alike;
            let end = if end == len { end } else { end - end % unit };
            let needless = kind == Kind::Seen || (kind == Kind::Zero && self.copier.target_is_zero);
            if needless && end > range.start {
                feed.dirty.reset(range.start, end - range.start);
            }
            at = end.max(range.start - range.start % unit + unit);
        }
        Ok(())
    }

    fn failure(&self) -> Option<Error> {
        self.saver.broken.lock().clone()
    }

    /// Has the bitmap be what its mode says.
    async fn settle_bitmap(&self, success: bool) {
        let Some(sync) = &self.bitmap else { return };
        let took_all = success;
        let takes = match sync.mode {
            BitmapMode::OnSuccess => success,
            BitmapMode::Always => true,
            BitmapMode::Never => false,
        };
        if !takes {
            return;
        }
        let _quiesced = self.inner.context.quiesce(std::slice::from_ref(self.source())).await;
        match bitmaps::content(self.source(), &sync.name).await {
            Ok(bitmap) => {
                let before = bitmaps::copy_of(&bitmap);
                bitmap.clear();
                bitmap.merge(&sync.since);
                if !took_all {
                    // What was to be copied, and was not, is still to be.
                    let left = bitmaps::copy_of(&self.saver.feed.dirty);
                    keep_common(&bitmap, &before, &left);
                }
            }
            Err(error) => tracing::warn!("the bitmap '{}' stays as it is: {error}", sync.name),
        }
    }

    fn end(&self) {
        self.source().remove_watcher(&self.watcher());
        if let Some(bitmap) = &self.bitmap {
            self.source().remove_bitmap(&bitmap.since);
        }
    }
}

/// Makes dirty in `into` what is dirty in both.
fn keep_common(into: &DirtyBitmap, a: &DirtyBitmap, b: &DirtyBitmap) {
    let mut at = 0;
    while let Some(one) = a.next_dirty(at) {
        at = one.end;
        let mut from = one.start;
        while let Some(other) = b.next_dirty(from).filter(|other| other.start < one.end) {
            let end = other.end.min(one.end);
            into.set(other.start, end - other.start);
            from = other.end;
        }
    }
}

#[async_trait(?Send)]
impl Work for BackupWork {
    async fn run(&self, job: &Job) -> Result<()> {
        let feed = &self.saver.feed;
        if self.sync == SyncMode::None {
            loop {
                job.pause_point().await?;
                if let Some(error) = self.failure() {
                    return Err(error);
                }
                job.sleep(std::time::Duration::from_millis(500)).await;
            }
        }
        job.set_remaining(feed.dirty.dirty_bytes());
        self.look(job).await?;
        feed.run(job, self.on_read, self.on_write, &mut None).await?;
        match self.failure() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    async fn prepare(&self, _job: &Job) -> Result<()> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        self.copier.target.flush().await
    }

    async fn commit(&self) {
        self.settle_bitmap(true).await;
    }

    async fn abort(&self) {
        if self.begun.get() {
            self.settle_bitmap(false).await;
        }
    }

    async fn clean(&self) {
        if self.begun.get() {
            // Whoever was in flight has gone by the saver by then.
            let _quiesced = self.inner.context.quiesce(std::slice::from_ref(self.source())).await;
            self.end();
        }
        if let Some(bitmap) = &self.bitmap {
            self.inner.free_bitmap(self.source(), &bitmap.name);
        }
    }
}

/// A backup that waits for its moment.
pub(crate) struct ReadyBackup {
    pub(crate) job: Rc<Job>,
    pub(crate) source: NodeRef,
    work: Rc<BackupWork>,
    of_bitmap: Option<Arc<DirtyBitmap>>,
}

impl ReadyBackup {
    /// Now: nothing is in flight.
    pub(crate) fn begin(&self, quiesced: &Quiesced) {
        debug_assert!(quiesced.holds(&self.source), "a backup of a node that is in use");
        self.work.begin(self.of_bitmap.as_deref());
    }
}

#[async_trait(?Send)]
impl Work for Rc<BackupWork> {
    async fn run(&self, job: &Job) -> Result<()> {
        (**self).run(job).await
    }

    async fn prepare(&self, job: &Job) -> Result<()> {
        (**self).prepare(job).await
    }

    async fn commit(&self) {
        (**self).commit().await;
    }

    async fn abort(&self) {
        (**self).abort().await;
    }

    async fn clean(&self) {
        (**self).clean().await;
    }
}

/// The mode of a backup's bitmap.
fn bitmap_mode(backup: &Backup) -> Result<Option<BitmapMode>> {
    let sync = backup.sync.name();
    let goes_by = matches!(backup.sync, SyncMode::Incremental | SyncMode::Bitmap);
    match (&backup.bitmap, backup.bitmap_mode) {
        (None, _) if goes_by => {
            Err(Error::invalid(format!("must provide a valid bitmap name for '{sync}' sync mode")))
        }
        (None, Some(_)) => Err(Error::invalid("Cannot specify bitmap sync mode without a bitmap")),
        (None, None) => Ok(None),
        (Some(_), Some(mode)) if backup.sync == SyncMode::Incremental && mode != BitmapMode::OnSuccess => {
            Err(Error::invalid("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'"))
        }
        (Some(_), _) if backup.sync == SyncMode::Incremental => Ok(Some(BitmapMode::OnSuccess)),
        (Some(_), None) => Err(Error::invalid("Bitmap sync mode must be given when providing a bitmap")),
        (Some(_), Some(_)) if backup.sync == SyncMode::None => {
            Err(Error::invalid(format!("sync mode '{sync}' does not produce meaningful bitmap outputs")))
        }
        (Some(_), Some(BitmapMode::Never)) if !goes_by => {
            let message = format!(
                "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{sync}'"
            );
            Err(Error::invalid(message))
        }
        (Some(_), Some(mode)) => Ok(Some(mode)),
    }
}

impl Inner {
    pub(crate) async fn ready_backup(
        self: &Rc<Self>,
        backup: &Backup,
        source: NodeRef,
        target: NodeRef,
        target_is_zero: bool,
    ) -> Result<ReadyBackup> {
        if Arc::ptr_eq(&source, &target) {
            return Err(Error::invalid("Source and target cannot be the same"));
        }
        if target.read_only() {
            return Err(Error::new(Errno::ACCESS, format!("Block node '{}' is read-only", target.name())));
        }
        self.check_op(&source, Op::Backup)?;
        // A target may have its source below it.
        self.check_target(&source, &target)?;
        if source.len() != target.len() {
            return Err(Error::invalid("Source and target image have different sizes"));
        }
        let compresses = image_of(&target).driver().format_name() == "qcow2";
        if backup.compress && !compresses {
            return Err(Error::unsupported(format!(
                "Compression is not supported for this drive {}",
                target.name()
            )));
        }
        let mode = bitmap_mode(backup)?;
        let of_bitmap = match &backup.bitmap {
            Some(name) => Some(self.take_bitmap(&source, name).await?),
            None => None,
        };
        let base = if backup.sync == SyncMode::Top { image_of(&source).backing() } else { None };
        let cluster = cluster_size(&target);
        let unit = if backup.compress { cluster } else { cluster.max(LEAST_UNIT) };
        let unit = Granularity::from_bytes(unit).unwrap_or(Granularity::DEFAULT);
        let copier = Copier {
            source: source.clone(),
            target: target.clone(),
            base,
            unit: unit.bytes(),
            compressed: backup.compress,
            target_is_zero,
        };
        let feed = Feed::new(copier.clone(), unit, BUFFER).bounded(backup.max_chunk, backup.max_workers);
        let saver = Arc::new(Saver {
            feed: Arc::new(feed),
            target: target.clone(),
            on_error: backup.on_cbw_error,
            broken: Mutex::default(),
        });
        let bitmap = of_bitmap.as_ref().zip(mode).map(|(bitmap, mode)| {
            let since = DirtyBitmap::new(None, source.len(), bitmap.granularity());
            since.set_enabled(bitmap.enabled());
            SyncBitmap { name: backup.bitmap.clone().unwrap_or_default(), mode, since: Arc::new(since) }
        });
        let work = Rc::new(BackupWork {
            inner: self.clone(),
            copier,
            saver,
            sync: backup.sync,
            bitmap,
            begun: Cell::new(false),
            on_read: backup.on_source_error,
            on_write: backup.on_target_error,
        });
        let nodes: [(NodeRef, &'static [Op]); 2] =
            [(source.clone(), &[Op::Backup, Op::Mirror, Op::InternalSnapshot]), (target, &[])];
        let job = self.new_job(JobType::Backup, &backup.job, &backup.device, &nodes, Box::new(work.clone()));
        match job {
            Ok(job) => Ok(ReadyBackup { job, source, work, of_bitmap }),
            Err(error) => {
                work.clean().await;
                Err(error)
            }
        }
    }

    pub(crate) async fn ready_blockdev_backup(
        self: &Rc<Self>,
        given: &BlockdevBackup,
    ) -> Result<ReadyBackup> {
        let source = self.find(&given.backup.device)?;
        let target = self.find(&given.target)?;
        self.ready_backup(&given.backup, source, target, false).await
    }

    /// Makes and opens the target of a backup.
    pub(crate) async fn backup_target(&self, given: &DriveBackup) -> Result<NodeRef> {
        let source = self.find(&given.backup.device)?;
        let backing = match given.backup.sync {
            SyncMode::Top => image_of(&source).backing(),
            SyncMode::None => Some(source.clone()),
            _ => None,
        };
        if given.target.mode == NewImageMode::AbsolutePaths {
            self.create_target(&source, backing.as_ref(), &given.target).await?;
        }
        self.open_target(&source, &given.target, backing).await
    }

    pub(crate) async fn ready_drive_backup(
        self: &Rc<Self>,
        given: &DriveBackup,
        target: NodeRef,
    ) -> Result<ReadyBackup> {
        let backup = &given.backup;
        let source = self.find(&backup.device)?;
        let whole = backup.sync == SyncMode::Top && image_of(&source).backing().is_none();
        let sync = if whole { SyncMode::Full } else { backup.sync };
        let made = given.target.mode == NewImageMode::AbsolutePaths;
        // A new image has nothing anywhere; a new raw file neither.
        let zero = made && sync == SyncMode::Full;
        self.ready_backup(&Backup { sync, ..backup.clone() }, source, target, zero).await
    }
}

impl Storage {
    /// `blockdev-backup`.
    ///
    /// # Errors
    /// What is wrong with what was given; the job has not begun.
    pub fn blockdev_backup(&self, backup: BlockdevBackup) -> Result<()> {
        self.transaction(vec![Action::BlockdevBackup(backup)], CompletionMode::Individual)
    }

    /// `drive-backup`.
    ///
    /// # Errors
    /// What is wrong with what was given; the job has not begun.
    pub fn drive_backup(&self, backup: DriveBackup) -> Result<()> {
        self.transaction(vec![Action::DriveBackup(backup)], CompletionMode::Individual)
    }
}
