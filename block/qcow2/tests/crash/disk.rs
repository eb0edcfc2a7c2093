//! A file in memory that keeps a log of what was done to it, and what may be left of it after a loss of power.

use block_graph::{
    AllowAll, Driver, NodeRef, OpenContext, OpenFlags, Options, Registry, Result, Secrets, Truncate,
    WriteFlags, async_trait,
};
use io_loop::{IoVec, yield_now};
use std::any::Any;
use std::collections::HashSet;
use std::sync::{Arc, Mutex};

/// Bytes that a disk writes as a whole or not at all.
const SECTOR: usize = 512;
/// How long a file may become.
const MAX_LEN: u64 = 64 << 20;

/// One thing that was done to the file, when it was done.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Write {
        offset: u64,
        bytes: Vec<u8>,
        through: bool,
    },
    SetLen(u64),
    /// What was written before is on stable storage.
    Flush,
}

/// What was done.
#[derive(Clone, Debug, Default)]
pub(crate) struct Log(pub(crate) Arc<Mutex<Vec<Event>>>);

impl Log {
    pub(crate) fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    pub(crate) fn events(&self) -> Vec<Event> {
        self.0.lock().unwrap().clone()
    }
}

/// A file in memory.
#[derive(Debug)]
struct Disk {
    bytes: Mutex<Vec<u8>>,
    log: Log,
}

#[async_trait(?Send)]
impl Driver for Disk {
    fn format_name(&self) -> &'static str {
        "memory"
    }

    fn len(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn grows(&self) -> bool {
        true
    }

    async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        yield_now().await;
        let bytes = self.bytes.lock().unwrap();
        into.copy_from(0, &bytes[offset as usize..][..into.len()]);
        Ok(())
    }

    async fn write(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()> {
        let content = from.to_vec();
        let end = offset + content.len() as u64;
        if end > MAX_LEN {
            return Err(block_graph::Error::errno_only(block_graph::Errno::NO_SPACE));
        }
        // Requests that are in flight together are done in an order that is not theirs.
        for _ in 0..(offset >> 9) % 3 {
            yield_now().await;
        }
        let mut bytes = self.bytes.lock().unwrap();
        apply_write(&mut bytes, offset, &content);
        let through = flags.contains(WriteFlags::FUA);
        self.log.0.lock().unwrap().push(Event::Write { offset, bytes: content, through });
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        // What ends while the flush is under way may or may not be covered: here it is not, for the worst.
        let event = Event::Flush;
        self.log.0.lock().unwrap().push(event);
        yield_now().await;
        Ok(())
    }

    async fn truncate(&self, len: u64, _: Truncate) -> Result<()> {
        self.bytes.lock().unwrap().resize(len.min(MAX_LEN) as usize, 0);
        self.log.0.lock().unwrap().push(Event::SetLen(len.min(MAX_LEN)));
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn apply_write(image: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    let end = offset as usize + bytes.len();
    if image.len() < end {
        image.resize(end, 0);
    }
    image[offset as usize..end].copy_from_slice(bytes);
}

/// What is in the file if everything was done that `keep` says, with the number of the event, and of the sector of it.
pub(crate) fn replay(base: &[u8], events: &[Event], mut keep: impl FnMut(usize, usize) -> bool) -> Vec<u8> {
    let mut image = base.to_vec();
    for (number, event) in events.iter().enumerate() {
        match event {
            Event::Write { offset, bytes, .. } => {
                let (mut at, mut sector) = (0, 0);
                while at < bytes.len() {
                    let next = bytes.len().min(at + SECTOR - (*offset as usize + at) % SECTOR);
                    if keep(number, sector) {
                        apply_write(&mut image, offset + at as u64, &bytes[at..next]);
                    }
                    (at, sector) = (next, sector + 1);
                }
            }
            Event::SetLen(len) => {
                if keep(number, 0) {
                    image.resize(*len as usize, 0);
                }
            }
            Event::Flush => {}
        }
    }
    image
}

/// The events before `end` that are on stable storage then.
pub(crate) fn stable(events: &[Event], end: usize) -> HashSet<usize> {
    let flushed = events[..end].iter().rposition(|event| matches!(event, Event::Flush)).unwrap_or(0);
    let through =
        |number: &usize| matches!(events[*number], Event::Write { through: true, .. }) || *number < flushed;
    (0..end).filter(through).collect()
}

/// A context that knows this format.
pub(crate) fn context() -> OpenContext {
    let mut registry = Registry::new();
    registry.add(qcow2::Qcow2Kind);
    OpenContext::new(Arc::new(registry), Arc::new(Secrets::default()), Arc::new(AllowAll))
}

/// Opens the image that is in `bytes`, with caches so small that tables are written in the middle of the work.
pub(crate) async fn open(bytes: Vec<u8>, log: Log, flags: OpenFlags) -> Result<NodeRef> {
    open_with(bytes, log, flags, &["l2-cache-size", "refcount-cache-size"]).await
}

/// Opens the image that is in `bytes`, with the least of each cache that is named.
pub(crate) async fn open_with(bytes: Vec<u8>, log: Log, flags: OpenFlags, small: &[&str]) -> Result<NodeRef> {
    let context = context();
    let disk = Disk { bytes: Mutex::new(bytes), log };
    let file = context.add(None, Box::new(disk), OpenFlags::WRITE)?;
    let mut options = Options::with("driver", "qcow2");
    options.set("file", file);
    for cache in small {
        options.set(*cache, 1_i64);
    }
    context.open(options, flags).await
}
