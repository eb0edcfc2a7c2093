//! The drivers' names, and how their nodes come into being.

use crate::create;
use crate::host_file::HostFile;
use crate::open::{Wants, strip_prefix};
use block_graph::{
    Driver, DriverKind, Errno, Error, OpenContext, OpenFlags, OptionSpec, Options, Registry, Result,
    async_trait,
};

/// One of the drivers: `file`, `host_device` or `host_cdrom`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A block or character device.
    HostDevice,
    /// A CD-ROM drive, whose medium may be absent when it is opened.
    HostCdrom,
}

/// Adds the drivers of this crate to a registry.
pub fn register(registry: &mut Registry) {
    registry.add(FileKind::File);
    registry.add(FileKind::HostDevice);
    registry.add(FileKind::HostCdrom);
}

#[async_trait(?Send)]
impl DriverKind for FileKind {
    fn name(&self) -> &'static str {
        match self {
            Self::File => "file",
            Self::HostDevice => "host_device",
            Self::HostCdrom => "host_cdrom",
        }
    }

    fn protocol_prefixes(&self) -> &'static [&'static str] {
        match self {
            Self::File => &["file"],
            Self::HostDevice => &["host_device"],
            Self::HostCdrom => &["host_cdrom"],
        }
    }

    fn is_protocol(&self) -> bool {
        true
    }

    fn takes_path(&self, path: &str) -> bool {
        use std::os::unix::fs::FileTypeExt;
        // Drives are devices too: who wants one's medium to come and go says so.
        *self == Self::HostDevice
            && std::fs::metadata(path)
                .is_ok_and(|data| data.file_type().is_block_device() || data.file_type().is_char_device())
    }

    fn parse_filename(&self, filename: &str) -> Result<Options> {
        Ok(Options::with("filename", strip_prefix(filename)))
    }

    async fn open(
        &self,
        _context: &OpenContext,
        options: &mut Options,
        flags: OpenFlags,
    ) -> Result<Box<dyn Driver>> {
        let wants = if *self == Self::File { Wants::File } else { Wants::Device };
        Ok(Box::new(HostFile::open(self.name(), wants, options, flags).await?))
    }

    fn create_options(&self) -> &'static [OptionSpec] {
        if *self == Self::File { create::OPTIONS } else { &[] }
    }

    async fn create(&self, _context: &OpenContext, filename: &str, options: &mut Options) -> Result<()> {
        if *self == Self::File {
            return create::create(filename, options).await;
        }
        // A device is there already: it is only checked that it is long enough, and an image's remains are erased.
        Box::pin(create_on_device(*self, filename, options)).await
    }

    async fn delete(&self, filename: &str) -> Result<()> {
        let filename = strip_prefix(filename);
        std::fs::remove_file(filename).map_err(Error::from)
    }
}

/// Takes a device for a new image.
async fn create_on_device(kind: FileKind, filename: &str, options: &mut Options) -> Result<()> {
    /// What is erased at the device's start, in bytes, so that it is not taken for what it was.
    const HEAD: usize = 512;
    let size = options.take_size("size")?.unwrap_or(0);
    if let Some(mode) = options.take_text("preallocation")
        && mode != "off"
    {
        let message = format!("Unsupported preallocation mode '{mode}'");
        return Err(Error::unsupported(message));
    }
    let mut open = Options::with("filename", strip_prefix(filename));
    let device = HostFile::open(kind.name(), Wants::Device, &mut open, OpenFlags::WRITE).await?;
    if size > device.len() {
        let message = format!("Cannot grow device files: {} has {} bytes", filename, device.len());
        return Err(Error::new(Errno::INVALID, message));
    }
    let head = io_loop::IoBuffer::zeroed(HEAD.min(device.len() as usize));
    device.write(0, &head.into_io(), block_graph::WriteFlags::empty()).await
}
