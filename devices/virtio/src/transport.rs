//! What the transports have in common, and the registers of PCI's: common configuration, doorbells, ISR and
//! device configuration. The MMIO transport reaches the common configuration through registers of its own.

use crate::device::Activation;
use crate::doorbells::{Doorbells, Places};
use crate::pci_layout::{
    COMMON, COMMON_LEN, DEVICE, ISR, MSIX_PBA, MSIX_TABLE, NOTIFY, NOTIFY_MULTIPLIER, PART_SIZE,
};
use crate::queue::QueueState;
use crate::signals::{NO_VECTOR, Signals};
use crate::{Interrupt, Queue, QueueError, QueueHandle, RingFeatures, VirtioDevice, feature, status};
use device::{MmioDevice, SavedState, StateError};
use guest_memory::GuestMemory;
use parking_lot::Mutex;
use pci::Msix;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Offsets in the common configuration structure (4.1.4.3).
pub(crate) mod common {
    pub(crate) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(crate) const DEVICE_FEATURE: u64 = 0x04;
    pub(crate) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(crate) const DRIVER_FEATURE: u64 = 0x0c;
    pub(crate) const CONFIG_VECTOR: u64 = 0x10;
    pub(crate) const NUM_QUEUES: u64 = 0x12;
    pub(crate) const STATUS: u64 = 0x14;
    pub(crate) const GENERATION: u64 = 0x15;
    pub(crate) const QUEUE_SELECT: u64 = 0x16;
    pub(crate) const QUEUE_SIZE: u64 = 0x18;
    pub(crate) const QUEUE_VECTOR: u64 = 0x1a;
    pub(crate) const QUEUE_ENABLE: u64 = 0x1c;
    pub(crate) const QUEUE_NOTIFY_OFFSET: u64 = 0x1e;
    pub(crate) const QUEUE_DESCRIPTORS: u64 = 0x20;
    pub(crate) const QUEUE_AVAILABLE: u64 = 0x28;
    pub(crate) const QUEUE_USED: u64 = 0x30;
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
}

/// The transport's guest-visible state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TransportState {
    registers: Registers,
    status: u8,
    isr: u8,
    generation: u8,
    config_vector: u16,
    queues: Vec<(QueueState, u16)>,
    device: SavedState,
}

/// The registers in the BAR, and the device behind them.
pub(crate) struct Transport {
    device: Arc<dyn VirtioDevice>,
    memory: GuestMemory,
    /// None where there is no PCI function.
    msix: Option<Arc<Msix>>,
    signals: Arc<Signals>,
    doorbells: Doorbells,
    queues: Vec<Arc<Mutex<Queue>>>,
    registers: Mutex<Registers>,
    /// Held while the device is activated, reset or restored, so that these do not overlap.
    control: Mutex<()>,
}

impl Transport {
    pub(crate) fn new(
        device: Arc<dyn VirtioDevice>,
        memory: GuestMemory,
        msix: Option<Arc<Msix>>,
        signals: Arc<Signals>,
        places: Places,
    ) -> Self {
        let doorbells = Doorbells::new(device.clone(), places);
        let queues =
            device.queue_sizes().iter().map(|size| Arc::new(Mutex::new(Queue::new(*size)))).collect();
        Self {
            device,
            memory,
            msix,
            signals,
            doorbells,
            queues,
            registers: Mutex::new(Registers::default()),
            control: Mutex::new(()),
        }
    }

    fn offered(&self) -> u64 {
        self.device.features() | feature::TRANSPORT
    }

    pub(crate) fn status(&self) -> u8 {
        self.signals.status.load(Ordering::SeqCst)
    }

    /// The doorbells, for accelerators.
    pub(crate) fn doorbells(&self) -> &Doorbells {
        &self.doorbells
    }

    /// As after a device reset (2.4).
    pub(crate) fn reset(&self) {
        let _control = self.control.lock();
        self.reset_locked();
    }

    fn reset_locked(&self) {
        self.doorbells.set_active(false);
        self.device.reset();
        for queue in &self.queues {
            queue.lock().reset();
        }
        *self.registers.lock() = Registers::default();
        self.signals.reset();
    }

    /// The driver writes the status register (2.1, 3.1).
    pub(crate) fn set_status(&self, value: u8) {
        let _control = self.control.lock();
        if value == 0 {
            self.reset_locked();
            return;
        }
        let current = self.status();
        // A driver may not clear bits, and NEEDS_RESET is the device's.
        let mut added = value & !current & !status::NEEDS_RESET;
        if added & status::FEATURES_OK != 0 {
            let accepted = self.registers.lock().driver_features;
            if accepted & !self.offered() != 0 || accepted & feature::VERSION_1 == 0 {
                added &= !(status::FEATURES_OK | status::DRIVER_OK);
            } else {
                self.device.set_features(accepted);
            }
        }
        let features_ok = (current | added) & status::FEATURES_OK != 0;
        if added & status::DRIVER_OK != 0 && !features_ok {
            added &= !status::DRIVER_OK;
        }
        self.signals.status.fetch_or(added, Ordering::SeqCst);
        if added & status::DRIVER_OK != 0 && !self.signals.failed() {
            self.activate();
        }
    }

    fn activate(&self) {
        let features = self.registers.lock().driver_features;
        let ring = RingFeatures {
            indirect: features & feature::RING_INDIRECT_DESC != 0,
            event_idx: features & feature::RING_EVENT_IDX != 0,
        };
        let interrupt: Arc<dyn Interrupt> = self.signals.clone();
        let handle = |(index, queue): (usize, &Arc<Mutex<Queue>>)| {
            queue.lock().set_features(ring);
            QueueHandle {
                index: index as u16,
                queue: queue.clone(),
                memory: self.memory.clone(),
                interrupt: interrupt.clone(),
            }
        };
        let queues = self.queues.iter().enumerate().map(handle).collect();
        let activation =
            Activation { features, queues, memory: self.memory.clone(), interrupt: interrupt.clone() };
        match self.device.activate(activation) {
            Ok(()) => self.doorbells.set_active(true),
            Err(error) => interrupt.fail(&QueueError::Device(error.to_string())),
        }
    }

    fn selected(&self) -> Option<(usize, &Arc<Mutex<Queue>>)> {
        let index = usize::from(self.registers.lock().queue_select);
        self.queues.get(index).map(|queue| (index, queue))
    }

    pub(crate) fn common_image(&self) -> [u8; COMMON_LEN] {
        let mut image = [0; COMMON_LEN];
        let mut set = |offset: u64, bytes: &[u8]| {
            let at = offset as usize;
            image[at..at + bytes.len()].copy_from_slice(bytes);
        };
        let registers = *self.registers.lock();
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let offered = half(self.offered(), registers.device_feature_select);
        let accepted = half(registers.driver_features, registers.driver_feature_select);
        set(common::DEVICE_FEATURE_SELECT, &registers.device_feature_select.to_le_bytes());
        set(common::DEVICE_FEATURE, &offered.to_le_bytes());
        set(common::DRIVER_FEATURE_SELECT, &registers.driver_feature_select.to_le_bytes());
        set(common::DRIVER_FEATURE, &accepted.to_le_bytes());
        set(common::CONFIG_VECTOR, &self.signals.config_vector.load(Ordering::SeqCst).to_le_bytes());
        set(common::NUM_QUEUES, &(self.queues.len() as u16).to_le_bytes());
        set(common::STATUS, &[self.status()]);
        set(common::GENERATION, &[self.signals.generation.load(Ordering::SeqCst)]);
        set(common::QUEUE_SELECT, &registers.queue_select.to_le_bytes());
        if let Some((index, queue)) = self.selected() {
            let state = queue.lock().state().clone();
            set(common::QUEUE_SIZE, &state.size.to_le_bytes());
            let vector = self.signals.queue_vectors[index].load(Ordering::SeqCst);
            set(common::QUEUE_VECTOR, &vector.to_le_bytes());
            set(common::QUEUE_ENABLE, &u16::from(state.enabled).to_le_bytes());
            set(common::QUEUE_NOTIFY_OFFSET, &(index as u16).to_le_bytes());
            set(common::QUEUE_DESCRIPTORS, &state.descriptors.to_le_bytes());
            set(common::QUEUE_AVAILABLE, &state.available.to_le_bytes());
            set(common::QUEUE_USED, &state.used.to_le_bytes());
        } else {
            set(common::QUEUE_VECTOR, &NO_VECTOR.to_le_bytes());
        }
        image
    }

    /// A store to the common configuration: of the width of the field (4.1.3.1), others are ignored. The
    /// 64-bit fields are written by halves or at once.
    fn common_write(&self, offset: u64, data: &[u8]) {
        match *data {
            [value] if offset == common::STATUS => self.set_status(value),
            [a, b] => self.common_write_u16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.common_write_u32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if offset >= common::QUEUE_DESCRIPTORS => {
                self.common_write_u32(offset, u32::from_le_bytes([a, b, c, d]));
                self.common_write_u32(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
    }

    pub(crate) fn common_write_u16(&self, offset: u64, value: u16) {
        let driver_ok = self.status() & status::DRIVER_OK != 0;
        match offset {
            common::CONFIG_VECTOR => {
                self.signals.config_vector.store(self.signals.valid_vector(value), Ordering::SeqCst);
            }
            common::QUEUE_SELECT => self.registers.lock().queue_select = value,
            common::QUEUE_SIZE => {
                if let Some((_, queue)) = self.selected() {
                    queue.lock().configure(|state| state.size = value);
                }
            }
            common::QUEUE_VECTOR => {
                if let Some((index, _)) = self.selected() {
                    let vector = self.signals.valid_vector(value);
                    self.signals.queue_vectors[index].store(vector, Ordering::SeqCst);
                }
            }
            // Queues are enabled before DRIVER_OK (3.1.1), and 0 is never written (4.1.4.3.2).
            common::QUEUE_ENABLE if value == 1 && !driver_ok => {
                if let Some((_, queue)) = self.selected() {
                    let result = queue.lock().enable(&self.memory);
                    if let Err(error) = result {
                        self.signals.fail(&error);
                    }
                }
            }
            _ => {}
        }
    }

    pub(crate) fn common_write_u32(&self, offset: u64, value: u32) {
        let set_half = |field: &mut u64, high: bool| {
            let shift = if high { 32 } else { 0 };
            *field = *field & !(0xffff_ffff << shift) | u64::from(value) << shift;
        };
        match offset {
            common::DEVICE_FEATURE_SELECT => self.registers.lock().device_feature_select = value,
            common::DRIVER_FEATURE_SELECT => self.registers.lock().driver_feature_select = value,
            // Negotiation ends with FEATURES_OK (3.1.1).
            common::DRIVER_FEATURE if self.status() & status::FEATURES_OK == 0 => {
                let mut registers = self.registers.lock();
                let select = registers.driver_feature_select;
                if select < 2 {
                    set_half(&mut registers.driver_features, select == 1);
                } else if value != 0 {
                    // A feature that nobody offers: negotiation is to fail.
                    registers.driver_features |= 1 << 63;
                }
            }
            common::QUEUE_DESCRIPTORS..COMMON_END if offset.is_multiple_of(4) => {
                let Some((_, queue)) = self.selected() else { return };
                queue.lock().configure(|state| {
                    let field = match offset & !7 {
                        common::QUEUE_DESCRIPTORS => &mut state.descriptors,
                        common::QUEUE_AVAILABLE => &mut state.available,
                        _ => &mut state.used,
                    };
                    set_half(field, offset & 4 != 0);
                });
            }
            _ => {}
        }
    }

    pub(crate) fn signals(&self) -> &Signals {
        &self.signals
    }

    /// The most entries of the queue selected; 0 if there is none.
    pub(crate) fn selected_max_size(&self) -> u16 {
        self.selected().map_or(0, |(_, queue)| queue.lock().max_size())
    }

    /// The driver takes the selected queue out of use. What it had in flight is not completed.
    pub(crate) fn disable_selected(&self) {
        if let Some((_, queue)) = self.selected() {
            queue.lock().disable();
        }
    }

    /// The driver rings the doorbell of queue `index`.
    pub(crate) fn ring(&self, index: u64) {
        let active = self.status() & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK;
        if index < self.queues.len() as u64 && active {
            self.device.notify(index as u16);
        }
    }

    /// The guest-visible state, the device's own included.
    pub(crate) fn save(&self) -> TransportState {
        let queue = |(queue, vector): (&Arc<Mutex<Queue>>, &std::sync::atomic::AtomicU16)| {
            (queue.lock().state().clone(), vector.load(Ordering::SeqCst))
        };
        TransportState {
            registers: *self.registers.lock(),
            status: self.status(),
            isr: self.signals.isr(),
            generation: self.signals.generation.load(Ordering::SeqCst),
            config_vector: self.signals.config_vector.load(Ordering::SeqCst),
            queues: self.queues.iter().zip(&self.signals.queue_vectors).map(queue).collect(),
            device: self.device.save(),
        }
    }

    /// Takes over a saved state.
    pub(crate) fn restore(&self, kind: &'static str, state: &TransportState) -> Result<(), StateError> {
        let _control = self.control.lock();
        self.reset_locked();
        let result = self.restore_locked(kind, state);
        if result.is_err() {
            self.reset_locked();
        }
        result
    }

    fn restore_locked(&self, kind: &'static str, state: &TransportState) -> Result<(), StateError> {
        let TransportState {
            registers,
            status: saved_status,
            isr,
            generation,
            config_vector,
            queues,
            device,
        } = state;
        let malformed = |reason: String| StateError::malformed(kind, reason);
        if queues.len() != self.queues.len() {
            return Err(malformed(format!(
                "{} queues, and the device has {}",
                queues.len(),
                self.queues.len()
            )));
        }
        let features_ok = saved_status & status::FEATURES_OK != 0;
        let driver_ok = saved_status & status::DRIVER_OK != 0;
        let accepted = registers.driver_features;
        if features_ok && (accepted & !self.offered() != 0 || accepted & feature::VERSION_1 == 0) {
            return Err(malformed(format!("features {accepted:#x} are not offered")));
        }
        if driver_ok && !features_ok {
            return Err(malformed(format!("status {saved_status:#x} cannot be")));
        }
        self.device.restore(device)?;
        *self.registers.lock() = *registers;
        if features_ok {
            self.device.set_features(accepted);
        }
        for (index, (queue, (saved, vector))) in self.queues.iter().zip(queues).enumerate() {
            let restored = queue.lock().restore(&self.memory, saved);
            restored.map_err(|error| malformed(format!("queue {index}: {error}")))?;
            self.signals.queue_vectors[index].store(self.signals.valid_vector(*vector), Ordering::SeqCst);
        }
        self.signals.config_vector.store(self.signals.valid_vector(*config_vector), Ordering::SeqCst);
        self.signals.generation.store(*generation, Ordering::SeqCst);
        self.signals.set_isr(*isr);
        self.signals.status.store(*saved_status, Ordering::SeqCst);
        if driver_ok && !self.signals.failed() {
            self.activate();
        }
        Ok(())
    }
}

const COMMON_END: u64 = common::QUEUE_USED + 8;

impl MmioDevice for Transport {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        let within = offset % PART_SIZE;
        match offset - within {
            COMMON => crate::read_registers(&self.common_image(), within, data),
            ISR => {
                data.fill(0);
                if within == 0 {
                    data[0] = self.signals.take_isr();
                }
            }
            DEVICE => self.device.config_read(within, data),
            MSIX_TABLE | MSIX_PBA => match &self.msix {
                Some(msix) if offset - within == MSIX_TABLE => msix.table_read(within, data),
                Some(msix) => msix.pba_read(within, data),
                None => data.fill(0),
            },
            _ => data.fill(0),
        }
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        let within = offset % PART_SIZE;
        match offset - within {
            COMMON => self.common_write(within, data),
            NOTIFY if within.is_multiple_of(NOTIFY_MULTIPLIER) => self.ring(within / NOTIFY_MULTIPLIER),
            DEVICE => self.device.config_write(within, data),
            MSIX_TABLE => {
                if let Some(msix) = &self.msix {
                    msix.table_write(within, data);
                }
            }
            _ => {}
        }
    }
}
