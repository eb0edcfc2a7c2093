//! The virtio block device, with a disk in memory or in a file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use vireo_fuzz::{Driven, Input, Request, drive_virtio};
use virtio::{GuestSlice, VirtioDevice};
use virtio_blk::{BlockBackend, RawFile, VirtioBlk, VirtioBlkConfig};

/// Sectors, and a few bytes that are none.
const DISK: usize = 512 * 64 + 100;

/// A disk in memory that fails when it is told to.
struct Disk {
    bytes: Mutex<Vec<u8>>,
    read_only: bool,
    failing: AtomicU8,
}

impl Disk {
    /// Checks what the device promises of every access.
    fn range(&self, offset: u64, len: u64) -> io::Result<std::ops::Range<usize>> {
        assert!(
            offset.is_multiple_of(512) && len.is_multiple_of(512),
            "{len} bytes at {offset} are no sectors"
        );
        assert!(offset + len <= self.size_bytes(), "{len} bytes at {offset} are past the end");
        match self.failing.load(Ordering::Relaxed) {
            1 => Err(io::ErrorKind::Other.into()),
            2 => Err(io::ErrorKind::Unsupported.into()),
            _ => Ok(offset as usize..(offset + len) as usize),
        }
    }
}

fn len(buffers: &[GuestSlice<'_>]) -> u64 {
    buffers.iter().map(|buffer| buffer.len() as u64).sum()
}

impl BlockBackend for Disk {
    fn size_bytes(&self) -> u64 {
        DISK as u64
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        let mut at = self.range(offset, len(buffers))?.start;
        let bytes = self.bytes.lock();
        for buffer in buffers {
            buffer.copy_from(&bytes[at..at + buffer.len()]);
            at += buffer.len();
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        assert!(!self.read_only);
        let mut at = self.range(offset, len(buffers))?.start;
        let mut bytes = self.bytes.lock();
        for buffer in buffers {
            buffer.copy_to(&mut bytes[at..at + buffer.len()]);
            at += buffer.len();
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.range(0, 0).map(drop)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        assert!(!self.read_only);
        self.range(offset, len).map(drop)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _may_unmap: bool) -> io::Result<()> {
        assert!(!self.read_only);
        let range = self.range(offset, len)?;
        self.bytes.lock()[range].fill(0);
        Ok(())
    }
}

/// A file without a name, always the same, as nobody else may write to it.
fn raw_file() -> Arc<dyn BlockBackend> {
    thread_local! {
        static FILE: (File, Arc<RawFile>) = {
            let file = memfd_create("disk", MemfdFlags::CLOEXEC).expect("a file in memory");
            let file = File::from(file);
            file.set_len(DISK as u64).expect("the file can be sized");
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            (file, Arc::new(RawFile::open(path, false).expect("the file can be opened")))
        };
    }
    FILE.with(|(file, raw)| {
        file.set_len(0).and_then(|()| file.set_len(DISK as u64)).expect("the file can be sized");
        raw.clone()
    })
}

struct Target<const KIND: u8> {
    disk: Arc<Disk>,
    device: Arc<VirtioBlk>,
}

const READ_ONLY: u8 = 1;
const FILE: u8 = 2;

impl<const KIND: u8> Driven for Target<KIND> {
    fn new() -> Self {
        let bytes = (0..DISK).map(|at| (at / 512) as u8).collect();
        let disk = Arc::new(Disk {
            bytes: Mutex::new(bytes),
            read_only: KIND == READ_ONLY,
            failing: AtomicU8::new(0),
        });
        let config = VirtioBlkConfig { queues: 2, serial: "fuzz".into(), ..VirtioBlkConfig::default() };
        let backend: Arc<dyn BlockBackend> = if KIND == FILE { raw_file() } else { disk.clone() };
        Self { disk, device: Arc::new(VirtioBlk::new(config, backend)) }
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
    match kind % 4 {
        0 => drive_virtio::<Target<READ_ONLY>>(data),
        1 => drive_virtio::<Target<FILE>>(data),
        _ => drive_virtio::<Target<0>>(data),
    }
});
