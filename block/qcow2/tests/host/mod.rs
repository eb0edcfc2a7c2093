//! A driver for host files that is slow in unforeseeable ways, and what is needed to open images on it.

use block_graph::{
    AllowAll, Driver, DriverKind, Error, NodeRef, OpenContext, OpenFlags, Options, Registry, Result, Secrets,
    Truncate, WriteFlags, async_trait,
};
use io_loop::{IoBuffer, IoVec, yield_now};
use std::any::Any;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Debug)]
struct HostFile {
    file: File,
    name: String,
    turn: AtomicU64,
}

impl HostFile {
    /// Lets other requests run for a while.
    async fn dawdle(&self) {
        let turn = self.turn.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        for _ in 0..turn >> 62 {
            yield_now().await;
        }
    }
}

#[async_trait(?Send)]
impl Driver for HostFile {
    fn format_name(&self) -> &'static str {
        "file"
    }

    fn len(&self) -> u64 {
        self.file.metadata().unwrap().len()
    }

    fn grows(&self) -> bool {
        true
    }

    async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        self.dawdle().await;
        let mut bytes = vec![0; into.len()];
        self.file.read_exact_at(&mut bytes, offset)?;
        self.dawdle().await;
        into.copy_from(0, &bytes);
        Ok(())
    }

    async fn write(&self, offset: u64, from: &IoVec, _: WriteFlags) -> Result<()> {
        self.dawdle().await;
        self.file.write_all_at(&from.to_vec(), offset)?;
        self.dawdle().await;
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.dawdle().await;
        Ok(())
    }

    async fn truncate(&self, len: u64, _: Truncate) -> Result<()> {
        Ok(self.file.set_len(len)?)
    }

    fn filename(&self) -> Option<String> {
        Some(self.name.clone())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[derive(Debug)]
struct HostFileKind;

#[async_trait(?Send)]
impl DriverKind for HostFileKind {
    fn name(&self) -> &'static str {
        "file"
    }

    fn is_protocol(&self) -> bool {
        true
    }

    async fn open(
        &self,
        _: &OpenContext,
        options: &mut Options,
        flags: OpenFlags,
    ) -> Result<Box<dyn Driver>> {
        let name = options.take_text("filename").ok_or_else(|| Error::invalid("no file name"))?;
        let file = File::options().read(true).write(flags.writable).open(&name)?;
        Ok(Box::new(HostFile { file, name, turn: AtomicU64::new(1) }))
    }
}

/// Opens an image with options.
pub(crate) async fn open_with(path: &Path, mut options: Options, flags: OpenFlags) -> Result<NodeRef> {
    let mut registry = Registry::new();
    registry.add(HostFileKind);
    registry.add(qcow2::Qcow2Kind);
    let mut secrets = Secrets::default();
    secrets.add("key", b"sesame".to_vec());
    let context = OpenContext::new(Arc::new(registry), Arc::new(secrets), Arc::new(AllowAll));
    options.set_default("driver", "qcow2");
    context.open_filename(path.to_str().unwrap(), options, flags).await
}

/// Reads a range.
pub(crate) async fn read(node: &NodeRef, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut buffer = IoBuffer::zeroed(len);
    node.read(offset, &buffer.io()).await?;
    Ok(buffer.bytes().to_vec())
}

/// Writes bytes.
pub(crate) async fn write(node: &NodeRef, offset: u64, bytes: &[u8], flags: WriteFlags) -> Result<()> {
    node.write(offset, &IoBuffer::from(bytes).into_io(), flags).await
}
