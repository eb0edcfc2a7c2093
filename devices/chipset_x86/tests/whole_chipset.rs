//! All devices of the chipset, wired as a machine wires them.

use bus::{MmioBus, PioBus};
use chipset_x86::addresses::*;
use chipset_x86::{
    A20Gate, Board, DebugExit, FastReset, Hpet, I8042, I8042Config, IoApic, Pic, Pit, Pm, PmConfig, PostCode,
    PowerEvent, PowerEvents, Pvpanic, ResetControl, Rtc, RtcConfig,
};
use clock::{TimerService, VmClock};
use device::{Device, SavedState};
use irq::{IrqLine, IrqSink, MsiMessage, MsiTarget};
use parking_lot::Mutex;
use proptest::prelude::*;
use std::sync::Arc;

/// What the CPUs and the machine would see.
#[derive(Default)]
struct Outside {
    intr: Mutex<Vec<bool>>,
    messages: Mutex<Vec<MsiMessage>>,
    events: Mutex<Vec<PowerEvent>>,
}

impl IrqSink for Outside {
    fn set_level(&self, _pin: u32, level: bool) {
        self.intr.lock().push(level);
    }
}

impl MsiTarget for Outside {
    fn signal(&self, message: MsiMessage) {
        self.messages.lock().push(message);
    }
}

impl PowerEvents for Outside {
    fn request(&self, event: PowerEvent) {
        self.events.lock().push(event);
    }
}

struct Machine {
    clock: VmClock,
    timers: Arc<TimerService>,
    ports: PioBus,
    memory: MmioBus,
    pic: Arc<Pic>,
    ioapic: Arc<IoApic>,
    board: Arc<Board>,
    pm: Arc<Pm>,
    i8042: Arc<I8042>,
    outside: Arc<Outside>,
    devices: Vec<Arc<dyn Device>>,
}

impl Machine {
    fn new() -> Self {
        let clock = VmClock::new();
        let timers = TimerService::new(clock.clone()).unwrap();
        let outside = Arc::new(Outside::default());
        let pic = Pic::new(IrqLine::new(outside.clone(), 0));
        let ioapic = IoApic::new(outside.clone());
        let board = Board::new(pic.clone(), ioapic.clone());
        let a20 = A20Gate::new();
        let pit = Pit::new(&timers, board.pit_line());
        let rtc_config = RtcConfig { seconds: 1_700_000_000, memory_below_4g: 1 << 30, ..Default::default() };
        let rtc = Rtc::new(&rtc_config, &timers, board.rtc_line());
        let hpet = Hpet::new(&timers, board.hpet_wiring());
        let pm = Pm::new(PmConfig::default(), &timers, board.gsi_line(SCI_GSI), outside.clone());
        let i8042 = I8042::new(
            I8042Config::default(),
            board.isa_line(I8042::KEYBOARD_IRQ),
            board.isa_line(I8042::MOUSE_IRQ),
            outside.clone(),
            a20.clone(),
        );
        let fast_reset = FastReset::new(outside.clone(), a20);
        let reset = ResetControl::new(outside.clone());
        let exit = DebugExit::new(DEBUG_EXIT_PORT, outside.clone());
        let pvpanic = Pvpanic::new(outside.clone());
        let post = PostCode::new();

        let ports = PioBus::new();
        let regions = [
            pic.port_regions(),
            pit.port_regions(),
            rtc.port_regions(),
            pm.port_regions(),
            i8042.port_regions(),
            fast_reset.port_regions(),
            reset.port_regions(),
            exit.port_regions(),
            pvpanic.port_regions(),
            post.port_regions(),
        ];
        for region in regions.into_iter().flatten() {
            ports.map(region.first, region.count, region.device).unwrap();
        }
        let memory = MmioBus::new();
        memory.map(IOAPIC_ADDRESS, IOAPIC_LEN, ioapic.clone()).unwrap();
        memory.map(HPET_ADDRESS, HPET_LEN, hpet.clone()).unwrap();
        let devices: Vec<Arc<dyn Device>> = vec![
            pic.clone(),
            ioapic.clone(),
            pit,
            rtc,
            hpet,
            pm.clone(),
            i8042.clone(),
            fast_reset,
            reset,
            exit,
            pvpanic,
            post,
        ];
        Self { clock, timers, ports, memory, pic, ioapic, board, pm, i8042, outside, devices }
    }

    fn start(&self) {
        self.clock.start();
        self.timers.clock_changed();
        for device in &self.devices {
            device.start();
        }
    }

    fn stop(&self) {
        self.clock.stop();
        self.timers.clock_changed();
        for device in &self.devices {
            device.stop();
        }
    }

    fn save(&self) -> Vec<SavedState> {
        self.devices.iter().map(|device| device.save()).collect()
    }

    /// The messages that were sent. The timers' thread may deliver some of them, in an order of its own.
    fn sorted_messages(&self) -> Vec<MsiMessage> {
        let mut messages = self.outside.messages.lock().clone();
        messages.sort_by_key(|message| (message.address, message.data));
        messages
    }

    fn out(&self, port: u16, value: u8) {
        self.ports.write(port, &[value]);
    }

    fn input(&self, port: u16) -> u8 {
        let mut data = [0];
        self.ports.read(port, &mut data);
        data[0]
    }

    fn write_ioapic(&self, register: u8, value: u32) {
        self.memory.write(IOAPIC_ADDRESS, &u32::from(register).to_le_bytes());
        self.memory.write(IOAPIC_ADDRESS + 0x10, &value.to_le_bytes());
    }

    /// Waits, without a limit that a busy host could break, until `condition` holds.
    fn wait_until(condition: impl Fn() -> bool) {
        let begin = std::time::Instant::now();
        while !condition() {
            assert!(begin.elapsed().as_secs() < 30, "nothing happens");
            std::thread::yield_now();
        }
    }
}

#[test]
fn the_timer_interrupts_through_either_controller() {
    let machine = Machine::new();
    for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, 0xfe)] {
        machine.out(port, value);
    }
    machine.write_ioapic(0x15, 0x0100_0000);
    machine.write_ioapic(0x14, 0x0000_0040);
    for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)] {
        machine.out(port, value); // 1000 Hz
    }
    machine.start();
    for _ in 0..3 {
        Machine::wait_until(|| machine.pic.is_pending());
        assert_eq!(machine.pic.acknowledge(), 0x30);
        machine.out(0x20, 0x20);
    }
    machine.stop();
    let messages = machine.outside.messages.lock().clone();
    assert!(messages.len() >= 3);
    assert!(messages.iter().all(|message| (message.address, message.data) == (0xfee0_1000, 0x40)));
    let standing = machine.outside.messages.lock().len();
    machine.clock.set(machine.clock.now() + 1_000_000_000);
    machine.timers.clock_changed();
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert_eq!(machine.outside.messages.lock().len(), standing, "a stopped machine does not tick");
}

#[test]
fn the_hpet_replaces_the_timer() {
    let machine = Machine::new();
    machine.write_ioapic(0x15, 0);
    machine.write_ioapic(0x14, 0x0000_0040);
    let hpet = |offset: u64, value: u32| machine.memory.write(HPET_ADDRESS + offset, &value.to_le_bytes());
    hpet(0x100, 0x14c); // enabled, periodic, set value, 32 bits
    hpet(0x108, 100_000);
    hpet(0x108, 100_000);
    hpet(0x010, 3);
    for (port, value) in [(0x43, 0x34), (0x40, 0x10), (0x40, 0x00)] {
        machine.out(port, value); // 75 kHz, which nobody is to hear
    }
    machine.start();
    Machine::wait_until(|| machine.outside.messages.lock().len() >= 3);
    machine.stop();
    let counter = machine.clock.now() / 10;
    assert!(machine.outside.messages.lock().len() as u64 <= counter / 100_000);
}

#[test]
fn the_power_button_arrives_as_a_level() {
    let machine = Machine::new();
    machine.write_ioapic(0x10 + 2 * SCI_GSI as u8, 0x0000_8049);
    machine.out(SMI_COMMAND_PORT, ACPI_ENABLE);
    machine.ports.write(PM_PORT_BASE + 2, &[0x00, 0x01]);
    machine.pm.press_power_button();
    let message = MsiMessage { address: 0xfee0_0000, data: 0xc049 };
    assert_eq!(*machine.outside.messages.lock(), [message]);
    machine.ioapic.end_of_interrupt(0x49);
    assert_eq!(machine.outside.messages.lock().len(), 2, "not handled yet");
    machine.ports.write(PM_PORT_BASE, &[0x00, 0x01]);
    machine.ioapic.end_of_interrupt(0x49);
    assert_eq!(machine.outside.messages.lock().len(), 2);
    machine.ports.write(PM_PORT_BASE + 4, &[0x00, 0x20 | SLEEP_TYPE_S5 << 2]);
    machine.out(RESET_CONTROL_PORT, RESET_CONTROL_VALUE);
    assert_eq!(*machine.outside.events.lock(), [PowerEvent::PowerOff, PowerEvent::Reset]);
}

#[test]
fn many_threads_at_once_neither_hang_nor_lose_an_interrupt() {
    let machine = Machine::new();
    for (port, value) in [(0x43, 0x34), (0x40, 0x00), (0x40, 0x02), (0x64, 0x60), (0x60, 0x03)] {
        machine.out(port, value);
    }
    machine.start();
    std::thread::scope(|scope| {
        for seed in 0..3u32 {
            let machine = &machine;
            scope.spawn(move || {
                let mut random = seed.wrapping_mul(0x9e37_79b9) | 1;
                for _ in 0..20_000 {
                    random ^= random << 13;
                    random ^= random >> 17;
                    random ^= random << 5;
                    let ports = [0x20, 0x21, 0x40, 0x43, 0x60, 0x61, 0x64, 0x71, 0xa0, 0x600, 0x604];
                    machine.input(ports[random as usize % ports.len()]);
                    match random >> 8 & 7 {
                        0 => drop(machine.i8042.key(0x1e, false, random & 1 != 0)),
                        1 => machine.board.isa_line(5).pulse(),
                        2 => machine.pm.press_power_button(),
                        3 => drop(machine.pic.acknowledge()),
                        _ => machine.out(0x70, random as u8),
                    }
                }
            });
        }
    });
    machine.stop();
    assert_eq!(machine.outside.intr.lock().last().copied().unwrap_or(false), machine.pic.is_pending());
}

#[derive(Debug, Clone)]
enum Step {
    Read(u16, usize),
    Write(u16, usize, u32),
    ReadMemory(u64, usize),
    WriteMemory(u64, u64),
    Acknowledge,
    EndOfInterrupt(u8),
    Pass(u64),
    Key(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let port = prop_oneof![
        0x20u16..0x22,
        0xa0u16..0xa2,
        0x40u16..0x44,
        0x60u16..0x65,
        0x70u16..0x72,
        Just(0x92u16),
        Just(0x80),
        0x4d0u16..0x4d2,
        0xb2u16..0xb4,
        0x600u16..0x640,
        Just(0xcf9),
        0x501u16..0x506,
    ];
    let gpa = prop_oneof![
        3 => Just(IOAPIC_ADDRESS),
        3 => Just(IOAPIC_ADDRESS + 0x10),
        1 => Just(IOAPIC_ADDRESS + 0x40),
        4 => (0u64..3, 0u64..3).prop_map(|(timer, register)| HPET_ADDRESS + 0x100 + timer * 0x20 + register * 8),
        2 => (0u64..0x100).prop_map(|offset| HPET_ADDRESS + offset),
    ];
    let width = prop_oneof![Just(1usize), Just(2), Just(4)];
    let value = prop_oneof![0u64..0x50, any::<u64>()];
    let step = prop_oneof![
        3 => (port.clone(), width.clone()).prop_map(|(port, len)| Step::Read(port, len)),
        6 => (port, width, any::<u32>()).prop_map(|(port, len, value)| Step::Write(port, len, value)),
        1 => gpa.clone().prop_map(|gpa| Step::ReadMemory(gpa, 4)),
        4 => (gpa, value).prop_map(|(gpa, value)| Step::WriteMemory(gpa, value)),
        1 => Just(Step::Acknowledge),
        1 => any::<u8>().prop_map(Step::EndOfInterrupt),
        2 => (0u64..2_000_000_000).prop_map(Step::Pass),
        1 => (1u8..0x80).prop_map(Step::Key),
    ];
    proptest::collection::vec(step, 0..80)
}

/// Does `step` and returns what the guest's program sees of it.
fn observe(machine: &Machine, step: &Step) -> (Vec<u8>, u8) {
    let mut data = Vec::new();
    let mut vector = 0;
    match *step {
        Step::Read(port, len) => {
            data.resize(len, 0);
            machine.ports.read(port, &mut data);
        }
        Step::Write(port, len, value) => machine.ports.write(port, &value.to_le_bytes()[..len]),
        Step::ReadMemory(gpa, len) => {
            data.resize(len, 0);
            machine.memory.read(gpa, &mut data);
        }
        Step::WriteMemory(gpa, value) => machine.memory.write(gpa, &value.to_le_bytes()[..4]),
        Step::Acknowledge => vector = machine.pic.acknowledge(),
        Step::EndOfInterrupt(vector) => machine.ioapic.end_of_interrupt(vector),
        Step::Pass(nanos) => {
            machine.clock.set(machine.clock.now() + nanos);
            for device in &machine.devices {
                device.start(); // brings counters up to the new time
            }
        }
        Step::Key(code) => drop(machine.i8042.key(code, false, true)),
    }
    (data, vector)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_restored_chipset_goes_on_like_the_saved_one(
        before in steps(), other in steps(), after in steps(),
    ) {
        let first = Machine::new();
        for step in &before {
            observe(&first, step);
        }
        first.stop();
        let states = first.save();
        // Devices are restored in any order: interrupts' levels are not made up on the way.
        for reversed in [false, true] {
            let second = Machine::new();
            for step in &other {
                observe(&second, step); // a machine with another past
            }
            second.clock.set(first.clock.now());
            let mut pairs: Vec<_> = second.devices.iter().zip(&states).collect();
            if reversed {
                pairs.reverse();
            }
            for (device, state) in pairs {
                device.restore(state).unwrap();
            }
            prop_assert_eq!(&second.save(), &states);
            prop_assert_eq!(second.pic.is_pending(), first.pic.is_pending());
            second.outside.messages.lock().clear();
            if reversed {
                first.outside.messages.lock().clear();
                for step in &after {
                    prop_assert_eq!(observe(&first, step), observe(&second, step));
                    prop_assert_eq!(first.pic.is_pending(), second.pic.is_pending());
                }
                prop_assert_eq!(first.sorted_messages(), second.sorted_messages());
            }
        }
    }
}
