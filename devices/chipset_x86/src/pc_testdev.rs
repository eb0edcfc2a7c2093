//! The device that CPU test programs expect of a PC (QEMU's `pc-testdev`): ports that remember, lines that a
//! program drives itself, and memory-mapped registers that behave as RAM.

use crate::board::Board;
use crate::ports::{PortRegion, PortSet, decode_checked, region, take_over};
use device::{Device, MmioDevice, SavedState, StateError, encode};
use irq::OrderedLine;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;

/// Four ports that read as they were written, with accesses of any width.
const REGISTER_PORTS: (u16, u16) = (0xe0, 4);
/// A program writes an address here to have the host forget how the page there is mapped. No accelerator shows
/// a difference, so nothing is done.
const FLUSH_PORTS: (u16, u16) = (0xe4, 4);
/// The same four bytes as [`REGISTER_PORTS`], for programs that access single bytes.
const BYTE_PORTS: (u16, u16) = (0xe8, 4);
/// A port for each interrupt line: not zero is high.
const LINE_PORTS: (u16, u16) = (0x2000, 24);
/// Where the registers that behave as RAM are (guest physical).
pub const PC_TESTDEV_ADDRESS: u64 = 0xff00_0000;
/// How many bytes they are.
pub const PC_TESTDEV_LEN: u64 = 0x1_0000;

/// The device.
pub struct PcTestdev {
    // Host glue.
    lines: Vec<OrderedLine>,
    // Guest-visible state.
    state: Mutex<State>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    register: [u8; 4],
    /// Which lines are high.
    levels: u32,
    memory: Vec<u8>,
}

impl Default for State {
    fn default() -> Self {
        Self { register: [0; 4], levels: 0, memory: vec![0; PC_TESTDEV_LEN as usize] }
    }
}

impl State {
    fn is_sound(&self) -> bool {
        self.memory.len() as u64 == PC_TESTDEV_LEN && self.levels >> LINE_PORTS.1 == 0
    }
}

impl PcTestdev {
    /// The device's kind in saved states.
    pub const KIND: &'static str = "pc-testdev";
    const VERSION: u32 = 1;

    /// A device that drives the lines of `board`: those of ISA interrupts, and above them those of global
    /// system interrupts.
    pub fn new(board: &Arc<Board>) -> Arc<Self> {
        let line =
            |pin: u32| OrderedLine::new(if pin < 16 { board.isa_line(pin) } else { board.gsi_line(pin) });
        let lines = (0..LINE_PORTS.1.into()).map(line).collect();
        Arc::new(Self { lines, state: Mutex::default() })
    }

    /// The ports to map.
    pub fn port_regions(self: &Arc<Self>) -> Vec<PortRegion> {
        [REGISTER_PORTS, FLUSH_PORTS, BYTE_PORTS, LINE_PORTS].map(|ports| region(self, ports)).into()
    }

    /// Takes a state over, and drives the lines as it says.
    fn put(&self, state: State) {
        *self.state.lock() = state;
        (0..self.lines.len()).for_each(|pin| self.drive(pin));
    }

    /// Drives a line as the state says. A processor that writes what the line is at already waits until another's
    /// write has arrived.
    fn drive(&self, pin: usize) {
        self.lines[pin].update(|| self.state.lock().levels >> pin & 1 != 0);
    }
}

impl PortSet for PcTestdev {
    fn read_ports(&self, first: u16, data: &mut [u8]) {
        let state = self.state.lock();
        for (port, byte) in (first..).zip(data) {
            *byte = match port {
                0xe0..0xe4 | 0xe8..0xec => state.register[usize::from(port & 3)],
                _ => 0xff,
            };
        }
    }

    fn write_ports(&self, first: u16, data: &[u8]) {
        let pin = usize::from(first.wrapping_sub(LINE_PORTS.0));
        if pin < self.lines.len() {
            let level = data.iter().any(|byte| *byte != 0);
            let bit = 1 << pin;
            let mut state = self.state.lock();
            state.levels = if level { state.levels | bit } else { state.levels & !bit };
            drop(state);
            return self.drive(pin);
        }
        let mut state = self.state.lock();
        for (port, byte) in (first..).zip(data) {
            if let 0xe0..0xe4 | 0xe8..0xec = port {
                state.register[usize::from(port & 3)] = *byte;
            }
        }
    }
}

impl MmioDevice for PcTestdev {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock();
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = state.memory.get(offset as usize + index).copied().unwrap_or(0xff);
        }
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state.lock();
        for (index, byte) in data.iter().enumerate() {
            if let Some(place) = state.memory.get_mut(offset as usize + index) {
                *place = *byte;
            }
        }
    }
}

impl Device for PcTestdev {
    fn kind(&self) -> &'static str {
        Self::KIND
    }

    fn version(&self) -> u32 {
        Self::VERSION
    }

    fn reset(&self) {
        self.put(State::default());
    }

    fn save(&self) -> SavedState {
        let State { register, levels, memory } = self.state.lock().clone();
        encode(Self::KIND, Self::VERSION, &State { register, levels, memory })
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let decoded = decode_checked(Self::KIND, Self::VERSION, state, State::is_sound);
        take_over(self, decoded, |state| self.put(state))
    }
}

impl fmt::Debug for PcTestdev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PcTestdev").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_bench::{Ports, SignalLog};
    use proptest::prelude::*;

    fn device() -> (Arc<PcTestdev>, Arc<SignalLog>) {
        let ioapic = SignalLog::new();
        (PcTestdev::new(&Board::new(SignalLog::new(), ioapic.clone())), ioapic)
    }

    #[test]
    fn registers_remember_and_lines_follow() {
        let (device, ioapic) = device();
        let ports = Ports::new(device.port_regions());
        ports.write_wide(0xe0, 4, 0x1234_5678);
        ports.write(0xe9, 0xaa);
        assert_eq!(ports.read_wide(0xe0, 4), 0x1234_aa78);
        assert_eq!(ports.read_wide(0xe2, 2), 0x1234);
        ports.write_wide(0xe4, 4, 0x5000);
        ports.write(0x200e, 1);
        ports.write(0x2017, 2);
        ports.write(0x200e, 0);
        assert_eq!(ioapic.take(), [(14, true), (23, true), (14, false)]);
        device.mmio_write(0xfffe, &[1, 2]);
        let mut data = [0; 4];
        device.mmio_read(0xfffc, &mut data);
        assert_eq!(data, [0, 0, 1, 2]);
        device.reset();
        assert_eq!((ports.read_wide(0xe0, 4), ioapic.take()), (0, vec![(23, false)]));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn any_state_is_restored(register: [u8; 4], levels in 0u32..1 << 24, byte: u8, at in 0usize..0x1_0000) {
            let ((from, _), (to, _)) = (device(), device());
            let mut state = State { register, levels, ..State::default() };
            state.memory[at] = byte;
            from.put(state.clone());
            to.restore(&from.save()).unwrap();
            prop_assert_eq!(&*to.state.lock(), &state);
            prop_assert_eq!(to.lines.iter().filter(|line| line.level()).count() as u32, levels.count_ones());
            let wrong = encode(PcTestdev::KIND, 1, &State { memory: vec![0; 3], ..State::default() });
            prop_assert!(to.restore(&wrong).is_err());
        }
    }
}
