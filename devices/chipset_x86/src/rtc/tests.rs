use super::*;
use crate::test_bench::{Ports, SignalLog, Time};
use proptest::prelude::*;

/// 2024-02-28 23:59:50 UTC, a Wednesday.
const START: i64 = 1_709_164_790;

struct Bench {
    time: Time,
    rtc: Arc<Rtc>,
    ports: Ports,
    line: IrqLine,
}

fn bench() -> Bench {
    let time = Time::new();
    let line = SignalLog::new().line(8);
    let config = RtcConfig { seconds: START, memory_below_4g: 3 << 30, memory_above_4g: 5 << 30, vcpus: 4 };
    let rtc = Rtc::new(&config, &time.timers, line.clone());
    Bench { time, ports: Ports::new(rtc.port_regions()), rtc, line }
}

impl Bench {
    fn read(&self, register: u8) -> u8 {
        self.ports.write(0x70, register);
        self.ports.read(0x71)
    }

    fn write(&self, register: u8, value: u8) {
        self.ports.write(0x70, register);
        self.ports.write(0x71, value);
    }

    fn seconds_later(&self, seconds: u64) {
        self.time.pass(seconds * NANOS_PER_SECOND);
        self.rtc.access(|_, _| {});
    }

    /// Century to second as the registers show them.
    fn registers(&self) -> [u8; 7] {
        [CMOS_CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS].map(|register| self.read(register))
    }
}

#[test]
fn the_time_goes_on_in_each_format() {
    let bench = bench();
    assert_eq!(bench.registers(), [0x20, 0x24, 0x02, 0x28, 0x23, 0x59, 0x50]);
    assert_eq!(bench.read(DAY_OF_WEEK), 4);
    assert_eq!(bench.read(REG_D), 0x80);
    bench.write(REG_B, B_BINARY);
    assert_eq!(bench.registers(), [20, 24, 2, 28, 0x8b, 59, 50]);
    bench.seconds_later(10);
    assert_eq!(bench.registers(), [20, 24, 2, 29, 12, 0, 0]);
    bench.write(REG_B, 0);
    bench.seconds_later(13 * 3600);
    assert_eq!(bench.registers(), [0x20, 0x24, 0x02, 0x29, 0x81, 0, 0]);
}

#[test]
fn the_time_can_be_set() {
    let bench = bench();
    bench.time.pass(NANOS_PER_SECOND / 4);
    // As Linux does: updates off, divider in reset, then back in the same order.
    bench.write(REG_B, B_SET | B_24_HOURS);
    bench.write(REG_A, 0x70);
    for (register, value) in [
        (CMOS_CENTURY, 0x19),
        (YEAR, 0x99),
        (MONTH, 0x12),
        (DAY, 0x31),
        (HOURS, 0x23),
        (MINUTES, 0x59),
        (SECONDS, 0x59),
    ] {
        bench.write(register, value);
    }
    bench.seconds_later(3);
    assert_eq!(bench.read(SECONDS), 0x59);
    bench.write(REG_B, B_24_HOURS);
    bench.write(REG_A, 0x26);
    bench.time.pass(NANOS_PER_SECOND / 2 - 1000);
    assert_eq!(bench.read(REG_A), 0xa6, "an update is in progress");
    assert_eq!(bench.read(SECONDS), 0x59);
    bench.time.pass(1000);
    assert_eq!(bench.read(REG_A), 0x26);
    assert_eq!(bench.registers(), [0x20, 0, 1, 1, 0, 0, 0]);
    assert_eq!(bench.read(DAY_OF_WEEK), 7);
    bench.write(MINUTES, 0x30); // while it runs
    assert_eq!(bench.registers(), [0x20, 0, 1, 1, 0, 0x30, 0]);
}

#[test]
fn updates_alarms_and_periods_interrupt() {
    let bench = bench();
    bench.write(REG_C, 0);
    bench.read(REG_C);
    bench.write(REG_B, B_24_HOURS | B_UPDATE_ENABLE);
    assert!(!bench.line.level());
    bench.seconds_later(1);
    assert!(bench.line.level());
    assert_eq!(bench.read(REG_C) & 0xb0, C_INTERRUPT | C_UPDATE);
    assert!(!bench.line.level());

    for (register, value) in [(HOURS_ALARM, 0x00), (MINUTES_ALARM, 0xff), (SECONDS_ALARM, 0x30)] {
        bench.write(register, value);
    }
    bench.write(REG_B, B_24_HOURS | B_ALARM_ENABLE);
    let wanted = bench.rtc.state.lock().deadline(bench.time.clock.now());
    assert_eq!(wanted, Some(40 * NANOS_PER_SECOND), "at 00:00:30");
    bench.seconds_later(38);
    assert!(!bench.line.level());
    bench.seconds_later(1);
    assert!(bench.line.level());
    assert_eq!(bench.read(REG_C) & 0xa0, C_INTERRUPT | C_ALARM);

    bench.write(REG_A, 0x26);
    bench.write(REG_B, B_24_HOURS | B_PERIODIC_ENABLE);
    bench.read(REG_C);
    bench.time.pass(NANOS_PER_SECOND / 1024 - 1000);
    bench.rtc.access(|_, _| {});
    assert!(!bench.line.level());
    bench.time.pass(2000);
    bench.rtc.access(|_, _| {});
    assert!(bench.line.level());
    bench.rtc.reset();
    assert!(!bench.line.level());
}

#[test]
fn interrupts_come_without_accesses() {
    let bench = bench();
    bench.write(REG_B, B_24_HOURS | B_PERIODIC_ENABLE);
    bench.time.clock.start();
    bench.time.timers.clock_changed();
    for _ in 0..3 {
        let begin = std::time::Instant::now();
        while !bench.line.level() && begin.elapsed().as_secs() < 20 {
            std::thread::yield_now();
        }
        assert!(bench.line.level());
        bench.read(REG_C);
    }
}

#[test]
fn the_memory_holds_sizes_and_what_is_written() {
    let bench = bench();
    let word = |register| u16::from_le_bytes([bench.read(register), bench.read(register + 1)]);
    assert_eq!((word(0x15), word(0x17), word(0x30)), (640, 0xffff, 0xffff));
    assert_eq!(u32::from(word(0x34)) * 65536 + (16 << 20), 3 << 30);
    let above_4g = u64::from(bench.read(0x5d)) << 16 | u64::from(word(0x5b));
    assert_eq!(above_4g << 16, 5 << 30);
    assert_eq!(bench.read(0x5f), 3);
    bench.write(0x8f, 0x0a);
    assert_eq!(bench.read(0x0f), 0x0a);
    bench.rtc.reset();
    assert_eq!(bench.read(0x0f), 0x0a);
    assert_eq!(bench.read(SECONDS), 0x50);
}

#[test]
fn what_nobody_has_looked_at_yet_is_saved() {
    let first = bench();
    first.time.pass(7_300_000_000);
    let second = bench();
    second.time.clock.set(first.time.clock.now());
    let saved = first.rtc.save();
    second.rtc.restore(&saved).unwrap();
    assert_eq!(second.rtc.save(), saved);
    assert_eq!(second.registers(), [0x20, 0x24, 0x02, 0x28, 0x23, 0x59, 0x57]);
}

type Step = (bool, u8, u8, u64);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let register = prop_oneof![3 => 0u8..0x0e, 1 => Just(CMOS_CENTURY), 1 => any::<u8>()];
    let pause = prop_oneof![4 => 0u64..2_000_000, 2 => 0u64..3_000_000_000, 1 => 0u64..200_000_000_000_000];
    proptest::collection::vec((any::<bool>(), register, any::<u8>(), pause), 0..50)
}

fn observe(bench: &Bench, &(write, register, value, pause): &Step) -> (u8, bool, Option<Nanos>) {
    bench.time.pass(pause);
    let result = if write {
        bench.write(register, value);
        0
    } else {
        bench.read(register)
    };
    let deadline = bench.rtc.state.lock().deadline(bench.time.clock.now());
    (result, bench.line.level(), deadline)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn a_restored_clock_goes_on_like_the_saved_one(before in steps(), after in steps()) {
        let first = bench();
        for step in &before {
            observe(&first, step);
        }
        let second = bench();
        second.time.clock.set(first.time.clock.now());
        second.rtc.restore(&first.rtc.save()).unwrap();
        prop_assert_eq!(first.line.level(), second.line.level());
        for step in &after {
            prop_assert_eq!(observe(&first, step), observe(&second, step));
        }
    }

    #[test]
    fn hostile_states_are_refused_or_harmless(
        cmos in proptest::collection::vec(any::<u8>(), 127..130),
        flags in any::<u8>(), base in any::<i64>(), seen in any::<i64>(), phase in any::<u64>(),
        small in any::<bool>(), steps in steps(),
    ) {
        let bench = bench();
        let (base, seen_seconds, phase) =
            if small { (base >> 24, seen >> 24, phase % NANOS_PER_SECOND) } else { (base, seen, phase) };
        let state = RtcState { index: flags, cmos, flags: flags & C_FLAGS, base, phase, seen_seconds, seen_periods: phase };
        let _ = bench.rtc.restore(&encode(Rtc::KIND, 1, &state));
        for step in &steps {
            observe(&bench, step);
        }
    }
}
