//! Streaming: an image takes what those below it have, and needs them no more.

use crate::blockers::Op;
use crate::copy::cluster_size;
use crate::event::JobType;
use crate::feed::Feed;
use crate::inner::Inner;
use crate::job::{Job, Work};
use crate::nodes::{image_of, recorded_name};
use crate::parameters::{BlockStream, OnError};
use crate::storage::Storage;
use crate::transfer::{CopyError, Transfer};
use block_graph::{
    Change, Error, Granularity, Next, NodeRef, OpenContext, Result, WriteFlags, WriteWatcher, ZeroFlags,
    async_trait,
};
use io_loop::IoBuffer;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

/// Memory for copies, in bytes.
const BUFFER: u64 = 8 << 20;
/// The least that is copied at once, in bytes.
const LEAST_UNIT: u64 = 65536;
/// The most bytes that are read at once.
const MOST_READ: u64 = 1 << 20;
/// The bytes of a status that is asked for at once.
const MOST_STATUS: u64 = 1 << 30;

/// Brings what the nodes below have into a node.
struct Filler {
    top: NodeRef,
    /// The first node of which nothing is taken.
    base: Option<NodeRef>,
    unit: u64,
}

impl Filler {
    /// Whether bytes are to be brought, whether they are zero, and how many are alike. The caller has entered the top.
    async fn find_out(&self, at: u64, len: u64) -> Result<(bool, bool, u64)> {
        let own = self.top.block_status_within(at, len, true).await?;
        let len = if own.len == 0 { len } else { own.len };
        let below = self
            .top
            .backing()
            .filter(|below| !self.base.as_ref().is_some_and(|base| Arc::ptr_eq(base, below)));
        let Some(below) = below.filter(|_| !own.allocated && own.len > 0) else {
            return Ok((false, false, len));
        };
        let (status, _) = blockdev::status::above(&below, self.base.as_ref(), at, len).await?;
        if status.len == 0 {
            // The one below ends before; one further down may be longer.
            return Ok((self.base.is_some(), true, len));
        }
        Ok((status.allocated, status.zero, status.len.min(len)))
    }
}

#[async_trait(?Send)]
impl Transfer for Filler {
    fn source(&self) -> &NodeRef {
        &self.top
    }

    async fn transfer(&self, range: Range<u64>) -> std::result::Result<(), CopyError> {
        let mut at = range.start;
        while at < range.end {
            let (wanted, zero, alike) = self.find_out(at, range.end - at).await.map_err(CopyError::Read)?;
            let len = alike.min(MOST_READ.max(self.unit));
            if wanted && zero {
                let change = Change::Zeroes { offset: at, len, flags: ZeroFlags::empty() };
                self.top.store_within(change).await.map_err(CopyError::Write)?;
            } else if wanted {
                let memory = IoBuffer::scratch(usize::try_from(len).unwrap_or(usize::MAX)).into_io();
                self.top.read_within(at, &memory).await.map_err(CopyError::Read)?;
                let change = Change::Data { offset: at, from: &memory, flags: WriteFlags::empty() };
                self.top.store_within(change).await.map_err(CopyError::Write)?;
            }
            at += len;
        }
        Ok(())
    }
}

/// Keeps writes from what is being brought.
struct Keeper(Arc<Feed>);

#[async_trait(?Send)]
impl WriteWatcher for Keeper {
    async fn around(&self, change: Change<'_>, next: Next<'_>) -> Result<()> {
        let (offset, len) = change.range();
        let range = self.0.units(offset..offset.saturating_add(len));
        let _held = self.0.hold(range).await;
        next.run(change).await
    }
}

struct StreamWork {
    inner: Rc<Inner>,
    filler: Filler,
    feed: Arc<Feed>,
    keeper: Arc<dyn WriteWatcher>,
    backing_file: Option<String>,
    was_read_only: bool,
    on_error: OnError,
}

impl StreamWork {
    fn top(&self) -> &NodeRef {
        &self.filler.top
    }

    async fn look(&self, job: &Job) -> Result<()> {
        let len = self.top().len();
        let mut at = 0;
        while at < len {
            job.pause_point().await?;
            let _entered = self.top().enter().await;
            let (wanted, _, alike) = self.filler.find_out(at, MOST_STATUS.min(len - at)).await?;
            if wanted {
                self.feed.dirty.set(at, alike);
            }
            at += alike.max(1);
        }
        Ok(())
    }
}

#[async_trait(?Send)]
impl Work for StreamWork {
    async fn run(&self, job: &Job) -> Result<()> {
        self.inner.set_writable(self.top(), true).await?;
        let quiesced = self.inner.context.quiesce(std::slice::from_ref(self.top())).await;
        self.top().add_watcher(self.keeper.clone());
        drop(quiesced);
        self.look(job).await?;
        let mut left_out = None;
        self.feed.run(job, self.on_error, self.on_error, &mut left_out).await?;
        // What is brought is there before the chain is cut.
        self.top().flush().await?;
        left_out.map_or(Ok(()), Err)
    }

    async fn prepare(&self, _job: &Job) -> Result<()> {
        let (top, base) = (self.top(), &self.filler.base);
        let name = match (&self.backing_file, base) {
            (Some(name), Some(_)) => Some(name.clone()),
            (_, Some(base)) => Some(recorded_name(&image_of(base))),
            (_, None) => None,
        };
        let format = base.as_ref().map(|base| image_of(base).driver().format_name());
        let old = top.backing();
        let quiesced = self.inner.context.quiesce(std::slice::from_ref(top)).await;
        top.flush_within().await?;
        let image = image_of(top);
        let image =
            image.driver().image().ok_or_else(|| Error::unsupported("This image has no backing file"))?;
        image.change_backing(name.as_deref(), format).await?;
        image.set_backing_node(base.clone())?;
        drop(quiesced);
        self.inner.release(&old.into_iter().collect::<Vec<_>>()).await;
        Ok(())
    }

    async fn clean(&self) {
        let quiesced = self.inner.context.quiesce(std::slice::from_ref(self.top())).await;
        self.top().remove_watcher(&self.keeper);
        drop(quiesced);
        if self.was_read_only
            && let Err(error) = self.inner.set_writable(self.top(), false).await
        {
            tracing::warn!("node '{}' stays writable: {error}", self.top().name());
        }
    }
}

impl Inner {
    /// The nodes of a chain from `top` down.
    pub(crate) fn chain(top: &NodeRef) -> Vec<NodeRef> {
        let mut chain = vec![image_of(top)];
        while let Some(below) = chain.last().and_then(|node| node.backing()) {
            chain.push(image_of(&below));
        }
        chain
    }

    async fn block_stream(self: &Rc<Self>, given: BlockStream) -> Result<()> {
        let named = [given.base.is_some(), given.base_node.is_some(), given.bottom.is_some()];
        if named.iter().filter(|named| **named).count() > 1 {
            return Err(Error::invalid(
                "'base', 'base-node' and 'bottom' cannot be specified at the same time",
            ));
        }
        let top = image_of(&self.find(&given.device)?);
        let chain = Self::chain(&top);
        let not_found = |name: &str| Error::invalid(format!("Can't find '{name}' in the backing chain"));
        let base = if let Some(name) = &given.base {
            Some(blockdev::chain::find_backing(&top, name).ok_or_else(|| not_found(name))?)
        } else if let Some(name) = &given.base_node {
            let base = image_of(&self.find_node(name)?);
            if Arc::ptr_eq(&base, &top) || !chain.iter().any(|node| Arc::ptr_eq(node, &base)) {
                return Err(Error::invalid(format!(
                    "Node '{name}' is not a backing image of '{}'",
                    given.device
                )));
            }
            Some(base)
        } else if let Some(name) = &given.bottom {
            let bottom = image_of(&self.find_node(name)?);
            if !OpenContext::stands_on(&top, &bottom) || Arc::ptr_eq(&top, &bottom) {
                return Err(Error::invalid(format!(
                    "Node '{name}' is not in a chain starting from '{}'",
                    given.device
                )));
            }
            bottom.backing().map(|base| image_of(&base))
        } else {
            None
        };
        if given.backing_file.is_some() && base.is_none() {
            return Err(Error::invalid("backing file specified, but streaming the entire chain"));
        }
        if top.driver().image().is_none() {
            return Err(Error::unsupported("Driver of the node does not support backing files"));
        }
        self.check_op(&top, Op::Stream)?;
        let above_base =
            chain.iter().take_while(|node| !base.as_ref().is_some_and(|base| Arc::ptr_eq(base, node)));
        let mut nodes: Vec<(NodeRef, &'static [Op])> = vec![(top.clone(), &[])];
        for node in above_base.skip(1) {
            self.check_op(node, Op::Stream)?;
            nodes.push((node.clone(), &[]));
        }
        nodes.extend(base.iter().map(|base| (base.clone(), &[Op::Backup, Op::Stream] as &'static [Op])));
        let unit =
            Granularity::from_bytes(cluster_size(&top).max(LEAST_UNIT)).unwrap_or(Granularity::DEFAULT);
        // Filters above the base stay there.
        let seen = chain.iter().find(|node| {
            node.backing()
                .is_some_and(|below| base.as_ref().is_some_and(|base| Arc::ptr_eq(&image_of(&below), base)))
        });
        let base = seen.and_then(|node| node.backing());
        let filler = |base| Filler { top: top.clone(), base, unit: unit.bytes() };
        let feed = Arc::new(Feed::new(filler(base.clone()), unit, BUFFER).leaving_out());
        let work = StreamWork {
            inner: self.clone(),
            filler: filler(base),
            keeper: Arc::new(Keeper(feed.clone())),
            feed,
            backing_file: given.backing_file.clone(),
            was_read_only: top.read_only(),
            on_error: given.on_error,
        };
        let job = self.new_job(JobType::Stream, &given.job, &given.device, &nodes, Box::new(work))?;
        crate::lifecycle::start(self, &[job], false);
        Ok(())
    }
}

impl Storage {
    /// `block-stream`.
    ///
    /// # Errors
    /// What is wrong with what was given; the job has not begun.
    pub fn block_stream(&self, stream: BlockStream) -> Result<()> {
        self.call(move |inner| Box::pin(async move { inner.block_stream(stream).await }))
    }
}
