//! A virtio device as a PCI function (4.1), without the legacy interface.

use crate::doorbells::{DoorbellSink, Places};
use crate::pci_layout::{
    self, BAR, BAR_SIZE, MAX_QUEUES, MAX_VECTORS, MSIX_PBA, MSIX_TABLE, NOTIFY, NOTIFY_MULTIPLIER,
    WINDOW_BAR, WINDOW_DATA, WINDOW_LENGTH, WINDOW_OFFSET,
};
use crate::signals::{Pin, Signals};
use crate::transport::{Transport, TransportState};
use crate::{DeviceType, VirtioDevice};
use device::{Device, MmioDevice, SavedState, StateError, decode, encode};
use guest_memory::GuestMemory;
use irq::{IrqLine, MsiTarget};
use pci::{BarHandler, BarKind, FunctionState, Identity, PciDevice, PciError, PciFunction};
use std::fmt;
use std::sync::Arc;

/// The vendor ID of virtio devices (4.1.2).
const VENDOR: u16 = 0x1af4;
/// The PCI device ID is this plus the virtio device ID.
const DEVICE_ID_BASE: u16 = 0x1040;
/// Says "not transitional": 0x40 or higher.
const SUBSYSTEM: u16 = 0x1100;

const KIND: &str = "virtio-pci";
const VERSION: u32 = 1;

/// What a virtio PCI function is connected to.
pub struct VirtioPciConfig {
    /// Guest memory, for rings and buffers.
    pub memory: GuestMemory,
    /// Where MSI-X messages go.
    pub msi: Arc<dyn MsiTarget>,
    /// The interrupt line for guests without MSI-X, the pin (1 for INTA#), and the number of the interrupt
    /// controller's input that firmware tells the guest.
    pub intx: Option<(IrqLine, u8, u8)>,
    /// Whether queues are served on the thread that rings their doorbells.
    pub inline: bool,
}

impl fmt::Debug for VirtioPciConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioPciConfig").field("intx", &self.intx).finish_non_exhaustive()
    }
}

/// A virtio device on a PCI bus.
pub struct VirtioPciDevice {
    device: Arc<dyn VirtioDevice>,
    function: PciFunction,
    transport: Arc<Transport>,
    /// Offset of the PCI configuration access capability (4.1.4.9).
    window: u16,
}

impl VirtioPciDevice {
    /// A PCI function for `device`. It has a vector for each queue and one for configuration changes, as
    /// far as there is room.
    ///
    /// # Errors
    /// [`PciError`] if the device has more queues than [`MAX_QUEUES`].
    pub fn new(device: Arc<dyn VirtioDevice>, config: VirtioPciConfig) -> Result<Self, PciError> {
        let VirtioPciConfig { memory, msi, intx, inline } = config;
        let kind = device.device_type();
        let queues = device.queue_sizes().len();
        if queues > MAX_QUEUES {
            return Err(PciError::BadBar { index: BAR.into(), reason: "there are too many queues for it" });
        }
        let identity = Identity {
            vendor: VENDOR,
            device: DEVICE_ID_BASE + kind.id(),
            revision: 1,
            class: kind.pci_class(),
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM,
        };
        let mut builder = PciFunction::builder(&identity);
        if let Some((line, pin, input)) = intx {
            builder = builder.intx(line, pin, input);
        }
        let vectors = (queues + 1).min(MAX_VECTORS) as u16;
        let msix = builder.msix(vectors, BAR, MSIX_TABLE as u32, MSIX_PBA as u32, msi)?;
        let window = pci_layout::add_capabilities(&mut builder)?;
        let pin = Pin::Pci { msix: msix.clone(), intx: builder.intx_pin() };
        let signals = Arc::new(Signals::new(name(kind), queues, pin, inline));
        let places = Places::Apart(NOTIFY, NOTIFY_MULTIPLIER);
        let transport = Arc::new(Transport::new(device.clone(), memory, Some(msix), signals, places));
        let handler = BarHandler::Memory(transport.clone());
        let kind = BarKind::Memory64 { prefetchable: false };
        let function = builder.bar(BAR.into(), kind, BAR_SIZE, handler)?.build();
        Ok(Self { device, function, transport, window })
    }

    /// The device behind the transport.
    pub fn device(&self) -> &Arc<dyn VirtioDevice> {
        &self.device
    }

    /// The device status register (2.1).
    pub fn status(&self) -> u8 {
        self.transport.status()
    }

    /// Has `sink` told which doorbells there are, now and whenever the driver comes or goes or the BAR moves.
    /// To be called once, before the VM runs.
    pub fn connect_doorbells(&self, sink: Box<dyn DoorbellSink>) {
        self.transport.doorbells().connect(sink);
        self.bar_moved();
    }

    fn bar_moved(&self) {
        self.transport.doorbells().set_base(self.function.bar_address(BAR.into()));
    }

    /// The access that the window describes: offset in the BAR and width.
    fn window_access(&self) -> Option<(u64, usize)> {
        let register = |offset: u16| {
            let mut data = [0; 4];
            self.function.config_read(self.window + offset, &mut data);
            u32::from_le_bytes(data)
        };
        let (offset, len) = (u64::from(register(WINDOW_OFFSET)), register(WINDOW_LENGTH));
        let valid = register(WINDOW_BAR) & 0xff == u32::from(BAR)
            && matches!(len, 1 | 2 | 4)
            && offset.is_multiple_of(len.into())
            && offset + u64::from(len) <= BAR_SIZE;
        valid.then_some((offset, len as usize))
    }

    fn touches_window(&self, offset: u16, len: usize) -> bool {
        let data = self.window + WINDOW_DATA;
        offset < data + 4 && usize::from(offset) + len > usize::from(data)
    }
}

/// What messages call a device of this type.
pub(crate) fn name(kind: DeviceType) -> &'static str {
    match kind {
        DeviceType::Network => "virtio network card",
        DeviceType::Block => "virtio block device",
        DeviceType::Console => "virtio console",
        DeviceType::Entropy => "virtio entropy source",
        DeviceType::Balloon => "virtio balloon",
        _ => "virtio device",
    }
}

impl Device for VirtioPciDevice {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn reset(&self) {
        self.transport.reset();
        self.function.reset();
        self.bar_moved();
    }

    fn start(&self) {
        self.device.start();
    }

    fn stop(&self) {
        self.device.stop();
    }

    fn save(&self) -> SavedState {
        encode(KIND, VERSION, &(self.function.save(), self.transport.save()))
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        self.reset();
        let (function, transport): (FunctionState, TransportState) = decode(KIND, VERSION, state)?;
        let result =
            self.function.restore(KIND, &function).and_then(|()| self.transport.restore(KIND, &transport));
        if result.is_err() {
            self.reset();
        }
        self.bar_moved();
        result
    }
}

impl PciDevice for VirtioPciDevice {
    fn function(&self) -> &PciFunction {
        &self.function
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        if self.touches_window(offset, data.len())
            && let Some((bar_offset, len)) = self.window_access()
        {
            let mut value = [0; 4];
            self.transport.mmio_read(bar_offset, &mut value[..len]);
            self.function.set(self.window + WINDOW_DATA, &value);
        }
        self.function.config_read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.function.config_write(offset, data);
        self.bar_moved();
        if self.touches_window(offset, data.len())
            && let Some((bar_offset, len)) = self.window_access()
        {
            let mut value = [0; 4];
            self.function.config_read(self.window + WINDOW_DATA, &mut value);
            self.transport.mmio_write(bar_offset, &value[..len]);
        }
    }
}

impl fmt::Debug for VirtioPciDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioPciDevice")
            .field("type", &self.device.device_type())
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}
