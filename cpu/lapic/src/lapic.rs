//! One local APIC: its registers behind a lock, and what others may ask without it.

use crate::registers::{Effects, Registers};
use crate::{ApicBus, Event, MMIO_LEN, MSR_APIC_BASE, MSR_TSC_DEADLINE, MSR_X2APIC, MSR_X2APIC_LAST};
use crate::{Message, VcpuSink};
use accel::LapicState;
use clock::{Nanos, Timer, TimerService, VmClock};
use parking_lot::{Mutex, MutexGuard};
use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

/// The MSR access faults with #GP(0).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[error("general protection")]
pub struct GeneralProtection;

/// A saved state that is none of this local APIC.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("local APIC state {reason}")]
pub struct RestoreError {
    /// What it is instead.
    pub reason: String,
}

/// What waits for the processor to take it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Pending {
    /// The 8259 pair asks: take it with [`Lapic::acknowledge_ext_int`] and the pair's own vector.
    pub ext_int: bool,
    /// An interrupt above the processor priority: take it with [`Lapic::acknowledge`].
    pub vector: Option<u8>,
}

impl Pending {
    const EXT_INT: u32 = 1 << 8;
    const VECTOR: u32 = 1 << 9;

    fn to_bits(self) -> u32 {
        let ext_int = if self.ext_int { Self::EXT_INT } else { 0 };
        ext_int | self.vector.map_or(0, |vector| Self::VECTOR | u32::from(vector))
    }

    fn from_bits(bits: u32) -> Self {
        Self { ext_int: bits & Self::EXT_INT != 0, vector: (bits & Self::VECTOR != 0).then_some(bits as u8) }
    }

    /// Whether anything waits.
    pub fn any(self) -> bool {
        self.ext_int || self.vector.is_some()
    }

    /// Whether there is something here that was not in `before`.
    fn exceeds(self, before: Self) -> bool {
        self.ext_int && !before.ext_int || self.vector > before.vector
    }
}

/// No address: the registers are not in physical memory.
const NOWHERE: u64 = u64::MAX;

/// One vCPU's local APIC.
pub struct Lapic {
    id: u32,
    registers: Mutex<Registers>,
    /// [`Pending`] as of the last change of the registers.
    pending: AtomicU32,
    /// Where the MMIO registers are, or [`NOWHERE`].
    mmio_base: AtomicU64,
    sink: OnceLock<Arc<dyn VcpuSink>>,
    bus: Weak<ApicBus>,
    clock: VmClock,
    timer: Timer,
}

impl Lapic {
    pub(crate) fn new(
        registers: Registers,
        id: u32,
        bus: Weak<ApicBus>,
        timers: &Arc<TimerService>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|this: &Weak<Self>| {
            let this = this.clone();
            let timer = timers.timer(move || {
                if let Some(lapic) = this.upgrade() {
                    lapic.timer_expired();
                }
            });
            let mmio_base = registers.mmio_base().unwrap_or(NOWHERE);
            Self {
                id,
                pending: AtomicU32::new(0),
                mmio_base: AtomicU64::new(mmio_base),
                registers: Mutex::new(registers),
                sink: OnceLock::new(),
                bus,
                clock: timers.clock().clone(),
                timer,
            }
        })
    }

    /// The APIC id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Sets whom to tell of events; says whether it was the first.
    pub(crate) fn connect(&self, sink: Arc<dyn VcpuSink>) -> bool {
        self.sink.set(sink).is_ok()
    }

    /// What waits for the processor. One atomic load.
    pub fn pending(&self) -> Pending {
        Pending::from_bits(self.pending.load(Ordering::Acquire))
    }

    /// The guest physical address of the [`MMIO_LEN`] bytes of registers, in xAPIC mode.
    pub fn mmio_base(&self) -> Option<u64> {
        Some(self.mmio_base.load(Ordering::Relaxed)).filter(|base| *base != NOWHERE)
    }

    /// Changes the registers and does what follows.
    fn change<R>(&self, change: impl FnOnce(&mut Registers, &mut Effects) -> R) -> R {
        let mut effects = Effects::default();
        let mut registers = self.registers.lock();
        let expiry = registers.expiry;
        let result = change(&mut registers, &mut effects);
        self.settle(registers, expiry, effects);
        result
    }

    fn settle(&self, registers: MutexGuard<'_, Registers>, expiry: Option<Nanos>, effects: Effects) {
        let after = Pending { ext_int: registers.ext_int(), vector: registers.deliverable() };
        let before = Pending::from_bits(self.pending.swap(after.to_bits(), Ordering::AcqRel));
        self.mmio_base.store(registers.mmio_base().unwrap_or(NOWHERE), Ordering::Relaxed);
        match registers.expiry {
            same if same == expiry => {}
            Some(expiry) => self.timer.arm_at(expiry),
            None => self.timer.disarm(),
        }
        drop(registers);
        if let Some(sink) = self.sink.get() {
            let events = [
                after.exceeds(before).then_some(Event::Interrupt),
                effects.init.then_some(Event::Init),
                effects.sipi.map(Event::Sipi),
                effects.smi.then_some(Event::Smi),
                effects.nmi.then_some(Event::Nmi),
            ];
            events.into_iter().flatten().for_each(|event| sink.event(event));
        }
        if effects.eoi.is_some() || effects.send.is_some() || effects.renamed {
            let Some(bus) = self.bus.upgrade() else { return };
            if effects.renamed {
                bus.note_renamed();
            }
            if let Some(vector) = effects.eoi {
                bus.end_of_interrupt(vector);
            }
            if let Some(message) = effects.send {
                bus.deliver(&message);
            }
        }
    }

    fn timer_expired(&self) {
        let now = self.clock.now();
        self.change(|registers, effects| registers.timer_expired(now, effects));
    }

    /// Takes the interrupt of highest priority: it is in service from now on.
    pub fn acknowledge(&self) -> Option<u8> {
        self.change(|registers, _| registers.acknowledge())
    }

    /// Says that the 8259 pair is about to be asked for its vector.
    pub fn acknowledge_ext_int(&self) {
        self.change(|registers, _| registers.acknowledge_ext_int());
    }

    /// Whether `message` is for this APIC, and if so, delivers it.
    pub(crate) fn offer(&self, message: &Message) {
        self.change(|registers, effects| {
            if registers.is_destination(message.destination) {
                registers.accept(message, effects);
            }
        });
    }

    /// The processor priority, if this APIC is a destination of `message` and takes fixed interrupts.
    pub(crate) fn arbitration(&self, message: &Message) -> Option<u8> {
        let registers = self.registers.lock();
        let candidate = registers.is_destination(message.destination) && registers.accepts_fixed();
        candidate.then(|| registers.ppr())
    }

    pub(crate) fn set_lint0(&self, level: bool) {
        self.change(|registers, effects| registers.set_lint0(level, effects));
    }

    /// An edge on LINT1, the board's NMI input.
    pub fn pulse_lint1(&self) {
        self.change(|registers, effects| registers.pulse_lint1(effects));
    }

    /// CR8: the upper half of the task priority.
    pub fn cr8(&self) -> u8 {
        self.registers.lock().tpr >> 4
    }

    /// Sets CR8.
    pub fn set_cr8(&self, priority: u8) {
        self.change(|registers, _| registers.tpr = priority << 4);
    }

    /// A load of `data.len()` bytes at `offset` into the registers. Each register is the first four of
    /// sixteen bytes; the rest reads as zero.
    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= MMIO_LEN || data.is_empty() {
            return;
        }
        let within = (offset & 0xf) as usize;
        if within >= 4 {
            return;
        }
        let now = || self.clock.now();
        let value = self
            .change(|registers, effects| registers.mmio_read((offset >> 4) as u32, &now, effects))
            .to_le_bytes();
        let len = data.len().min(4 - within);
        data[..len].copy_from_slice(&value[within..within + len]);
    }

    /// A store of `data` at `offset` into the registers. Only aligned words are registers' business.
    pub fn mmio_write(&self, offset: u64, data: &[u8]) {
        if offset >= MMIO_LEN || offset & 0xf != 0 {
            return;
        }
        let Some(value) = data.first_chunk::<4>() else { return };
        let value = u32::from_le_bytes(*value);
        let now = || self.clock.now();
        self.change(|registers, effects| {
            registers.mmio_write((offset >> 4) as u32, value, &now, effects);
        });
    }

    /// Reads IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC MSR.
    ///
    /// # Errors
    /// #GP if there is no such MSR, or not in this mode.
    pub fn read_msr(&self, msr: u32) -> Result<u64, GeneralProtection> {
        match msr {
            MSR_APIC_BASE => Ok(self.registers.lock().apic_base),
            MSR_TSC_DEADLINE => Ok(self.registers.lock().tsc_deadline()),
            MSR_X2APIC..=MSR_X2APIC_LAST => {
                let now = || self.clock.now();
                self.registers.lock().x2apic_read(msr - MSR_X2APIC, &now)
            }
            _ => Err(GeneralProtection),
        }
    }

    /// Writes one, when the time-stamp counter that deadlines are told in is `tsc`.
    ///
    /// # Errors
    /// #GP if there is no such MSR, or not in this mode, or the value has reserved bits.
    pub fn write_msr(&self, msr: u32, value: u64, tsc: u64) -> Result<(), GeneralProtection> {
        match msr {
            MSR_APIC_BASE => self.change(|registers, _| registers.set_apic_base(value)),
            MSR_TSC_DEADLINE => {
                let now = self.clock.now();
                self.change(|registers, effects| registers.set_tsc_deadline(value, tsc, now, effects));
                Ok(())
            }
            MSR_X2APIC..=MSR_X2APIC_LAST => {
                let now = || self.clock.now();
                self.change(|registers, effects| {
                    registers.x2apic_write(msr - MSR_X2APIC, value, &now, effects)
                })
            }
            _ => Err(GeneralProtection),
        }
    }

    /// What the processor does on INIT.
    pub fn init(&self) {
        self.change(|registers, _| registers.init());
    }

    /// Back to the state after power-on. The level of LINT0 is the board's and stays.
    pub fn reset(&self) {
        self.change(|registers, _| registers.reset());
    }

    /// The state. What the timer owes up to now is raised first.
    pub fn save(&self) -> LapicState {
        self.timer_expired();
        self.registers.lock().save()
    }

    /// Takes over a state that was saved at `time` of the VM's clock, when the guest's time-stamp counter
    /// was `tsc`.
    ///
    /// # Errors
    /// [`RestoreError`] if it is none of this APIC; nothing has changed then.
    pub fn restore(&self, state: &LapicState, tsc: u64, time: Nanos) -> Result<(), RestoreError> {
        self.change(|registers, effects| {
            let restored = registers.restore(state, tsc, time);
            effects.renamed = registers.is_renamed();
            restored
        })
        .map_err(|reason| RestoreError { reason })
    }
}

impl fmt::Debug for Lapic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lapic").field("registers", &*self.registers.lock()).finish_non_exhaustive()
    }
}
