//! The I/O APIC (Intel 82093AA data sheet; version 0x20 with its EOI register as in the ICH9 data sheet,
//! 13.5).

use crate::ports::{decode_checked, take_over};
use device::{Device, MmioDevice, SavedState, StateError, encode};
use irq::{IrqSink, MsiMessage, MsiTarget};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;

/// Where a PC's only I/O APIC is in guest physical memory.
pub const IOAPIC_ADDRESS: u64 = 0xfec0_0000;
/// The length of its region.
pub const IOAPIC_LEN: u64 = 0x1000;
/// How many inputs it has.
pub const IOAPIC_PINS: u32 = 24;
/// Its version register: inputs minus one, and a version that has an EOI register.
const VERSION_REGISTER: u32 = (IOAPIC_PINS - 1) << 16 | 0x20;

const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
const EOI: u64 = 0x40;

const LOGICAL_DESTINATION: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL_TRIGGERED: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// What a guest can write: vector, delivery mode, destination mode, polarity, trigger mode, mask and
/// destination.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

#[derive(Debug, Clone, Serialize, Deserialize)]
struct IoApicState {
    id: u8,
    select: u8,
    /// The inputs that are asserted, as a bit mask. What "asserted" means on the wire (the polarity) is
    /// settled before the line gets here.
    asserted: u32,
    redirection: [u64; IOAPIC_PINS as usize],
}

impl IoApicState {
    fn new() -> Self {
        Self { id: 0, select: 0, asserted: 0, redirection: [MASKED; IOAPIC_PINS as usize] }
    }

    fn sound(&self) -> bool {
        self.id < 16
            && self.asserted >> IOAPIC_PINS == 0
            && self.redirection.iter().all(|entry| {
                entry & !(WRITABLE | REMOTE_IRR) == 0
                    && (entry & REMOTE_IRR == 0 || entry & LEVEL_TRIGGERED != 0)
            })
    }

    /// Whether `entry` behaves as level-triggered: only fixed and lowest-priority delivery can.
    fn is_level(entry: u64) -> bool {
        entry & LEVEL_TRIGGERED != 0 && matches!(entry >> 8 & 7, 0 | 1)
    }

    /// The message that `entry` sends (Intel SDM volume 3, 11.11.1 and 11.11.2).
    fn message(entry: u64) -> MsiMessage {
        let destination = entry >> 56;
        let logical = u64::from(entry & LOGICAL_DESTINATION != 0);
        let vector_and_mode = (entry & 0x7ff) as u32;
        let level = if Self::is_level(entry) { 0xc000 } else { 0 };
        MsiMessage { address: 0xfee0_0000 | destination << 12 | logical << 2, data: vector_and_mode | level }
    }

    /// Sends a level-triggered pin's interrupt if there is one to send.
    fn service_level(&mut self, pin: usize, messages: &mut Vec<MsiMessage>) {
        let entry = self.redirection[pin];
        let ready = self.asserted >> pin & 1 != 0 && entry & (MASKED | REMOTE_IRR) == 0;
        if ready && Self::is_level(entry) {
            messages.push(Self::message(entry));
            self.redirection[pin] |= REMOTE_IRR;
        }
    }

    fn set_input(&mut self, pin: usize, level: bool, messages: &mut Vec<MsiMessage>) {
        let rises = level && self.asserted >> pin & 1 == 0;
        self.asserted = self.asserted & !(1 << pin) | u32::from(level) << pin;
        let entry = self.redirection[pin];
        if Self::is_level(entry) {
            self.service_level(pin, messages);
        } else if rises && entry & MASKED == 0 {
            // An edge at a masked pin is lost.
            messages.push(Self::message(entry));
        }
    }

    fn end_of_interrupt(&mut self, vector: u8, messages: &mut Vec<MsiMessage>) {
        for pin in 0..self.redirection.len() {
            let entry = self.redirection[pin];
            if entry & REMOTE_IRR != 0 && entry & 0xff == vector.into() {
                self.redirection[pin] &= !REMOTE_IRR;
                self.service_level(pin, messages);
            }
        }
    }

    fn read_window(&self) -> u32 {
        match self.select {
            0x00 | 0x02 => u32::from(self.id) << 24,
            0x01 => VERSION_REGISTER,
            select @ 0x10..=0x3f => {
                let entry = self.redirection[usize::from(select - 0x10) / 2];
                if select & 1 == 0 { entry as u32 } else { (entry >> 32) as u32 }
            }
            _ => 0,
        }
    }

    fn write_window(&mut self, value: u32, messages: &mut Vec<MsiMessage>) {
        match self.select {
            0x00 => self.id = (value >> 24 & 0x0f) as u8,
            select @ 0x10..=0x3f => {
                let pin = usize::from(select - 0x10) / 2;
                let old = self.redirection[pin];
                let new = if select & 1 == 0 {
                    old & !0xffff_ffff | u64::from(value)
                } else {
                    old & 0xffff_ffff | u64::from(value) << 32
                };
                // Guests of versions without an EOI register make a pin edge-triggered for a moment to
                // clear its remote IRR.
                let kept = if new & LEVEL_TRIGGERED != 0 { old & REMOTE_IRR } else { 0 };
                self.redirection[pin] = new & WRITABLE | kept;
                self.service_level(pin, messages);
            }
            _ => {}
        }
    }
}

/// The I/O APIC. Its inputs are an [`IrqSink`]; it sends its interrupts as messages.
pub struct IoApic {
    // Host glue.
    target: Arc<dyn MsiTarget>,
    // Guest-visible state.
    state: Mutex<IoApicState>,
}

impl IoApic {
    /// The controller's kind in saved states.
    pub const KIND: &'static str = "ioapic";
    const VERSION: u32 = 1;

    /// A controller, all inputs masked, that sends to the local APICs behind `target`. They must not call
    /// back at once: [`IoApic::end_of_interrupt`] is for a vCPU's own thread.
    pub fn new(target: Arc<dyn MsiTarget>) -> Arc<Self> {
        Arc::new(Self { target, state: Mutex::new(IoApicState::new()) })
    }

    /// A local APIC's broadcast that the level-triggered interrupt `vector` was handled. If the input is still
    /// asserted this sends it again at once: the caller must not hold a lock that its [`MsiTarget`] takes.
    pub fn end_of_interrupt(&self, vector: u8) {
        self.change(|state, messages| state.end_of_interrupt(vector, messages));
    }

    /// Whether some input is set up to send level-triggered interrupts with `vector`: if not, its end of
    /// interrupt need not be broadcast.
    pub fn is_level_vector(&self, vector: u8) -> bool {
        let state = self.state.lock();
        let mut entries = state.redirection.iter();
        entries.any(|&entry| IoApicState::is_level(entry) && entry & 0xff == vector.into())
    }

    /// Does `change`, and sends the messages that come of it without the lock held.
    fn change(&self, change: impl FnOnce(&mut IoApicState, &mut Vec<MsiMessage>)) {
        let mut messages = Vec::new(); // mostly stays empty, which takes no memory
        change(&mut self.state.lock(), &mut messages);
        for message in messages {
            self.target.signal(message);
        }
    }
}

impl IrqSink for IoApic {
    fn set_level(&self, pin: u32, level: bool) {
        if pin < IOAPIC_PINS {
            self.change(|state, messages| state.set_input(pin as usize, level, messages));
        }
    }
}

impl MmioDevice for IoApic {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = self.state.lock();
        let value = match offset & !3 {
            IOREGSEL => state.select.into(),
            IOWIN => state.read_window(),
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        for (to, from) in data.iter_mut().zip(&bytes[(offset & 3) as usize..]) {
            *to = *from;
        }
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(bytes);
        match offset {
            IOREGSEL => self.state.lock().select = value as u8,
            // The registers behind the window are reached by 32-bit stores only.
            IOWIN if data.len() >= 4 => self.change(|state, messages| state.write_window(value, messages)),
            EOI => self.end_of_interrupt(value as u8),
            _ => {}
        }
    }
}

impl Device for IoApic {
    fn kind(&self) -> &'static str {
        Self::KIND
    }

    fn version(&self) -> u32 {
        Self::VERSION
    }

    /// The inputs keep the levels that their devices drive them to.
    fn reset(&self) {
        let mut state = self.state.lock();
        *state = IoApicState { asserted: state.asserted, ..IoApicState::new() };
    }

    fn save(&self) -> SavedState {
        encode(Self::KIND, Self::VERSION, &*self.state.lock())
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let decoded = decode_checked(Self::KIND, Self::VERSION, state, IoApicState::sound);
        take_over(self, decoded, |state| *self.state.lock() = state)
    }
}

impl fmt::Debug for IoApic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoApic").field("state", &self.state).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_bench::SignalLog;
    use proptest::prelude::*;

    fn bench() -> (Arc<IoApic>, Arc<SignalLog>) {
        let log = SignalLog::new();
        (IoApic::new(log.clone()), log)
    }

    fn read(ioapic: &IoApic, register: u8) -> u32 {
        ioapic.mmio_write(IOREGSEL, &[register, 0, 0, 0]);
        let mut data = [0; 4];
        ioapic.mmio_read(IOWIN, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(ioapic: &IoApic, register: u8, value: u32) {
        ioapic.mmio_write(IOREGSEL, &[register, 0, 0, 0]);
        ioapic.mmio_write(IOWIN, &value.to_le_bytes());
    }

    #[test]
    fn identification() {
        let (ioapic, _) = bench();
        assert_eq!(read(&ioapic, 1), 0x0017_0020);
        write(&ioapic, 0, 0xff00_0000);
        assert_eq!((read(&ioapic, 0), read(&ioapic, 2)), (0x0f00_0000, 0x0f00_0000));
        assert_eq!((read(&ioapic, 0x10), read(&ioapic, 0x3e)), (0x0001_0000, 0x0001_0000));
        write(&ioapic, 0x10, 0xffff_ffff);
        assert_eq!(read(&ioapic, 0x10), 0x0001_afff);
    }

    #[test]
    fn edges_are_sent_once_and_lost_while_masked() {
        let (ioapic, log) = bench();
        write(&ioapic, 0x19, 0x0300_0000);
        write(&ioapic, 0x18, 0x0001_0931); // masked, logical, lowest priority
        ioapic.set_level(4, true);
        ioapic.set_level(4, false);
        write(&ioapic, 0x18, 0x0000_0931);
        assert!(log.take_messages().is_empty());
        ioapic.set_level(4, true);
        ioapic.set_level(4, true);
        ioapic.set_level(4, false);
        assert_eq!(log.take_messages(), [MsiMessage { address: 0xfee0_3004, data: 0x131 }]);
    }

    #[test]
    fn levels_are_sent_again_after_the_end_of_interrupt() {
        let (ioapic, log) = bench();
        write(&ioapic, 0x30, 0x0000_a055); // pin 16: active low, level, physical 0
        assert!(ioapic.is_level_vector(0x55) && !ioapic.is_level_vector(0x56));
        ioapic.set_level(16, true);
        let message = MsiMessage { address: 0xfee0_0000, data: 0xc055 };
        assert_eq!(log.take_messages(), [message]);
        assert_eq!(read(&ioapic, 0x30), 0x0000_e055);
        ioapic.set_level(16, false);
        ioapic.set_level(16, true);
        ioapic.end_of_interrupt(0x54);
        assert!(log.take_messages().is_empty());
        ioapic.end_of_interrupt(0x55);
        assert_eq!(log.take_messages(), [message]);
        ioapic.set_level(16, false);
        ioapic.mmio_write(EOI, &[0x55, 0, 0, 0]);
        assert_eq!(read(&ioapic, 0x30), 0x0000_a055);
        write(&ioapic, 0x30, 0x0001_a055);
        ioapic.set_level(16, true);
        assert!(log.take_messages().is_empty());
        write(&ioapic, 0x30, 0x0000_a055);
        assert_eq!(log.take_messages(), [message]);
        write(&ioapic, 0x30, 0x0001_2055); // edge clears remote IRR
        assert_eq!(read(&ioapic, 0x30), 0x0001_2055);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Read(u8),
        Write(u8, u32),
        Raw(u64, Vec<u8>),
        Level(u32, bool),
        Eoi(u8),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0u8..0x44).prop_map(Step::Read),
            // Few vectors, so that ends of interrupts hit.
            (0x10u8..0x18, any::<u32>())
                .prop_map(|(register, value)| Step::Write(register, value & 0x0fff_ff03)),
            (0u64..0x60, proptest::collection::vec(any::<u8>(), 1..9))
                .prop_map(|(offset, data)| Step::Raw(offset, data)),
            (0u32..5, any::<bool>()).prop_map(|(pin, level)| Step::Level(pin, level)),
            (0u8..4).prop_map(Step::Eoi),
        ];
        proptest::collection::vec(step, 0..60)
    }

    fn observe((ioapic, log): &(Arc<IoApic>, Arc<SignalLog>), step: &Step) -> (u32, Vec<MsiMessage>) {
        let mut result = 0;
        match step {
            Step::Read(register) => result = read(ioapic, *register),
            Step::Write(register, value) => write(ioapic, *register, *value),
            Step::Raw(offset, data) => {
                ioapic.mmio_write(*offset, data);
                let mut data = data.clone();
                ioapic.mmio_read(*offset, &mut data);
                result = data[0].into();
            }
            Step::Level(pin, level) => ioapic.set_level(*pin, *level),
            Step::Eoi(vector) => ioapic.end_of_interrupt(*vector),
        }
        (result, log.take_messages())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn a_restored_controller_goes_on_like_the_saved_one(before in steps(), after in steps()) {
            let first = bench();
            for step in &before {
                observe(&first, step);
            }
            let second = bench();
            second.0.restore(&first.0.save()).unwrap();
            for step in &after {
                prop_assert_eq!(observe(&first, step), observe(&second, step));
            }
        }

        #[test]
        fn impossible_entries_are_refused(entry in any::<u64>()) {
            let mut state = IoApicState::new();
            state.redirection[3] = entry;
            let (ioapic, _) = bench();
            let restored = ioapic.restore(&encode(IoApic::KIND, 1, &state));
            prop_assert_eq!(restored.is_ok(), state.sound());
        }
    }
}
