//! Several nodes with the same content, of which enough must agree.
//!
//! Writes go to all children and succeed if as many as the threshold succeed. Reads ask all children, and return what
//! at least as many agree on; or, with the pattern `fifo`, ask one after the other until one answers.

use block_graph::{
    BlockStatus, Driver, DriverKind, Edge, Errno, Error, Limits, NodeRef, OpenContext, OpenFlags, Options,
    RangeLock, Result, Role, WriteFlags, ZeroFlags, async_trait,
};
use futures_util::future::join_all;
use io_loop::{IoBuffer, IoVec};
use std::any::Any;
use std::sync::Arc;

/// The most children.
const MOST_CHILDREN: usize = 32;

/// A quorum of nodes.
#[derive(Debug)]
pub struct Quorum {
    children: Vec<Arc<Edge>>,
    /// How many must agree.
    threshold: usize,
    /// Reads ask one child after the other.
    fifo: bool,
    /// Children that disagree with the rest are corrected.
    rewrite: bool,
    /// What is written or corrected: a correction must not undo a write.
    writes: RangeLock,
}

/// What children said to a read: who agrees with whom.
struct Vote {
    /// Children by content, with that content.
    versions: Vec<(Vec<usize>, IoBuffer)>,
    failed: Vec<Error>,
}

impl Vote {
    /// The content that enough agree on, and the children that have another.
    fn winner(&self, threshold: usize) -> Option<(&IoBuffer, Vec<usize>)> {
        let (voters, winner) = self.versions.iter().max_by_key(|(voters, _)| voters.len())?;
        let others = || self.versions.iter().filter(|(others, _)| others != voters);
        (voters.len() >= threshold)
            .then(|| (winner, others().flat_map(|(others, _)| others.iter().copied()).collect()))
    }
}

/// The error that most children met.
fn most_common(errors: &[Error]) -> Error {
    let count = |errno| errors.iter().filter(|error| error.errno() == errno).count();
    let most = errors.iter().max_by_key(|error| count(error.errno()));
    most.cloned().unwrap_or_else(|| Error::new(Errno::IO, "The children of the quorum do not agree"))
}

impl Quorum {
    /// A quorum of these nodes, of which `threshold` must agree.
    ///
    /// # Errors
    /// There are too many or too few nodes for the threshold, or they are not equally long.
    pub fn new(children: Vec<NodeRef>, threshold: usize, fifo: bool, rewrite: bool) -> Result<Self> {
        if threshold < 1 {
            return Err(Error::new(Errno::RANGE, "Parameter 'vote-threshold' expects a value >= 1"));
        }
        if threshold > children.len() {
            return Err(Error::new(Errno::RANGE, "threshold may not exceed children count"));
        }
        let len = children[0].len();
        if let Some(other) = children.iter().find(|child| child.len() != len) {
            let message = format!(
                "Children of a quorum must be equally long: '{}' has {len} bytes, '{}' has {}",
                children[0].name(),
                other.name(),
                other.len()
            );
            return Err(Error::new(Errno::IO, message));
        }
        let edges = children.into_iter().enumerate();
        let children = edges.map(|(index, node)| Edge::new(Role::Member(index as u16), node)).collect();
        Ok(Self { children, threshold, fifo, rewrite, writes: RangeLock::new() })
    }

    async fn ask(&self, offset: u64, len: usize) -> Vote {
        let reads = self.children.iter().map(|child| async {
            let mut buffer = IoBuffer::scratch(len);
            let memory = buffer.io();
            let read = child.node().read(offset, &memory).await;
            drop(memory);
            read.map(|()| buffer)
        });
        let mut vote = Vote { versions: Vec::new(), failed: Vec::new() };
        for (index, answer) in join_all(reads).await.into_iter().enumerate() {
            match answer {
                Err(error) => vote.failed.push(error),
                Ok(buffer) => {
                    let same = vote.versions.iter_mut().find(|(_, known)| known.bytes() == buffer.bytes());
                    match same {
                        Some((voters, _)) => voters.push(index),
                        None => vote.versions.push((vec![index], buffer)),
                    }
                }
            }
        }
        vote
    }

    async fn read_quorum(&self, offset: u64, into: &IoVec) -> Result<()> {
        let mut vote = self.ask(offset, into.len()).await;
        let mut held = None;
        if self.rewrite && vote.versions.len() > 1 {
            // What is corrected is what they say while nobody writes.
            held = Some(self.writes.lock(offset..offset + into.len() as u64).await);
            vote = self.ask(offset, into.len()).await;
        }
        let Some((winner, losers)) = vote.winner(self.threshold) else {
            return Err(most_common(&vote.failed));
        };
        into.copy_from(0, winner.bytes());
        if self.rewrite {
            let memory = IoBuffer::from(winner.bytes()).into_io();
            for loser in losers {
                // The read is right in any case.
                let _ = self.children[loser].node().write(offset, &memory, WriteFlags::empty()).await;
            }
        }
        drop(held);
        Ok(())
    }

    /// Whether enough of the children's answers are good.
    fn count(&self, results: Vec<Result<()>>) -> Result<()> {
        let errors: Vec<Error> = results.into_iter().filter_map(Result::err).collect();
        if self.children.len() - errors.len() >= self.threshold { Ok(()) } else { Err(most_common(&errors)) }
    }
}

#[async_trait(?Send)]
impl Driver for Quorum {
    fn format_name(&self) -> &'static str {
        "quorum"
    }

    fn len(&self) -> u64 {
        self.children.iter().map(|child| child.node().len()).min().unwrap_or(0)
    }

    fn limits(&self) -> Limits {
        let all = self.children.iter().map(|child| child.node().driver().limits());
        let alignments = all.map(|limits| (limits.request_alignment, limits.memory_alignment));
        let (request_alignment, memory_alignment) =
            alignments.reduce(|a, b| (a.0.max(b.0), a.1.max(b.1))).unwrap_or((1, 1));
        Limits { request_alignment, memory_alignment, ..Limits::default() }
    }

    fn edges(&self) -> Vec<Arc<Edge>> {
        self.children.clone()
    }

    async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        if !self.fifo {
            return self.read_quorum(offset, into).await;
        }
        let mut errors = Vec::new();
        for child in &self.children {
            match child.node().read(offset, into).await {
                Ok(()) => return Ok(()),
                Err(error) => errors.push(error),
            }
        }
        Err(most_common(&errors))
    }

    async fn write(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()> {
        let _held = self.writes.lock(offset..offset.saturating_add(from.len() as u64)).await;
        // A guest may change its memory while it is read: all children get the same.
        let copy = IoBuffer::scratch(from.len()).into_io();
        copy.copy_from_vec(0, from);
        let nodes: Vec<NodeRef> = self.children.iter().map(|child| child.node()).collect();
        self.count(join_all(nodes.iter().map(|node| node.write(offset, &copy, flags))).await)
    }

    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let _held = self.writes.lock(offset..offset.saturating_add(len)).await;
        let nodes: Vec<NodeRef> = self.children.iter().map(|child| child.node()).collect();
        self.count(join_all(nodes.iter().map(|node| node.write_zeroes(offset, len, flags))).await)
    }

    async fn flush(&self) -> Result<()> {
        let nodes: Vec<NodeRef> = self.children.iter().map(|child| child.node()).collect();
        self.count(join_all(nodes.iter().map(|node| node.flush())).await)
    }

    async fn block_status(&self, offset: u64, len: u64, precise: bool) -> Result<BlockStatus> {
        // Zero is what all say is zero.
        let mut shortest = len;
        for child in &self.children {
            let (status, _) = block_graph::status_above(&child.node(), None, offset, len, precise).await?;
            if !status.zero {
                return Ok(BlockStatus::data(status.len.clamp(1, len)));
            }
            shortest = shortest.min(status.len.max(1));
        }
        Ok(BlockStatus::zero(shortest))
    }

    fn filename(&self) -> Option<String> {
        None
    }

    fn open_options(&self) -> Options {
        let mut options = Options::with("vote-threshold", self.threshold as i64);
        options.set("read-pattern", if self.fifo { "fifo" } else { "quorum" });
        options.set("rewrite-corrupted", self.rewrite);
        options
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The driver `quorum`.
#[derive(Debug, Clone, Copy, Default)]
pub struct QuorumKind;

#[async_trait(?Send)]
impl DriverKind for QuorumKind {
    fn name(&self) -> &'static str {
        "quorum"
    }

    async fn open(
        &self,
        context: &OpenContext,
        options: &mut Options,
        flags: OpenFlags,
    ) -> Result<Box<dyn Driver>> {
        let threshold = options.take_number("vote-threshold")?.unwrap_or(0);
        let fifo = match options.take_text("read-pattern").as_deref() {
            None | Some("quorum") => false,
            Some("fifo") => true,
            Some(_) => return Err(Error::invalid("Please set read-pattern as fifo or quorum")),
        };
        let verify = options.take_switch("blkverify")?.unwrap_or(false);
        let rewrite = options.take_switch("rewrite-corrupted")?.unwrap_or(false);
        let mut children = Vec::new();
        while options.has_child(&format!("children.{}", children.len())) {
            if children.len() == MOST_CHILDREN {
                return Err(Error::invalid(format!("A quorum has at most {MOST_CHILDREN} children")));
            }
            let name = format!("children.{}", children.len());
            let node = context.open_child(options, &name, flags).await?;
            children.push(node.ok_or_else(|| Error::invalid(format!("'{name}' is no node")))?);
        }
        if children.is_empty() {
            return Err(Error::invalid("Number of provided children must be 1 or more"));
        }
        let threshold = usize::try_from(threshold).unwrap_or(usize::MAX);
        if verify && !fifo && (children.len() != 2 || threshold != 2) {
            let message =
                "blkverify=on can only be set if there are exactly two files and vote-threshold is 2";
            return Err(Error::invalid(message));
        }
        if verify && rewrite {
            return Err(Error::invalid("rewrite-corrupted=on cannot be used with blkverify=on"));
        }
        Ok(Box::new(Quorum::new(children, threshold, fifo, rewrite)?))
    }
}
