//! The two cascaded 8259A interrupt controllers (Intel 8259A data sheet) with the edge/level control
//! registers of later chipsets (Intel ICH9 data sheet, 13.4.11).

use crate::ports::{PortRegion, PortSet, decode_checked, region, take_over};
use device::{Device, SavedState, StateError, encode};
use irq::{IrqLine, IrqSink, OrderedLine};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;

/// First port and number of ports of the master.
pub const PIC_MASTER_PORTS: (u16, u16) = (0x20, 2);
/// First port and number of ports of the slave.
pub const PIC_SLAVE_PORTS: (u16, u16) = (0xa0, 2);
/// First port and number of ports of the edge/level control registers.
pub const ELCR_PORTS: (u16, u16) = (0x4d0, 2);

const MASTER: usize = 0;
const SLAVE: usize = 1;
/// The master's input that the slave is wired to.
const CASCADE: u8 = 2;
/// The inputs that can be made level-triggered, per chip: not the timer, keyboard, cascade, RTC and FPU.
const ELCR_MASK: [u8; 2] = [0xf8, 0xde];

/// How far the initialisation sequence has come: which command word a write to the odd port is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
enum Expected {
    /// OCW1, the mask: initialisation is over.
    #[default]
    Mask,
    /// ICW2, the vector base.
    Icw2,
    /// ICW3, the cascade.
    Icw3,
    /// ICW4, the mode.
    Icw4,
}

/// One chip.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Chip {
    /// The inputs' levels.
    levels: u8,
    /// Rises of edge-triggered inputs that were not acknowledged yet.
    edges: u8,
    in_service: u8,
    mask: u8,
    level_triggered: u8,
    vector_base: u8,
    /// The input of the highest priority, 0 to 7.
    highest: u8,
    expected: Expected,
    single: bool,
    wants_icw4: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_fully_nested: bool,
    read_in_service: bool,
    poll: bool,
    /// The inputs that have a chip behind them: the master's [`CASCADE`].
    cascaded: u8,
}

impl Chip {
    fn requests(&self) -> u8 {
        self.edges & !self.level_triggered | self.levels & (self.level_triggered | self.cascaded)
    }

    fn set_input(&mut self, input: u8, level: bool) {
        let bit = 1 << input;
        if level {
            if self.levels & bit == 0 {
                self.edges |= bit;
            }
            self.levels |= bit;
        } else {
            self.levels &= !bit;
        }
        // The slave's output is not an edge: it may have a second request when the first is acknowledged.
        self.edges &= !self.cascaded;
    }

    /// The position of the highest-priority bit of `bits`, counted from the highest priority.
    fn priority(&self, bits: u8) -> Option<u8> {
        let rotated = bits.rotate_right(self.highest.into());
        (rotated != 0).then(|| rotated.trailing_zeros() as u8)
    }

    fn input_at(&self, priority: u8) -> u8 {
        (priority + self.highest) & 7
    }

    /// The input whose request goes to the output.
    fn pending(&self) -> Option<u8> {
        let request = self.priority(self.requests() & !self.mask)?;
        let mut blocking = self.in_service;
        if self.special_mask {
            blocking &= !self.mask;
        }
        if self.special_fully_nested {
            blocking &= !self.cascaded;
        }
        match self.priority(blocking) {
            Some(current) if current <= request => None,
            _ => Some(self.input_at(request)),
        }
    }

    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        self.edges &= !bit;
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.highest = (input + 1) & 7;
            }
        } else {
            self.in_service |= bit;
        }
    }

    fn initialise(&mut self, icw1: u8) {
        *self = Self {
            levels: self.levels,
            level_triggered: self.level_triggered,
            cascaded: self.cascaded,
            vector_base: self.vector_base,
            expected: Expected::Icw2,
            single: icw1 & 0x02 != 0,
            wants_icw4: icw1 & 0x01 != 0,
            ..Self::default()
        };
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            self.initialise(value);
        } else if value & 0x08 != 0 {
            self.write_ocw3(value);
        } else {
            self.write_ocw2(value);
        }
    }

    fn write_ocw3(&mut self, value: u8) {
        self.poll = value & 0x04 != 0;
        if value & 0x02 != 0 {
            self.read_in_service = value & 0x01 != 0;
        }
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let level = value & 7;
        match value >> 5 {
            0 => self.rotate_on_auto_eoi = false,
            4 => self.rotate_on_auto_eoi = true,
            command @ (1 | 5) => {
                let visible = if self.special_mask { !self.mask } else { 0xff };
                if let Some(priority) = self.priority(self.in_service & visible) {
                    let input = self.input_at(priority);
                    self.in_service &= !(1 << input);
                    if command == 5 {
                        self.highest = (input + 1) & 7;
                    }
                }
            }
            command @ (3 | 7) => {
                self.in_service &= !(1 << level);
                if command == 7 {
                    self.highest = (level + 1) & 7;
                }
            }
            6 => self.highest = (level + 1) & 7,
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        self.expected = match self.expected {
            Expected::Mask => {
                self.mask = value;
                Expected::Mask
            }
            Expected::Icw2 => {
                self.vector_base = value & 0xf8;
                match (self.single, self.wants_icw4) {
                    (false, _) => Expected::Icw3,
                    (true, true) => Expected::Icw4,
                    (true, false) => Expected::Mask,
                }
            }
            // The cascade is wired: what ICW3 says about it changes nothing.
            Expected::Icw3 if self.wants_icw4 => Expected::Icw4,
            Expected::Icw3 => Expected::Mask,
            Expected::Icw4 => {
                self.auto_eoi = value & 0x02 != 0;
                self.special_fully_nested = value & 0x10 != 0;
                Expected::Mask
            }
        };
    }

    fn read_status(&self) -> u8 {
        if self.read_in_service { self.in_service } else { self.requests() }
    }

    fn sound(&self, chip: usize) -> bool {
        self.highest < 8
            && self.vector_base & 7 == 0
            && self.level_triggered & !ELCR_MASK[chip] == 0
            && self.cascaded == if chip == MASTER { 1 << CASCADE } else { 0 }
            && self.edges & self.cascaded == 0
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct PicState {
    chips: [Chip; 2],
}

impl PicState {
    fn new() -> Self {
        let master = Chip { cascaded: 1 << CASCADE, ..Chip::default() };
        Self { chips: [master, Chip::default()] }
    }

    /// Passes the slave's output on to the master.
    fn propagate(&mut self) {
        let slave = self.chips[SLAVE].pending().is_some();
        self.chips[MASTER].set_input(CASCADE, slave);
    }

    fn output(&self) -> bool {
        self.chips[MASTER].pending().is_some()
    }

    /// The interrupt acknowledge cycle.
    fn acknowledge(&mut self) -> u8 {
        let vector = match self.chips[MASTER].pending() {
            Some(CASCADE) => {
                self.chips[MASTER].acknowledge(CASCADE);
                let slave = self.chips[SLAVE].pending();
                if let Some(input) = slave {
                    self.chips[SLAVE].acknowledge(input);
                }
                self.chips[SLAVE].vector_base | slave.unwrap_or(7)
            }
            Some(input) => {
                self.chips[MASTER].acknowledge(input);
                self.chips[MASTER].vector_base | input
            }
            // The request went away in between: the "spurious" interrupt, which is not in service.
            None => self.chips[MASTER].vector_base | 7,
        };
        self.propagate();
        vector
    }

    /// The acknowledge cycle of one chip by a read in poll mode.
    fn poll(&mut self, chip: usize) -> u8 {
        self.chips[chip].poll = false;
        let Some(input) = self.chips[chip].pending() else { return 0 };
        self.chips[chip].acknowledge(input);
        0x80 | input
    }

    fn read(&mut self, port: u16) -> u8 {
        let (chip, odd) = match port {
            0x20 | 0x21 => (MASTER, port & 1 != 0),
            0xa0 | 0xa1 => (SLAVE, port & 1 != 0),
            0x4d0 => return self.chips[MASTER].level_triggered,
            0x4d1 => return self.chips[SLAVE].level_triggered,
            _ => return 0xff,
        };
        if self.chips[chip].poll {
            let value = self.poll(chip);
            self.propagate();
            value
        } else if odd {
            self.chips[chip].mask
        } else {
            self.chips[chip].read_status()
        }
    }

    fn write(&mut self, port: u16, value: u8) {
        match port {
            0x20 => self.chips[MASTER].write_command(value),
            0x21 => self.chips[MASTER].write_data(value),
            0xa0 => self.chips[SLAVE].write_command(value),
            0xa1 => self.chips[SLAVE].write_data(value),
            0x4d0 => self.chips[MASTER].level_triggered = value & ELCR_MASK[MASTER],
            0x4d1 => self.chips[SLAVE].level_triggered = value & ELCR_MASK[SLAVE],
            _ => {}
        }
        self.propagate();
    }
}

/// The pair of controllers with its 16 inputs.
///
/// An input that fell again before it was acknowledged stays requested if it is edge-triggered, as in the
/// controllers of today's chipsets.
pub struct Pic {
    // Host glue.
    intr: OrderedLine,
    // Guest-visible state.
    state: Mutex<PicState>,
}

impl Pic {
    /// The controllers' kind in saved states.
    pub const KIND: &'static str = "pic-8259";
    const VERSION: u32 = 1;

    /// Controllers that signal requests to the CPU by `intr`. What is behind that line must not call back
    /// at once; a vCPU calls [`Pic::acknowledge`] when it takes the interrupt.
    pub fn new(intr: IrqLine) -> Arc<Self> {
        Arc::new(Self { intr: OrderedLine::new(intr), state: Mutex::new(PicState::new()) })
    }

    /// The ports to map.
    pub fn port_regions(self: &Arc<Self>) -> Vec<PortRegion> {
        [PIC_MASTER_PORTS, PIC_SLAVE_PORTS, ELCR_PORTS].map(|ports| region(self, ports)).into()
    }

    /// The CPU's interrupt acknowledge cycle: the vector of the interrupt that is now in service.
    pub fn acknowledge(&self) -> u8 {
        let vector = self.state.lock().acknowledge();
        self.update();
        vector
    }

    /// Whether there is a request for the CPU: the level of INTR.
    pub fn is_pending(&self) -> bool {
        self.state.lock().output()
    }

    fn update(&self) {
        self.intr.update(|| self.state.lock().output());
    }
}

impl IrqSink for Pic {
    fn set_level(&self, pin: u32, level: bool) {
        let chip = if pin < 8 { MASTER } else { SLAVE };
        if pin >= 16 || pin == CASCADE.into() {
            return;
        }
        {
            let mut state = self.state.lock();
            state.chips[chip].set_input((pin & 7) as u8, level);
            state.propagate();
        }
        self.update();
    }
}

impl PortSet for Pic {
    fn read_ports(&self, first: u16, data: &mut [u8]) {
        {
            let mut state = self.state.lock();
            for (port, byte) in (first..).zip(data) {
                *byte = state.read(port);
            }
        }
        self.update();
    }

    fn write_ports(&self, first: u16, data: &[u8]) {
        {
            let mut state = self.state.lock();
            for (port, &value) in (first..).zip(data) {
                state.write(port, value);
            }
        }
        self.update();
    }
}

impl Device for Pic {
    fn kind(&self) -> &'static str {
        Self::KIND
    }

    fn version(&self) -> u32 {
        Self::VERSION
    }

    /// The inputs keep the levels that their devices drive them to.
    fn reset(&self) {
        {
            let mut state = self.state.lock();
            let levels = [MASTER, SLAVE].map(|chip| state.chips[chip].levels);
            *state = PicState::new();
            for (chip, levels) in state.chips.iter_mut().zip(levels) {
                chip.levels = levels & !chip.cascaded;
            }
            state.propagate();
        }
        self.update();
    }

    fn save(&self) -> SavedState {
        encode(Self::KIND, Self::VERSION, &*self.state.lock())
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let sound = |state: &PicState| state.chips[MASTER].sound(MASTER) && state.chips[SLAVE].sound(SLAVE);
        let decoded = decode_checked(Self::KIND, Self::VERSION, state, sound);
        take_over(self, decoded, |mut state| {
            state.propagate();
            *self.state.lock() = state;
        })?;
        self.update();
        Ok(())
    }
}

impl fmt::Debug for Pic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pic").field("state", &self.state).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_bench::{Ports, SignalLog};
    use proptest::prelude::*;

    struct Bench {
        pic: Arc<Pic>,
        ports: Ports,
        intr: IrqLine,
    }

    fn bench() -> Bench {
        let intr = SignalLog::new().line(0);
        let pic = Pic::new(intr.clone());
        Bench { ports: Ports::new(pic.port_regions()), pic, intr }
    }

    impl Bench {
        /// What Linux's `init_8259A` writes, with everything unmasked.
        fn initialised() -> Self {
            let bench = bench();
            let sequence = [
                (0x21, 0xff),
                (0x20, 0x11),
                (0x21, 0x30),
                (0x21, 0x04),
                (0x21, 0x01),
                (0xa0, 0x11),
                (0xa1, 0x38),
                (0xa1, 0x02),
                (0xa1, 0x01),
                (0x21, 0x00),
                (0xa1, 0x00),
            ];
            for (port, value) in sequence {
                bench.ports.write(port, value);
            }
            bench
        }

        fn pulse(&self, pin: u32) {
            self.pic.set_level(pin, true);
            self.pic.set_level(pin, false);
        }
    }

    #[test]
    fn interrupts_nest_by_priority() {
        let bench = Bench::initialised();
        bench.pulse(4);
        assert!(bench.intr.level());
        assert_eq!(bench.pic.acknowledge(), 0x34);
        assert!(!bench.intr.level());
        bench.pulse(5);
        assert!(!bench.intr.level());
        bench.pulse(1);
        assert!(bench.intr.level());
        assert_eq!(bench.pic.acknowledge(), 0x31);
        bench.ports.write(0x20, 0x0b);
        assert_eq!(bench.ports.read(0x20), 0x12);
        bench.ports.write(0x20, 0x20); // ends 1
        bench.ports.write(0x20, 0x64); // ends 4, by name
        assert!(bench.intr.level());
        assert_eq!(bench.pic.acknowledge(), 0x35);
        assert_eq!(bench.pic.acknowledge(), 0x37, "spurious");
    }

    #[test]
    fn the_slave_interrupts_through_the_master() {
        let bench = Bench::initialised();
        bench.pulse(12);
        bench.pulse(8);
        assert_eq!(bench.pic.acknowledge(), 0x38);
        assert!(!bench.intr.level());
        bench.ports.write(0xa0, 0x60);
        assert!(!bench.intr.level());
        bench.ports.write(0x20, 0x62);
        assert!(bench.intr.level());
        assert_eq!(bench.pic.acknowledge(), 0x3c);
    }

    #[test]
    fn special_fully_nested_mode_lets_the_slave_nest() {
        let bench = Bench::initialised();
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 0x11), (0x21, 0)] {
            bench.ports.write(port, value);
        }
        bench.pulse(12);
        assert_eq!(bench.pic.acknowledge(), 0x3c);
        bench.pulse(8);
        assert_eq!(bench.pic.acknowledge(), 0x38);
    }

    #[test]
    fn level_triggered_inputs_request_while_high() {
        let bench = Bench::initialised();
        bench.ports.write(0x4d1, 0xff);
        assert_eq!(bench.ports.read(0x4d1), 0xde);
        bench.pic.set_level(10, true);
        assert_eq!(bench.pic.acknowledge(), 0x3a);
        bench.ports.write(0xa0, 0x20);
        bench.ports.write(0x20, 0x20);
        assert!(bench.intr.level());
        bench.pic.set_level(10, false);
        assert!(!bench.intr.level());
    }

    #[test]
    fn masks_special_mask_mode_polling_and_rotation() {
        let bench = Bench::initialised();
        bench.ports.write(0x21, 0x10);
        assert_eq!(bench.ports.read(0x21), 0x10);
        bench.pulse(4);
        assert!(!bench.intr.level());
        bench.ports.write(0x21, 0);
        assert_eq!(bench.pic.acknowledge(), 0x34);
        bench.pulse(6);
        assert!(!bench.intr.level());
        bench.ports.write(0x21, 0x10);
        bench.ports.write(0x20, 0x68);
        assert!(bench.intr.level(), "a masked input in service blocks nothing in special mask mode");
        bench.ports.write(0x20, 0x48);
        bench.ports.write(0x20, 0x64);
        bench.ports.write(0x20, 0x0c);
        assert_eq!(bench.ports.read(0x20), 0x86);
        bench.ports.write(0x20, 0xa0); // ends 6 and makes it the lowest
        bench.pulse(0);
        bench.pulse(7);
        assert_eq!(bench.pic.acknowledge(), 0x37);
        bench.ports.write(0x20, 0x20);
        assert_eq!(bench.pic.acknowledge(), 0x30);
    }

    #[test]
    fn automatic_end_of_interrupt() {
        let bench = Bench::initialised();
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 3), (0x21, 0), (0x20, 0x80)] {
            bench.ports.write(port, value);
        }
        bench.pulse(3);
        bench.pulse(3);
        assert_eq!(bench.pic.acknowledge(), 0x33);
        bench.ports.write(0x20, 0x0b);
        assert_eq!(bench.ports.read(0x20), 0);
        bench.pulse(3);
        bench.pulse(4);
        assert_eq!(bench.pic.acknowledge(), 0x34, "rotated");
    }

    #[derive(Debug, Clone)]
    enum Step {
        Read(u16, usize),
        Write(u16, usize, u32),
        Level(u32, bool),
        Acknowledge,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let port = prop_oneof![4 => Just(0x20u16), 4 => Just(0x21), 2 => Just(0xa0), 2 => Just(0xa1), 1 => 0x4d0u16..0x4d2];
        let step = prop_oneof![
            (port.clone(), 1usize..3).prop_map(|(port, len)| Step::Read(port, len)),
            (port, 1usize..3, any::<u32>()).prop_map(|(port, len, value)| Step::Write(port, len, value)),
            (0u32..18, any::<bool>()).prop_map(|(pin, level)| Step::Level(pin, level)),
            Just(Step::Acknowledge),
        ];
        proptest::collection::vec(step, 0..60)
    }

    fn observe(bench: &Bench, step: &Step) -> (u32, bool) {
        let mut result = 0;
        match *step {
            Step::Read(port, len) => result = bench.ports.read_wide(port, len),
            Step::Write(port, len, value) => bench.ports.write_wide(port, len, value),
            Step::Level(pin, level) => bench.pic.set_level(pin, level),
            Step::Acknowledge => result = bench.pic.acknowledge().into(),
        }
        assert_eq!(bench.intr.level(), bench.pic.is_pending());
        (result, bench.intr.level())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn restored_controllers_go_on_like_the_saved_ones(before in steps(), after in steps()) {
            let first = bench();
            for step in &before {
                observe(&first, step);
            }
            let second = bench();
            second.pic.restore(&first.pic.save()).unwrap();
            prop_assert_eq!(first.intr.level(), second.intr.level());
            for step in &after {
                prop_assert_eq!(observe(&first, step), observe(&second, step));
            }
        }

        #[test]
        fn any_bytes_as_state_are_refused_or_harmless(
            bytes in proptest::collection::vec(any::<u8>(), 0..40), steps in steps(),
        ) {
            let bench = bench();
            let _ = bench.pic.restore(&SavedState { kind: Pic::KIND.into(), version: 1, bytes });
            for step in &steps {
                observe(&bench, step);
            }
        }
    }
}
