//! Virtio 1.2: queues, the device trait, and the transports over PCI and in memory-mapped registers.
//!
//! A device implements [`VirtioDevice`] and serves its queues on [`QueueThreads`]; [`VirtioPciDevice`] makes
//! a PCI function of it, [`VirtioMmioDevice`] gives it registers in memory.
//! Section numbers in this crate and in the devices' are those of the OASIS Virtual I/O Device (VIRTIO)
//! specification, version 1.2.
//!
//! Whatever a guest does that the specification forbids ends, at worst, in the error state of that one
//! device: status bit `DEVICE_NEEDS_RESET` (2.1), and no further processing until the guest resets it.

mod chain;
mod device;
mod doorbells;
mod inline_handlers;
mod loop_threads;
mod mmio_device;
mod pci_device;
mod pci_layout;
mod queue;
mod queue_threads;
mod signals;
mod thread_control;
mod threads;
mod transport;

#[cfg(any(test, feature = "test-driver"))]
pub mod test_driver;

pub use chain::{Chain, GuestSlice, MAX_CHAIN_DESCRIPTORS};
pub use device::{ActivateError, Activation, DeviceType, Interrupt, QueueHandle, VirtioDevice};
pub use doorbells::{Doorbell, DoorbellSink};
pub use loop_threads::{QueueServer, Wake};
pub use mmio_device::{MMIO_DEVICE_LEN, TooManyQueues, VirtioMmioConfig, VirtioMmioDevice};
pub use pci_device::{VirtioPciConfig, VirtioPciDevice};
pub use pci_layout::MAX_QUEUES;
pub use queue::{MAX_QUEUE_SIZE, Queue, QueueError, QueueState, RingFeatures};
pub use queue_threads::QueueThreads;
pub use threads::StopToken;

/// Feature bits that are not of one device type (6).
pub mod feature {
    /// Indirect descriptors (2.7.5.3).
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// Notification suppression by index (2.7.10).
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// This specification rather than its precursor.
    pub const VERSION_1: u64 = 1 << 32;

    /// What the transport offers on behalf of every device.
    pub const TRANSPORT: u64 = RING_INDIRECT_DESC | RING_EVENT_IDX | VERSION_1;
}

/// Device status bits (2.1).
pub mod status {
    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is set up.
    pub const DRIVER_OK: u8 = 4;
    /// Features are negotiated.
    pub const FEATURES_OK: u8 = 8;
    /// The device has met an error that it cannot recover from.
    pub const NEEDS_RESET: u8 = 64;
    /// The guest has given up on the device.
    pub const FAILED: u8 = 128;
}

/// Copies the part of `registers` at `offset` into `data`; bytes past the end are 0. What a device's
/// configuration space does with a read.
pub fn read_registers(registers: &[u8], offset: u64, data: &mut [u8]) {
    for (index, byte) in data.iter_mut().enumerate() {
        let at = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(index));
        *byte = at.and_then(|at| registers.get(at)).copied().unwrap_or(0);
    }
}

#[cfg(test)]
mod tests;
