//! What a user of a disk has: a device, an export.

use crate::node::Entered;
use crate::{BlockStatus, Edge, NodeRef, OpenFlags, Result, Role, WriteFlags, ZeroFlags};
use arc_swap::ArcSwapOption;
use async_trait::async_trait;
use io_loop::IoVec;
use parking_lot::Mutex;
use std::fmt;
use std::sync::Arc;

/// Which way data go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To the user.
    Read,
    /// To the disk.
    Write,
}

/// Has requests wait until they may begin.
#[async_trait(?Send)]
pub trait Admission: Send + Sync {
    /// Waits until a request of so many bytes may begin.
    async fn admit(&self, bytes: u64, direction: Direction);
}

/// A user's hold of a disk: the node on which he stands may be exchanged for another under him, and his requests go to
/// the one that is there when they begin.
pub struct Backend {
    name: String,
    root: Arc<Edge>,
    admission: ArcSwapOption<Arc<dyn Admission>>,
    resized: Mutex<Option<Box<dyn Fn() + Send + Sync>>>,
}

impl Backend {
    /// The hold of `node` for the user `name`.
    pub fn new(name: impl Into<String>, node: NodeRef) -> Arc<Self> {
        Arc::new(Self {
            name: name.into(),
            root: Edge::new(Role::Root, node),
            admission: ArcSwapOption::empty(),
            resized: Mutex::default(),
        })
    }

    /// The user's name: of a device, that of its drive.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The edge to the node.
    pub fn root(&self) -> &Arc<Edge> {
        &self.root
    }

    /// The node, now.
    pub fn node(&self) -> NodeRef {
        self.root.node()
    }

    /// The length in bytes.
    pub fn len(&self) -> u64 {
        self.node().len()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the node was opened with.
    pub fn flags(&self) -> OpenFlags {
        self.node().flags()
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.node().read_only()
    }

    /// Has requests wait for `admission`, or for nothing.
    pub fn set_admission(&self, admission: Option<Arc<dyn Admission>>) {
        self.admission.store(admission.map(Arc::new));
    }

    /// Has `tell` be called when the length has changed.
    pub fn on_resize(&self, tell: impl Fn() + Send + Sync + 'static) {
        *self.resized.lock() = Some(Box::new(tell));
    }

    /// Tells the user that the length has changed.
    pub fn resized(&self) {
        if let Some(tell) = &*self.resized.lock() {
            tell();
        }
    }

    /// Begins a request at the node that is there.
    async fn enter(&self) -> Entered {
        loop {
            let entered = self.root.node().enter_this().await;
            // It may have been exchanged while this waited for it; from here on it cannot be.
            if self.root.leads_to(entered.node()) {
                return entered;
            }
        }
    }

    async fn admit(&self, bytes: usize, direction: Direction) {
        if let Some(admission) = self.admission.load_full() {
            admission.admit(bytes as u64, direction).await;
        }
    }

    /// See [`crate::Node::read`].
    ///
    /// # Errors
    /// As there.
    pub async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        self.admit(into.len(), Direction::Read).await;
        self.enter().await.node().read_within(offset, into).await
    }

    /// See [`crate::Node::write`].
    ///
    /// # Errors
    /// As there.
    pub async fn write(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()> {
        if from.is_empty() {
            return if flags.contains(WriteFlags::FUA) { self.flush().await } else { Ok(()) };
        }
        self.admit(from.len(), Direction::Write).await;
        self.enter().await.node().write_within(offset, from, flags).await
    }

    /// See [`crate::Node::write_zeroes`].
    ///
    /// # Errors
    /// As there.
    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.admit(usize::try_from(len).unwrap_or(usize::MAX), Direction::Write).await;
        self.enter().await.node().write_zeroes_within(offset, len, flags).await
    }

    /// See [`crate::Node::discard`].
    ///
    /// # Errors
    /// As there.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.admit(usize::try_from(len).unwrap_or(usize::MAX), Direction::Write).await;
        self.enter().await.node().discard_within(offset, len).await
    }

    /// See [`crate::Node::flush`].
    ///
    /// # Errors
    /// As there.
    pub async fn flush(&self) -> Result<()> {
        self.enter().await.node().flush_within().await
    }

    /// See [`crate::Node::block_status`].
    ///
    /// # Errors
    /// As there.
    pub async fn block_status(&self, offset: u64, len: u64, precise: bool) -> Result<BlockStatus> {
        self.enter().await.node().block_status_within(offset, len, precise).await
    }
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backend").field("name", &self.name).field("root", &self.root).finish_non_exhaustive()
    }
}
