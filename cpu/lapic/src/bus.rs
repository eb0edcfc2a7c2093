//! The bus between the local APICs.

use crate::registers::Registers;
use crate::{DeliveryMode, Destination, Lapic, Message, VcpuSink};
use accel::EoiListener;
use clock::TimerService;
use irq::{MsiMessage, MsiTarget};
use parking_lot::RwLock;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

/// What all local APICs of a VM have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ApicConfig {
    /// How many there are; their ids are `0..vcpus`.
    pub vcpus: u32,
    /// Bits of a guest physical address.
    pub physical_bits: u8,
    /// Rate of the guest's time-stamp counter.
    pub tsc_hertz: u64,
}

/// All local APICs of a VM, and what carries interrupts between them and from devices.
pub struct ApicBus {
    lapics: Vec<Arc<Lapic>>,
    eoi_listener: RwLock<Option<EoiListener>>,
    /// Where the next search for the lowest priority begins, so that equals take turns.
    turn: AtomicUsize,
    /// A guest has changed an id: messages are for whoever has it now.
    renamed: AtomicBool,
}

impl ApicBus {
    /// The local APICs as after power-on. Their timers are of the clock of `timers`.
    pub fn new(config: ApicConfig, timers: &Arc<TimerService>) -> Arc<Self> {
        Arc::new_cyclic(|bus: &Weak<Self>| {
            let lapic = |id| {
                let registers = Registers::new(id, config.physical_bits, config.tsc_hertz);
                Lapic::new(registers, id, bus.clone(), timers)
            };
            Self {
                lapics: (0..config.vcpus).map(lapic).collect(),
                eoi_listener: RwLock::new(None),
                turn: AtomicUsize::new(0),
                renamed: AtomicBool::new(false),
            }
        })
    }

    /// The local APIC with this id.
    pub fn lapic(&self, id: u32) -> Option<&Arc<Lapic>> {
        self.lapics.get(id as usize)
    }

    /// All of them, by id.
    pub fn lapics(&self) -> &[Arc<Lapic>] {
        &self.lapics
    }

    /// Connects a vCPU to its local APIC. `None` if there is none with this id, or it is connected.
    pub fn connect(&self, id: u32, sink: Arc<dyn VcpuSink>) -> Option<Arc<Lapic>> {
        let lapic = self.lapic(id)?;
        lapic.connect(sink).then(|| lapic.clone())
    }

    /// Drives the 8259 pair's INTR output, which is wired to every LINT0.
    pub fn set_ext_int(&self, level: bool) {
        for lapic in &self.lapics {
            lapic.set_lint0(level);
        }
    }

    /// Sets who is told of ends of level-triggered interrupts.
    pub fn set_eoi_listener(&self, listener: EoiListener) {
        *self.eoi_listener.write() = Some(listener);
    }

    /// Notes that not every local APIC has the id that it had at power-on.
    pub(crate) fn note_renamed(&self) {
        self.renamed.store(true, Ordering::SeqCst);
    }

    pub(crate) fn end_of_interrupt(&self, vector: u8) {
        let listener = self.eoi_listener.read().clone();
        if let Some(listener) = listener {
            listener(vector);
        }
    }

    /// Delivers a message to whom it is for.
    pub fn deliver(&self, message: &Message) {
        match (message.mode, message.destination) {
            (_, Destination::Physical(id)) if !self.renamed.load(Ordering::SeqCst) => {
                if let Some(lapic) = self.lapic(id) {
                    lapic.offer(message);
                }
            }
            (_, Destination::Only(id)) => {
                if let Some(lapic) = self.lapic(id) {
                    lapic.offer(message);
                }
            }
            (DeliveryMode::LowestPriority, _) => {
                if let Some(lapic) = self.least_busy(message) {
                    lapic.offer(message);
                }
            }
            _ => self.lapics.iter().for_each(|lapic| lapic.offer(message)),
        }
    }

    #[cfg(test)]
    pub(crate) fn restart_turns(&self) {
        self.turn.store(0, Ordering::Relaxed);
    }

    /// The destination of `message` with the lowest processor priority; equals take turns.
    fn least_busy(&self, message: &Message) -> Option<&Arc<Lapic>> {
        let count = self.lapics.len();
        let first = self.turn.load(Ordering::Relaxed) % count.max(1);
        let (_, step) = (0..count)
            .filter_map(|step| Some((self.lapics[(first + step) % count].arbitration(message)?, step)))
            .min()?;
        let chosen = (first + step) % count;
        self.turn.store(chosen + 1, Ordering::Relaxed);
        Some(&self.lapics[chosen])
    }
}

impl MsiTarget for ApicBus {
    fn signal(&self, message: MsiMessage) {
        if let Some(message) = Message::from_msi(message) {
            self.deliver(&message);
        }
    }
}

impl fmt::Debug for ApicBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApicBus").field("lapics", &self.lapics).finish_non_exhaustive()
    }
}
