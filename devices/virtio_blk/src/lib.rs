//! The virtio block device (5.2).
//!
//! [`VirtioBlk`] turns the driver's requests into requests of a block node, straight from and to guest memory, with an
//! I/O thread for each queue and as many requests in flight as the driver makes.

#![allow(unsafe_code)] // guest_io: guest memory as what the kernel reads and writes

mod errors;
mod guest_io;
mod request;
mod server;

use block_graph::Backend;
use device::{SavedState, StateError, decode, encode};
use errors::{Failures, Kept};
use parking_lot::Mutex;
use request::Disk;
use server::Server;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use virtio::{ActivateError, Activation, DeviceType, Interrupt, QueueThreads, VirtioDevice};

pub use errors::{ErrorAction, ErrorPolicy, IoFailure};

/// Feature bits of block devices (5.2.3).
pub mod feature {
    /// `seg_max` is valid.
    pub const SEG_MAX: u64 = 1 << 2;
    /// The device is read-only.
    pub const RO: u64 = 1 << 5;
    /// `blk_size` is valid.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// There are flush requests.
    pub const FLUSH: u64 = 1 << 9;
    /// The topology fields are valid.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// The driver can switch between write-back and write-through.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// There are several queues.
    pub const MQ: u64 = 1 << 12;
    /// There are discard requests.
    pub const DISCARD: u64 = 1 << 13;
    /// There are write-zeroes requests.
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Bytes in a sector, the unit of all of the interface whatever the block size is (5.2.4).
pub const SECTOR_SIZE: u64 = 512;

/// Bytes of a serial number (5.2.6).
pub const SERIAL_LEN: usize = 20;

const KIND: &str = "virtio-blk";
const VERSION: u32 = 2;

/// Offset of `writeback` in the configuration space.
const CONFIG_WRITEBACK: u64 = 32;
/// Bytes of the configuration space up to what these features need.
const CONFIG_LEN: usize = 60;

/// The fixed configuration of a block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtioBlkConfig {
    /// How many queues there are: best as many as there are vCPUs. At least 1.
    pub queues: u16,
    /// The most entries of each queue: a power of two, at least 4.
    pub queue_size: u16,
    /// What the guest sees as the disk's serial number; [`SERIAL_LEN`] bytes of it count.
    pub serial: String,
    /// The smallest unit that the guest should address: a power of two from 512 to 4096.
    pub logical_block_size: u32,
    /// The smallest unit that the guest should write for speed: a power of two, at least as large.
    pub physical_block_size: u32,
    /// What is done about reads that the host fails.
    pub read_errors: ErrorPolicy,
    /// What is done about all other requests that the host fails.
    pub write_errors: ErrorPolicy,
}

impl Default for VirtioBlkConfig {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 256,
            serial: String::new(),
            logical_block_size: 512,
            physical_block_size: 4096,
            read_errors: ErrorPolicy::Report,
            write_errors: ErrorPolicy::Report,
        }
    }
}

/// A virtio block device.
pub struct VirtioBlk {
    config: VirtioBlkConfig,
    queue_sizes: Vec<u16>,
    disk: Arc<Disk>,
    threads: QueueThreads,
    active: Mutex<Option<Arc<dyn Interrupt>>>,
}

impl VirtioBlk {
    /// A block device with what is in `backend`. Values out of range in `config` become the nearest ones
    /// in range.
    pub fn new(config: VirtioBlkConfig, backend: Arc<Backend>) -> Self {
        let logical = 1 << config.logical_block_size.clamp(512, 4096).ilog2();
        let physical = 1 << config.physical_block_size.clamp(logical, 1 << 16).ilog2();
        let config = VirtioBlkConfig {
            queues: config.queues.clamp(1, virtio::MAX_QUEUES as u16),
            queue_size: config.queue_size.clamp(4, 1024),
            logical_block_size: logical,
            physical_block_size: physical,
            serial: config.serial,
            ..config
        };
        let queue_sizes = vec![config.queue_size; config.queues.into()];
        let disk = Arc::new(Disk::new(
            backend,
            &config.serial,
            Failures::new(config.read_errors, config.write_errors),
        ));
        Self { config, queue_sizes, disk, threads: QueueThreads::new(), active: Mutex::new(None) }
    }

    /// Has `listener` hear of requests that the host failed, on the thread of their queue. Only then can the VM be
    /// stopped for one: the listener is to see to that without waiting for it. To be called once.
    pub fn on_failure(&self, listener: impl Fn(&IoFailure<'_>) + Send + Sync + 'static) {
        self.disk.failures.listen(Box::new(listener));
    }

    /// Tells the driver that the disk's size changed.
    pub fn size_changed(&self) {
        let interrupt = self.active.lock().clone();
        if let Some(interrupt) = interrupt {
            interrupt.config_changed();
        }
    }

    /// The configuration space (5.2.4).
    fn registers(&self) -> [u8; CONFIG_LEN] {
        let mut registers = [0; CONFIG_LEN];
        let mut set = |at: usize, bytes: &[u8]| registers[at..at + bytes.len()].copy_from_slice(bytes);
        let VirtioBlkConfig { queues, queue_size, logical_block_size, physical_block_size, .. } = self.config;
        let ratio = physical_block_size / logical_block_size;
        set(0, &(self.disk.backend.len() / SECTOR_SIZE).to_le_bytes());
        set(12, &u32::from(queue_size - 2).to_le_bytes());
        set(20, &logical_block_size.to_le_bytes());
        set(24, &[ratio.ilog2() as u8, 0]);
        set(26, &(ratio as u16).to_le_bytes());
        set(CONFIG_WRITEBACK as usize, &[self.disk.write_back.load(Ordering::SeqCst).into()]);
        set(34, &queues.to_le_bytes());
        set(36, &request::MAX_DISCARD_SECTORS.to_le_bytes());
        set(40, &request::MAX_RANGES.to_le_bytes());
        set(44, &(physical_block_size / SECTOR_SIZE as u32).to_le_bytes());
        set(48, &request::MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
        set(52, &request::MAX_RANGES.to_le_bytes());
        set(56, &[1]); // write_zeroes_may_unmap
        registers
    }
}

impl VirtioDevice for VirtioBlk {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        let always = feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::FLUSH
            | feature::TOPOLOGY
            | feature::CONFIG_WCE
            | feature::MQ;
        let write = if self.disk.backend.read_only() {
            feature::RO
        } else {
            feature::DISCARD | feature::WRITE_ZEROES
        };
        always | write
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        virtio::read_registers(&self.registers(), offset, data);
    }

    fn config_write(&self, offset: u64, data: &[u8]) {
        if self.disk.features.load(Ordering::SeqCst) & feature::CONFIG_WCE != 0
            && let (CONFIG_WRITEBACK, [value]) = (offset, data)
        {
            self.disk.write_back.store(value & 1 != 0, Ordering::SeqCst);
        }
    }

    fn set_features(&self, features: u64) {
        self.disk.features.store(features, Ordering::SeqCst);
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        *self.active.lock() = Some(activation.interrupt.clone());
        for queue in activation.queues {
            if !queue.queue.lock().enabled() {
                continue;
            }
            let (index, name) = (queue.index, format!("virtio-blk q{}", queue.index));
            let server = Server::new(queue, self.disk.clone());
            self.threads.spawn_loop(index, &name, activation.interrupt.clone(), server)?;
        }
        Ok(())
    }

    fn notify(&self, queue: u16) {
        self.threads.notify(queue);
    }

    fn doorbell(&self, queue: u16) -> Option<Arc<OwnedFd>> {
        self.threads.doorbell(queue)
    }

    fn reset(&self) {
        self.threads.clear();
        *self.active.lock() = None;
        self.disk.reset();
    }

    fn start(&self) {
        self.disk.failures.start();
        self.threads.start();
    }

    fn stop(&self) {
        self.threads.stop();
    }

    fn save(&self) -> SavedState {
        encode(KIND, VERSION, &(self.disk.write_back.load(Ordering::SeqCst), self.disk.failures.kept()))
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let (write_back, kept): (bool, Vec<Kept>) = decode(KIND, VERSION, state)?;
        // A queue has no more chains than entries.
        let most = usize::from(self.config.queues) * usize::from(self.config.queue_size);
        if kept.len() > most || kept.iter().any(|(queue, _)| *queue >= self.config.queues) {
            let reason = "it keeps requests that there cannot be".into();
            return Err(StateError::Malformed { kind: KIND, reason });
        }
        self.disk.write_back.store(write_back, Ordering::SeqCst);
        self.disk.failures.set_kept(kept);
        Ok(())
    }
}

impl fmt::Debug for VirtioBlk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioBlk").field("config", &self.config).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_errors;
