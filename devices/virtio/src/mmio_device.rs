//! A virtio device in memory-mapped registers without a bus (4.2), without the legacy interface.

use crate::VirtioDevice;
use crate::doorbells::{DoorbellSink, Places};
use crate::pci_device::name;
use crate::pci_layout::MAX_QUEUES;
use crate::signals::{Pin, Signals};
use crate::transport::{Transport, TransportState, common};
use device::{Device, MmioDevice, SavedState, StateError, decode, encode};
use guest_memory::GuestMemory;
use irq::IrqLine;
use std::fmt;
use std::sync::Arc;

/// Bytes of a device's registers: a page, so that an accelerator can treat it by itself.
pub const MMIO_DEVICE_LEN: u64 = 0x1000;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
/// The version of the register layout that isn't legacy.
const LAYOUT: u32 = 2;
/// "VREO", little-endian: who made it.
const VENDOR: u32 = 0x4f45_5256;

/// Offsets of the registers (4.2.2).
mod register {
    pub(super) const MAGIC: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const VENDOR_ID: u64 = 0x00c;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SELECT: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub(super) const QUEUE_SELECT: u64 = 0x030;
    pub(super) const QUEUE_SIZE_MAX: u64 = 0x034;
    pub(super) const QUEUE_SIZE: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(super) const INTERRUPT_ACKNOWLEDGE: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESCRIPTORS: u64 = 0x080;
    pub(super) const QUEUE_AVAILABLE: u64 = 0x090;
    pub(super) const QUEUE_USED: u64 = 0x0a0;
    /// Length and address of a shared memory region, of which there are none: all ones.
    pub(super) const SHARED_MEMORY: std::ops::Range<u64> = 0x0b0..0x0c0;
    pub(super) const GENERATION: u64 = 0x0fc;
    /// The device's own configuration space.
    pub(super) const CONFIG: u64 = 0x100;
}

const KIND: &str = "virtio-mmio";
const VERSION: u32 = 1;

/// What a virtio device without a bus is connected to.
#[derive(Debug)]
pub struct VirtioMmioConfig {
    /// Guest memory, for rings and buffers.
    pub memory: GuestMemory,
    /// The interrupt line: high while there is a cause that the driver has not acknowledged.
    pub line: IrqLine,
    /// Whether queues are served on the thread that rings their doorbells.
    pub inline: bool,
}

/// Why a device cannot have this transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a virtio device has {queues} queues; at most {most} are possible")]
pub struct TooManyQueues {
    /// How many it has.
    pub queues: usize,
    /// The most.
    pub most: usize,
}

/// A virtio device with its registers.
pub struct VirtioMmioDevice {
    device: Arc<dyn VirtioDevice>,
    transport: Transport,
}

impl VirtioMmioDevice {
    /// Registers for `device`.
    ///
    /// # Errors
    /// [`TooManyQueues`] if the device has more queues than [`MAX_QUEUES`].
    pub fn new(device: Arc<dyn VirtioDevice>, config: VirtioMmioConfig) -> Result<Self, TooManyQueues> {
        let queues = device.queue_sizes().len();
        if queues > MAX_QUEUES {
            return Err(TooManyQueues { queues, most: MAX_QUEUES });
        }
        let pin = Pin::Line(config.line);
        let signals = Signals::new(name(device.device_type()), queues, pin, config.inline);
        let places = Places::Together(register::QUEUE_NOTIFY);
        let transport = Transport::new(device.clone(), config.memory, None, Arc::new(signals), places);
        Ok(Self { device, transport })
    }

    /// The device behind the transport.
    pub fn device(&self) -> &Arc<dyn VirtioDevice> {
        &self.device
    }

    /// The device status register (2.1).
    pub fn status(&self) -> u8 {
        self.transport.status()
    }

    /// Has `sink` told which doorbells there are, now and whenever the driver comes or goes, of registers at
    /// the guest physical address `base`. To be called once, before the VM runs.
    pub fn connect_doorbells(&self, base: u64, sink: Box<dyn DoorbellSink>) {
        self.transport.doorbells().connect(sink);
        self.transport.doorbells().set_base(Some(base));
    }

    fn common(&self, offset: u64, len: usize) -> u32 {
        let mut value = [0; 4];
        crate::read_registers(&self.transport.common_image(), offset, &mut value[..len]);
        u32::from_le_bytes(value)
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => LAYOUT,
            register::DEVICE_ID => self.device.device_type().id().into(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => self.common(common::DEVICE_FEATURE, 4),
            register::QUEUE_SIZE_MAX => self.transport.selected_max_size().into(),
            register::QUEUE_READY => self.common(common::QUEUE_ENABLE, 2),
            register::INTERRUPT_STATUS => self.transport.signals().isr().into(),
            register::STATUS => self.status().into(),
            register::GENERATION => self.common(common::GENERATION, 1),
            _ if register::SHARED_MEMORY.contains(&offset) => u32::MAX,
            // The others are written only.
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        let transport = &self.transport;
        match offset {
            register::DEVICE_FEATURES_SELECT => {
                transport.common_write_u32(common::DEVICE_FEATURE_SELECT, value);
            }
            register::DRIVER_FEATURES => transport.common_write_u32(common::DRIVER_FEATURE, value),
            register::DRIVER_FEATURES_SELECT => {
                transport.common_write_u32(common::DRIVER_FEATURE_SELECT, value);
            }
            // A queue or a size that 16 bits do not hold is none.
            register::QUEUE_SELECT => {
                transport.common_write_u16(common::QUEUE_SELECT, u16::try_from(value).unwrap_or(u16::MAX));
            }
            register::QUEUE_SIZE => {
                transport.common_write_u16(common::QUEUE_SIZE, u16::try_from(value).unwrap_or(0));
            }
            register::QUEUE_READY if value == 0 => transport.disable_selected(),
            register::QUEUE_READY if value == 1 => transport.common_write_u16(common::QUEUE_ENABLE, 1),
            register::QUEUE_NOTIFY => transport.ring(value.into()),
            register::INTERRUPT_ACKNOWLEDGE => transport.signals().acknowledge(value as u8),
            register::STATUS => transport.set_status(value as u8),
            _ => {
                let fields = [
                    (register::QUEUE_DESCRIPTORS, common::QUEUE_DESCRIPTORS),
                    (register::QUEUE_AVAILABLE, common::QUEUE_AVAILABLE),
                    (register::QUEUE_USED, common::QUEUE_USED),
                ];
                if let Some((_, field)) = fields.iter().find(|(register, _)| offset & !4 == *register) {
                    transport.common_write_u32(field + (offset & 4), value);
                }
            }
        }
    }
}

impl MmioDevice for VirtioMmioDevice {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        if offset >= register::CONFIG {
            self.device.config_read(offset - register::CONFIG, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        } else {
            // Registers are read and written in 32 bits at once (4.2.2.2).
            data.fill(0);
        }
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        if offset >= register::CONFIG {
            self.device.config_write(offset - register::CONFIG, data);
        } else if let [a, b, c, d] = *data
            && offset.is_multiple_of(4)
        {
            self.write_register(offset, u32::from_le_bytes([a, b, c, d]));
        }
    }
}

impl Device for VirtioMmioDevice {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn reset(&self) {
        self.transport.reset();
    }

    fn start(&self) {
        self.device.start();
    }

    fn stop(&self) {
        self.device.stop();
    }

    fn save(&self) -> SavedState {
        encode(KIND, VERSION, &self.transport.save())
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        self.reset();
        let state: TransportState = decode(KIND, VERSION, state)?;
        self.transport.restore(KIND, &state)
    }
}

impl fmt::Debug for VirtioMmioDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioMmioDevice")
            .field("type", &self.device.device_type())
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}
