//! A disk that stores nothing, for measurements and tests.

use block_graph::{
    BlockStatus, Driver, DriverKind, Error, OpenContext, OpenFlags, Options, Result, WriteFlags, ZeroFlags,
    async_trait,
};
use io_loop::IoVec;
use std::any::Any;
use std::time::Duration;

/// The length of a disk that nobody gave one, in bytes.
const DEFAULT_LEN: u64 = 1 << 30;

/// The drivers `null-co` and `null-aio`, which are one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NullKind {
    /// By the name `null-co`.
    Co,
    /// By the name `null-aio`.
    Aio,
}

/// A disk whose writes go nowhere.
#[derive(Debug)]
pub struct NullDisk {
    kind: NullKind,
    len: u64,
    /// How long each request takes.
    latency: Duration,
    /// Whether reads fill memory with zeroes, rather than leave it as it is.
    read_zeroes: bool,
}

impl NullDisk {
    async fn wait(&self) {
        if !self.latency.is_zero() {
            io_loop::sleep(self.latency).await;
        }
    }
}

#[async_trait(?Send)]
impl Driver for NullDisk {
    fn format_name(&self) -> &'static str {
        self.kind.name()
    }

    fn len(&self) -> u64 {
        self.len
    }

    async fn read(&self, _offset: u64, into: &IoVec) -> Result<()> {
        self.wait().await;
        if self.read_zeroes {
            into.zero(0, into.len());
        }
        Ok(())
    }

    async fn write(&self, _offset: u64, _from: &IoVec, _flags: WriteFlags) -> Result<()> {
        self.wait().await;
        Ok(())
    }

    async fn write_zeroes(&self, _offset: u64, _len: u64, _flags: ZeroFlags) -> Result<()> {
        self.wait().await;
        Ok(())
    }

    async fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        self.wait().await;
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.wait().await;
        Ok(())
    }

    async fn block_status(&self, _offset: u64, len: u64, _precise: bool) -> Result<BlockStatus> {
        Ok(if self.read_zeroes { BlockStatus::zero(len) } else { BlockStatus::data(len) })
    }

    async fn reopen(&self, _options: &mut Options, _flags: OpenFlags) -> Result<()> {
        Ok(())
    }

    fn allocated_size(&self) -> Option<u64> {
        Some(0)
    }

    fn filename(&self) -> Option<String> {
        // With options of its own a file name does not open it again.
        let plain = self.len == DEFAULT_LEN && self.latency.is_zero() && !self.read_zeroes;
        plain.then(|| format!("{}://", self.kind.name()))
    }

    fn open_options(&self) -> Options {
        let mut options = Options::with("size", self.len as i64);
        options.set("read-zeroes", self.read_zeroes);
        if !self.latency.is_zero() {
            options.set("latency-ns", self.latency.as_nanos() as i64);
        }
        options
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[async_trait(?Send)]
impl DriverKind for NullKind {
    fn name(&self) -> &'static str {
        match self {
            Self::Co => "null-co",
            Self::Aio => "null-aio",
        }
    }

    fn protocol_prefixes(&self) -> &'static [&'static str] {
        match self {
            Self::Co => &["null-co"],
            Self::Aio => &["null-aio"],
        }
    }

    fn is_protocol(&self) -> bool {
        true
    }

    fn parse_filename(&self, filename: &str) -> Result<Options> {
        let name = self.name();
        if filename.strip_prefix(name) == Some("://") {
            return Ok(Options::new());
        }
        Err(Error::invalid(format!("The only allowed filename for this driver is '{name}://'")))
    }

    async fn open(
        &self,
        _context: &OpenContext,
        options: &mut Options,
        _flags: OpenFlags,
    ) -> Result<Box<dyn Driver>> {
        if let Some(filename) = options.take_text("filename") {
            self.parse_filename(&filename)?;
        }
        let len = options.take_size("size")?.unwrap_or(DEFAULT_LEN);
        if len > block_graph::MAX_LEN {
            return Err(Error::invalid("Image size is too large"));
        }
        let invalid = |_| Error::invalid("latency-ns is invalid");
        let latency = options.take_number("latency-ns").map_err(invalid)?.unwrap_or(0);
        Ok(Box::new(NullDisk {
            kind: *self,
            len,
            latency: Duration::from_nanos(latency),
            read_zeroes: options.take_switch("read-zeroes")?.unwrap_or(false),
        }))
    }
}
