//! An image that anyone wrote, opened and used: reads, writes, flushes, snapshots and a close end with a result or an
//! error, and what was written is read again.
#![no_main]

use block_graph::{
    AllowAll, Driver, NodeRef, OpenContext, OpenFlags, Options, Registry, Result, Secrets, SnapshotInfo, Truncate,
    WriteFlags, ZeroFlags, async_trait,
};
use io_loop::{IoBuffer, IoVec, block_on};
use libfuzzer_sys::fuzz_target;
use parking_lot::Mutex;
use std::any::Any;
use std::sync::Arc;
use vireo_fuzz::{Input, damaged_image};

/// How long the file may become.
const MAX_LEN: u64 = 32 << 20;

#[derive(Debug)]
struct Disk(Mutex<Vec<u8>>);

#[async_trait(?Send)]
impl Driver for Disk {
    fn format_name(&self) -> &'static str {
        "memory"
    }

    fn len(&self) -> u64 {
        self.0.lock().len() as u64
    }

    fn grows(&self) -> bool {
        true
    }

    async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        into.copy_from(0, &self.0.lock()[offset as usize..][..into.len()]);
        Ok(())
    }

    async fn write(&self, offset: u64, from: &IoVec, _: WriteFlags) -> Result<()> {
        let end = offset.saturating_add(from.len() as u64);
        if end > MAX_LEN {
            return Err(block_graph::Error::errno_only(block_graph::Errno::NO_SPACE));
        }
        let mut bytes = self.0.lock();
        if bytes.len() < end as usize {
            bytes.resize(end as usize, 0);
        }
        bytes[offset as usize..end as usize].copy_from_slice(&from.to_vec());
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn truncate(&self, len: u64, _: Truncate) -> Result<()> {
        if len > MAX_LEN {
            return Err(block_graph::Error::errno_only(block_graph::Errno::NO_SPACE));
        }
        self.0.lock().resize(len as usize, 0);
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

async fn open(image: Vec<u8>) -> Result<NodeRef> {
    let mut registry = Registry::new();
    registry.add(qcow2::Qcow2Kind);
    let context = OpenContext::new(Arc::new(registry), Arc::new(Secrets::default()), Arc::new(AllowAll));
    let file = context.add(None, Box::new(Disk(Mutex::new(image))), OpenFlags::WRITE)?;
    let mut options = Options::with("driver", "qcow2");
    options.set("file", file);
    context.open(options, OpenFlags { no_backing: true, ..OpenFlags::WRITE }).await
}

async fn operate(node: &NodeRef, input: &mut Input<'_>) {
    // Of a disk of any size the first and last MiB.
    let size = node.len();
    if size == 0 {
        return;
    }
    for _ in 0..16 {
        if input.is_empty() {
            break;
        }
        let operation = input.u8();
        let (place, length) = (u64::from(input.u32()), u64::from(input.u16()) + 1);
        let place = if operation & 0x80 != 0 { size.saturating_sub(place % (1 << 20) + 1) } else { place % size };
        let length = length.min(size - place);
        match operation % 8 {
            0 | 1 => {
                let mut buffer = IoBuffer::zeroed(length as usize);
                let _ = node.read(place, &buffer.io()).await;
            }
            2 | 3 => {
                let bytes = vec![operation; length as usize];
                let written = node.write(place, &IoBuffer::from(&bytes[..]).into_io(), WriteFlags::empty()).await;
                let mut buffer = IoBuffer::zeroed(length as usize);
                let read = node.read(place, &buffer.io()).await;
                if written.is_ok() && read.is_ok() {
                    assert!(buffer.bytes() == bytes, "what was written is not what is read");
                }
            }
            4 => drop(node.write_zeroes(place, length, ZeroFlags::MAY_UNMAP).await),
            5 => drop(node.discard(place, length).await),
            6 => drop(node.flush().await),
            _ => {
                let image = node.driver().image().expect("it is an image");
                match length % 4 {
                    0 => drop(image.snapshot_create(SnapshotInfo::default()).await),
                    1 => drop(image.snapshot_delete("1").await),
                    2 => drop(image.snapshot_apply("1").await),
                    _ => drop(node.block_status(place, length, true).await),
                }
            }
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((operations, data)) = data.split_at_checked(data.len().min(64)) else { return };
    let Some(image) = damaged_image(data) else { return };
    block_on(async {
        let Ok(node) = open(image).await else { return };
        let _ = node.driver().image().map(|image| image.info());
        operate(&node, &mut Input::new(operations)).await;
        let _ = node.close().await;
    });
});
