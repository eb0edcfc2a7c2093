use super::*;
use crate::test_bench::{EventLog, Ports, SignalLog};
use proptest::prelude::*;

struct Bench {
    controller: Arc<I8042>,
    ports: Ports,
    events: Arc<EventLog>,
    log: Arc<SignalLog>,
    a20: Arc<A20Gate>,
}

fn bench_with(config: I8042Config) -> Bench {
    let (events, log, a20) = (EventLog::new(), SignalLog::new(), A20Gate::new());
    let controller = I8042::new(config, log.line(1), log.line(12), events.clone(), a20.clone());
    Bench { ports: Ports::new(controller.port_regions()), controller, events, log, a20 }
}

fn bench() -> Bench {
    bench_with(I8042Config::default())
}

impl Bench {
    fn command(&self, command: u8) {
        self.ports.write(0x64, command);
    }

    fn data(&self, value: u8) {
        self.ports.write(0x60, value);
    }

    /// Everything that there is to read, with whether it came from the auxiliary port.
    fn drain(&self) -> Vec<(u8, bool)> {
        let mut bytes = Vec::new();
        loop {
            let status = self.ports.read(0x64);
            if status & STATUS_OUTPUT_FULL == 0 {
                return bytes;
            }
            bytes.push((self.ports.read(0x60), status & STATUS_AUX != 0));
        }
    }

    fn keyboard(&self, byte: u8) -> Vec<u8> {
        self.data(byte);
        self.drain().into_iter().map(|(byte, _)| byte).collect()
    }

    fn mouse(&self, byte: u8) -> Vec<u8> {
        self.command(0xd4);
        self.data(byte);
        let answer = self.drain();
        assert!(answer.iter().all(|(_, aux)| *aux));
        answer.into_iter().map(|(byte, _)| byte).collect()
    }
}

#[test]
fn a_driver_finds_a_working_controller() {
    let bench = bench();
    assert_eq!(bench.ports.read(0x64) & STATUS_OUTPUT_FULL, 0);
    bench.command(0xaa);
    assert_eq!(bench.drain(), [(0x55, false)]);
    bench.command(0xab);
    assert_eq!(bench.drain(), [(0x00, false)]);
    bench.command(0x20);
    let mode = bench.drain()[0].0;
    bench.command(0x60);
    bench.data(mode & !MODE_AUX_INTERRUPT);
    bench.command(0x20);
    assert_eq!(bench.drain(), [(mode & !MODE_AUX_INTERRUPT, false)]);
    bench.command(0xd3);
    bench.data(0x5a);
    assert_eq!(bench.drain(), [(0x5a, true)], "the auxiliary port loops back");
    bench.command(0xa7);
    bench.command(0x20);
    assert_ne!(bench.drain()[0].0 & MODE_AUX_OFF, 0);
    bench.command(0xa8);
    bench.command(0x20);
    assert_eq!(bench.drain()[0].0 & MODE_AUX_OFF, 0);
}

#[test]
fn resets_and_a20() {
    let bench = bench();
    bench.command(0xf1);
    assert!(bench.events.take().is_empty());
    bench.command(0xfe);
    assert_eq!(bench.events.take(), [PowerEvent::Reset]);
    bench.command(0xd1);
    bench.data(0x01);
    assert!(!bench.a20.is_open());
    bench.command(0xd0);
    assert_eq!(bench.drain()[0].0 & 3, 1);
    bench.command(0xdf);
    assert!(bench.a20.is_open() && bench.events.take().is_empty());
    bench.command(0xd1);
    bench.data(0x02);
    assert_eq!(bench.events.take(), [PowerEvent::Reset]);
}

#[test]
fn the_keyboard_answers_and_types() {
    let bench = bench();
    assert_eq!(bench.keyboard(0xff), [0xfa, 0xaa]);
    assert_eq!(bench.keyboard(0xf2), [0xfa, 0xab, 0x41]);
    assert_eq!(bench.keyboard(0xed), [0xfa]);
    assert_eq!(bench.keyboard(0x07), [0xfa]);
    assert_eq!(bench.keyboard(0xee), [0xee]);
    assert_eq!(bench.keyboard(0x12), [0xfe]);
    assert_eq!(bench.keyboard(0xf5), [0xfa]);
    assert!(!bench.controller.key(0x1e, false, true));
    assert_eq!(bench.keyboard(0xf4), [0xfa]);
    assert!(bench.controller.key(0x1e, false, true) && bench.controller.key(0x48, true, false));
    let typed: Vec<_> = bench.drain().into_iter().map(|(byte, _)| byte).collect();
    assert_eq!(typed, [0x1e, 0xe0, 0xc8]);
    bench.command(0x60);
    bench.data(MODE_KEYBOARD_INTERRUPT);
    bench.controller.key(0x1e, false, false);
    let typed: Vec<_> = bench.drain().into_iter().map(|(byte, _)| byte).collect();
    assert_eq!(typed, [0xf0, 0x1c]);
    assert_eq!(bench.keyboard(0xf2), [0xfa, 0xab, 0x83]);
}

#[test]
fn each_byte_interrupts_on_its_own() {
    let bench = bench();
    bench.data(0xf2);
    assert_eq!(bench.log.take(), [(1, true)]);
    bench.ports.read(0x60);
    assert_eq!(bench.log.take(), [(1, false), (1, true)]);
    bench.ports.read(0x60);
    bench.ports.read(0x60);
    assert_eq!(bench.log.take(), [(1, false), (1, true), (1, false)]);
    bench.command(0xd4);
    bench.data(0xf2);
    assert_eq!(bench.log.take(), [(12, true)]);
    bench.drain();
    assert_eq!(bench.log.take(), [(12, false), (12, true), (12, false)]);
}

#[test]
fn the_mouse_answers_and_moves() {
    let bench = bench();
    assert_eq!(bench.mouse(0xff), [0xfa, 0xaa, 0x00]);
    assert_eq!(bench.mouse(0xf2), [0xfa, 0x00]);
    for rate in [200, 100, 80] {
        assert_eq!(bench.mouse(0xf3), [0xfa]);
        assert_eq!(bench.mouse(rate), [0xfa]);
    }
    assert_eq!(bench.mouse(0xf2), [0xfa, 0x03]);
    assert!(!bench.controller.mouse(5, 0, 0, 0));
    assert_eq!(bench.mouse(0xf6), [0xfa]);
    assert_eq!(bench.mouse(0xf4), [0xfa]);
    assert!(bench.controller.mouse(300, -2, -1, 0b110));
    let report: Vec<_> = bench.drain().into_iter().map(|(byte, _)| byte).collect();
    assert_eq!(report, [0x2e, 0xff, 0xfe, 0xff]);
    assert_eq!(bench.mouse(0xe9), [0xfa, 0x20 | 0b011, 2, 100]);
    assert_eq!(bench.mouse(0xeb), [0xfa, 0x0e, 45, 0, 0]);
}

#[test]
fn absent_devices_time_out_at_once() {
    let bench = bench_with(I8042Config { keyboard: false, mouse: false });
    bench.data(0xf2);
    assert_ne!(bench.ports.read(0x64) & STATUS_TIMEOUT, 0);
    assert_eq!(bench.drain(), [(0xfe, false)]);
    assert_eq!(bench.mouse(0xf2), [0xfe]);
    assert!(!bench.controller.key(0x1e, false, true) && !bench.controller.mouse(1, 1, 0, 0));
}

#[derive(Debug, Clone)]
enum Step {
    Read(u16),
    Write(u16, u8),
    Key(u8, bool, bool),
    Mouse(i32, i32, i32, u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let port = prop_oneof![Just(0x60u16), Just(0x64)];
    let step = prop_oneof![
        4 => port.prop_map(Step::Read),
        2 => any::<u8>().prop_map(|value| Step::Write(0x60, value)),
        1 => (0xe6u8..).prop_map(|value| Step::Write(0x60, value)),
        2 => any::<u8>().prop_map(|value| Step::Write(0x64, value)),
        2 => Just(Step::Write(0x64, 0xd4)),
        1 => any::<(u8, bool, bool)>().prop_map(|(code, extended, pressed)| Step::Key(code, extended, pressed)),
        1 => any::<(i32, i32, i32, u8)>().prop_map(|(x, y, wheel, buttons)| Step::Mouse(x, y, wheel, buttons)),
    ];
    proptest::collection::vec(step, 0..80)
}

fn observe(bench: &Bench, step: &Step) -> (u8, bool, Vec<(u32, bool)>, Vec<PowerEvent>) {
    let mut result = (0, false);
    match *step {
        Step::Read(port) => result.0 = bench.ports.read(port),
        Step::Write(port, value) => bench.ports.write(port, value),
        Step::Key(code, extended, pressed) => result.1 = bench.controller.key(code, extended, pressed),
        Step::Mouse(x, y, wheel, buttons) => result.1 = bench.controller.mouse(x, y, wheel, buttons),
    }
    (result.0, result.1, bench.log.take(), bench.events.take())
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
        second.a20.set(first.a20.is_open());
        second.controller.restore(&first.controller.save()).unwrap();
        second.log.take();
        for step in &after {
            prop_assert_eq!(observe(&first, step), observe(&second, step));
        }
    }

    #[test]
    fn any_bytes_as_state_are_refused_or_harmless(
        bytes in proptest::collection::vec(any::<u8>(), 0..100), steps in steps(),
    ) {
        let bench = bench();
        let _ = bench.controller.restore(&SavedState { kind: I8042::KIND.into(), version: 1, bytes });
        for step in &steps {
            observe(&bench, step);
        }
    }
}
