//! A guest's driver in miniature, which drives a [`VirtioPciDevice`] through its BAR as a guest would. For
//! tests: it panics when things go wrong.

use crate::pci_layout::{BAR, COMMON, DEVICE, ISR, NOTIFY, NOTIFY_MULTIPLIER};
use crate::{VirtioDevice, VirtioPciConfig, VirtioPciDevice, feature, status};
use bus::{MmioBus, PioBus};
use device::Device;
use guest_memory::GuestMemory;
use irq::{IrqLine, IrqSink, MsiMessage, MsiTarget};
use parking_lot::Mutex;
use pci::{DevFn, PciBus, PciDevice, Windows};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the driver waits for a device before it gives up. Far beyond what any device needs.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Bytes of guest memory: enough for the rings of a few queues and for buffers.
pub const MEMORY_SIZE: u64 = 8 << 20;

/// Where buffers may be: below are rings.
pub const BUFFERS: u64 = 4 << 20;

/// Offsets of the common configuration's registers.
const FEATURE_SELECT: [(u64, u64); 2] = [(0x00, 0x04), (0x08, 0x0c)];
const CONFIG_VECTOR: u64 = 0x10;
const STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_ADDRESSES: u64 = 0x20;

/// Records interrupts.
#[derive(Debug, Default)]
pub struct Recorder {
    /// The messages received.
    pub messages: Mutex<Vec<MsiMessage>>,
    /// The levels that the line went to.
    pub levels: Mutex<Vec<bool>>,
}

impl MsiTarget for Recorder {
    fn signal(&self, message: MsiMessage) {
        self.messages.lock().push(message);
    }
}

impl IrqSink for Recorder {
    fn set_level(&self, _pin: u32, level: bool) {
        self.levels.lock().push(level);
    }
}

/// Guest memory as [`Driver::new`] makes it.
pub fn test_memory() -> GuestMemory {
    GuestMemory::new(std::slice::from_ref(&(0..MEMORY_SIZE))).unwrap()
}

/// One device on a PCI bus, with memory, and what the driver knows of it.
pub struct Driver {
    /// Guest memory.
    pub memory: GuestMemory,
    /// The device.
    pub device: Arc<VirtioPciDevice>,
    /// Interrupts.
    pub recorder: Arc<Recorder>,
    /// The bus that the BAR is on.
    pub mmio: Arc<MmioBus>,
    /// The bus that the function is on.
    pub pci: Arc<PciBus>,
}

/// A descriptor: guest physical address, length, and whether the device writes.
pub type Buffer = (u64, u32, bool);

/// The driver's side of one queue.
#[derive(Debug, Clone)]
pub struct DriverQueue {
    memory: GuestMemory,
    /// The queue's number.
    pub index: u16,
    /// Its size.
    pub size: u16,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest physical address of the available ring.
    pub available: u64,
    /// Guest physical address of the used ring.
    pub used: u64,
    next_descriptor: u16,
    next_available: u16,
    next_used: u16,
}

impl Driver {
    /// Puts `device` on a bus of its own. The VM does not run yet.
    pub fn new(device: Arc<dyn VirtioDevice>) -> Self {
        Self::with_memory(device, test_memory())
    }

    /// Puts `device` on a bus of its own, with guest memory that exists already.
    pub fn with_memory(device: Arc<dyn VirtioDevice>, memory: GuestMemory) -> Self {
        Self::with_service(device, memory, false)
    }

    /// The same with queues that are served on the thread that rings.
    pub fn inline(device: Arc<dyn VirtioDevice>, memory: GuestMemory) -> Self {
        Self::with_service(device, memory, true)
    }

    fn with_service(device: Arc<dyn VirtioDevice>, memory: GuestMemory, inline: bool) -> Self {
        let recorder = Arc::new(Recorder::default());
        let mmio = Arc::new(MmioBus::new());
        let windows = Windows { memory32: 0xc000_0000..0xd000_0000, memory64: 0..0, io: 0..0 };
        let pci = PciBus::new(mmio.clone(), Arc::new(PioBus::new()), windows);
        let config = VirtioPciConfig {
            memory: memory.clone(),
            msi: recorder.clone(),
            intx: Some((IrqLine::new(recorder.clone(), 0), 1, 16)),
            inline,
        };
        let device = Arc::new(VirtioPciDevice::new(device, config).unwrap());
        pci.attach(DevFn::new(1, 0).unwrap(), device.clone()).unwrap();
        Self { memory, device, recorder, mmio, pci }
    }

    fn bar(&self) -> u64 {
        self.device.function().bar_address(BAR.into()).unwrap()
    }

    /// Reads `data.len()` bytes at `offset` of the BAR.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.mmio.read(self.bar() + offset, data);
    }

    /// Writes to the BAR.
    pub fn write(&self, offset: u64, data: &[u8]) {
        self.mmio.write(self.bar() + offset, data);
    }

    fn read_u16(&self, offset: u64) -> u16 {
        let mut data = [0; 2];
        self.read(COMMON + offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        let mut data = [0];
        self.read(COMMON + STATUS, &mut data);
        data[0]
    }

    /// Writes the device status.
    pub fn set_status(&self, status: u8) {
        self.write(COMMON + STATUS, &[status]);
    }

    /// The features offered.
    pub fn offered(&self) -> u64 {
        let (select, value) = FEATURE_SELECT[0];
        [0u32, 1].iter().fold(0, |features, half| {
            self.write(COMMON + select, &half.to_le_bytes());
            let mut data = [0; 4];
            self.read(COMMON + value, &mut data);
            features | u64::from(u32::from_le_bytes(data)) << (32 * half)
        })
    }

    /// Resets the device and negotiates `features`, plus `VERSION_1`; says whether the device agrees.
    pub fn negotiate(&self, features: u64) -> bool {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        let (select, value) = FEATURE_SELECT[1];
        let features = features | feature::VERSION_1;
        for half in [0u32, 1] {
            self.write(COMMON + select, &half.to_le_bytes());
            self.write(COMMON + value, &((features >> (32 * half)) as u32).to_le_bytes());
        }
        self.set_status(self.status() | status::FEATURES_OK);
        self.status() & status::FEATURES_OK != 0
    }

    /// Sets up queue `index` with `size` entries, at a place of its own, and enables it.
    pub fn queue(&self, index: u16, size: u16) -> DriverQueue {
        let queue = DriverQueue::new(&self.memory, index, size);
        self.enable(&queue);
        queue
    }

    /// Writes a queue's registers and enables it.
    pub fn enable(&self, queue: &DriverQueue) {
        self.write(COMMON + QUEUE_SELECT, &queue.index.to_le_bytes());
        self.write(COMMON + QUEUE_SIZE, &queue.size.to_le_bytes());
        self.write(COMMON + QUEUE_VECTOR, &(queue.index + 1).to_le_bytes());
        for (position, address) in [queue.descriptors, queue.available, queue.used].into_iter().enumerate() {
            let register = COMMON + QUEUE_ADDRESSES + 8 * position as u64;
            self.write(register, &(address as u32).to_le_bytes());
            self.write(register + 4, &((address >> 32) as u32).to_le_bytes());
        }
        self.write(COMMON + QUEUE_ENABLE, &1u16.to_le_bytes());
    }

    /// Whether queue `index` is enabled.
    pub fn is_enabled(&self, index: u16) -> bool {
        self.write(COMMON + QUEUE_SELECT, &index.to_le_bytes());
        self.read_u16(QUEUE_ENABLE) == 1
    }

    /// Uses MSI-X: vector `n` gets data `0x40 + n`, vector 0 is for the configuration.
    pub fn use_msix(&self) {
        let function = self.device.function();
        let vectors = function.msix().unwrap().vectors();
        for vector in 0..vectors {
            let entry = 0x4000 + 16 * u64::from(vector);
            self.write(entry, &0xfee0_0000u64.to_le_bytes());
            self.write(entry + 8, &(0x40 + u32::from(vector)).to_le_bytes());
            self.write(entry + 12, &0u32.to_le_bytes());
        }
        let capability = self.find_capability(pci::capability::MSIX);
        let place = DevFn::new(1, 0).unwrap();
        self.pci.config_write(place, capability + 2, &0x8000u16.to_le_bytes());
        self.write(COMMON + CONFIG_VECTOR, &0u16.to_le_bytes());
    }

    /// The offset of the first capability `id`.
    pub fn find_capability(&self, id: u8) -> u16 {
        let place = DevFn::new(1, 0).unwrap();
        let byte = |offset: u16| {
            let mut data = [0];
            self.pci.config_read(place, offset, &mut data);
            data[0]
        };
        let mut at = byte(pci::register::CAPABILITIES);
        while at != 0 && byte(at.into()) != id {
            at = byte(u16::from(at) + 1);
        }
        assert_ne!(at, 0, "capability {id:#x} is missing");
        at.into()
    }

    /// Sets `DRIVER_OK`.
    pub fn driver_ok(&self) {
        self.set_status(self.status() | status::DRIVER_OK);
    }

    /// Negotiates, sets up queues of `sizes`, and is ready.
    pub fn set_up(&self, features: u64, sizes: &[u16]) -> Vec<DriverQueue> {
        self.device.start();
        assert!(self.negotiate(features), "the device refuses features {features:#x}");
        self.use_msix();
        let queues = sizes.iter().enumerate().map(|(index, size)| self.queue(index as u16, *size)).collect();
        self.driver_ok();
        queues
    }

    /// Rings the doorbell of queue `index`.
    pub fn ring(&self, index: u16) {
        self.write(NOTIFY + NOTIFY_MULTIPLIER * u64::from(index), &index.to_le_bytes());
    }

    /// Reads the device's configuration space.
    pub fn config(&self, offset: u64, data: &mut [u8]) {
        self.read(DEVICE + offset, data);
    }

    /// The little-endian integer of `len` bytes in the device's configuration space.
    pub fn config_int(&self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.config(offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    /// Writes the device's configuration space.
    pub fn set_config(&self, offset: u64, data: &[u8]) {
        self.write(DEVICE + offset, data);
    }

    /// Reads the ISR register.
    pub fn isr(&self) -> u8 {
        let mut data = [0];
        self.read(ISR, &mut data);
        data[0]
    }

    /// Waits until `condition` holds.
    pub fn wait_for(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition() {
            assert!(Instant::now() < deadline, "waited in vain for {what}; status {:#x}", self.status());
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Makes `buffers` available as one chain, rings, waits until it is used, and returns the number of
    /// bytes written.
    pub fn transact(&self, queue: &mut DriverQueue, buffers: &[Buffer]) -> u32 {
        let head = queue.add(buffers);
        self.ring(queue.index);
        let mut used = None;
        self.wait_for("a used buffer", || {
            used = queue.take_used();
            used.is_some()
        });
        let (id, written) = used.unwrap();
        assert_eq!(id, u32::from(head));
        written
    }

    /// Waits until the device is in the error state.
    pub fn wait_needs_reset(&self) {
        self.wait_for("the error state", || self.status() & status::NEEDS_RESET != 0);
    }
}

impl DriverQueue {
    /// Queue `index` with `size` entries, at a place of its own in `memory`, which is cleared.
    pub fn new(memory: &GuestMemory, index: u16, size: u16) -> Self {
        let base = 0x1_0000 * (u64::from(index) + 1);
        memory.write(base, &vec![0; 0x1_0000]).unwrap();
        Self {
            memory: memory.clone(),
            index,
            size,
            descriptors: base,
            available: base + 0x4000,
            used: base + 0x8000,
            next_descriptor: 0,
            next_available: 0,
            next_used: 0,
        }
    }

    /// Writes descriptor `index` of the table.
    pub fn write_descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.memory
            .write(self.descriptors + 16 * u64::from(index), &descriptor(address, len, flags, next))
            .unwrap();
    }

    /// Writes `buffers` as a chain of descriptors and makes it available. Returns its head.
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        for (position, (address, len, write)) in buffers.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let more = position + 1 < buffers.len();
            let flags = u16::from(more) | u16::from(*write) << 1;
            self.write_descriptor(index, *address, *len, flags, self.next_descriptor);
        }
        self.make_available(head);
        head
    }

    /// Writes `buffers` as a chain in an indirect table at `table` and makes it available.
    pub fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) -> u16 {
        for (index, (address, len, write)) in buffers.iter().enumerate() {
            let more = index + 1 < buffers.len();
            let flags = u16::from(more) | u16::from(*write) << 1;
            let bytes = descriptor(*address, *len, flags, index as u16 + 1);
            self.memory.write(table + 16 * index as u64, &bytes).unwrap();
        }
        let head = self.next_descriptor;
        self.next_descriptor = (head + 1) % self.size;
        self.write_descriptor(head, table, 16 * buffers.len() as u32, 4, 0);
        self.make_available(head);
        head
    }

    /// Puts `head` into the available ring.
    pub fn make_available(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        self.memory.write(self.available + 4 + 2 * slot, &head.to_le_bytes()).unwrap();
        self.next_available = self.next_available.wrapping_add(1);
        self.set_available_index(self.next_available);
    }

    /// Writes the available ring's index.
    pub fn set_available_index(&self, index: u16) {
        self.memory.write(self.available + 2, &index.to_le_bytes()).unwrap();
    }

    /// The next used element: head and bytes written.
    pub fn take_used(&mut self) -> Option<(u32, u32)> {
        let mut index = [0; 2];
        self.memory.read(self.used + 2, &mut index).unwrap();
        if u16::from_le_bytes(index) == self.next_used {
            return None;
        }
        let mut entry = [0; 8];
        let slot = u64::from(self.next_used % self.size);
        self.memory.read(self.used + 4 + 8 * slot, &mut entry).unwrap();
        self.next_used = self.next_used.wrapping_add(1);
        let [a, b, c, d, e, f, g, h] = entry;
        Some((u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])))
    }

    /// Says from which used index on the driver wants an interrupt.
    pub fn set_used_event(&self, index: u16) {
        let at = self.available + 4 + 2 * u64::from(self.size);
        self.memory.write(at, &index.to_le_bytes()).unwrap();
    }

    /// From which available index on the device wants a doorbell.
    pub fn avail_event(&self) -> u16 {
        let mut data = [0; 2];
        self.memory.read(self.used + 4 + 8 * u64::from(self.size), &mut data).unwrap();
        u16::from_le_bytes(data)
    }

    /// The driver's side of the same queue over another memory, of a restored VM.
    #[must_use]
    pub fn over(&self, memory: &GuestMemory) -> Self {
        Self { memory: memory.clone(), ..self.clone() }
    }
}

fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
    let mut bytes = address.to_le_bytes().to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    bytes
}

/// A copy of a VM's memory, as a restored VM has it.
pub fn copy_memory(memory: &GuestMemory) -> GuestMemory {
    let regions: Vec<_> = memory.regions().iter().map(|region| region.gpa..region.gpa + region.len).collect();
    let copy = GuestMemory::new(&regions).unwrap();
    for region in regions {
        let mut data = vec![0; (region.end - region.start) as usize];
        memory.read(region.start, &mut data).unwrap();
        copy.write(region.start, &data).unwrap();
    }
    copy
}
