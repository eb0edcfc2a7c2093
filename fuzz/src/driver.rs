//! A virtio device on a PCI bus or without one, and a driver without scruples.

use crate::{Bench, Input, Rig, drive};
use guest_memory::GuestMemory;
use pci::{DevFn, Ecam, PciBus, PciDevice, Windows, capability, register};
use std::cell::Cell;
use std::sync::Arc;
use virtio::{
    MAX_QUEUES, MMIO_DEVICE_LEN, VirtioDevice, VirtioMmioConfig, VirtioMmioDevice, VirtioPciConfig,
    VirtioPciDevice, status,
};

/// Bytes of the low memory region. Queue `n` has its rings at `RINGS_EACH * n`.
const LOW_MEMORY: u64 = 128 << 10;
/// The high region.
const HIGH_MEMORY: std::ops::Range<u64> = (4 << 30)..(4 << 30) + (16 << 10);
const RINGS_EACH: u64 = 0x400;
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x200;
/// Descriptors in queues that are set up properly.
const RING_SIZE: u16 = 16;
/// An indirect table, then buffers.
const TABLE: u64 = 0x7000;
const BUFFERS: u64 = 0x8000;
const BUFFER_LEN: u64 = 0x400;
/// The most bytes of one request, in each direction.
const MAX_REQUEST: usize = 0x2000;

const ECAM: u64 = 0xe000_0000;
/// Where the registers of a device without a bus are.
const MMIO: u64 = 0xd000_0000;
/// Offsets in the BAR.
const STATUS: u64 = 0x14;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const CONFIG_VECTOR: u64 = 0x10;
const QUEUE_SELECT: u64 = 0x16;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;

thread_local! {
    static MEMORY: GuestMemory =
        GuestMemory::new(&[0..LOW_MEMORY, HIGH_MEMORY]).expect("the host gives memory");
}

/// Guest memory, always the same, with whatever was in it.
pub fn test_memory() -> GuestMemory {
    MEMORY.with(GuestMemory::clone)
}

/// What a driver asks of a device.
#[derive(Debug, Default)]
pub struct Request {
    /// What the device reads.
    pub readable: Vec<u8>,
    /// How many bytes it may write.
    pub writable: usize,
}

/// A virtio device and its host's side.
pub trait Driven: Sized {
    /// The device after power-on.
    fn new() -> Self;

    /// The device.
    fn device(&self) -> Arc<dyn VirtioDevice>;

    /// A request that queue `queue` of the device is for.
    fn request(&self, queue: u16, input: &mut Input<'_>) -> Request {
        let _ = queue;
        let len = input.below(0x100) as usize;
        Request { readable: input.bytes(len).to_vec(), writable: input.below(0x800) as usize }
    }

    /// Something that the host does.
    fn host(&self, input: &mut Input<'_>) {
        let _ = input;
    }
}

/// How the device is reached.
enum Transport {
    Pci { bar: u64, function: DevFn, bus: Arc<PciBus> },
    Mmio,
}

struct VirtioBench<D, const BUS: bool> {
    rig: Rig,
    driven: D,
    transport: Transport,
    offered: u64,
    /// The sizes of the rings.
    sizes: Vec<u16>,
    /// The available indices of the first queues.
    available: [Cell<u16>; 16],
    next_descriptor: Cell<u16>,
}

/// Offsets of registers that PCI and memory-mapped registers have both.
mod mmio {
    pub(super) const DRIVER_FEATURES: u64 = 0x20;
    pub(super) const QUEUE_SELECT: u64 = 0x30;
    pub(super) const QUEUE_SIZE: u64 = 0x38;
    pub(super) const QUEUE_READY: u64 = 0x44;
    pub(super) const NOTIFY: u64 = 0x50;
    pub(super) const STATUS: u64 = 0x70;
    pub(super) const RINGS: u64 = 0x80;
}

impl<D: Driven, const BUS: bool> VirtioBench<D, BUS> {
    fn write(&self, offset: u64, data: &[u8]) {
        let base = match self.transport {
            Transport::Pci { bar, .. } => bar,
            Transport::Mmio => MMIO,
        };
        self.rig.memory.write(base + offset, data);
    }

    fn write_word(&self, offset: u64, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    fn queue(&self, input: &mut Input<'_>) -> u16 {
        input.below(self.sizes.len() as u64) as u16
    }

    /// Does what a driver does to begin, with any features and not all queues.
    fn set_up(&self, input: &mut Input<'_>) {
        let declined = if input.one_in(4) { input.u64() } else { 0 };
        let features = self.offered & !declined | virtio::feature::VERSION_1;
        self.set_status(0);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        for half in [0u32, 1] {
            let word = (features >> (32 * half)) as u32;
            if BUS {
                self.write_word(DRIVER_FEATURE_SELECT, half);
                self.write_word(DRIVER_FEATURE_SELECT + 4, word);
            } else {
                self.write_word(mmio::DRIVER_FEATURES + 4, half);
                self.write_word(mmio::DRIVER_FEATURES, word);
            }
        }
        self.set_status(status::FEATURES_OK);
        if input.flag() {
            self.use_msix();
        }
        let left_out = input.u8();
        for (queue, size) in (0u16..).zip(&self.sizes) {
            if left_out == 1 << (queue % 8) {
                continue;
            }
            let base = RINGS_EACH * u64::from(queue);
            test_memory().write(base, &[0; RINGS_EACH as usize]).expect("rings are in memory");
            self.enable_queue(queue, *size, [base, base + AVAILABLE, base + USED]);
        }
        self.available.iter().for_each(|index| index.set(0));
        self.set_status(status::DRIVER_OK);
    }

    fn set_status(&self, value: u8) {
        if BUS { self.write(STATUS, &[value]) } else { self.write_word(mmio::STATUS, value.into()) }
    }

    fn enable_queue(&self, queue: u16, size: u16, rings: [u64; 3]) {
        if BUS {
            self.write(QUEUE_SELECT, &queue.to_le_bytes());
            self.write(QUEUE_SELECT + 2, &size.to_le_bytes());
            self.write(QUEUE_SELECT + 4, &(queue + 1).to_le_bytes());
            for (index, address) in rings.iter().enumerate() {
                self.write(0x20 + 8 * index as u64, &address.to_le_bytes());
            }
            return self.write(QUEUE_SELECT + 6, &1u16.to_le_bytes());
        }
        self.write_word(mmio::QUEUE_SELECT, queue.into());
        self.write_word(mmio::QUEUE_SIZE, size.into());
        for (index, address) in rings.iter().enumerate() {
            let register = mmio::RINGS + 0x10 * index as u64;
            self.write_word(register, *address as u32);
            self.write_word(register + 4, (address >> 32) as u32);
        }
        self.write_word(mmio::QUEUE_READY, 1);
    }

    fn use_msix(&self) {
        let Transport::Pci { function, bus, .. } = &self.transport else { return };
        for vector in 0..4u64 {
            let entry = MSIX_TABLE + 16 * vector;
            self.write(entry, &0xfee0_0000u64.to_le_bytes());
            self.write(entry + 8, &(0x40 + vector).to_le_bytes());
        }
        let byte = |offset: u16| {
            let mut data = [0];
            bus.config_read(*function, offset, &mut data);
            data[0]
        };
        let mut at = byte(register::CAPABILITIES);
        while at != 0 && byte(at.into()) != capability::MSIX {
            at = byte(u16::from(at) + 1);
        }
        bus.config_write(*function, u16::from(at) + 2, &0x8000u16.to_le_bytes());
        self.write(CONFIG_VECTOR, &0u16.to_le_bytes());
    }

    /// A descriptor anywhere in a table, with anything in it.
    fn write_descriptor(&self, input: &mut Input<'_>) {
        let queue = self.queue(input);
        let index = input.below((RING_SIZE + 1).into());
        let address = match input.u8() % 8 {
            0 => input.number(),
            1 => HIGH_MEMORY.end - input.below(0x20),
            2 => LOW_MEMORY - input.below(0x20),
            3 => TABLE,
            _ => BUFFERS + input.below(0x1_0000),
        };
        let len = if input.flag() { input.u16().into() } else { input.number() as u32 };
        let flags = u16::from(input.u8()) & 7;
        let next = input.below((RING_SIZE + 1).into()) as u16;
        let table = if input.flag() { TABLE } else { RINGS_EACH * u64::from(queue) };
        // Past the end of memory it is lost.
        let _ = test_memory().write(table + 16 * index, &descriptor(address, len, flags, next));
    }

    fn make_available(&self, queue: u16, head: u16, step: u16) {
        let Some(index) = self.available.get(usize::from(queue)) else { return };
        let at = RINGS_EACH * u64::from(queue) + AVAILABLE;
        let slot = u64::from(index.get() % self.sizes[usize::from(queue)]);
        let memory = test_memory();
        memory.write(at + 4 + 2 * slot, &head.to_le_bytes()).expect("the ring is in memory");
        index.set(index.get().wrapping_add(step));
        memory.write(at + 2, &index.get().to_le_bytes()).expect("the ring is in memory");
    }

    fn ring(&self, queue: u16) {
        if BUS {
            self.write(NOTIFY + 4 * u64::from(queue), &queue.to_le_bytes());
        } else {
            self.write_word(mmio::NOTIFY, queue.into());
        }
    }

    /// A request as it should be, in pieces of any length.
    fn request(&self, input: &mut Input<'_>) {
        let queue = self.queue(input);
        let size = self.sizes[usize::from(queue)];
        let mut request = self.driven.request(queue, input);
        request.readable.truncate(MAX_REQUEST);
        let memory = test_memory();
        let head = self.next_descriptor.get() % size;
        let start = BUFFERS + BUFFER_LEN * u64::from(head);
        memory.write(start, &request.readable).expect("buffers are in memory");
        let mut pieces = Vec::new();
        let mut at = start;
        let writable = request.writable.min(MAX_REQUEST) as u32;
        for (total, flags) in [(request.readable.len() as u32, 0), (writable, 2)] {
            let mut left = total;
            while left > 0 {
                // Mostly one piece; the last of a few takes the rest.
                let cut = if pieces.len() < 4 && input.one_in(3) { input.u16().into() } else { left };
                let len = left.min(cut);
                pieces.push((at, len, flags));
                at += u64::from(len);
                left -= len;
            }
        }
        let indirect = pieces.len() > usize::from(size) || input.one_in(4);
        let base = RINGS_EACH * u64::from(queue);
        let count = pieces.len();
        for (position, (address, len, flags)) in pieces.into_iter().enumerate() {
            let more = u16::from(position + 1 < count);
            let slot = (head + position as u16) % size;
            let (at, next) = if indirect {
                (TABLE + 16 * position as u64, position as u16 + 1)
            } else {
                (base + 16 * u64::from(slot), (slot + 1) % size)
            };
            memory.write(at, &descriptor(address, len, flags | more, next)).expect("tables are in memory");
        }
        if indirect {
            let bytes = descriptor(TABLE, 16 * count as u32, 4, 0);
            memory.write(base + 16 * u64::from(head), &bytes).expect("tables are in memory");
        }
        self.next_descriptor.set((head + count as u16) % size);
        self.make_available(queue, head, 1);
        self.ring(queue);
    }
}

fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let bits =
        u128::from(address) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
    bits.to_le_bytes()
}

/// Puts `device` on a PCI bus.
fn attach(rig: &mut Rig, device: Arc<dyn VirtioDevice>) -> Transport {
    let windows =
        Windows { memory32: 0xc000_0000..0xd000_0000, memory64: 1 << 40..2 << 40, io: 0xc000..0xd000 };
    let bus = PciBus::new(rig.memory.clone(), rig.ports.clone(), windows);
    let config = VirtioPciConfig {
        memory: test_memory(),
        msi: rig.outside.clone(),
        intx: Some((rig.outside.line(0), 1, 16)),
        inline: true,
    };
    let pci = Arc::new(VirtioPciDevice::new(device, config).expect("the device fits"));
    let function = DevFn::from_number(8);
    bus.attach(function, pci.clone()).expect("the bus is empty");
    let bar = pci.function().bar_address(0).expect("firmware placed the BAR");
    rig.memory.map(ECAM, 1 << 20, Arc::new(Ecam::new(bus.clone()))).expect("addresses are free");
    let windows = [
        (bar, 0x40),
        (bar + DEVICE, 0x40),
        (bar + NOTIFY, 0x20),
        (bar + MSIX_TABLE, 0x40),
        (bar, 0x8000),
        (ECAM + (8 << 12), 0x100),
        (ECAM + (8 << 12), 0x1000),
    ];
    for (first, len) in windows {
        rig.add_window(first, len);
    }
    rig.add_device(pci);
    Transport::Pci { bar, function, bus }
}

/// Gives `device` memory-mapped registers.
fn map(rig: &mut Rig, device: Arc<dyn VirtioDevice>) -> Transport {
    let config = VirtioMmioConfig { memory: test_memory(), line: rig.outside.line(0), inline: true };
    let mmio = Arc::new(VirtioMmioDevice::new(device, config).expect("the device fits"));
    rig.memory.map(MMIO, MMIO_DEVICE_LEN, mmio.clone()).expect("addresses are free");
    for (first, len) in [(0, 0x100), (0x30, 0x18), (0x80, 0x30), (0x100, 0x40), (0, MMIO_DEVICE_LEN)] {
        rig.add_window(MMIO + first, len);
    }
    rig.add_device(mmio);
    Transport::Mmio
}

impl<D: Driven, const BUS: bool> Bench for VirtioBench<D, BUS> {
    fn new() -> Self {
        let mut rig = Rig::new();
        let driven = D::new();
        let device = driven.device();
        assert!(device.queue_sizes().len() <= MAX_QUEUES);
        let sizes = device.queue_sizes().iter().map(|size| RING_SIZE.min(1 << size.ilog2())).collect();
        let offered = device.features() | virtio::feature::TRANSPORT;
        let transport = if BUS { attach(&mut rig, device) } else { map(&mut rig, device) };
        let available = [const { Cell::new(0) }; 16];
        Self { rig, driven, transport, offered, sizes, available, next_descriptor: Cell::new(0) }
    }

    fn rig(&self) -> &Rig {
        &self.rig
    }

    fn prepare(&self, input: &mut Input<'_>) {
        if !input.one_in(16) {
            self.set_up(input);
        }
    }

    fn special(&self, input: &mut Input<'_>) {
        match input.u8() % 16 {
            0 | 1 => self.set_up(input),
            2 | 3 => self.write_descriptor(input),
            4 => {
                let queue = self.queue(input);
                let head = input.below((RING_SIZE + 1).into()) as u16;
                let step = if input.flag() { 1 } else { input.u16() };
                self.make_available(queue, head, step);
            }
            5 => self.ring(self.queue(input)),
            6 => {
                let at = u64::from(input.u16()) * 2;
                let len = input.below(0x40) as usize;
                // What does not fit is lost.
                let _ = test_memory().write(at, input.bytes(len));
            }
            7..=9 => self.driven.host(input),
            _ => self.request(input),
        }
    }

    fn take_over(&self, old: &Self) {
        for (to, from) in self.available.iter().zip(&old.available) {
            to.set(from.get());
        }
        self.next_descriptor.set(old.next_descriptor.get());
    }
}

/// Does with a virtio device on a PCI bus what `data` says.
pub fn drive_virtio<D: Driven>(data: &[u8]) {
    clear_memory();
    drive::<VirtioBench<D, true>>(data);
}

/// Does with a virtio device in memory-mapped registers what `data` says.
pub fn drive_virtio_mmio<D: Driven>(data: &[u8]) {
    clear_memory();
    drive::<VirtioBench<D, false>>(data);
}

fn clear_memory() {
    let memory = test_memory();
    memory.write(0, &[0; LOW_MEMORY as usize]).expect("low memory is memory");
    memory.write(HIGH_MEMORY.start, &[0; 16 << 10]).expect("high memory is memory");
}
