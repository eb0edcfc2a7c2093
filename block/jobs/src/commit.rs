//! Commits: layers of a chain are written to one below, and are not needed any more.

use crate::blockers::Op;
use crate::copy::{Copier, Kind, cluster_size};
use crate::event::JobType;
use crate::feed::{Feed, Follower};
use crate::inner::Inner;
use crate::job::{Job, Work};
use crate::mirror::{Below, First, MirrorWork};
use crate::nodes::{image_of, recorded_name};
use crate::parameters::{BlockCommit, OnError};
use crate::storage::Storage;
use block_graph::{Error, Granularity, NodeRef, Result, Role, Truncate, async_trait};
use std::rc::Rc;
use std::sync::Arc;

/// Memory for copies, in bytes.
const BUFFER: u64 = 10 << 20;
/// The least that is copied at once, in bytes.
const LEAST_UNIT: u64 = 65536;
/// The bytes of a status that is asked for at once.
const MOST_STATUS: u64 = 1 << 30;

/// The commit of layers that nobody writes to.
struct CommitWork {
    inner: Rc<Inner>,
    copier: Copier,
    feed: Arc<Feed>,
    backing_file: Option<String>,
    base_was_read_only: bool,
    on_error: OnError,
}

impl CommitWork {
    fn top(&self) -> &NodeRef {
        &self.copier.source
    }

    fn base(&self) -> &NodeRef {
        &self.copier.target
    }

    /// Marks what the layers above the base have.
    async fn look(&self, job: &Job) -> Result<()> {
        let len = self.top().len();
        let mut at = 0;
        while at < len {
            job.pause_point().await?;
            let _entered = self.top().enter().await;
            let (kind, alike) = self.copier.find_out(at, MOST_STATUS.min(len - at)).await?;
            if kind != Kind::Seen {
                self.feed.dirty.set(at, alike);
            }
            at += alike.max(1);
        }
        Ok(())
    }
}

#[async_trait(?Send)]
impl Work for CommitWork {
    async fn run(&self, job: &Job) -> Result<()> {
        self.inner.set_writable(self.base(), true).await?;
        if self.base().len() < self.top().len() {
            self.base().truncate(self.top().len(), Truncate::default()).await?;
        }
        self.look(job).await?;
        self.feed.run(job, self.on_error, self.on_error, &mut None).await?;
        self.base().flush().await
    }

    async fn prepare(&self, _job: &Job) -> Result<()> {
        let (top, base) = (self.top(), self.base());
        let name = self.backing_file.clone().unwrap_or_else(|| recorded_name(base));
        let format = image_of(base).driver().format_name();
        // The images above name the base before they are read with it: after a crash either chain is right.
        for (owner, edge) in self.inner.context.users(top) {
            if let Some(owner) = owner.filter(|_| edge.role() == Role::Backing) {
                self.inner.record_backing(&owner, Some(&name), Some(format)).await?;
            }
        }
        let quiesced = self.inner.context.quiesce(&[top.clone(), base.clone()]).await;
        self.inner.context.replace_node(&quiesced, top, base, |edge| edge.role() == Role::Root)?;
        Ok(())
    }

    async fn clean(&self) {
        if self.base_was_read_only
            && let Err(error) = self.inner.set_writable(self.base(), false).await
        {
            tracing::warn!("node '{}' stays writable: {error}", self.base().name());
        }
    }
}

impl Inner {
    /// The top and the base of a commit.
    fn commit_range(&self, given: &BlockCommit, active: &NodeRef) -> Result<(NodeRef, NodeRef)> {
        let chain = Self::chain(active);
        let in_chain = |node: &NodeRef| chain.iter().any(|other| Arc::ptr_eq(other, node));
        let named = |name: &str| -> Result<NodeRef> {
            let node = image_of(&self.find_node(name)?);
            if in_chain(&node) {
                Ok(node)
            } else {
                Err(Error::invalid(format!("'{name}' is not in this backing file chain")))
            }
        };
        let by_file = |name: &str, what: &str| {
            let is_active = active.filename().as_deref() == Some(name);
            let found =
                if is_active { Some(active.clone()) } else { blockdev::chain::find_backing(active, name) };
            found.ok_or_else(|| Error::invalid(format!("{what} '{name}' not found")))
        };
        let top = match (&given.top_node, &given.top) {
            (Some(_), Some(_)) => {
                return Err(Error::invalid("'top-node' and 'top' are mutually exclusive"));
            }
            (Some(name), None) => named(name)?,
            (None, Some(name)) => by_file(name, "Top image file")?,
            (None, None) => active.clone(),
        };
        let base = match (&given.base_node, &given.base) {
            (Some(_), Some(_)) => {
                return Err(Error::invalid("'base-node' and 'base' are mutually exclusive"));
            }
            (Some(name), None) => named(name)?,
            (None, Some(name)) => by_file(name, "Base")?,
            (None, None) => chain.last().cloned().unwrap_or_else(|| active.clone()),
        };
        if Arc::ptr_eq(&top, &base) {
            return Err(Error::invalid("cannot commit an image into itself"));
        }
        let place = |node: &NodeRef| chain.iter().position(|other| Arc::ptr_eq(other, node));
        if place(&top) > place(&base) {
            return Err(Error::invalid(format!("'{}' is not in this backing file chain", base.name())));
        }
        Ok((top, base))
    }

    async fn block_commit(self: &Rc<Self>, given: BlockCommit) -> Result<()> {
        let root = self.find(&given.device)?;
        let active = image_of(&root);
        let (top, base) = self.commit_range(&given, &active)?;
        let is_active = Arc::ptr_eq(&top, &active);
        if is_active && given.backing_file.is_some() {
            return Err(Error::invalid("'backing-file' specified, but 'top' is the active layer"));
        }
        let chain = Self::chain(&top);
        let layers: Vec<&NodeRef> = chain.iter().take_while(|node| !Arc::ptr_eq(node, &base)).collect();
        let mut nodes: Vec<(NodeRef, &'static [Op])> = Vec::new();
        for node in layers.iter().copied().chain([&base]) {
            self.check_op(node, Op::Commit)?;
            nodes.push((node.clone(), &[]));
        }
        self.check_others(&chain, &base)?;
        let unit = cluster_size(&base).max(LEAST_UNIT);
        let unit = Granularity::from_bytes(unit).unwrap_or(Granularity::DEFAULT);
        let copier = Copier {
            source: top.clone(),
            target: base.clone(),
            base: layers.last().and_then(|node| node.backing()),
            unit: unit.bytes(),
            compressed: false,
            target_is_zero: false,
        };
        let work: Box<dyn Work> = if is_active {
            Box::new(MirrorWork {
                inner: self.clone(),
                follower: Arc::new(Follower::new(copier.clone(), unit, BUFFER)),
                copier,
                first: First::Chain,
                target_is_zero: false,
                replaces: top.clone(),
                below: Below::AsItIs,
                on_read: given.on_error,
                on_write: given.on_error,
                is_commit: true,
                target_was_read_only: base.read_only(),
            })
        } else {
            Box::new(CommitWork {
                inner: self.clone(),
                feed: Arc::new(Feed::new(copier.clone(), unit, BUFFER)),
                copier,
                backing_file: given.backing_file.clone(),
                base_was_read_only: base.read_only(),
                on_error: given.on_error,
            })
        };
        let job = self.new_job(JobType::Commit, &given.job, &given.device, &nodes, work)?;
        crate::lifecycle::start(self, &[job], false);
        Ok(())
    }

    /// Whether somebody who is not of the chain would see the base change.
    fn check_others(&self, chain: &[NodeRef], base: &NodeRef) -> Result<()> {
        let layers: Vec<&NodeRef> = chain.iter().take_while(|node| !Arc::ptr_eq(node, base)).collect();
        for node in chain.iter().skip(1).take(layers.len()) {
            for (owner, edge) in self.context.users(node) {
                let mut owner = owner;
                // Filters within the chain are part of it.
                while let Some(filter) = owner.as_ref().filter(|owner| owner.driver().is_filter()).cloned() {
                    owner = self.context.users(&filter).into_iter().find_map(|(owner, _)| owner);
                }
                let of_chain =
                    owner.as_ref().is_some_and(|owner| layers.iter().any(|node| Arc::ptr_eq(node, owner)));
                if !of_chain && edge.role() != Role::Hold {
                    let message = format!("Node '{}' is in use by others than the chain", node.name());
                    return Err(Error::new(block_graph::Errno::BUSY, message));
                }
            }
        }
        Ok(())
    }
}

impl Storage {
    /// `block-commit`: of layers that nobody writes to, or of the one that is written to, which becomes ready and has
    /// to be completed.
    ///
    /// # Errors
    /// What is wrong with what was given; the job has not begun.
    pub fn block_commit(&self, commit: BlockCommit) -> Result<()> {
        self.call(move |inner| Box::pin(async move { inner.block_commit(commit).await }))
    }
}
