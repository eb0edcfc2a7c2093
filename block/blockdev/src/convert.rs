//! Copying whole images: many requests at once, reading only what is there, and writing only what is not zero.

use crate::status;
use crate::zero_runs::{SECTOR, first_run, is_zero};
use block_graph::{Error, NodeRef, WriteFlags, ZeroFlags};
use futures_util::future::{join, join_all, try_join_all};
use futures_util::lock::Mutex;
use io_loop::{IoBuffer, IoVec};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::poll_fn;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

/// The most bytes that are read at once, unless the target likes more.
const CHUNK: u64 = 2 << 20;
/// The most bytes that are ever read at once.
pub const LARGEST_CHUNK: u64 = 16 << 20;
/// The most bytes whose status is asked for at once.
const LARGEST_STATUS: u64 = 1 << 40;
const SECTOR_BYTES: u64 = SECTOR as u64;

/// How an image is copied.
#[derive(Debug, Clone)]
pub struct Settings {
    /// So many zero bytes in a row are not written; 0 has everything written. A multiple of 512.
    pub least_zeroes: u64,
    /// Zeroes are looked for in what is read; otherwise only what is known to be zero without reading counts.
    pub scan: bool,
    /// What is written is compressed.
    pub compressed: bool,
    /// Writes begin in the order of their offsets.
    pub in_order: bool,
    /// How many chunks are under way at once.
    pub requests: usize,
    /// What cannot be read is taken for zeroes.
    pub salvage: bool,
    /// The target reads as zeroes wherever nothing is written.
    pub target_is_zero: bool,
    /// The target has a backing file, which has what the source's own backing file has.
    pub target_has_backing: bool,
    /// How long that backing file is, if the target is new and it is known.
    pub target_backing_len: Option<u64>,
    /// The node of a source's chain that the target's backing file has the content of; else the source's own backing
    /// node.
    pub base: Option<NodeRef>,
    /// The most bytes that are written in a second, if there is a limit.
    pub rate: Option<u64>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            least_zeroes: 4096,
            scan: true,
            compressed: false,
            in_order: true,
            requests: 8,
            salvage: false,
            target_is_zero: false,
            target_has_backing: false,
            target_backing_len: None,
            base: None,
            rate: None,
        }
    }
}

/// Why an image was not copied.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConvertError {
    /// What a part of the source is cannot be known.
    #[error("error while reading block status at offset {0}: {errno}", errno = .1.errno())]
    Status(u64, Error),
    /// It cannot be read.
    #[error("error while reading at byte {0}: {errno}", errno = .1.errno())]
    Read(u64, Error),
    /// The target cannot be written.
    #[error("error while writing at byte {0}: {errno}", errno = .1.errno())]
    Write(u64, Error),
    /// The target cannot be written compressed.
    #[error("invalid cluster size")]
    ClusterSize,
}

/// Who wants to know what goes on.
pub trait Watcher {
    /// So many bytes of so many are done.
    fn progress(&self, done: u64, total: u64);
    /// Whether progress is looked at: to know how much there is, the sources are gone through beforehand.
    fn wants_progress(&self) -> bool;
    /// Something could not be read, and was taken for zeroes.
    fn warn(&self, message: String);
}

/// What a part of the source is, for the copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Data,
    Zero,
    Backing,
}

#[derive(Debug, Clone, Copy)]
struct Chunk {
    offset: u64,
    len: u64,
    kind: Kind,
    turn: u64,
}

/// How far the sources have been gone through.
#[derive(Debug, Default)]
struct Walk {
    at: u64,
    turn: u64,
    /// Up to where what was found out last holds, and what it is.
    known: Option<(u64, Kind)>,
}

struct Copy<'a> {
    sources: &'a [NodeRef],
    /// Where each source begins.
    starts: Vec<u64>,
    alignments: Vec<u64>,
    total: u64,
    target: &'a NodeRef,
    settings: &'a Settings,
    watcher: &'a dyn Watcher,
    chunk: u64,
    cluster: u64,
    alignment: usize,
    walk: Mutex<Walk>,
    turns: Turns,
    failed: RefCell<Option<ConvertError>>,
    done: Cell<u64>,
    all: u64,
    pace: Cell<Instant>,
    zero_already: bool,
}

/// Copies `sources`, one after the other, to `target`, which is large enough. Whether a target that is new reads as
/// zeroes is found out.
///
/// # Errors
///
/// The first error that was met. The target may then contain anything.
pub async fn convert(
    sources: &[NodeRef],
    target: &NodeRef,
    settings: &Settings,
    watcher: &dyn Watcher,
    target_is_new: bool,
) -> Result<(), ConvertError> {
    let mut copy = Copy::new(sources, target, settings, watcher)?;
    if target_is_new && settings.least_zeroes > 0 && !settings.target_has_backing && !settings.target_is_zero
    {
        // A new image mostly reads as zeroes as it is.
        let len = target.len();
        let whole = status::above(target, None, 0, len).await;
        copy.zero_already = matches!(whole, Ok((status, _)) if status.zero && status.len == len);
    }
    // What cannot be salvaged is said before anything is copied, too.
    if watcher.wants_progress() || settings.salvage {
        copy.all = copy.measure().await?;
    }
    let workers = (0..settings.requests.max(1)).map(|_| copy.work());
    join_all(workers).await;
    copy.failed.take().map_or(Ok(()), Err)
}

impl<'a> Copy<'a> {
    fn new(
        sources: &'a [NodeRef],
        target: &'a NodeRef,
        settings: &'a Settings,
        watcher: &'a dyn Watcher,
    ) -> Result<Self, ConvertError> {
        let mut starts = Vec::new();
        let mut total = 0_u64;
        for source in sources {
            starts.push(total);
            total += source.len().next_multiple_of(SECTOR_BYTES);
        }
        let alignments = sources.iter().map(|source| {
            let cluster = source.driver().image().and_then(|image| image.info().cluster_size);
            cluster
                .unwrap_or_default()
                .max(u64::from(source.driver().limits().request_alignment))
                .max(SECTOR_BYTES)
        });
        let limits = target.driver().limits();
        let cluster = target.driver().image().and_then(|image| image.info().cluster_size).unwrap_or_default();
        let mut chunk = CHUNK.max(limits.optimal_transfer).max(limits.discard_alignment).min(LARGEST_CHUNK);
        if settings.compressed {
            if cluster == 0 || cluster > chunk {
                return Err(ConvertError::ClusterSize);
            }
            chunk = cluster;
        }
        let least = settings.least_zeroes / SECTOR_BYTES;
        let power = least.checked_ilog2().map_or(1, |power| 1_u64 << power);
        let alignment = (power * SECTOR_BYTES).max(u64::from(limits.request_alignment));
        Ok(Self {
            sources,
            alignments: alignments.collect(),
            starts,
            total,
            target,
            settings,
            watcher,
            chunk,
            cluster,
            alignment: usize::try_from(alignment).unwrap_or(SECTOR),
            walk: Mutex::default(),
            turns: Turns::default(),
            failed: RefCell::default(),
            done: Cell::new(0),
            all: 0,
            pace: Cell::new(Instant::now()),
            zero_already: settings.target_is_zero,
        })
    }

    /// The source that has the byte at `offset`.
    fn source_at(&self, offset: u64) -> usize {
        self.starts.partition_point(|start| *start <= offset) - 1
    }

    /// How many bytes are going to be written.
    async fn measure(&self) -> Result<u64, ConvertError> {
        let mut walk = Walk::default();
        let mut bytes = 0;
        while walk.at < self.total {
            let chunk = self.next_chunk(&mut walk).await?;
            if self.counts(chunk.kind) {
                bytes += chunk.len;
            }
        }
        Ok(bytes)
    }

    fn counts(&self, kind: Kind) -> bool {
        kind == Kind::Data || (kind == Kind::Zero && self.settings.least_zeroes == 0)
    }

    /// Goes on by a part that is all of one kind.
    async fn next_chunk(&self, walk: &mut Walk) -> Result<Chunk, ConvertError> {
        let offset = walk.at;
        let known = walk.known.filter(|(end, _)| *end > offset);
        let (end, mut kind) = match known {
            Some(known) => known,
            None => self.find_out(offset).await?,
        };
        walk.known = Some((end, kind));
        let mut len = end - offset;
        if self.counts(kind) {
            len = len.min(self.chunk);
        }
        // Clusters that are compressed are written as a whole.
        if self.settings.compressed {
            if len < self.cluster {
                len = self.cluster.min(self.total - offset);
                kind = Kind::Data;
            } else {
                len -= len % self.cluster;
            }
        }
        walk.at += len;
        walk.turn += 1;
        Ok(Chunk { offset, len, kind, turn: walk.turn - 1 })
    }

    /// What the source has at `offset`, and up to where.
    async fn find_out(&self, offset: u64) -> Result<(u64, Kind), ConvertError> {
        let index = self.source_at(offset);
        let (source, start) = (&self.sources[index], self.starts[index]);
        let end = self.starts.get(index + 1).copied().unwrap_or(self.total);
        let mut len = (end - offset).min(LARGEST_STATUS);
        // What lies beyond the target's backing file is zero there, and needs no more to be.
        let mut past_backing = false;
        if let Some(backing) = self.settings.target_backing_len {
            let backing = backing.next_multiple_of(SECTOR_BYTES);
            past_backing = offset >= backing;
            if !past_backing {
                len = len.min(backing - offset);
            }
        }
        let base = match (self.settings.target_has_backing, &self.settings.base) {
            (false, _) => None,
            (true, Some(base)) => Some(base.clone()),
            (true, None) => block_graph::skip_filters(source).backing(),
        };
        let found = loop {
            match status::above(source, base.as_ref(), offset - start, len).await {
                Ok((found, _)) => break found,
                Err(error) if !self.settings.salvage => {
                    return Err(ConvertError::Status(offset - start, error));
                }
                Err(_) if len > SECTOR_BYTES => len = (len / 4).next_multiple_of(SECTOR_BYTES),
                Err(error) => {
                    let at = offset - start;
                    self.watcher
                        .warn(format!("error while reading block status at offset {at}: {}", error.errno()));
                    break block_graph::BlockStatus::data(SECTOR_BYTES);
                }
            }
        };
        // The last sector may be longer than the source.
        let mut found_len = if found.len == 0 { len } else { found.len.next_multiple_of(SECTOR_BYTES) };
        let tail = (offset - start + found_len) % self.alignments[index];
        if found_len > tail && offset + found_len < end {
            found_len -= tail;
        }
        let kind = match found {
            _ if found.zero && past_backing => Kind::Backing,
            _ if found.zero => Kind::Zero,
            _ if found.data || !self.settings.target_has_backing => Kind::Data,
            _ => Kind::Backing,
        };
        Ok((offset + found_len.min(end - offset), kind))
    }

    /// Takes chunks until there are no more.
    async fn work(&self) {
        let mut buffer: Option<IoBuffer> = None;
        loop {
            let chunk = {
                let mut walk = self.walk.lock().await;
                if walk.at >= self.total || self.failed.borrow().is_some() {
                    return;
                }
                match self.next_chunk(&mut walk).await {
                    Ok(chunk) => chunk,
                    Err(error) => return self.fail(error),
                }
            };
            if let Err(error) = self.copy_chunk(chunk, &mut buffer).await {
                self.fail(error);
            }
            self.turns.begin_next(chunk.turn);
            if self.counts(chunk.kind) {
                self.done.set(self.done.get() + chunk.len);
                self.watcher.progress(self.done.get(), self.all);
            }
        }
    }

    fn fail(&self, error: ConvertError) {
        self.failed.borrow_mut().get_or_insert(error);
        self.turns.open();
    }

    async fn copy_chunk(&self, chunk: Chunk, buffer: &mut Option<IoBuffer>) -> Result<(), ConvertError> {
        let Chunk { offset, len, kind, turn } = chunk;
        let writes = match kind {
            Kind::Backing => return Ok(()),
            Kind::Zero if self.settings.least_zeroes > 0 => vec![Write::Zero(0, len)],
            Kind::Zero | Kind::Data => {
                let size = usize::try_from(self.chunk).unwrap_or(usize::MAX);
                let buffer = buffer.get_or_insert_with(|| IoBuffer::zeroed(size));
                self.fill(chunk, buffer).await?
            }
        };
        if self.settings.in_order {
            self.turns.wait(turn).await;
        }
        if self.failed.borrow().is_some() {
            return Ok(());
        }
        self.keep_pace(&writes).await;
        let io = buffer.as_mut().map(|buffer| buffer.io_range(0..buffer.len()));
        let requests = try_join_all(writes.iter().map(|write| self.write(offset, *write, io.as_ref())));
        // Requests begin in the order in which they are polled: the next chunk's after these.
        let (written, ()) = join(requests, async { self.turns.begin_next(turn) }).await;
        written.map(|_| ()).map_err(|error| ConvertError::Write(offset, error))
    }

    /// Reads a chunk, and says what of it is to be written how.
    async fn fill(&self, chunk: Chunk, buffer: &mut IoBuffer) -> Result<Vec<Write>, ConvertError> {
        let Chunk { offset, len, kind, .. } = chunk;
        let bytes = usize::try_from(len).unwrap_or(usize::MAX);
        let io = buffer.io_range(0..bytes);
        if kind == Kind::Zero {
            io.zero(0, bytes);
            return Ok(vec![Write::Data(0, len)]);
        }
        self.read(offset, &io).await.map_err(|error| ConvertError::Read(offset, error))?;
        drop(io);
        let bytes = &buffer.bytes()[..bytes];
        if self.settings.least_zeroes == 0 || !self.settings.scan {
            return Ok(vec![Write::Data(0, len)]);
        }
        if self.settings.compressed {
            return Ok(vec![if is_zero(bytes) { Write::Zero(0, len) } else { Write::Data(0, len) }]);
        }
        let least = usize::try_from(self.settings.least_zeroes).unwrap_or(usize::MAX);
        let mut writes = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let run = first_run(&bytes[at..], offset + at as u64, least, self.alignment);
            let write = if run.data { Write::Data } else { Write::Zero };
            writes.push(write(at as u64, run.len as u64));
            at += run.len;
        }
        Ok(writes)
    }

    /// Reads across the borders of sources.
    async fn read(&self, offset: u64, into: &IoVec) -> Result<(), Error> {
        let mut at = 0;
        while at < into.len() {
            let position = offset + at as u64;
            let index = self.source_at(position);
            let end = self.starts.get(index + 1).copied().unwrap_or(self.total);
            let len = usize::try_from(end - position).unwrap_or(usize::MAX).min(into.len() - at);
            let part = into.slice(at..at + len);
            let (source, position) = (&self.sources[index], position - self.starts[index]);
            match source.read(position, &part).await {
                Err(_) if self.settings.salvage => self.salvage(source, position, &part).await,
                result => result?,
            }
            at += len;
        }
        Ok(())
    }

    /// Reads sector by sector, and takes for zeroes what cannot be read.
    async fn salvage(&self, source: &NodeRef, offset: u64, into: &IoVec) {
        for at in (0..into.len()).step_by(SECTOR) {
            let len = SECTOR.min(into.len() - at);
            let position = offset + at as u64;
            if let Err(error) = source.read(position, &into.slice(at..at + len)).await {
                self.watcher.warn(format!("error while reading offset {position}: {}", error.errno()));
                into.zero(at, len);
            }
        }
    }

    async fn write(&self, offset: u64, write: Write, io: Option<&IoVec>) -> Result<(), Error> {
        match (write, io) {
            (Write::Data(at, len), Some(io)) => {
                let mut flags = WriteFlags::empty();
                flags.set(WriteFlags::COMPRESSED, self.settings.compressed);
                flags.set(WriteFlags::FUA, self.target.flags().write_through);
                let range = usize::try_from(at).unwrap_or(usize::MAX)
                    ..usize::try_from(at + len).unwrap_or(usize::MAX);
                self.target.write(offset + at, &io.slice(range), flags).await
            }
            (Write::Zero(at, len), _) if !self.zero_already => {
                self.target.write_zeroes(offset + at, len, ZeroFlags::MAY_UNMAP).await
            }
            _ => Ok(()),
        }
    }

    /// Waits until so much may be written.
    async fn keep_pace(&self, writes: &[Write]) {
        let Some(rate @ 1..) = self.settings.rate else { return };
        let bytes: u64 =
            writes.iter().map(|write| if let Write::Data(_, len) = write { *len } else { 0 }).sum();
        let begin = self.pace.get().max(Instant::now());
        self.pace.set(begin + Duration::from_secs_f64(bytes as f64 / rate as f64));
        io_loop::sleep(begin.saturating_duration_since(Instant::now())).await;
    }
}

/// What to do with a part of a chunk: where it begins in it, and its bytes.
#[derive(Debug, Clone, Copy)]
enum Write {
    Data(u64, u64),
    Zero(u64, u64),
}

/// Has things begin one after the other.
#[derive(Debug, Default)]
struct Turns {
    next: Cell<u64>,
    /// Those that have had their turn before the ones ahead of them.
    over: RefCell<std::collections::BTreeSet<u64>>,
    waiting: RefCell<HashMap<u64, Waker>>,
    all: Cell<bool>,
}

impl Turns {
    /// Waits until all before `turn` have begun.
    async fn wait(&self, turn: u64) {
        poll_fn(|context| {
            if self.all.get() || self.next.get() >= turn {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().insert(turn, context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// The thing of that turn has begun, or will not.
    fn begin_next(&self, turn: u64) {
        if turn < self.next.get() {
            return;
        }
        let mut over = self.over.borrow_mut();
        over.insert(turn);
        while over.remove(&self.next.get()) {
            self.next.set(self.next.get() + 1);
        }
        if let Some(waker) = self.waiting.borrow_mut().remove(&self.next.get()) {
            waker.wake();
        }
    }

    /// Lets all begin.
    fn open(&self) {
        self.all.set(true);
        self.waiting.borrow_mut().drain().for_each(|(_, waker)| waker.wake());
    }
}
