//! The real-time clock and its battery-backed memory (Motorola MC146818A data sheet), as a PC has them.

mod calendar;

use crate::device_timer::DeviceTimer;
use crate::ports::{PortRegion, PortSet, decode_checked, region, take_over};
use calendar::DateTime;
use clock::{NANOS_PER_SECOND, Nanos, TimerService, VmClock, nanos_for, ticks_in};
use device::{Device, SavedState, StateError, encode};
use irq::{IrqLine, OrderedLine};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::{Arc, OnceLock, Weak};

/// First port and number of ports: index, then data.
pub const RTC_PORTS: (u16, u16) = (0x70, 2);
/// The register of the century, for ACPI's FADT.
pub const CMOS_CENTURY: u8 = 0x32;

const REGISTER_COUNT: usize = 128;
const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const DAY_OF_WEEK: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;
const TIME_REGISTERS: [u8; 8] = [SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY, MONTH, YEAR, CMOS_CENTURY];

const A_UPDATE_IN_PROGRESS: u8 = 0x80;
/// The upper two bits of the divider's selection: both set hold the divider in reset.
const A_DIVIDER_RESET: u8 = 0x60;
const A_RATE: u8 = 0x0f;
const B_SET: u8 = 0x80;
const B_UPDATE_ENABLE: u8 = 0x10;
const B_ALARM_ENABLE: u8 = 0x20;
const B_PERIODIC_ENABLE: u8 = 0x40;
const B_SQUARE_WAVE: u8 = 0x08;
const B_BINARY: u8 = 0x04;
const B_24_HOURS: u8 = 0x02;
const C_UPDATE: u8 = 0x10;
const C_ALARM: u8 = 0x20;
const C_PERIODIC: u8 = 0x40;
const C_FLAGS: u8 = C_UPDATE | C_ALARM | C_PERIODIC;
const C_INTERRUPT: u8 = 0x80;
const D_VALID: u8 = 0x80;

/// The time base's frequency, from which periodic interrupts are divided.
const BASE_HZ: u64 = 32_768;
/// How long before an update the update-in-progress bit is set.
const UPDATE_NANOS: u64 = 244_000;
/// Seconds from 1970 beyond which a clock cannot be: ten thousand years and then some.
const MAX_SECONDS: i64 = 1 << 40;

/// What the clock and its memory start with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RtcConfig {
    /// The time when the device is made, in seconds since 1970: the host's, plus any offset, in UTC or in
    /// the guest's local time, as the guest expects.
    pub seconds: i64,
    /// Bytes of memory below 4 GiB.
    pub memory_below_4g: u64,
    /// Bytes of memory from 4 GiB on.
    pub memory_above_4g: u64,
    /// How many vCPUs there are at the start.
    pub vcpus: u8,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct RtcState {
    index: u8,
    /// All registers but those computed: the time, UIP and register C. While the clock is held, the time
    /// as well.
    cmos: Vec<u8>,
    flags: u8,
    /// The clock shows `base` plus the seconds in VM time plus `phase`.
    base: i64,
    /// Nanoseconds, less than a second.
    phase: u64,
    /// The second, in clock time, up to which updates and alarms were noticed.
    seen_seconds: i64,
    /// The number of periods up to which periodic interrupts were noticed.
    seen_periods: u64,
}

impl RtcState {
    fn new(config: &RtcConfig, now: Nanos) -> Self {
        let mut state = Self {
            index: 0,
            cmos: vec![0; REGISTER_COUNT],
            flags: 0,
            base: 0,
            phase: 0,
            seen_seconds: 0,
            seen_periods: 0,
        };
        state.set(REG_A, 0x26); // 32768 Hz crystal, 1024 Hz periodic
        state.set(REG_B, B_24_HOURS);
        state.set_seconds(now, config.seconds.clamp(0, calendar::LAST_SECOND));
        state.store_memory_size(config);
        state
    }

    /// What firmware leaves for boot loaders and kernels to find.
    fn store_memory_size(&mut self, config: &RtcConfig) {
        let mut word = |register: u8, value: u64, max: u64| {
            let bytes = value.min(max).to_le_bytes();
            self.set(register, bytes[0]);
            self.set(register + 1, bytes[1]);
            bytes[2]
        };
        word(0x15, (config.memory_below_4g >> 10).min(640), 640);
        let extended = (config.memory_below_4g >> 10).saturating_sub(1024);
        word(0x17, extended, 0xffff);
        word(0x30, extended, 0xffff);
        word(0x34, (config.memory_below_4g >> 16).saturating_sub(256), 0xffff);
        let highest = word(0x5b, config.memory_above_4g >> 16, 0xff_ffff);
        self.set(0x5d, highest);
        self.set(0x5f, config.vcpus.saturating_sub(1));
        self.set(0x14, 0x06); // equipment: FPU and mouse
    }

    fn sound(&self) -> bool {
        self.cmos.len() == REGISTER_COUNT
            && self.index < REGISTER_COUNT as u8
            && self.flags & !C_FLAGS == 0
            && self.phase < NANOS_PER_SECOND
            && self.base.abs() <= MAX_SECONDS
            && self.seen_seconds.abs() <= MAX_SECONDS
            && self.cmos[usize::from(REG_A)] & A_UPDATE_IN_PROGRESS == 0
    }

    fn get(&self, register: u8) -> u8 {
        self.cmos[usize::from(register & 0x7f)]
    }

    fn set(&mut self, register: u8, value: u8) {
        self.cmos[usize::from(register & 0x7f)] = value;
    }

    fn divider_is_reset(&self) -> bool {
        self.get(REG_A) & A_DIVIDER_RESET == A_DIVIDER_RESET
    }

    /// Time stands still: the guest sets it.
    fn is_held(&self) -> bool {
        self.get(REG_B) & B_SET != 0 || self.divider_is_reset()
    }

    /// The second that the clock is in, in seconds since 1970.
    fn seconds(&self, now: Nanos) -> i64 {
        self.base + (now.saturating_add(self.phase) / NANOS_PER_SECOND) as i64
    }

    /// The moment of VM time at which the second `seconds` of the clock begins.
    fn moment(&self, seconds: i64) -> Nanos {
        let nanos = i128::from(seconds - self.base) * i128::from(NANOS_PER_SECOND) - i128::from(self.phase);
        u64::try_from(nanos.max(0)).unwrap_or(u64::MAX)
    }

    /// Sets the clock to `seconds`.
    fn set_seconds(&mut self, now: Nanos, seconds: i64) {
        self.base = 0;
        self.base = seconds - self.seconds(now);
        self.seen_seconds = seconds;
    }

    fn update_in_progress(&self, now: Nanos) -> bool {
        let into = now.saturating_add(self.phase) % NANOS_PER_SECOND;
        !self.is_held() && into >= NANOS_PER_SECOND - UPDATE_NANOS
    }

    /// The length of a periodic interrupt's period, in ticks of [`BASE_HZ`].
    fn period(&self) -> Option<u64> {
        match self.get(REG_A) & A_RATE {
            0 => None,
            _ if self.divider_is_reset() => None,
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    fn periods(&self, now: Nanos) -> u64 {
        self.period().map_or(0, |period| ticks_in(now, BASE_HZ) / period)
    }

    /// `value` as the guest has chosen to see numbers.
    fn number(&self, value: u8) -> u8 {
        if self.get(REG_B) & B_BINARY != 0 { value } else { ((value / 10 % 10) << 4) | (value % 10) }
    }

    fn decode_number(&self, raw: u8) -> u8 {
        if self.get(REG_B) & B_BINARY != 0 { raw } else { (raw >> 4) * 10 + (raw & 0x0f) }
    }

    fn hour(&self, hour: u8) -> u8 {
        if self.get(REG_B) & B_24_HOURS != 0 {
            return self.number(hour);
        }
        let afternoon = if hour >= 12 { 0x80 } else { 0 };
        self.number(if hour.is_multiple_of(12) { 12 } else { hour % 12 }) | afternoon
    }

    fn decode_hour(&self, raw: u8) -> u8 {
        if self.get(REG_B) & B_24_HOURS != 0 {
            return self.decode_number(raw);
        }
        self.decode_number(raw & 0x7f) % 12 + if raw & 0x80 != 0 { 12 } else { 0 }
    }

    /// The value of time register `register` at `time`.
    fn time_register(&self, register: u8, time: &DateTime) -> u8 {
        match register {
            SECONDS => self.number(time.second),
            MINUTES => self.number(time.minute),
            HOURS => self.hour(time.hour),
            DAY_OF_WEEK => self.number(time.weekday),
            DAY => self.number(time.day),
            MONTH => self.number(time.month),
            YEAR => self.number((time.year % 100) as u8),
            _ => self.number((time.year / 100) as u8),
        }
    }

    /// Puts the time into its registers.
    fn store_time(&mut self, now: Nanos) {
        let time = DateTime::from_seconds(self.seconds(now));
        for register in TIME_REGISTERS {
            let value = self.time_register(register, &time);
            self.set(register, value);
        }
    }

    /// Sets the clock from its registers. (The day of the week follows from the date.)
    fn load_time(&mut self, now: Nanos) {
        let number = |register| self.decode_number(self.get(register));
        let time = DateTime {
            second: number(SECONDS),
            minute: number(MINUTES),
            hour: self.decode_hour(self.get(HOURS)),
            weekday: 1,
            day: number(DAY),
            month: number(MONTH),
            year: u32::from(number(CMOS_CENTURY)) * 100 + u32::from(number(YEAR)),
        };
        self.set_seconds(now, time.to_seconds());
    }

    /// The first second after `after` that the alarm is set for.
    fn alarm_after(&self, after: i64) -> Option<i64> {
        let matches = |register: u8, value: u8| {
            let alarm = self.get(register);
            alarm >= 0xc0 || alarm == value
        };
        let mut seconds = after + 1;
        while seconds <= after + 86_400 {
            let of_day = seconds.rem_euclid(86_400);
            let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
            if !matches(HOURS_ALARM, self.hour(hour as u8)) {
                seconds += 3600 - of_day % 3600;
            } else if !matches(MINUTES_ALARM, self.number(minute as u8)) {
                seconds += 60 - second;
            } else if !matches(SECONDS_ALARM, self.number(second as u8)) {
                seconds += 1;
            } else {
                return Some(seconds);
            }
        }
        None
    }

    /// Notices what has happened up to `now`.
    fn advance(&mut self, now: Nanos) {
        if !self.is_held() {
            let seconds = self.seconds(now);
            if seconds != self.seen_seconds {
                self.flags |= C_UPDATE;
                if self.alarm_after(self.seen_seconds).is_some_and(|alarm| alarm <= seconds) {
                    self.flags |= C_ALARM;
                }
                self.seen_seconds = seconds;
            }
        }
        let periods = self.periods(now);
        if periods != self.seen_periods {
            self.seen_periods = periods;
            self.flags |= C_PERIODIC;
        }
    }

    /// The enabled interrupts that are pending.
    fn interrupts(&self) -> u8 {
        self.flags & self.get(REG_B) & C_FLAGS
    }

    /// When the next interrupt comes, if one that is enabled is not pending already.
    fn deadline(&self, now: Nanos) -> Option<Nanos> {
        let awaited = self.get(REG_B) & !self.flags;
        let mut deadlines = [None; 3];
        if !self.is_held() {
            let seconds = self.seconds(now);
            if awaited & B_UPDATE_ENABLE != 0 {
                deadlines[0] = Some(self.moment(seconds + 1));
            }
            if awaited & B_ALARM_ENABLE != 0 {
                deadlines[1] = self.alarm_after(seconds).map(|alarm| self.moment(alarm));
            }
        }
        if awaited & B_PERIODIC_ENABLE != 0
            && let Some(period) = self.period()
        {
            deadlines[2] = Some(nanos_for((self.periods(now) + 1).saturating_mul(period), BASE_HZ));
        }
        deadlines.into_iter().flatten().min()
    }

    fn read_register(&mut self, now: Nanos) -> u8 {
        match self.index {
            register if TIME_REGISTERS.contains(&register) && !self.is_held() => {
                self.time_register(register, &DateTime::from_seconds(self.seconds(now)))
            }
            REG_A if self.update_in_progress(now) => self.get(REG_A) | A_UPDATE_IN_PROGRESS,
            REG_C => {
                let interrupt = if self.interrupts() != 0 { C_INTERRUPT } else { 0 };
                std::mem::take(&mut self.flags) | interrupt
            }
            REG_D => D_VALID,
            register => self.get(register),
        }
    }

    fn write_register(&mut self, value: u8, now: Nanos) {
        match self.index {
            register if TIME_REGISTERS.contains(&register) => {
                if self.is_held() {
                    self.set(register, value);
                } else {
                    self.store_time(now);
                    self.set(register, value);
                    self.load_time(now);
                }
            }
            REG_A => self.write_control(REG_A, value & !A_UPDATE_IN_PROGRESS, now),
            // Stopping updates also switches their interrupt off.
            REG_B if value & B_SET != 0 => self.write_control(REG_B, value & !B_UPDATE_ENABLE, now),
            REG_B => self.write_control(REG_B, value, now),
            REG_C | REG_D => {}
            register => self.set(register, value),
        }
    }

    /// Writes register A or B, which can stop the clock and let it go on.
    fn write_control(&mut self, register: u8, value: u8, now: Nanos) {
        let (was_held, was_reset) = (self.is_held(), self.divider_is_reset());
        if !was_held {
            self.store_time(now);
        }
        self.set(register, value);
        if was_reset && !self.divider_is_reset() {
            // The first update comes half a second after the divider starts.
            let half = NANOS_PER_SECOND / 2;
            self.phase = (half + NANOS_PER_SECOND - now % NANOS_PER_SECOND) % NANOS_PER_SECOND;
        }
        if was_held && !self.is_held() {
            self.load_time(now);
        }
        self.seen_periods = self.periods(now);
    }
}

/// The real-time clock. It runs on VM time: while the VM stands still, so does the clock.
///
/// A reset leaves time and memory as they are (the battery does), and only switches its interrupts off.
pub struct Rtc {
    // Host glue.
    clock: VmClock,
    timer: DeviceTimer,
    line: OrderedLine,
    alarm: OnceLock<OrderedLine>,
    // Guest-visible state.
    state: Mutex<RtcState>,
}

impl Rtc {
    /// The clock's kind in saved states.
    pub const KIND: &'static str = "rtc-mc146818";
    const VERSION: u32 = 1;

    /// A clock that interrupts by `line`.
    pub fn new(config: &RtcConfig, timers: &TimerService, line: IrqLine) -> Arc<Self> {
        let clock = timers.clock().clone();
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let weak = weak.clone();
            Self {
                state: Mutex::new(RtcState::new(config, clock.now())),
                clock,
                timer: DeviceTimer::new(timers, move || {
                    if let Some(rtc) = weak.upgrade() {
                        rtc.access(|_, _| {});
                    }
                }),
                line: OrderedLine::new(line),
                alarm: OnceLock::new(),
            }
        })
    }

    /// Has `line` be high while the alarm's interrupt is pending: an event of power management. The first such line is
    /// the one.
    pub fn connect_alarm(&self, line: IrqLine) {
        let _ = self.alarm.set(OrderedLine::new(line));
        self.access(|_, _| {});
    }

    /// The ports to map.
    pub fn port_regions(self: &Arc<Self>) -> Vec<PortRegion> {
        vec![region(self, RTC_PORTS)]
    }

    /// Does `access` on the state as it is now, and what comes of it: the interrupt's level, the timer's
    /// next deadline. (Arming a timer never calls back, so that the lock may be held.)
    fn access(&self, access: impl FnOnce(&mut RtcState, Nanos)) {
        {
            let mut state = self.state.lock();
            let now = self.clock.now();
            state.advance(now);
            access(&mut state, now);
            self.timer.set(state.deadline(now));
        }
        self.line.update(|| self.state.lock().interrupts() != 0);
        if let Some(alarm) = self.alarm.get() {
            alarm.update(|| self.state.lock().interrupts() & C_ALARM != 0);
        }
    }

    /// Puts another state in place of the present one, which has no more effects.
    fn replace(&self, new: RtcState) {
        *self.state.lock() = new;
        self.access(|_, _| {});
    }
}

impl PortSet for Rtc {
    fn read_ports(&self, first: u16, data: &mut [u8]) {
        self.access(|state, now| {
            for (port, byte) in (first..).zip(data) {
                // The index cannot be read back.
                *byte = if port == RTC_PORTS.0 + 1 { state.read_register(now) } else { 0xff };
            }
        });
    }

    fn write_ports(&self, first: u16, data: &[u8]) {
        self.access(|state, now| {
            for (port, &value) in (first..).zip(data) {
                match port - RTC_PORTS.0 {
                    0 => state.index = value & 0x7f, // bit 7 masks NMIs, of which there are none
                    1 => state.write_register(value, now),
                    _ => {}
                }
            }
        });
    }
}

impl Device for Rtc {
    fn kind(&self) -> &'static str {
        Self::KIND
    }

    fn version(&self) -> u32 {
        Self::VERSION
    }

    fn reset(&self) {
        self.access(|state, _| {
            let interrupts = B_PERIODIC_ENABLE | B_ALARM_ENABLE | B_UPDATE_ENABLE | B_SQUARE_WAVE;
            let kept = state.get(REG_B) & !interrupts;
            state.set(REG_B, kept);
            state.flags = 0;
            state.index = 0;
        });
    }

    fn start(&self) {
        self.timer.start();
        self.access(|_, _| {});
    }

    fn stop(&self) {
        self.timer.stop();
    }

    fn save(&self) -> SavedState {
        // With all that has happened up to now: the saved machine and the restored one notice the same.
        let mut state = self.state.lock().clone();
        state.advance(self.clock.now());
        encode(Self::KIND, Self::VERSION, &state)
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let decoded = decode_checked(Self::KIND, Self::VERSION, state, RtcState::sound);
        take_over(self, decoded, |state| self.replace(state))
    }
}

impl fmt::Debug for Rtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rtc").field("state", &self.state).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
