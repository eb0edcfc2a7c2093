//! A raw image: the bytes of its file, or a part of them.

use block_graph::{
    BlockStatus, Driver, DriverKind, Edge, Errno, Error, Limits, MAX_LEN, MeasureReport, NodeRef,
    OpenContext, OpenFlags, OptionKind, OptionSpec, Options, Registry, Result, Role, Truncate, WriteFlags,
    ZeroFlags, async_trait,
};
use io_loop::{IoBuffer, IoVec};
use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What lengths are multiples of, in bytes.
const SECTOR: u64 = 512;

/// The driver `raw`.
#[derive(Debug, Clone, Copy, Default)]
pub struct RawKind;

/// A raw image.
#[derive(Debug)]
pub struct RawImage {
    file: Arc<Edge>,
    /// Where it begins in its file, in bytes.
    offset: u64,
    /// Its length in bytes, where it is not as long as its file goes.
    size: Option<AtomicU64>,
    /// Whether an offset or length was asked for.
    windowed: bool,
    guard: HeadGuard,
}

/// Keeps the first sector of an image, whose format nobody named, from looking like another format: the next time it
/// is opened, its guest would choose what is done with the host's files.
#[derive(Default)]
struct HeadGuard {
    /// What formats there are; `None` if the image is known to be raw.
    formats: Option<Arc<Registry>>,
}

impl HeadGuard {
    /// Whether `from` may be written at `offset` of `file`.
    async fn check(&self, file: &NodeRef, offset: u64, from: &IoVec) -> Result<()> {
        let Some(formats) = self.formats.as_ref().filter(|_| offset < SECTOR) else { return Ok(()) };
        let mut head = IoBuffer::zeroed(SECTOR as usize);
        let io = head.io();
        let len = from.len().min((SECTOR - offset) as usize);
        if len < SECTOR as usize {
            file.read(0, &io).await?;
        }
        io.copy_from_vec(offset as usize, &from.slice(0..len));
        drop(io);
        if formats.probe(head.bytes(), "").is_some_and(|kind| kind.name() != "raw") {
            let message =
                "the image's format was not named, and this would make it look like another than raw";
            return Err(Error::new(Errno::NOT_PERMITTED, message));
        }
        Ok(())
    }
}

impl fmt::Debug for HeadGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HeadGuard").field(&self.formats.is_some()).finish()
    }
}

impl RawImage {
    /// The part of `file` that begins at `offset`, of `size` bytes or as long as the file goes.
    ///
    /// # Errors
    /// The file has no such part.
    pub fn new(file: NodeRef, offset: u64, size: Option<u64>) -> Result<Self> {
        let there = file.len();
        if offset > there {
            return Err(Error::invalid(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({there})"
            )));
        }
        if let Some(size) = size {
            if size > there - offset {
                return Err(Error::invalid(format!(
                    "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual \
                     size of the containing file ({there})"
                )));
            }
            if !size.is_multiple_of(SECTOR) {
                return Err(Error::invalid(format!("Specified size is not multiple of {SECTOR}")));
            }
        }
        let windowed = offset > 0 || size.is_some();
        let (file, size) = (Edge::new(Role::File, file), size.map(AtomicU64::new));
        Ok(Self { file, offset, size, windowed, guard: HeadGuard::default() })
    }

    /// Where the image's byte `at` is in the file.
    fn place(&self, at: u64) -> Result<u64> {
        at.checked_add(self.offset).ok_or_else(|| Error::errno_only(Errno::INVALID))
    }
}

#[async_trait(?Send)]
impl Driver for RawImage {
    fn format_name(&self) -> &'static str {
        "raw"
    }

    fn len(&self) -> u64 {
        let there = self.file.node().len().saturating_sub(self.offset);
        self.size.as_ref().map_or(there, |size| size.load(Ordering::Acquire))
    }

    fn limits(&self) -> Limits {
        self.file.node().driver().limits()
    }

    fn is_filter(&self) -> bool {
        !self.windowed
    }

    fn edges(&self) -> Vec<Arc<Edge>> {
        vec![self.file.clone()]
    }

    async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        let file = self.file.node();
        file.driver().debug_event("read_aio");
        file.read(self.place(offset)?, into).await
    }

    async fn write(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()> {
        let (file, offset) = (self.file.node(), self.place(offset)?);
        self.guard.check(&file, offset, from).await?;
        file.driver().debug_event("write_aio");
        file.write(offset, from, flags).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.file.node().write_zeroes(self.place(offset)?, len, flags).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.file.node().discard(self.place(offset)?, len).await
    }

    async fn flush(&self) -> Result<()> {
        self.file.node().flush().await
    }

    async fn block_status(&self, offset: u64, len: u64, _precise: bool) -> Result<BlockStatus> {
        let status = BlockStatus { recurse: true, ..BlockStatus::data(len) };
        Ok(status.stored_at(self.file.node(), self.place(offset)?))
    }

    async fn truncate(&self, len: u64, how: Truncate) -> Result<()> {
        if self.windowed && self.size.is_some() {
            return Err(Error::unsupported("Cannot resize fixed-size raw disks"));
        }
        let end = self.place(len).ok().filter(|end| *end <= MAX_LEN);
        let end = end.ok_or_else(|| Error::invalid("Disk size too large for the chosen offset"))?;
        self.file.node().truncate(end, how).await
    }

    async fn reopen(&self, options: &mut Options, flags: OpenFlags) -> Result<()> {
        if options.has("offset") || options.has("size") {
            return Err(Error::unsupported("Cannot change the options 'offset' and 'size'"));
        }
        let file = self.file.node();
        file.driver().reopen(&mut options.take_child("file"), flags.for_file()).await?;
        file.set_flags(flags.for_file());
        Ok(())
    }

    fn allocated_size(&self) -> Option<u64> {
        self.file.node().driver().allocated_size()
    }

    fn filename(&self) -> Option<String> {
        // With options of its own a file name does not open it again.
        if self.windowed { None } else { self.file.node().filename() }
    }

    fn open_options(&self) -> Options {
        let mut options = Options::new();
        if self.windowed {
            options.set("offset", self.offset as i64);
            if let Some(size) = &self.size {
                options.set("size", size.load(Ordering::Acquire) as i64);
            }
        }
        options
    }

    fn debug_event(&self, event: &'static str) {
        self.file.node().driver().debug_event(event);
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[async_trait(?Send)]
impl DriverKind for RawKind {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn probe(&self, _head: &[u8], _filename: &str) -> u8 {
        // Anything may be a raw image.
        1
    }

    async fn open(
        &self,
        context: &OpenContext,
        options: &mut Options,
        flags: OpenFlags,
    ) -> Result<Box<dyn Driver>> {
        let offset = options.take_size("offset")?.unwrap_or(0);
        let size = options.take_size("size")?;
        let file = context.open_file(options, flags).await?;
        let mut image = RawImage::new(file, offset, size)?;
        image.guard.formats = flags.probed.then(|| context.registry.clone());
        Ok(Box::new(image))
    }

    fn create_options(&self) -> &'static [OptionSpec] {
        &[OptionSpec {
            name: "size",
            kind: OptionKind::Size,
            help: "Virtual disk size",
            default: None,
            amendable: false,
        }]
    }

    async fn create(&self, context: &OpenContext, filename: &str, options: &mut Options) -> Result<()> {
        let filename = filename.strip_prefix("raw:").unwrap_or(filename);
        context.create_protocol(filename, options).await
    }

    async fn measure(&self, options: &mut Options, source: Option<&NodeRef>) -> Result<MeasureReport> {
        let size = options.take_size("size")?;
        let required = match source {
            Some(source) => source.len(),
            None => {
                let size = size.unwrap_or(0).checked_next_multiple_of(SECTOR);
                size.ok_or_else(|| Error::invalid("Image size is too large"))?
            }
        };
        Ok(MeasureReport { required, fully_allocated: required, bitmaps: None })
    }
}
