//! The virtio block device, with a disk in memory or in a file.
#![no_main]

use block_graph::{Backend, Driver, Errno, Error, Node, OpenFlags, Result, WriteFlags, ZeroFlags, async_trait};
use io_loop::IoVec;
use libfuzzer_sys::fuzz_target;
use parking_lot::Mutex;
use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use vireo_fuzz::{Driven, Input, Request, drive_virtio};
use virtio::VirtioDevice;
use virtio_blk::{VirtioBlk, VirtioBlkConfig};

/// Sectors, and a few bytes that are none.
const DISK: usize = 512 * 64 + 100;

/// A disk in memory that fails when it is told to.
#[derive(Debug)]
struct Disk {
    bytes: Mutex<Vec<u8>>,
    failing: AtomicU8,
}

#[derive(Debug)]
struct DiskDriver(Arc<Disk>);

impl DiskDriver {
    /// Checks what the device promises of every access.
    fn range(&self, offset: u64, len: u64) -> Result<std::ops::Range<usize>> {
        assert!(
            offset.is_multiple_of(512) && len.is_multiple_of(512),
            "{len} bytes at {offset} are no sectors"
        );
        assert!(offset + len <= self.len(), "{len} bytes at {offset} are past the end");
        match self.0.failing.load(Ordering::Relaxed) {
            1 => Err(Error::errno_only(Errno::IO)),
            2 => Err(Error::errno_only(Errno::NOT_SUPPORTED)),
            _ => Ok(offset as usize..(offset + len) as usize),
        }
    }
}

#[async_trait(?Send)]
impl Driver for DiskDriver {
    fn format_name(&self) -> &'static str {
        "fuzz"
    }

    fn len(&self) -> u64 {
        DISK as u64
    }

    async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        let range = self.range(offset, into.len() as u64)?;
        into.copy_from(0, &self.0.bytes.lock()[range]);
        Ok(())
    }

    async fn write(&self, offset: u64, from: &IoVec, _: WriteFlags) -> Result<()> {
        let range = self.range(offset, from.len() as u64)?;
        from.copy_to(0, &mut self.0.bytes.lock()[range]);
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.range(0, 0).map(drop)
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.range(offset, len).map(drop)
    }

    async fn write_zeroes(&self, offset: u64, len: u64, _: ZeroFlags) -> Result<()> {
        let range = self.range(offset, len)?;
        self.0.bytes.lock()[range].fill(0);
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

struct Target<const READ_ONLY: bool> {
    disk: Arc<Disk>,
    device: Arc<VirtioBlk>,
}

impl<const READ_ONLY: bool> Driven for Target<READ_ONLY> {
    fn new() -> Self {
        let bytes = (0..DISK).map(|at| (at / 512) as u8).collect();
        let disk = Arc::new(Disk { bytes: Mutex::new(bytes), failing: AtomicU8::new(0) });
        let config = VirtioBlkConfig { queues: 2, serial: "fuzz".into(), ..VirtioBlkConfig::default() };
        let flags = if READ_ONLY { OpenFlags::READ } else { OpenFlags::WRITE };
        let node = Node::new("fuzz", Box::new(DiskDriver(disk.clone())), flags);
        Self { disk, device: Arc::new(VirtioBlk::new(config, Backend::new("fuzz", node))) }
    }

    fn device(&self) -> Arc<dyn VirtioDevice> {
        self.device.clone()
    }

    fn request(&self, _queue: u16, input: &mut Input<'_>) -> Request {
        const KINDS: &[u32] = &[0, 1, 4, 8, 11, 13, 2];
        let kind = input.pick(KINDS);
        let sector = if input.one_in(4) { input.number() } else { u64::from(input.u8()) };
        let mut readable = kind.to_le_bytes().to_vec();
        readable.extend([0; 4]);
        readable.extend(sector.to_le_bytes());
        let odd = if input.one_in(8) { usize::from(input.u8()) } else { 0 };
        let len = 512 * usize::from(input.u8() % 8) + odd;
        match kind {
            1 => {
                let data = input.bytes(len.min(32)).to_vec();
                readable.extend(data);
                readable.resize(16 + len, 0x5a);
            }
            11 | 13 => {
                for _ in 0..input.u8() % 18 {
                    let sector = if input.one_in(4) { input.number() } else { u64::from(input.u8()) };
                    let sectors = if input.one_in(4) { input.number() as u32 } else { input.u8().into() };
                    readable.extend(sector.to_le_bytes());
                    readable.extend(sectors.to_le_bytes());
                    readable.extend(u32::from(input.u8() % 3).to_le_bytes());
                }
                readable.truncate(readable.len() - odd.min(readable.len()));
            }
            _ => {}
        }
        let writable = match kind {
            0 => len + 1,
            8 => usize::from(input.u8()),
            _ => 1,
        };
        Request { readable, writable }
    }

    fn host(&self, input: &mut Input<'_>) {
        if input.flag() {
            self.device.size_changed();
        } else {
            self.disk.failing.store(input.u8() % 3, Ordering::Relaxed);
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    if kind & 1 != 0 { drive_virtio::<Target<true>>(data) } else { drive_virtio::<Target<false>>(data) }
});
