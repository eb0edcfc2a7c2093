use super::*;
use crate::backlog::MAX_BACKLOG;
use crate::test_bench::{Ports, SignalLog, Time};
use proptest::prelude::*;

struct Bench {
    time: Time,
    pit: Arc<Pit>,
    ports: Ports,
    log: Arc<SignalLog>,
}

fn bench() -> Bench {
    let time = Time::new();
    let log = SignalLog::new();
    let pit = Pit::new(&time.timers, log.line(0));
    Bench { time, ports: Ports::new(pit.port_regions()), pit, log }
}

impl Bench {
    fn program(&self, channel: u16, mode: u8, count: u16) {
        self.ports.write(0x43, (channel as u8) << 6 | 0x30 | mode << 1);
        self.ports.write(0x40 + channel, count as u8);
        self.ports.write(0x40 + channel, (count >> 8) as u8);
    }

    fn set_tick(&self, tick: u64) {
        self.time.clock.set(nanos_for(tick, PIT_HZ));
        self.pit.access(|_, _| {});
    }

    fn count(&self, channel: u16) -> u16 {
        self.ports.write(0x43, (channel as u8) << 6);
        let low = self.ports.read(0x40 + channel);
        u16::from_le_bytes([low, self.ports.read(0x40 + channel)])
    }

    fn status(&self, channel: u16) -> u8 {
        self.ports.write(0x43, 0xe0 | 2 << channel);
        self.ports.read(0x40 + channel)
    }
}

#[test]
fn the_rate_generator_ticks_for_each_period() {
    let bench = bench();
    bench.program(0, 2, 1000);
    assert_eq!(bench.status(0), 0xb4);
    bench.set_tick(10);
    assert_eq!(bench.count(0), 990);
    bench.set_tick(999);
    assert_eq!(bench.status(0), 0x34);
    assert_eq!(bench.log.take_rises(), 0);
    for tick in 1..=5 {
        bench.set_tick(1000 * tick + 3);
        assert_eq!(bench.log.take_rises(), 1);
        assert_eq!(bench.count(0), 997);
    }
}

#[test]
fn missed_ticks_are_made_up_for_within_a_bound() {
    let bench = bench();
    let period = 11_932;
    bench.program(0, 2, period);
    bench.set_tick(4 * u64::from(period));
    assert_eq!(bench.log.take_rises(), 1);
    let mut rises = 0;
    for half in 9..=14 {
        bench.set_tick(half * u64::from(period) / 2 + half);
        rises += bench.log.take_rises();
    }
    assert_eq!(rises, 6, "three ticks in time and the three that were missed");
    bench.set_tick(1_000_000 * u64::from(period));
    let backlog = bench.pit.state.lock().backlog.missed();
    assert_eq!(backlog, MAX_BACKLOG);
    bench.program(0, 0, period);
    assert_eq!(bench.pit.state.lock().backlog.missed(), 0);
}

#[test]
fn one_shots_interrupt_once() {
    for mode in [0, 4] {
        let bench = bench();
        bench.program(0, mode, 100);
        bench.set_tick(99);
        assert_eq!(bench.log.take_rises(), 0);
        bench.set_tick(100);
        assert_eq!(bench.log.take_rises(), 1);
        bench.set_tick(300);
        assert_eq!(bench.log.take_rises(), 0);
        assert_eq!(bench.count(0), (100u16).wrapping_sub(300));
        assert_eq!(bench.status(0) >> 7, 1);
        // Another count alone starts it again.
        bench.ports.write(0x40, 50);
        bench.ports.write(0x40, 0);
        bench.set_tick(350);
        assert_eq!(bench.log.take_rises(), 1);
    }
}

#[test]
fn the_timer_service_delivers_without_accesses() {
    let bench = bench();
    bench.program(0, 2, 1000);
    bench.time.clock.start();
    bench.time.timers.clock_changed();
    let begin = std::time::Instant::now();
    let mut rises = 0;
    while rises < 5 && begin.elapsed().as_secs() < 20 {
        rises += bench.log.take_rises();
        std::thread::yield_now();
    }
    assert!(rises >= 5);
}

#[test]
fn channel_2_is_gated_by_port_b_which_shows_its_output() {
    let bench = bench();
    bench.program(2, 0, 1000);
    bench.set_tick(5000);
    assert_eq!(bench.ports.read(0x61) & 0x2f, 0);
    assert_eq!(bench.count(2), 1000);
    bench.ports.write(0x61, 1);
    bench.set_tick(5400);
    assert_eq!(bench.count(2), 600);
    bench.ports.write(0x61, 0);
    bench.set_tick(9000);
    assert_eq!(bench.count(2), 600);
    bench.ports.write(0x61, 0xf1);
    bench.set_tick(9600);
    assert_eq!(bench.ports.read(0x61) & 0xef, 0x21);
    let before = bench.ports.read(0x61) & 0x10;
    bench.time.pass(REFRESH_NANOS);
    assert_ne!(bench.ports.read(0x61) & 0x10, before);
}

#[test]
fn the_square_wave_and_the_gate_triggered_modes() {
    let bench = bench();
    bench.ports.write(0x61, 1);
    bench.program(2, 3, 100);
    for (tick, output, count) in
        [(0, true, 100), (49, true, 2), (50, false, 100), (99, false, 2), (100, true, 100)]
    {
        bench.set_tick(tick);
        assert_eq!((bench.status(2) >> 7 != 0, bench.count(2)), (output, count), "tick {tick}");
    }
    bench.program(2, 1, 100);
    bench.set_tick(500);
    assert_eq!(bench.status(2) >> 7, 1, "not triggered");
    bench.ports.write(0x61, 0);
    bench.ports.write(0x61, 1);
    assert_eq!(bench.status(2) >> 7, 0);
    bench.set_tick(600);
    assert_eq!(bench.status(2) >> 7, 1);
}

#[test]
fn a_new_rate_begins_with_the_next_period() {
    let bench = bench();
    bench.program(0, 2, 1000);
    bench.set_tick(1500);
    bench.ports.write(0x40, 100);
    bench.ports.write(0x40, 0);
    assert_eq!(bench.status(0) & 0x40, 0x40);
    assert_eq!(bench.count(0), 500);
    bench.set_tick(2050);
    assert_eq!(bench.count(0), 50);
    assert_eq!(bench.status(0) & 0x40, 0);
    assert_eq!(bench.log.take_rises(), 2);
}

#[test]
fn bcd_and_single_bytes() {
    let bench = bench();
    bench.ports.write(0x43, 0x35);
    bench.ports.write(0x40, 0x00);
    bench.ports.write(0x40, 0x10);
    bench.set_tick(1);
    assert_eq!(bench.count(0), 0x0999);
    bench.ports.write(0x43, 0x24); // high byte only, mode 2
    bench.ports.write(0x40, 0x01);
    bench.set_tick(2);
    assert_eq!(bench.ports.read(0x40), 0);
    bench.ports.write(0x43, 0x14);
    bench.ports.write(0x40, 0);
    bench.set_tick(4);
    assert_eq!(bench.ports.read(0x40), 0xfe);
}

#[test]
fn the_shortest_period_does_not_storm() {
    let bench = bench();
    bench.program(0, 2, 1);
    let mut rises = 0;
    let mut deadline = 0;
    for _ in 0..100 {
        bench.time.pass(1000);
        if deadline <= bench.time.clock.now() {
            bench.pit.access(|_, _| {});
            rises += bench.log.take_rises();
            deadline = bench.pit.state.lock().deadline(bench.time.clock.now()).unwrap();
        }
    }
    assert!((1..=3).contains(&rises), "{rises} interrupts in 100 µs");
}

type Step = (u8, u16, u8, u32);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let port = prop_oneof![0x40u16..0x44, Just(0x43), Just(0x61)];
    proptest::collection::vec((0u8..3, port, any::<u8>(), 0u32..3_000_000), 0..60)
}

fn observe(bench: &Bench, &(kind, port, value, pause): &Step) -> (u8, Option<Nanos>) {
    bench.time.pass(pause.into());
    let result = match kind {
        0 => bench.ports.read(port),
        _ => {
            bench.ports.write(port, value);
            0
        }
    };
    let deadline = bench.pit.state.lock().deadline(bench.time.clock.now());
    (result, deadline)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn a_restored_timer_goes_on_like_the_saved_one(before in steps(), after in steps()) {
        let first = bench();
        for step in &before {
            observe(&first, step);
        }
        let second = bench();
        second.time.clock.set(first.time.clock.now());
        second.pit.restore(&first.pit.save()).unwrap();
        for step in &after {
            prop_assert_eq!(observe(&first, step), observe(&second, step));
        }
    }

    #[test]
    fn any_bytes_as_state_are_refused_or_harmless(
        bytes in proptest::collection::vec(any::<u8>(), 0..60), steps in steps(),
    ) {
        let bench = bench();
        let _ = bench.pit.restore(&SavedState { kind: Pit::KIND.into(), version: 1, bytes });
        for step in &steps {
            observe(&bench, step);
        }
    }
}
