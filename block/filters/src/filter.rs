//! What filters of one node have in common: everything that they do not do otherwise goes to that node.

use block_graph::{
    BlockStatus, Driver, Edge, Error, Limits, NodeRef, OpenContext, OpenFlags, Options, Result, Truncate,
    WriteFlags, ZeroFlags, async_trait,
};
use io_loop::IoVec;
use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;

/// A filter of one node. Its methods are those of [`Driver`].
#[async_trait(?Send)]
pub(crate) trait Filter: Debug + Send + Sync + 'static {
    /// The driver's name.
    const NAME: &'static str;

    fn below(&self) -> &Arc<Edge>;

    fn limits(&self) -> Limits {
        self.below().node().driver().limits()
    }

    async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        self.below().node().read(offset, into).await
    }

    async fn write(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()> {
        self.below().node().write(offset, from, flags).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.below().node().write_zeroes(offset, len, flags).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.below().node().discard(offset, len).await
    }

    async fn flush(&self) -> Result<()> {
        self.below().node().flush().await
    }

    async fn block_status(&self, offset: u64, len: u64, precise: bool) -> Result<BlockStatus> {
        self.below().node().block_status(offset, len, precise).await
    }

    fn filename(&self) -> Option<String> {
        None
    }

    /// The options of its own that it was opened with.
    fn open_options(&self) -> Options {
        Options::new()
    }

    fn debug_event(&self, event: &'static str) {
        self.below().node().driver().debug_event(event);
    }
}

/// A filter as a driver.
#[derive(Debug)]
pub(crate) struct FilterDriver<F>(pub(crate) F);

#[async_trait(?Send)]
impl<F: Filter> Driver for FilterDriver<F> {
    fn format_name(&self) -> &'static str {
        F::NAME
    }

    fn len(&self) -> u64 {
        self.0.below().node().len()
    }

    fn limits(&self) -> Limits {
        self.0.limits()
    }

    fn grows(&self) -> bool {
        self.0.below().node().driver().grows()
    }

    fn is_filter(&self) -> bool {
        true
    }

    fn edges(&self) -> Vec<Arc<Edge>> {
        vec![self.0.below().clone()]
    }

    async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        self.0.read(offset, into).await
    }

    async fn write(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()> {
        self.0.write(offset, from, flags).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.0.write_zeroes(offset, len, flags).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.0.discard(offset, len).await
    }

    async fn flush(&self) -> Result<()> {
        self.0.flush().await
    }

    async fn block_status(&self, offset: u64, len: u64, precise: bool) -> Result<BlockStatus> {
        self.0.block_status(offset, len, precise).await
    }

    async fn truncate(&self, len: u64, how: Truncate) -> Result<()> {
        self.0.below().node().truncate(len, how).await
    }

    async fn reopen(&self, options: &mut Options, flags: OpenFlags) -> Result<()> {
        let below = self.0.below().node();
        below.driver().reopen(&mut options.take_child("file"), flags.for_file()).await?;
        below.set_flags(flags.for_file());
        Ok(())
    }

    fn allocated_size(&self) -> Option<u64> {
        self.0.below().node().driver().allocated_size()
    }

    fn filename(&self) -> Option<String> {
        self.0.filename()
    }

    fn open_options(&self) -> Options {
        self.0.open_options()
    }

    fn debug_event(&self, event: &'static str) {
        self.0.debug_event(event);
    }

    fn as_any(&self) -> &dyn Any {
        &self.0
    }
}

/// Opens the node below a filter: the child `name`, of a format if its driver is said, else a protocol's.
pub(crate) async fn open_below(
    context: &OpenContext,
    options: &mut Options,
    name: &str,
    flags: OpenFlags,
) -> Result<NodeRef> {
    let mut file = Options::new();
    file.set_child("file", options.take_child(name));
    if let Some(node) = options.take(name) {
        file.set("file", node);
    }
    if !file.has_child("file") {
        return Err(Error::invalid(format!("A block device must be specified for \"{name}\"")));
    }
    context.open_file(&mut file, flags).await
}
