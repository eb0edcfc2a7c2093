//! What a device tells its driver through its transport: interrupts and the status register.

use crate::{Interrupt, QueueError, status};
use irq::IrqLine;
use parking_lot::Mutex;
use pci::{Intx, Msix};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

/// No MSI-X vector (4.1.5.1.2).
pub(crate) const NO_VECTOR: u16 = 0xffff;

/// ISR bit: a queue's buffers were used (4.1.4.5).
const ISR_QUEUE: u8 = 1;
/// ISR bit: the configuration changed.
const ISR_CONFIG: u8 = 2;

/// The ways to the guest's interrupt controllers.
pub(crate) enum Pin {
    /// A PCI function's.
    Pci {
        /// Messages, if the guest uses them.
        msix: Arc<Msix>,
        /// The pin, if it doesn't.
        intx: Arc<Intx>,
    },
    /// A line of its own.
    Line(IrqLine),
}

impl Pin {
    fn set(&self, level: bool) {
        match self {
            Self::Pci { intx, .. } => intx.set(level),
            Self::Line(line) => line.set(level),
        }
    }
}

/// The parts of the transport that I/O threads touch.
pub(crate) struct Signals {
    name: &'static str,
    pin: Pin,
    pub(crate) status: AtomicU8,
    pub(crate) generation: AtomicU8,
    pub(crate) config_vector: AtomicU16,
    pub(crate) queue_vectors: Vec<AtomicU16>,
    /// How often the device met an error.
    failures: AtomicU64,
    /// The lock is held while the pin changes: the pin is to follow the register.
    isr: Mutex<u8>,
    /// See [`Interrupt::serves_inline`].
    inline: bool,
}

impl Signals {
    pub(crate) fn new(name: &'static str, queues: usize, pin: Pin, inline: bool) -> Self {
        Self {
            name,
            pin,
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            failures: AtomicU64::new(0),
            isr: Mutex::new(0),
            inline,
        }
    }

    /// As after a device reset (4.1.5.1.2.1, 2.4).
    pub(crate) fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.set_isr(0);
    }

    /// What a driver may set a vector register to: others become "none".
    pub(crate) fn valid_vector(&self, vector: u16) -> u16 {
        match &self.pin {
            Pin::Pci { msix, .. } if vector < msix.vectors() => vector,
            _ => NO_VECTOR,
        }
    }

    /// Reads the ISR status, which clears it and lets the pin fall.
    pub(crate) fn take_isr(&self) -> u8 {
        let mut isr = self.isr.lock();
        let value = std::mem::take(&mut *isr);
        self.pin.set(false);
        value
    }

    /// Clears `causes` of the ISR status; without any, the pin falls.
    pub(crate) fn acknowledge(&self, causes: u8) {
        let mut isr = self.isr.lock();
        *isr &= !causes;
        self.pin.set(*isr != 0);
    }

    pub(crate) fn isr(&self) -> u8 {
        *self.isr.lock()
    }

    pub(crate) fn set_isr(&self, value: u8) {
        let mut isr = self.isr.lock();
        *isr = value & (ISR_QUEUE | ISR_CONFIG);
        self.pin.set(*isr != 0);
    }

    fn signal(&self, vector: u16, cause: u8) {
        if let Pin::Pci { msix, .. } = &self.pin
            && msix.enabled()
        {
            if vector != NO_VECTOR {
                msix.signal(vector);
            }
            return;
        }
        let mut isr = self.isr.lock();
        *isr |= cause;
        self.pin.set(true);
    }
}

impl Interrupt for Signals {
    fn queue_used(&self, queue: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(queue)) {
            self.signal(vector.load(Ordering::SeqCst), ISR_QUEUE);
        }
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.signal(self.config_vector.load(Ordering::SeqCst), ISR_CONFIG);
    }

    fn fail(&self, error: &QueueError) {
        let before = self.status.fetch_or(status::NEEDS_RESET, Ordering::SeqCst);
        if before & status::NEEDS_RESET == 0 {
            // A guest can do so as often as it likes: the 1st, 2nd, 4th, 8th… are written down.
            let count = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
            if count.is_power_of_two() {
                tracing::warn!("{} needs a reset (error {count}): {error}", self.name);
            }
            if before & status::DRIVER_OK != 0 {
                self.config_changed();
            }
        }
    }

    fn failed(&self) -> bool {
        self.status.load(Ordering::SeqCst) & status::NEEDS_RESET != 0
    }

    fn serves_inline(&self) -> bool {
        self.inline
    }
}
