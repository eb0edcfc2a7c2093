//! A disk in memory, for tests: it remembers what it was asked for.

use block_graph::{
    BlockStatus, Driver, Errno, Error, Limits, Node, NodeRef, OpenFlags, Result, WriteFlags, ZeroFlags,
    async_trait,
};
use io_loop::IoVec;
use parking_lot::Mutex;
use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

/// What of the disk reads as zero without being asked for, in bytes.
const BLOCK: u64 = 4096;

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    minimum: u32,
    flushes: usize,
    misaligned: usize,
    log: Vec<String>,
    fail_writes: Option<i32>,
    delay: Duration,
}

/// The disk's other side.
#[derive(Clone, Debug)]
pub(crate) struct Disk(Arc<Mutex<State>>);

/// A node of zeroes that wants requests of multiples of `minimum`.
pub(crate) fn memory_node(len: usize, minimum: u32) -> (NodeRef, Disk) {
    let disk = Disk(Arc::new(Mutex::new(State { bytes: vec![0; len], minimum, ..State::default() })));
    (Node::new("memory", Box::new(disk.clone()), OpenFlags::WRITE), disk)
}

impl Disk {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.lock().bytes.clone()
    }

    pub(crate) fn flushes(&self) -> usize {
        self.0.lock().flushes
    }

    /// Reads and writes that were no whole blocks.
    pub(crate) fn misaligned(&self) -> usize {
        self.0.lock().misaligned
    }

    /// Requests for zeroes and discards.
    pub(crate) fn log(&self) -> Vec<String> {
        self.0.lock().log.clone()
    }

    pub(crate) fn fail_writes(&self, errno: i32) {
        self.0.lock().fail_writes = Some(errno);
    }

    /// Has reads take longer.
    pub(crate) fn delay(&self, time: Duration) {
        self.0.lock().delay = time;
    }

    fn check(&self, offset: u64, len: usize) {
        let mut state = self.0.lock();
        let minimum = u64::from(state.minimum);
        state.misaligned +=
            usize::from(!offset.is_multiple_of(minimum) || !(len as u64).is_multiple_of(minimum));
    }
}

#[async_trait(?Send)]
impl Driver for Disk {
    fn format_name(&self) -> &'static str {
        "memory"
    }

    fn len(&self) -> u64 {
        self.0.lock().bytes.len() as u64
    }

    fn limits(&self) -> Limits {
        Limits { request_alignment: self.0.lock().minimum, ..Limits::default() }
    }

    async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        self.check(offset, into.len());
        let delay = self.0.lock().delay;
        if !delay.is_zero() {
            io_loop::sleep(delay).await;
        }
        into.copy_from(0, &self.0.lock().bytes[offset as usize..offset as usize + into.len()]);
        Ok(())
    }

    async fn write(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()> {
        self.check(offset, from.len());
        let mut state = self.0.lock();
        if let Some(errno) = state.fail_writes {
            return Err(Error::errno_only(Errno::new(errno)));
        }
        from.copy_to(0, &mut state.bytes[offset as usize..offset as usize + from.len()]);
        state.flushes += usize::from(flags.contains(WriteFlags::FUA));
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let mut state = self.0.lock();
        state.bytes[offset as usize..(offset + len) as usize].fill(0);
        let names: Vec<&str> = flags.iter_names().map(|(name, _)| name).collect();
        state.log.push(format!("zero {offset}+{len} {}", names.join("|")));
        Ok(())
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.0.lock().log.push(format!("discard {offset}+{len}"));
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.0.lock().flushes += 1;
        Ok(())
    }

    async fn block_status(&self, offset: u64, len: u64, _: bool) -> Result<BlockStatus> {
        let state = self.0.lock();
        let is_zero =
            |at: u64, end: u64| state.bytes[at as usize..end as usize].iter().all(|byte| *byte == 0);
        let end_of = |at: u64| ((at / BLOCK + 1) * BLOCK).min(offset + len);
        let zero = is_zero(offset, end_of(offset));
        let mut end = end_of(offset);
        while end < offset + len && is_zero(end, end_of(end)) == zero {
            end = end_of(end);
        }
        Ok(if zero { BlockStatus::zero(end - offset) } else { BlockStatus::data(end - offset) })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
