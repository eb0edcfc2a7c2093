//! Mirrors, and the commit of an image that is written to: a copy that follows what is written, and takes the place of
//! what it copies.

use crate::blockers::Op;
use crate::copy::{Copier, Kind, cluster_size};
use crate::event::JobType;
use crate::feed::Follower;
use crate::inner::Inner;
use crate::job::{Job, Work};
use crate::nodes::image_of;
use crate::parameters::{BlockdevMirror, CopyMode, DriveMirror, Mirror, NewImageMode, OnError, SyncMode};
use crate::storage::Storage;
use block_graph::{
    DirtyBitmap, Errno, Error, Granularity, NodeRef, OpenContext, Quiesced, Result, Truncate, WriteWatcher,
    async_trait,
};
use std::rc::Rc;
use std::sync::Arc;

/// Memory for copies, in bytes, if nothing else is said.
const DEFAULT_BUFFER: u64 = 10 << 20;
/// The granularity is that of the target's clusters, within these bounds, if nothing else is said.
const DEFAULT_GRANULARITY: std::ops::RangeInclusive<u64> = 4096..=65536;
/// The bytes of a status that is asked for at once.
const MOST_STATUS: u64 = 1 << 30;

/// What is dirty at first.
pub(crate) enum First {
    /// What the source has above the copier's base.
    Chain,
    Nothing,
    Bitmap(Arc<DirtyBitmap>),
}

/// What stands below the copy when it takes its place.
#[derive(Debug, Clone)]
pub(crate) enum Below {
    /// What there is.
    AsItIs,
    /// This node, or none.
    Node(Option<NodeRef>),
}

/// The work of a mirror, or of a commit of what is written to.
pub(crate) struct MirrorWork {
    pub(crate) inner: Rc<Inner>,
    pub(crate) copier: Copier,
    pub(crate) follower: Arc<Follower>,
    pub(crate) first: First,
    /// The target reads as zeroes wherever nothing is written.
    pub(crate) target_is_zero: bool,
    /// What the copy takes the place of.
    pub(crate) replaces: NodeRef,
    pub(crate) below: Below,
    pub(crate) on_read: OnError,
    pub(crate) on_write: OnError,
    /// The target is made longer, and written to although it was not: a layer of the source's chain.
    pub(crate) is_commit: bool,
    pub(crate) target_was_read_only: bool,
}

impl MirrorWork {
    fn source(&self) -> &NodeRef {
        &self.copier.source
    }

    fn target(&self) -> &NodeRef {
        &self.copier.target
    }

    fn watcher(&self) -> Arc<dyn WriteWatcher> {
        self.follower.clone()
    }

    /// Writes go by the follower from now on.
    async fn begin(&self) -> Result<()> {
        if self.is_commit {
            self.inner.set_writable(self.target(), true).await?;
            if self.target().len() < self.source().len() {
                self.target().truncate(self.source().len(), Truncate::default()).await?;
            }
        }
        let _quiesced = self.inner.context.quiesce(std::slice::from_ref(self.source())).await;
        self.source().add_bitmap(self.follower.feed.dirty.clone());
        self.source().add_watcher(self.watcher());
        if let First::Bitmap(bitmap) = &self.first {
            self.follower.feed.dirty.merge(bitmap);
        }
        Ok(())
    }

    /// Makes dirty what is to be copied at first.
    async fn look(&self, job: &Job) -> Result<()> {
        if !matches!(self.first, First::Chain) {
            return Ok(());
        }
        let len = self.source().len();
        let target_is_zero = self.target_is_zero || {
            let whole = blockdev::status::above(self.target(), None, 0, len).await;
            matches!(whole, Ok((status, _)) if status.zero && status.len >= len)
        };
        let mut at = 0;
        while at < len {
            job.pause_point().await?;
            let most = MOST_STATUS.min(len - at);
            let (kind, alike) = {
                let _entered = self.source().enter().await;
                self.copier.find_out(at, most).await?
            };
            if kind == Kind::Data || (kind == Kind::Zero && !(target_is_zero && self.copier.base.is_none())) {
                self.follower.feed.dirty.set(at, alike);
            }
            at += alike.max(1);
        }
        job.set_remaining(self.follower.feed.dirty.dirty_bytes());
        Ok(())
    }

    /// Nothing goes by the follower any more.
    fn end(&self) {
        self.source().remove_watcher(&self.watcher());
        self.source().remove_bitmap(&self.follower.feed.dirty);
    }

    /// Waits until the copy is what the source is, with nothing in flight.
    async fn settle(&self) -> Result<Quiesced> {
        let nodes = [self.source().clone(), self.target().clone(), self.replaces.clone()];
        loop {
            let quiesced = self.inner.context.quiesce(&nodes).await;
            if self.follower.feed.dirty.dirty_bytes() == 0 {
                return Ok(quiesced);
            }
            drop(quiesced);
            self.follower.feed.catch_up().await?;
        }
    }

    /// Has the copy take its place.
    async fn pivot(&self, quiesced: &Quiesced) -> Result<()> {
        let target = self.target();
        // Whoever reads it after a crash finds what was flushed before.
        target.flush_within().await?;
        if let Below::Node(node) = &self.below {
            let image = image_of(target);
            let image = image.driver().image();
            let image = image.ok_or_else(|| Error::unsupported("The target cannot have a backing file"))?;
            image.set_backing_node(node.clone())?;
        }
        let users = self.inner.backends_on(&self.replaces);
        self.inner.context.replace_node(quiesced, &self.replaces, target, |_| false)?;
        if self.replaces.len() != target.len() {
            users.iter().for_each(|user| user.resized());
        }
        Ok(())
    }
}

#[async_trait(?Send)]
impl Work for MirrorWork {
    async fn run(&self, job: &Job) -> Result<()> {
        self.begin().await?;
        self.look(job).await?;
        self.follower.run(job, &self.copier.target, self.on_read, self.on_write).await
    }

    async fn prepare(&self, job: &Job) -> Result<()> {
        let quiesced = self.settle().await?;
        if job.is_completing() && !job.is_ended() {
            self.pivot(&quiesced).await?;
        } else {
            self.target().flush_within().await?;
        }
        self.end();
        Ok(())
    }

    async fn abort(&self) {
        self.end();
        if self.target_was_read_only
            && let Err(error) = self.inner.set_writable(self.target(), false).await
        {
            tracing::warn!("node '{}' stays writable: {error}", self.target().name());
        }
    }

    async fn clean(&self) {
        // Whoever was in flight has gone by the follower by then.
        let _quiesced = self.inner.context.quiesce(std::slice::from_ref(self.source())).await;
        self.end();
        if let First::Bitmap(bitmap) = &self.first
            && let Some(name) = bitmap.name()
        {
            self.inner.free_bitmap(self.source(), name);
        }
    }

    fn ends_when_cancelled(&self) -> bool {
        true
    }

    fn actively_synced(&self) -> Option<bool> {
        Some(self.follower.is_active() && self.follower.feed.dirty.dirty_bytes() == 0)
    }

    fn write_blocking(&self) -> Result<()> {
        self.follower.be_active();
        Ok(())
    }
}

fn granularity(asked: Option<u32>, target: &NodeRef) -> Result<Granularity> {
    let invalid = |expects| Error::invalid(format!("Parameter 'granularity' expects {expects}"));
    match asked.filter(|bytes| *bytes != 0) {
        None => {
            let (least, most) = (*DEFAULT_GRANULARITY.start(), *DEFAULT_GRANULARITY.end());
            let image = image_of(target);
            let cluster = image.driver().image().and_then(|image| image.info().cluster_size).unwrap_or(most);
            Granularity::from_bytes(cluster.clamp(least, most)).ok_or_else(|| invalid("a power of 2"))
        }
        Some(bytes) if !(512..=64 << 20).contains(&bytes) => Err(invalid("a value in range [512B, 64MB]")),
        Some(bytes) => Granularity::from_bytes(bytes.into()).ok_or_else(|| invalid("a power of 2")),
    }
}

impl Inner {
    /// A job that mirrors to `target`.
    async fn mirror_job(
        self: &Rc<Self>,
        mirror: &Mirror,
        source: NodeRef,
        target: NodeRef,
        below: Below,
        target_is_zero: bool,
    ) -> Result<Rc<Job>> {
        if Arc::ptr_eq(&source, &target) {
            return Err(Error::invalid("Can't mirror node into itself"));
        }
        if target.read_only() {
            return Err(Error::new(Errno::ACCESS, format!("Block node '{}' is read-only", target.name())));
        }
        self.check_op(&source, Op::Mirror)?;
        self.check_target(&source, &target)?;
        if target.len() < source.len() {
            return Err(Error::invalid("Target image is smaller than the source image"));
        }
        let replaces = match &mirror.replaces {
            None => source.clone(),
            Some(name) => {
                let node = self.find_node(name)?;
                self.check_op(&node, Op::Mirror)?;
                if node.len() != source.len() {
                    return Err(Error::invalid(format!(
                        "cannot replace node '{name}' with a mirror image of another size"
                    )));
                }
                node
            }
        };
        let granularity = granularity(mirror.granularity, &target)?;
        let first = match (mirror.sync, &mirror.bitmap) {
            (SyncMode::Incremental | SyncMode::Bitmap, None) => {
                return Err(Error::invalid(format!(
                    "must provide a valid bitmap name for '{}' sync mode",
                    mirror.sync.name()
                )));
            }
            (SyncMode::Incremental | SyncMode::Bitmap, Some(name)) => {
                First::Bitmap(self.take_bitmap(&source, name).await?)
            }
            (_, Some(_)) => {
                let name = mirror.sync.name();
                return Err(Error::invalid(format!(
                    "a bitmap was given to sync mode '{name}', which uses none"
                )));
            }
            (SyncMode::None, None) => First::Nothing,
            (SyncMode::Top | SyncMode::Full, None) => First::Chain,
        };
        let base = if mirror.sync == SyncMode::Top { image_of(&source).backing() } else { None };
        let buffer = mirror.buf_size.filter(|bytes| *bytes > 0).unwrap_or(DEFAULT_BUFFER);
        let unit = cluster_size(&target);
        let granularity = Granularity::from_bytes(unit).map_or(granularity, |unit| unit.max(granularity));
        let copier = Copier {
            source: source.clone(),
            target: target.clone(),
            base,
            unit: granularity.bytes(),
            compressed: false,
            target_is_zero: false,
        };
        let follower = Arc::new(Follower::new(copier.clone(), granularity, buffer));
        if mirror.copy_mode == CopyMode::WriteBlocking {
            follower.be_active();
        }
        let work = MirrorWork {
            inner: self.clone(),
            copier,
            follower,
            first,
            target_is_zero,
            replaces,
            below,
            on_read: mirror.on_source_error,
            on_write: mirror.on_target_error,
            is_commit: false,
            target_was_read_only: false,
        };
        let nodes: [(NodeRef, &'static [Op]); 2] = [(source, &[Op::Backup]), (target, &[])];
        let job = self.new_job(JobType::Mirror, &mirror.job, &mirror.device, &nodes, Box::new(work));
        if let (Err(_), Some(name)) = (&job, &mirror.bitmap) {
            self.free_bitmap(&nodes[0].0, name);
        }
        job
    }

    /// Whether a job may write to `target`, beside whatever `source` is.
    pub(crate) fn check_target(&self, source: &NodeRef, target: &NodeRef) -> Result<()> {
        self.check_op(target, Op::Target)?;
        let users = self.context.users(target);
        let in_use = |(owner, edge): &(Option<NodeRef>, Arc<block_graph::Edge>)| {
            owner.is_some() || edge.role() == block_graph::Role::Root
        };
        if users.iter().any(in_use) || OpenContext::stands_on(source, target) {
            return Err(Error::new(Errno::BUSY, format!("Node '{}' is in use", target.name())));
        }
        Ok(())
    }

    async fn blockdev_mirror(self: &Rc<Self>, given: BlockdevMirror) -> Result<()> {
        let source = self.find(&given.mirror.device)?;
        let target = self.find(&given.target)?;
        let zero = given.mirror.target_is_zero;
        let job = self.mirror_job(&given.mirror, source, target, Below::AsItIs, zero).await?;
        crate::lifecycle::start(self, &[job], false);
        Ok(())
    }

    async fn drive_mirror(self: &Rc<Self>, given: DriveMirror) -> Result<()> {
        let mirror = &given.mirror;
        let source = self.find(&mirror.device)?;
        let backing = image_of(&source).backing();
        let mut sync = mirror.sync;
        if sync == SyncMode::Top && backing.is_none() {
            sync = SyncMode::Full;
        }
        let named = match sync {
            SyncMode::Top => backing.clone(),
            SyncMode::None => Some(source.clone()),
            _ => None,
        };
        let made = given.target.mode == NewImageMode::AbsolutePaths;
        if made {
            self.create_target(&source, named.as_ref(), &given.target).await?;
        }
        let target = self.open_target(&source, &given.target, None).await?;
        let below = if named.is_some() { Below::Node(named) } else { Below::AsItIs };
        let mirror = Mirror { sync, ..mirror.clone() };
        let zero = made && sync == SyncMode::Full;
        let job =
            self.mirror_job(&mirror, source, target.clone(), below, zero || mirror.target_is_zero).await;
        match job {
            Ok(job) => {
                crate::lifecycle::start(self, &[job], false);
                Ok(())
            }
            Err(error) => {
                self.release(&[target]).await;
                Err(error)
            }
        }
    }
}

impl Storage {
    /// `blockdev-mirror`.
    ///
    /// # Errors
    /// What is wrong with what was given; the job has not begun.
    pub fn blockdev_mirror(&self, mirror: BlockdevMirror) -> Result<()> {
        self.call(move |inner| Box::pin(async move { inner.blockdev_mirror(mirror).await }))
    }

    /// `drive-mirror`.
    ///
    /// # Errors
    /// What is wrong with what was given; the job has not begun.
    pub fn drive_mirror(&self, mirror: DriveMirror) -> Result<()> {
        self.call(move |inner| Box::pin(async move { inner.drive_mirror(mirror).await }))
    }
}
