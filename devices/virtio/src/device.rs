//! What a virtio device is to a transport, and a transport to a device.

use crate::{Chain, Queue, QueueError, StopToken};
use device::{SavedState, StateError};
use guest_memory::GuestMemory;
use parking_lot::Mutex;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Device types (5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceType {
    /// Network card.
    Network,
    /// Block device.
    Block,
    /// Console.
    Console,
    /// Entropy source.
    Entropy,
    /// Traditional memory balloon.
    Balloon,
    /// SCSI host.
    ScsiHost,
    /// 9P transport.
    NineP,
    /// GPU.
    Gpu,
    /// Input device.
    Input,
    /// Socket device.
    Socket,
    /// File system device.
    FileSystem,
}

impl DeviceType {
    /// The virtio device ID (5).
    pub const fn id(self) -> u16 {
        match self {
            Self::Network => 1,
            Self::Block => 2,
            Self::Console => 3,
            Self::Entropy => 4,
            Self::Balloon => 5,
            Self::ScsiHost => 8,
            Self::NineP => 9,
            Self::Gpu => 16,
            Self::Input => 18,
            Self::Socket => 19,
            Self::FileSystem => 26,
        }
    }

    /// The PCI class code that fits best (PCI Code and ID Assignment Specification, section 1).
    pub(crate) const fn pci_class(self) -> u32 {
        match self {
            Self::Network => 0x02_0000,
            Self::Block | Self::ScsiHost => 0x01_0000,
            Self::Console | Self::Socket => 0x07_8000,
            Self::Gpu => 0x03_8000,
            Self::Input => 0x09_8000,
            Self::FileSystem => 0x01_8000,
            Self::NineP => 0x00_0200,
            Self::Entropy | Self::Balloon => 0x00_ff00,
        }
    }
}

/// How a device reaches its driver.
pub trait Interrupt: Send + Sync {
    /// Buffers of queue `queue` were used (2.3, used buffer notification).
    fn queue_used(&self, queue: u16);
    /// The configuration space changed (2.3, configuration change notification).
    fn config_changed(&self);
    /// The device met an error: it goes into the error state until it is reset (2.1.2).
    fn fail(&self, error: &QueueError);
    /// Whether the device is in the error state.
    fn failed(&self) -> bool;
    /// Whether queues are served on the thread that rings their doorbells, before that goes on: where the guest is to
    /// see the same whenever it runs.
    fn serves_inline(&self) -> bool {
        false
    }
}

/// A queue in use by a device.
#[derive(Clone)]
pub struct QueueHandle {
    /// The queue's number.
    pub index: u16,
    /// The queue. The lock is held only while ring entries are read or written.
    pub queue: Arc<Mutex<Queue>>,
    /// The memory that the rings and buffers are in.
    pub memory: GuestMemory,
    /// How the driver is told.
    pub interrupt: Arc<dyn Interrupt>,
}

impl QueueHandle {
    /// Takes the next available chain.
    ///
    /// # Errors
    /// [`QueueError`] if ring or chain break the rules.
    pub fn pop(&self) -> Result<Option<Chain>, QueueError> {
        self.queue.lock().pop(&self.memory)
    }

    /// A chain that was taken and not given back; see [`Queue::chain`].
    ///
    /// # Errors
    /// [`QueueError`] if it breaks the rules by now.
    pub fn chain(&self, head: u16) -> Result<Chain, QueueError> {
        self.queue.lock().chain(&self.memory, head)
    }

    /// Takes back the last [`QueueHandle::pop`]; see [`Queue::put_back`].
    pub fn put_back(&self) {
        self.queue.lock().put_back();
    }

    /// Asks for no doorbells: the queue is looked at anyway.
    ///
    /// # Errors
    /// [`QueueError`] if the ring breaks the rules.
    pub fn disable_doorbell(&self) -> Result<(), QueueError> {
        self.queue.lock().disable_doorbell(&self.memory)
    }

    /// Asks for doorbells and says whether chains became available meanwhile; see
    /// [`Queue::enable_doorbell`].
    ///
    /// # Errors
    /// [`QueueError`] if the ring breaks the rules.
    pub fn enable_doorbell(&self) -> Result<bool, QueueError> {
        self.queue.lock().enable_doorbell(&self.memory)
    }

    /// Gives `chain` back, with `written` bytes written, and interrupts the driver if it wants that.
    ///
    /// # Errors
    /// [`QueueError`] if the ring breaks the rules.
    pub fn complete(&self, chain: &Chain, written: u32) -> Result<(), QueueError> {
        self.complete_all([(chain, written)])
    }

    /// Gives several chains back, each with the number of bytes written, and then interrupts the driver if it wants
    /// that.
    ///
    /// # Errors
    /// [`QueueError`] if the ring breaks the rules.
    pub fn complete_all<'a>(
        &self,
        chains: impl IntoIterator<Item = (&'a Chain, u32)>,
    ) -> Result<(), QueueError> {
        let interrupt = {
            let mut queue = self.queue.lock();
            for (chain, written) in chains {
                queue.push(&self.memory, chain.head(), written)?;
            }
            queue.needs_interrupt(&self.memory)?
        };
        if interrupt {
            self.interrupt.queue_used(self.index);
        }
        Ok(())
    }

    /// Serves the queue until it is empty or `stop` says to stop: calls `request` with each chain and gives
    /// it back with the number of bytes that `request` says it wrote.
    ///
    /// # Errors
    /// What `request` returns, and [`QueueError`] if ring or chain break the rules.
    pub fn serve(
        &self,
        stop: &StopToken,
        mut request: impl FnMut(&Chain) -> Result<u32, QueueError>,
    ) -> Result<(), QueueError> {
        loop {
            self.queue.lock().disable_doorbell(&self.memory)?;
            loop {
                if stop.stopping() {
                    return Ok(());
                }
                let Some(chain) = self.pop()? else { break };
                let written = request(&chain)?;
                self.complete(&chain, written)?;
            }
            if !self.queue.lock().enable_doorbell(&self.memory)? {
                return Ok(());
            }
        }
    }
}

impl fmt::Debug for QueueHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueHandle").field("index", &self.index).finish_non_exhaustive()
    }
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// The features negotiated.
    pub features: u64,
    /// The queues, as many as [`VirtioDevice::queue_sizes`] says. Those that the driver left alone are not
    /// enabled, and always empty.
    pub queues: Vec<QueueHandle>,
    /// Guest memory.
    pub memory: GuestMemory,
    /// How the driver is told of things.
    pub interrupt: Arc<dyn Interrupt>,
}

impl fmt::Debug for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Activation")
            .field("features", &format_args!("{:#x}", self.features))
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

/// Why a device could not be activated.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The host gives no thread or descriptor.
    #[error("the host gives no thread for a queue: {0}")]
    Thread(#[from] std::io::Error),
    /// The features negotiated do not go together.
    #[error("{0}")]
    Features(&'static str),
}

/// A virtio device without its transport.
///
/// A transport calls `activate` when the driver sets `DRIVER_OK`, and from then on `notify` when the driver
/// rings a doorbell, until `reset`. These run on vCPU threads: `notify` only wakes whoever does the work.
/// `start` and `stop` come from the machine; a device that was not started yet processes nothing.
pub trait VirtioDevice: Send + Sync {
    /// The device's type.
    fn device_type(&self) -> DeviceType;

    /// The device's own features, to which the transport adds its own. They do not change while a driver
    /// is there.
    fn features(&self) -> u64;

    /// How many queues there are, and the most entries of each.
    fn queue_sizes(&self) -> &[u16];

    /// A read of the device's configuration space. Bytes past its end are 0.
    fn config_read(&self, offset: u64, data: &mut [u8]);

    /// A write to the device's configuration space. What cannot be written is ignored.
    fn config_write(&self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The features that the driver accepted, before it is ready: some devices' configuration space depends
    /// on them.
    fn set_features(&self, features: u64) {
        let _ = features;
    }

    /// The driver is ready: queues may be served.
    ///
    /// # Errors
    /// [`ActivateError`]; the device is then in the error state.
    fn activate(&self, activation: Activation) -> Result<(), ActivateError>;

    /// The driver rang the doorbell of queue `queue`.
    fn notify(&self, queue: u16);

    /// An event descriptor that does what [`VirtioDevice::notify`] does when 1 is written to it, if the
    /// device is active and has one for this queue: for accelerators that turn guest stores into events.
    fn doorbell(&self, queue: u16) -> Option<Arc<OwnedFd>> {
        let _ = queue;
        None
    }

    /// Back to the state before `activate`. On return no queue is touched any more.
    fn reset(&self);

    /// The VM begins to run.
    fn start(&self);

    /// The VM is about to stand still. On return no request is under way and no guest memory is touched.
    fn stop(&self);

    /// The device's own guest-visible state, beyond what its queues hold.
    fn save(&self) -> SavedState;

    /// Takes over a state that `save` wrote. Called on a device that was reset, before `activate`.
    ///
    /// # Errors
    /// [`StateError`] if the state is not this device's.
    fn restore(&self, state: &SavedState) -> Result<(), StateError>;
}
