//! One local APIC's registers and what reading and writing them does. No locks, no time of its own.

use crate::message::{DeliveryMode, Destination, Message};
use crate::timer::{Countdown, TimerMode, divisor};
use crate::vectors::Vectors;
use crate::{DEFAULT_BASE, GeneralProtection};
use accel::{LapicState, LvtState};
use clock::{Nanos, nanos_for};

/// IA32_APIC_BASE bits (Intel SDM volume 3, 11.4.4 and 11.12.1).
const BASE_BSP: u64 = 1 << 8;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ENABLED: u64 = 1 << 11;

/// Version 0x14 with six LVT entries, without suppression of EOI broadcasts.
const VERSION: u32 = 0x0005_0014;
const SVR_ENABLED: u32 = 1 << 8;
const SVR_VALID: u32 = 0x3ff;
const MASKED: u32 = 1 << 16;
const DIVIDE_VALID: u32 = 0xb;

const ERROR_SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
const ERROR_RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
const ERROR_ILLEGAL_REGISTER: u32 = 1 << 7;

/// Indices into the LVT; the register numbers are these from 0x32 on.
pub(crate) mod lvt {
    pub(crate) const TIMER: usize = 0;
    pub(crate) const THERMAL: usize = 1;
    pub(crate) const PERFORMANCE: usize = 2;
    pub(crate) const LINT0: usize = 3;
    pub(crate) const LINT1: usize = 4;
    pub(crate) const ERROR: usize = 5;
    /// Bits that can be written.
    pub(crate) const VALID: [u32; 6] =
        [0x0007_00ff, 0x0001_07ff, 0x0001_07ff, 0x0001_a7ff, 0x0001_a7ff, 0x0001_00ff];
    /// Bits that read as written by the APIC itself: delivery status and remote IRR.
    pub(crate) const READ_ONLY: u32 = 0x5000;
}

/// Register numbers: bits 4..=11 of the MMIO offset, and bits 0..=7 of the x2APIC MSR.
mod number {
    pub(super) const ID: u32 = 0x02;
    pub(super) const VERSION: u32 = 0x03;
    pub(super) const TPR: u32 = 0x08;
    pub(super) const APR: u32 = 0x09;
    pub(super) const PPR: u32 = 0x0a;
    pub(super) const EOI: u32 = 0x0b;
    pub(super) const RRD: u32 = 0x0c;
    pub(super) const LDR: u32 = 0x0d;
    pub(super) const DFR: u32 = 0x0e;
    pub(super) const SVR: u32 = 0x0f;
    pub(super) const ISR: u32 = 0x10;
    pub(super) const TMR: u32 = 0x18;
    pub(super) const IRR: u32 = 0x20;
    pub(super) const IRR_LAST: u32 = 0x27;
    pub(super) const ESR: u32 = 0x28;
    pub(super) const ICR: u32 = 0x30;
    pub(super) const ICR_HIGH: u32 = 0x31;
    pub(super) const LVT: u32 = 0x32;
    pub(super) const LVT_LAST: u32 = 0x37;
    pub(super) const TIMER_INITIAL: u32 = 0x38;
    pub(super) const TIMER_CURRENT: u32 = 0x39;
    pub(super) const TIMER_DIVIDE: u32 = 0x3e;
    pub(super) const SELF_IPI: u32 = 0x3f;
}

/// The three states of IA32_APIC_BASE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Disabled,
    XApic,
    X2Apic,
}

/// What an operation wants done outside the registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Effects {
    /// Tell the EOI listener.
    pub(crate) eoi: Option<u8>,
    /// Put a message on the bus.
    pub(crate) send: Option<Message>,
    /// An SMI for the processor.
    pub(crate) smi: bool,
    /// An NMI for the processor.
    pub(crate) nmi: bool,
    /// An INIT for the processor.
    pub(crate) init: bool,
    /// A SIPI for the processor.
    pub(crate) sipi: Option<u8>,
    /// The guest has changed the id.
    pub(crate) renamed: bool,
}

/// One local APIC's registers.
#[derive(Debug, Clone)]
pub(crate) struct Registers {
    // Fixed.
    id: u32,
    physical_bits: u8,
    tsc_hertz: u64,
    // Guest-visible.
    pub(crate) apic_base: u64,
    /// The id by which messages name this APIC: in xAPIC mode programs can change it (AMD APM volume 2, 16.3.3), and
    /// with it its width to eight bits.
    current_id: u32,
    ldr: u32,
    dfr: u32,
    pub(crate) tpr: u8,
    svr: u32,
    isr: Vectors,
    tmr: Vectors,
    irr: Vectors,
    esr: u32,
    esr_pending: u32,
    icr: u64,
    lvt: [u32; 6],
    timer_initial: u32,
    timer_divide: u32,
    timer_start: Option<Nanos>,
    tsc_deadline: u64,
    lint0_level: bool,
    ext_int_latched: bool,
    /// When the timer expires next; follows from the above and what has expired already.
    pub(crate) expiry: Option<Nanos>,
}

impl Registers {
    /// Back to the state after power-on, but for the inputs' levels.
    pub(crate) fn reset(&mut self) {
        let lint0_level = self.lint0_level;
        *self = Self { lint0_level, ..Self::new(self.id, self.physical_bits, self.tsc_hertz) };
    }

    /// As after power-on.
    pub(crate) fn new(id: u32, physical_bits: u8, tsc_hertz: u64) -> Self {
        let bsp = if id == 0 { BASE_BSP } else { 0 };
        let mut registers = Self {
            id,
            physical_bits,
            tsc_hertz: tsc_hertz.max(1),
            apic_base: DEFAULT_BASE | BASE_ENABLED | bsp,
            current_id: id,
            ldr: 0,
            dfr: 0,
            tpr: 0,
            svr: 0,
            isr: Vectors::default(),
            tmr: Vectors::default(),
            irr: Vectors::default(),
            esr: 0,
            esr_pending: 0,
            icr: 0,
            lvt: [0; 6],
            timer_initial: 0,
            timer_divide: 0,
            timer_start: None,
            tsc_deadline: 0,
            lint0_level: false,
            ext_int_latched: false,
            expiry: None,
        };
        registers.init();
        registers
    }

    /// What INIT does: everything but the id, IA32_APIC_BASE and the inputs' levels goes back to the state
    /// after power-on (Intel SDM volume 3, 11.4.7.3).
    pub(crate) fn init(&mut self) {
        self.ldr = 0;
        self.dfr = u32::MAX;
        self.tpr = 0;
        self.svr = 0xff;
        self.isr = Vectors::default();
        self.tmr = Vectors::default();
        self.irr = Vectors::default();
        self.esr = 0;
        self.esr_pending = 0;
        self.icr = 0;
        self.lvt = [MASKED; 6];
        if self.apic_base & BASE_BSP != 0 {
            // What firmware leaves behind on a PC: the 8259s' interrupts go through the bootstrap
            // processor's LINT0 (the multiprocessor specification's virtual wire mode), so that a kernel
            // that was started without firmware finds them working.
            self.lvt[lvt::LINT0] = 0x700;
        }
        self.timer_initial = 0;
        self.timer_divide = 0;
        self.stop_timer();
        self.ext_int_latched = false;
    }

    /// Whether the guest has changed the id.
    pub(crate) fn is_renamed(&self) -> bool {
        self.current_id != self.id
    }

    pub(crate) fn mode(&self) -> Mode {
        match (self.apic_base & BASE_ENABLED != 0, self.apic_base & BASE_X2APIC != 0) {
            (false, _) => Mode::Disabled,
            (true, false) => Mode::XApic,
            (true, true) => Mode::X2Apic,
        }
    }

    /// The address of the MMIO registers, if they are reachable.
    pub(crate) fn mmio_base(&self) -> Option<u64> {
        (self.mode() == Mode::XApic).then_some(self.apic_base & !0xfff)
    }

    /// A write of IA32_APIC_BASE (Intel SDM volume 3, 11.12.5).
    pub(crate) fn set_apic_base(&mut self, value: u64) -> Result<(), GeneralProtection> {
        if !self.legal_base(value) {
            return Err(GeneralProtection);
        }
        let (enabled, x2apic) = (value & BASE_ENABLED != 0, value & BASE_X2APIC != 0);
        match (self.mode(), enabled, x2apic) {
            (Mode::X2Apic, true, false) | (Mode::Disabled, true, true) => return Err(GeneralProtection),
            (Mode::Disabled, _, _) => {}
            (_, false, _) => {
                self.init();
                self.current_id = self.id;
            }
            (Mode::XApic, true, true) => {
                // The logical id follows from the id from now on, and the destination format is gone.
                self.icr &= 0xffff_ffff;
                self.current_id = self.id;
            }
            _ => {}
        }
        self.apic_base = value;
        Ok(())
    }

    fn legal_base(&self, value: u64) -> bool {
        let address = (1u64 << self.physical_bits.clamp(32, 52)) - 0x1000;
        let legal = address | BASE_BSP | BASE_X2APIC | BASE_ENABLED;
        value & !legal == 0 && value & (BASE_ENABLED | BASE_X2APIC) != BASE_X2APIC
    }

    fn software_enabled(&self) -> bool {
        self.svr & SVR_ENABLED != 0
    }

    /// The processor priority (Intel SDM volume 3, 11.8.3.1).
    pub(crate) fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= in_service { self.tpr } else { in_service }
    }

    /// The vector that the processor would take now.
    pub(crate) fn deliverable(&self) -> Option<u8> {
        if self.mode() == Mode::Disabled {
            return None;
        }
        self.irr.highest().filter(|vector| vector >> 4 > self.ppr() >> 4)
    }

    /// Whether the 8259 pair's interrupt request reaches the processor.
    pub(crate) fn ext_int(&self) -> bool {
        if self.mode() == Mode::Disabled {
            // LINT0 is the processor's INTR pin then, and boards wire that to the bootstrap processor.
            return self.lint0_level && self.apic_base & BASE_BSP != 0;
        }
        let lint0 = self.lvt[lvt::LINT0];
        let through =
            lint0 & MASKED == 0 && DeliveryMode::from_bits(lint0 >> 8) == Some(DeliveryMode::ExtInt);
        self.ext_int_latched || self.lint0_level && through
    }

    /// The processor takes the interrupt that [`Registers::deliverable`] names.
    pub(crate) fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.deliverable()?;
        self.irr.remove(vector);
        self.isr.insert(vector);
        Some(vector)
    }

    /// The processor takes the interrupt that [`Registers::ext_int`] speaks of.
    pub(crate) fn acknowledge_ext_int(&mut self) {
        self.ext_int_latched = false;
    }

    /// Whether a message to `destination` is for this APIC.
    pub(crate) fn is_destination(&self, destination: Destination) -> bool {
        let mode = self.mode();
        if mode == Mode::Disabled {
            return false;
        }
        match destination {
            Destination::All => true,
            Destination::AllBut(id) => id != self.id,
            Destination::Physical(id) => id == self.current_id,
            Destination::Only(id) => id == self.id,
            Destination::Logical(mask) if mode == Mode::X2Apic => {
                let own = self.logical_id();
                mask >> 16 == own >> 16 && mask & own & 0xffff != 0
            }
            Destination::Logical(mask) if mask > 0xff => false,
            Destination::Logical(mask) => {
                let own = self.ldr >> 24;
                match self.dfr >> 28 {
                    0xf => mask & own != 0,
                    0 => mask >> 4 == own >> 4 && mask & own & 0xf != 0,
                    _ => false,
                }
            }
        }
    }

    /// The logical id as the register reads (Intel SDM volume 3, 11.12.10.2).
    fn logical_id(&self) -> u32 {
        if self.mode() == Mode::X2Apic { self.id >> 4 << 16 | 1 << (self.id & 0xf) } else { self.ldr }
    }

    /// Whether fixed interrupts are accepted.
    pub(crate) fn accepts_fixed(&self) -> bool {
        self.mode() != Mode::Disabled && self.software_enabled()
    }

    /// A message arrives that [`Registers::is_destination`] said is for this APIC.
    pub(crate) fn accept(&mut self, message: &Message, effects: &mut Effects) {
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                if !self.accepts_fixed() {
                } else if message.vector < 16 {
                    self.error(ERROR_RECEIVE_ILLEGAL_VECTOR, effects);
                } else {
                    self.irr.insert(message.vector);
                    self.tmr.set(message.vector, message.level_triggered);
                }
            }
            DeliveryMode::Smi => effects.smi = true,
            DeliveryMode::Nmi => effects.nmi = true,
            DeliveryMode::Init => effects.init = true,
            DeliveryMode::StartUp => effects.sipi = Some(message.vector),
            DeliveryMode::ExtInt => self.ext_int_latched |= self.accepts_fixed(),
        }
    }

    /// A local interrupt source fires.
    fn raise(&mut self, entry: usize, effects: &mut Effects) {
        let value = self.lvt[entry];
        if value & MASKED != 0 || self.mode() == Mode::Disabled {
            return;
        }
        let mode = if matches!(entry, lvt::TIMER | lvt::ERROR) { 0 } else { value >> 8 };
        match DeliveryMode::from_bits(mode) {
            Some(DeliveryMode::Fixed) if value as u8 >= 16 => {
                self.irr.insert(value as u8);
                self.tmr.remove(value as u8);
            }
            Some(DeliveryMode::Fixed) => self.esr_pending |= ERROR_RECEIVE_ILLEGAL_VECTOR,
            Some(DeliveryMode::Nmi) => effects.nmi = true,
            _ => {}
        }
    }

    fn error(&mut self, bit: u32, effects: &mut Effects) {
        if self.esr_pending & bit == 0 {
            self.esr_pending |= bit;
            self.raise(lvt::ERROR, effects);
        }
    }

    /// Drives LINT0, which the 8259 pair is wired to.
    pub(crate) fn set_lint0(&mut self, level: bool, effects: &mut Effects) {
        let rising = level && !self.lint0_level;
        self.lint0_level = level;
        if rising {
            self.raise(lvt::LINT0, effects);
        }
    }

    /// An edge on LINT1, the board's NMI input.
    pub(crate) fn pulse_lint1(&mut self, effects: &mut Effects) {
        if self.mode() == Mode::Disabled {
            effects.nmi = true;
        } else {
            self.raise(lvt::LINT1, effects);
        }
    }

    fn end_of_interrupt(&mut self, effects: &mut Effects) {
        if let Some(vector) = self.isr.highest() {
            self.isr.remove(vector);
            if self.tmr.contains(vector) {
                effects.eoi = Some(vector);
            }
        }
    }

    /// Reads a register. `None` if there is none.
    fn read(&self, number: u32, now: &dyn Fn() -> Nanos) -> Option<u32> {
        let x2apic = self.mode() == Mode::X2Apic;
        Some(match number {
            number::ID if x2apic => self.id,
            number::ID => self.current_id << 24,
            number::VERSION => VERSION,
            number::TPR => self.tpr.into(),
            number::APR | number::RRD if !x2apic => 0,
            number::PPR => self.ppr().into(),
            number::EOI | number::SELF_IPI if !x2apic => 0,
            number::LDR => self.logical_id(),
            number::DFR if !x2apic => self.dfr,
            number::SVR => self.svr,
            number::ISR..number::TMR => self.isr.0[(number - number::ISR) as usize],
            number::TMR..number::IRR => self.tmr.0[(number - number::TMR) as usize],
            number::IRR..=number::IRR_LAST => self.irr.0[(number - number::IRR) as usize],
            number::ESR => self.esr,
            number::ICR => self.icr as u32,
            number::ICR_HIGH if !x2apic => (self.icr >> 32) as u32,
            number::LVT..=number::LVT_LAST => self.lvt[(number - number::LVT) as usize],
            number::TIMER_INITIAL => self.timer_initial,
            number::TIMER_CURRENT => self.countdown().map_or(0, |countdown| countdown.current(now())),
            number::TIMER_DIVIDE => self.timer_divide,
            _ => return None,
        })
    }

    /// A load from the register with this number.
    pub(crate) fn mmio_read(&mut self, number: u32, now: &dyn Fn() -> Nanos, effects: &mut Effects) -> u32 {
        self.read(number, now).unwrap_or_else(|| {
            self.error(ERROR_ILLEGAL_REGISTER, effects);
            0
        })
    }

    /// A store to the register with this number.
    pub(crate) fn mmio_write(
        &mut self,
        number: u32,
        value: u32,
        now: &dyn Fn() -> Nanos,
        effects: &mut Effects,
    ) {
        match number {
            number::LDR => self.ldr = value & 0xff00_0000,
            number::DFR => self.dfr = value | 0x0fff_ffff,
            number::ICR => {
                self.icr = self.icr & 0xffff_ffff_0000_0000 | u64::from(value & 0x000c_cfff);
                let destination = Message::xapic_destination((self.icr >> 56) as u32, value & 1 << 11 != 0);
                self.send(destination, effects);
            }
            number::ICR_HIGH => self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32,
            number::ID if self.mode() == Mode::XApic => {
                self.current_id = value >> 24;
                effects.renamed = true;
            }
            number::ID | number::VERSION | number::APR | number::PPR | number::RRD => {}
            number::ISR..=number::IRR_LAST | number::TIMER_CURRENT | number::SELF_IPI => {}
            _ => {
                if !self.write(number, value, now, effects) {
                    self.error(ERROR_ILLEGAL_REGISTER, effects);
                }
            }
        }
    }

    /// Writes a register that xAPIC and x2APIC mode have in common; says whether there is one.
    fn write(&mut self, number: u32, value: u32, now: &dyn Fn() -> Nanos, effects: &mut Effects) -> bool {
        match number {
            number::TPR => self.tpr = value as u8,
            number::EOI => self.end_of_interrupt(effects),
            number::SVR => {
                self.svr = value & SVR_VALID;
                if !self.software_enabled() {
                    self.lvt.iter_mut().for_each(|entry| *entry |= MASKED);
                }
            }
            number::ESR => self.esr = std::mem::take(&mut self.esr_pending),
            number::LVT..=number::LVT_LAST => {
                self.write_lvt((number - number::LVT) as usize, value, now, effects);
            }
            number::TIMER_INITIAL => self.start_timer(value, now()),
            number::TIMER_DIVIDE => self.set_divide(value & DIVIDE_VALID, now, effects),
            _ => return false,
        }
        true
    }

    fn write_lvt(&mut self, entry: usize, value: u32, now: &dyn Fn() -> Nanos, effects: &mut Effects) {
        let mut value = value & lvt::VALID[entry];
        if !self.software_enabled() {
            value |= MASKED;
        }
        if entry == lvt::TIMER && self.timer_mode() != TimerMode::of(value) {
            self.leave_timer_mode(TimerMode::of(value), now, effects);
        }
        let before = std::mem::replace(&mut self.lvt[entry], value);
        if entry == lvt::LINT0 && before & MASKED != 0 && self.lint0_level {
            // An input that is high when it is unmasked counts as an edge for the fixed mode: nothing else
            // would let through what the 8259s have been asking for.
            self.raise(lvt::LINT0, effects);
        }
    }

    /// A read of an x2APIC MSR.
    pub(crate) fn x2apic_read(&self, number: u32, now: &dyn Fn() -> Nanos) -> Result<u64, GeneralProtection> {
        if self.mode() != Mode::X2Apic {
            return Err(GeneralProtection);
        }
        match number {
            number::ICR => Ok(self.icr),
            number => self.read(number, now).map(u64::from).ok_or(GeneralProtection),
        }
    }

    /// A write of an x2APIC MSR. Reserved bits fault (Intel SDM volume 3, 11.12.1.2).
    pub(crate) fn x2apic_write(
        &mut self,
        number: u32,
        value: u64,
        now: &dyn Fn() -> Nanos,
        effects: &mut Effects,
    ) -> Result<(), GeneralProtection> {
        if self.mode() != Mode::X2Apic {
            return Err(GeneralProtection);
        }
        let valid: u64 = match number {
            number::TPR | number::SELF_IPI => 0xff,
            number::EOI | number::ESR => 0,
            number::SVR => SVR_VALID.into(),
            number::ICR => 0xffff_ffff_000c_dfff,
            number::LVT..=number::LVT_LAST => {
                u64::from(lvt::VALID[(number - number::LVT) as usize] | lvt::READ_ONLY)
            }
            number::TIMER_INITIAL => u32::MAX.into(),
            number::TIMER_DIVIDE => DIVIDE_VALID.into(),
            _ => return Err(GeneralProtection),
        };
        if value & !valid != 0 {
            return Err(GeneralProtection);
        }
        match number {
            number::ICR => {
                self.icr = value & !(1 << 12);
                let destination = Message::x2apic_destination((value >> 32) as u32, value & 1 << 11 != 0);
                self.send(destination, effects);
            }
            number::SELF_IPI if value < 16 => self.error(ERROR_SEND_ILLEGAL_VECTOR, effects),
            number::SELF_IPI => {
                let message = Message {
                    destination: Destination::Only(self.id),
                    mode: DeliveryMode::Fixed,
                    vector: value as u8,
                    level_triggered: false,
                };
                self.accept(&message, effects);
            }
            _ => {
                self.write(number, value as u32, now, effects);
            }
        }
        Ok(())
    }

    /// Sends what the interrupt command register says (Intel SDM volume 3, 11.6.1).
    fn send(&mut self, destination: Destination, effects: &mut Effects) {
        let command = self.icr as u32;
        let Some(mode) = DeliveryMode::from_bits(command >> 8) else { return };
        let vector = command as u8;
        let asserted = command & 1 << 14 != 0;
        let level_triggered = command & 1 << 15 != 0;
        match mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority if vector < 16 => {
                return self.error(ERROR_SEND_ILLEGAL_VECTOR, effects);
            }
            // The de-assert message only synchronised the arbitration ids of long-gone processors.
            DeliveryMode::Init if level_triggered && !asserted => return,
            DeliveryMode::ExtInt => return,
            _ => {}
        }
        let destination = match command >> 18 & 3 {
            0 => destination,
            1 => Destination::Only(self.id),
            2 => Destination::All,
            _ => Destination::AllBut(self.id),
        };
        let to_self = command >> 18 & 3 == 1;
        if to_self && matches!(mode, DeliveryMode::Init | DeliveryMode::StartUp) {
            return;
        }
        effects.send = Some(Message { destination, mode, vector, level_triggered: false });
    }
}

/// The timer.
impl Registers {
    fn timer_mode(&self) -> TimerMode {
        TimerMode::of(self.lvt[lvt::TIMER])
    }

    fn countdown(&self) -> Option<Countdown> {
        let periodic = match self.timer_mode() {
            TimerMode::OneShot => false,
            TimerMode::Periodic => true,
            TimerMode::TscDeadline | TimerMode::Reserved => return None,
        };
        let start = self.timer_start?;
        Some(Countdown { start, initial: self.timer_initial, divisor: divisor(self.timer_divide), periodic })
    }

    fn stop_timer(&mut self) {
        self.timer_start = None;
        self.tsc_deadline = 0;
        self.expiry = None;
    }

    /// The timer is about to get mode `new`.
    fn leave_timer_mode(&mut self, new: TimerMode, now: &dyn Fn() -> Nanos, effects: &mut Effects) {
        let by_deadline = |mode| matches!(mode, TimerMode::TscDeadline | TimerMode::Reserved);
        if by_deadline(self.timer_mode()) || by_deadline(new) {
            self.timer_initial = 0;
            self.stop_timer();
        } else if let Some(countdown) = self.countdown() {
            // One-shot and periodic count the same; only what follows an expiry differs.
            let now = now();
            self.timer_expired(now, effects);
            if countdown.periodic {
                // The cycle that it is in is its last.
                let last = Countdown { start: countdown.cycle_start(now), periodic: false, ..countdown };
                self.timer_start = Some(last.start);
                self.expiry = last.next_expiry(now);
            }
        }
    }

    fn start_timer(&mut self, initial: u32, now: Nanos) {
        if matches!(self.timer_mode(), TimerMode::TscDeadline | TimerMode::Reserved) {
            return;
        }
        self.stop_timer();
        self.timer_initial = initial;
        if initial != 0 {
            self.timer_start = Some(now);
            self.expiry = self.countdown().and_then(|countdown| countdown.next_expiry(now));
        }
    }

    fn set_divide(&mut self, divide: u32, now: &dyn Fn() -> Nanos, effects: &mut Effects) {
        let now = now();
        // What is due already comes of the old rate.
        self.timer_expired(now, effects);
        let counted =
            self.countdown().map(|countdown| u64::from(self.timer_initial - countdown.current(now)));
        self.timer_divide = divide;
        if let Some(counted) = counted {
            // The count stays where it is and goes on at the new rate.
            self.timer_start = Some(now.saturating_sub(counted * divisor(divide)));
            self.expiry = self.countdown().and_then(|countdown| countdown.next_expiry(now));
        }
    }

    /// IA32_TSC_DEADLINE (Intel SDM volume 3, 11.5.4.1): reads 0 when not armed.
    pub(crate) fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    /// A write of IA32_TSC_DEADLINE, at `now` when the guest's counter is `tsc`.
    pub(crate) fn set_tsc_deadline(&mut self, value: u64, tsc: u64, now: Nanos, effects: &mut Effects) {
        if self.timer_mode() != TimerMode::TscDeadline {
            return;
        }
        self.tsc_deadline = value;
        self.expiry = (value != 0).then(|| self.deadline_in_nanos(value, tsc, now));
        self.timer_expired(now, effects);
    }

    fn deadline_in_nanos(&self, deadline: u64, tsc: u64, now: Nanos) -> Nanos {
        now.saturating_add(nanos_for(deadline.saturating_sub(tsc), self.tsc_hertz))
    }

    /// Raises the timer's interrupt if it is due at `now`.
    pub(crate) fn timer_expired(&mut self, now: Nanos, effects: &mut Effects) {
        if self.expiry.is_none_or(|expiry| expiry > now) {
            return;
        }
        self.raise(lvt::TIMER, effects);
        self.expiry = match self.timer_mode() {
            TimerMode::Periodic => self.countdown().and_then(|countdown| countdown.next_expiry(now)),
            TimerMode::OneShot => {
                self.timer_start = None;
                None
            }
            TimerMode::TscDeadline | TimerMode::Reserved => {
                self.tsc_deadline = 0;
                None
            }
        };
    }
}

/// Saved state.
impl Registers {
    pub(crate) fn save(&self) -> LapicState {
        let Self {
            id: _,
            current_id: id,
            physical_bits: _,
            tsc_hertz: _,
            apic_base,
            ldr,
            dfr,
            tpr,
            svr,
            isr,
            tmr,
            irr,
            esr,
            esr_pending,
            icr,
            lvt: [timer, thermal, performance, lint0, lint1, error],
            timer_initial,
            timer_divide,
            timer_start,
            tsc_deadline,
            lint0_level,
            ext_int_latched,
            expiry: _,
        } = self;
        LapicState {
            apic_base: *apic_base,
            id: *id,
            ldr: *ldr,
            dfr: *dfr,
            tpr: *tpr,
            svr: *svr,
            isr: isr.0,
            tmr: tmr.0,
            irr: irr.0,
            esr: *esr,
            esr_pending: *esr_pending,
            icr: *icr,
            lvt: LvtState {
                cmci: MASKED,
                timer: *timer,
                thermal: *thermal,
                performance: *performance,
                lint0: *lint0,
                lint1: *lint1,
                error: *error,
            },
            timer_initial: *timer_initial,
            timer_divide: *timer_divide,
            timer_start: *timer_start,
            tsc_deadline: *tsc_deadline,
            lint0_level: *lint0_level,
            ext_int_latched: *ext_int_latched,
        }
    }

    /// Takes over a state that was saved at `time`, when the guest's counter was `tsc`. Says what is wrong
    /// with it if it is none; nothing has changed then.
    pub(crate) fn restore(&mut self, state: &LapicState, tsc: u64, time: Nanos) -> Result<(), String> {
        let x2apic = state.apic_base & BASE_X2APIC != 0;
        if state.id != self.id && (x2apic || state.id > 0xff) {
            return Err(format!("of APIC {}, and this is APIC {}", state.id, self.id));
        }
        if !self.legal_base(state.apic_base) {
            return Err(format!("at IA32_APIC_BASE {:#x}", state.apic_base));
        }
        let LvtState { cmci: _, timer, thermal, performance, lint0, lint1, error } = state.lvt;
        let mut entries = [0; 6];
        entries[lvt::TIMER] = timer;
        entries[lvt::THERMAL] = thermal;
        entries[lvt::PERFORMANCE] = performance;
        entries[lvt::LINT0] = lint0;
        entries[lvt::LINT1] = lint1;
        entries[lvt::ERROR] = error;
        for (entry, valid) in entries.iter_mut().zip(lvt::VALID) {
            *entry &= valid;
        }
        *self = Self {
            apic_base: state.apic_base,
            current_id: state.id,
            ldr: state.ldr & 0xff00_0000,
            dfr: state.dfr | 0x0fff_ffff,
            tpr: state.tpr,
            svr: state.svr & SVR_VALID,
            isr: Vectors(state.isr),
            tmr: Vectors(state.tmr),
            irr: Vectors(state.irr),
            esr: state.esr & 0xff,
            esr_pending: state.esr_pending & 0xff,
            icr: state.icr & !(1 << 12),
            lvt: entries,
            timer_initial: state.timer_initial,
            timer_divide: state.timer_divide & DIVIDE_VALID,
            timer_start: state.timer_start,
            tsc_deadline: state.tsc_deadline,
            lint0_level: state.lint0_level,
            ext_int_latched: state.ext_int_latched,
            expiry: None,
            ..*self
        };
        self.expiry = match self.timer_mode() {
            TimerMode::OneShot => {
                self.countdown().and_then(|countdown| countdown.next_expiry(countdown.start))
            }
            TimerMode::Periodic => self.countdown().and_then(|countdown| countdown.next_expiry(time)),
            TimerMode::TscDeadline if self.tsc_deadline != 0 => {
                Some(self.deadline_in_nanos(self.tsc_deadline, tsc, time))
            }
            TimerMode::TscDeadline | TimerMode::Reserved => None,
        };
        Ok(())
    }
}
