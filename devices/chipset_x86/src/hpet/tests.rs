use super::*;
use crate::test_bench::{SignalLog, Time};
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering};

struct Bench {
    time: Time,
    hpet: Arc<Hpet>,
    log: Arc<SignalLog>,
    legacy: Arc<AtomicBool>,
}

fn bench() -> Bench {
    let time = Time::new();
    let log = SignalLog::new();
    let legacy = Arc::new(AtomicBool::new(false));
    let switch = legacy.clone();
    let wiring = HpetWiring {
        legacy: [log.line(0), log.line(8)],
        routes: vec![(20, log.line(20)), (21, log.line(21))],
        set_legacy_replacement: Box::new(move |on| switch.store(on, Ordering::SeqCst)),
        messages: Some(log.clone()),
    };
    Bench { hpet: Hpet::new(&time.timers, wiring), time, log, legacy }
}

impl Bench {
    fn read(&self, offset: u64) -> u64 {
        let mut data = [0; 8];
        self.hpet.mmio_read(offset, &mut data);
        u64::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u64) {
        self.hpet.mmio_write(offset, &value.to_le_bytes());
    }

    fn write_32(&self, offset: u64, value: u32) {
        self.hpet.mmio_write(offset, &value.to_le_bytes());
    }

    fn set_tick(&self, tick: u64) {
        self.time.clock.set(tick * 10);
        self.hpet.access(|_, _| {});
    }
}

#[test]
fn the_counter_counts_while_enabled() {
    let bench = bench();
    assert_eq!(bench.read(0), 0x0098_9680_8086_a201);
    assert_eq!(bench.read(0x100) >> 32, 0x0030_0000);
    bench.set_tick(1000);
    assert_eq!(bench.read(0xf0), 0);
    bench.write(0x10, 1);
    bench.set_tick(1500);
    assert_eq!(bench.read(0xf0), 500);
    bench.write(0x10, 0);
    bench.set_tick(2000);
    assert_eq!(bench.read(0xf0), 500);
    bench.write_32(0xf4, 1);
    bench.write(0x10, 1);
    bench.set_tick(2001);
    assert_eq!(bench.read(0xf0), (1 << 32) + 501);
    let mut half = [0; 4];
    bench.hpet.mmio_read(0xf4, &mut half);
    assert_eq!(u32::from_le_bytes(half), 1);
}

#[test]
fn legacy_replacement_takes_the_timers_interrupts() {
    let bench = bench();
    bench.write(0x10, 3);
    assert!(bench.legacy.load(Ordering::SeqCst));
    // As Linux sets its periodic clock event device up.
    bench.write_32(0x100, (0x4 | 0x8 | 0x40 | 0x100) as u32);
    bench.write_32(0x108, 100_000);
    bench.write_32(0x108, 100_000);
    for tick in 1..=4 {
        bench.set_tick(tick * 100_000 - 1);
        assert_eq!(bench.log.take_rises(), 0);
        bench.set_tick(tick * 100_000);
        assert_eq!(bench.log.take(), [(0, true), (0, false)]);
    }
    assert_eq!(bench.read(0x108), 500_000);
    bench.set_tick(8 * 100_000);
    assert_eq!(bench.log.take_rises(), 1);
    let mut rises = 0;
    for half in 17..=24 {
        bench.set_tick(half * 50_000 + half);
        rises += bench.log.take_rises();
    }
    assert_eq!(rises, 4 + 3, "four in time and three that were missed");
    bench.set_tick(1 << 40);
    let state = bench.hpet.state.lock().clone();
    assert!(state.deadline(10 << 40).unwrap() <= (10 << 40) + 500_000);
}

#[test]
fn one_shots_match_once_in_32_bits_and_64() {
    let bench = bench();
    bench.write(0x10, 1);
    bench.write(0x120, 20 << 9 | 0x4 | 0x100);
    bench.write(0x128, 1000);
    bench.set_tick(999);
    assert_eq!(bench.log.take_rises(), 0);
    bench.set_tick(1000);
    assert_eq!(bench.log.take(), [(20, true), (20, false)]);
    bench.set_tick(1_000_000);
    bench.write(0x128, 5); // behind the counter: not before it has wrapped
    bench.set_tick((1 << 32) + 4);
    assert_eq!(bench.log.take_rises(), 0);
    bench.set_tick((1 << 32) + 5);
    assert_eq!(bench.log.take_rises(), 1);
    bench.write(0x120, 20 << 9 | 0x4);
    bench.set_tick((1 << 33) + 5);
    assert_eq!(bench.log.take_rises(), 0);
}

#[test]
fn levels_stay_until_they_are_cleared() {
    let bench = bench();
    bench.write(0x10, 1);
    bench.write(0x140, 21 << 9 | 0x6);
    bench.write(0x148, 100);
    bench.set_tick(100);
    assert_eq!(bench.log.take(), [(21, true)]);
    assert_eq!(bench.read(0x20), 4);
    bench.write(0x20, 4);
    assert_eq!(bench.log.take(), [(21, false)]);
    assert_eq!(bench.read(0x20), 0);
}

#[test]
fn messages_go_where_the_guest_says() {
    let bench = bench();
    bench.write(0x10, 1);
    bench.write(0x140, 0x4004);
    bench.write(0x150, 0xfee0_1000_0000_0031);
    bench.write(0x148, 100);
    bench.set_tick(100);
    assert_eq!(bench.log.take_messages(), [MsiMessage { address: 0xfee0_1000, data: 0x31 }]);
}

#[test]
fn the_timer_service_delivers_without_accesses() {
    let bench = bench();
    bench.write(0x10, 3);
    bench.write(0x100, 0x4 | 0x8 | 0x40);
    bench.write(0x108, 100_000);
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

type Step = (bool, u64, usize, u64, u64);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let offset = prop_oneof![
        2 => Just(0x10u64), 1 => Just(0x20), 1 => Just(0xf0),
        8 => (0u64..3, 0u64..3).prop_map(|(timer, register)| 0x100 + timer * 0x20 + register * 8),
        1 => 0u64..0x400,
    ];
    let len = prop_oneof![Just(4usize), Just(8), Just(1)];
    let value = prop_oneof![0u64..4096, any::<u64>()];
    let pause = prop_oneof![0u64..100_000, 0u64..50_000_000_000];
    proptest::collection::vec((any::<bool>(), offset, len, value, pause), 0..50)
}

fn observe(bench: &Bench, &(write, offset, len, value, pause): &Step) -> (u64, Option<Nanos>, bool) {
    bench.time.pass(pause);
    let mut data = value.to_le_bytes();
    if write {
        bench.hpet.mmio_write(offset, &data[..len]);
    } else {
        bench.hpet.mmio_read(offset, &mut data[..len]);
    }
    bench.hpet.access(|_, _| {}); // some accesses touch no register
    let deadline = bench.hpet.state.lock().deadline(bench.time.clock.now());
    (u64::from_le_bytes(data), deadline, bench.legacy.load(Ordering::SeqCst))
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
        second.hpet.restore(&first.hpet.save()).unwrap();
        for step in &after {
            prop_assert_eq!(observe(&first, step), observe(&second, step));
        }
    }

    #[test]
    fn any_bytes_as_state_are_refused_or_harmless(
        bytes in proptest::collection::vec(any::<u8>(), 0..100), steps in steps(),
    ) {
        let bench = bench();
        let _ = bench.hpet.restore(&SavedState { kind: Hpet::KIND.into(), version: 1, bytes });
        for step in &steps {
            observe(&bench, step);
        }
    }
}
