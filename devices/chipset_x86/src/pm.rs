//! ACPI power management (ACPI 6.5, 4.8): PM1 event and control blocks, the PM timer, general-purpose
//! events, the system control interrupt, and the port that switches ACPI on.

use crate::device_timer::DeviceTimer;
use crate::ports::{PortRegion, PortSet, decode_checked, region, take_over};
use crate::{PowerEvent, PowerEvents};
use clock::{TimerService, VmClock, nanos_for, ticks_in};
use device::{Device, SavedState, StateError, encode};
use irq::{IrqLine, IrqSink, OrderedLine};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::{Arc, Weak};

/// First port of the power management registers.
pub const PM_PORT_BASE: u16 = 0x600;
/// How many ports they take.
pub const PM_PORT_COUNT: u16 = 0x40;
/// The PM1a event block (status, then enable; 4 bytes), from [`PM_PORT_BASE`] on.
pub const PM1_EVENT_OFFSET: u16 = 0x00;
/// The PM1a control block (2 bytes), from [`PM_PORT_BASE`] on.
pub const PM1_CONTROL_OFFSET: u16 = 0x04;
/// The PM timer (4 bytes), from [`PM_PORT_BASE`] on.
pub const PM_TIMER_OFFSET: u16 = 0x08;
/// General-purpose event block 0 (status, then enable), from [`PM_PORT_BASE`] on.
pub const GPE0_OFFSET: u16 = 0x20;
/// Length of general-purpose event block 0 in bytes: 64 events.
pub const GPE0_LEN: u16 = 16;
/// The PM timer's frequency.
pub const PM_TIMER_HZ: u64 = 3_579_545;
/// The global system interrupt that the SCI is wired to: level-triggered, active high.
pub const SCI_GSI: u32 = 9;
/// The sleep type of S0 for ACPI's `\_S0`.
pub const SLEEP_TYPE_S0: u8 = 0;
/// The sleep type of S3, "suspend to RAM", for ACPI's `\_S3`.
pub const SLEEP_TYPE_S3: u8 = 1;
/// The sleep type of S5, "soft off", for ACPI's `\_S5`.
pub const SLEEP_TYPE_S5: u8 = 5;
/// The SMI command port; the one after it is a scratch register.
pub const SMI_COMMAND_PORT: u16 = 0xb2;
const SMI_SCRATCH_PORT: u16 = SMI_COMMAND_PORT + 1;
/// Written to [`SMI_COMMAND_PORT`], this hands power management to the operating system.
pub const ACPI_ENABLE: u8 = 0x02;
/// Written to [`SMI_COMMAND_PORT`], this takes it back.
pub const ACPI_DISABLE: u8 = 0x03;

const TIMER_STATUS: u16 = 1 << 0;
const GLOBAL_STATUS: u16 = 1 << 5;
const POWER_BUTTON: u16 = 1 << 8;
const SLEEP_BUTTON: u16 = 1 << 9;
const RTC_ALARM: u16 = 1 << 10;
const WAKE_STATUS: u16 = 1 << 15;
const STATUS_MASK: u16 = ENABLE_MASK | WAKE_STATUS;
const ENABLE_MASK: u16 = TIMER_STATUS | GLOBAL_STATUS | POWER_BUTTON | SLEEP_BUTTON | RTC_ALARM;

const SCI_ENABLE: u16 = 1 << 0;
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP_ENABLE: u16 = 1 << 13;
/// SCI_EN, BM_RLD and SLP_TYP; GBL_RLS and SLP_EN read as 0.
const CONTROL_MASK: u16 = SCI_ENABLE | 1 << 1 | 7 << SLEEP_TYPE_SHIFT;

/// Fixed choices about the power management block. They have to agree with the ACPI tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PmConfig {
    /// The PM timer has 32 bits (`TMR_VAL_EXT` in the FADT), not 24.
    pub timer_32_bits: bool,
    /// The machine comes up in ACPI mode, as where no firmware would switch it on. (A guest that finds
    /// `SMI_CMD` 0 in the FADT expects so.)
    pub acpi_at_reset: bool,
}

/// The power management block.
///
/// A guest that sleeps in S3 is a [`PowerEvent::Sleep`], and what ends its sleep a [`PowerEvent::Wake`]. The machine
/// resets everything then, and calls [`Pm::woken`] after that.
pub struct Pm {
    // Fixed configuration.
    config: PmConfig,
    // Host glue.
    clock: VmClock,
    overflow: DeviceTimer,
    sci: OrderedLine,
    events: Arc<dyn PowerEvents>,
    // Guest-visible state.
    state: Mutex<PmState>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct PmState {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u64,
    gpe_enable: u64,
    smi_command: u8,
    smi_scratch: u8,
    /// How often the timer's highest bit had changed when the status bit was last brought up to date.
    timer_toggles: u64,
    /// The machine sleeps in S3, and nothing has woken it yet.
    asleep: bool,
}

/// What [`Pm::waking`] keeps.
#[derive(Debug, Clone, Copy)]
pub struct WakeState {
    status: u16,
    control: u16,
}

impl PmState {
    /// Whether something has come that the guest wants to hear of.
    fn is_event_pending(&self) -> bool {
        self.status & self.enable & ENABLE_MASK != 0 || self.gpe_status & self.gpe_enable != 0
    }

    fn sci(&self) -> bool {
        self.control & SCI_ENABLE != 0 && self.is_event_pending()
    }

    /// Ends the sleep if something has come that ends it: an event that was enabled for that, or the power button
    /// (ACPI 6.5, 4.8.2.3 and 4.8.3.1). Whether it did.
    fn wakes(&mut self) -> bool {
        let wakes = self.asleep && (self.is_event_pending() || self.status & POWER_BUTTON != 0);
        if wakes {
            self.asleep = false;
            self.status |= WAKE_STATUS;
        }
        wakes
    }

    fn sound(&self) -> bool {
        self.status & !STATUS_MASK == 0
            && self.enable & !ENABLE_MASK == 0
            && self.control & !CONTROL_MASK == 0
    }
}

impl Pm {
    /// The block's kind in saved states.
    pub const KIND: &'static str = "acpi-pm";
    const VERSION: u32 = 2;

    /// A block that interrupts by `sci` and asks `events` to switch the machine off.
    pub fn new(
        config: PmConfig,
        timers: &TimerService,
        sci: IrqLine,
        events: Arc<dyn PowerEvents>,
    ) -> Arc<Self> {
        let pm = Arc::new_cyclic(|weak: &Weak<Self>| {
            let weak = weak.clone();
            Self {
                config,
                clock: timers.clock().clone(),
                overflow: DeviceTimer::new(timers, move || {
                    if let Some(pm) = weak.upgrade() {
                        pm.refresh();
                    }
                }),
                sci: OrderedLine::new(sci),
                events,
                state: Mutex::default(),
            }
        });
        pm.reset();
        pm
    }

    /// The ports to map: the registers and the SMI command port.
    pub fn port_regions(self: &Arc<Self>) -> Vec<PortRegion> {
        vec![region(self, (PM_PORT_BASE, PM_PORT_COUNT)), region(self, (SMI_COMMAND_PORT, 2))]
    }

    /// Presses and releases the power button: asks the guest to shut down.
    pub fn press_power_button(&self) {
        self.state.lock().status |= POWER_BUTTON;
        self.refresh();
    }

    /// Presses and releases the sleep button.
    pub fn press_sleep_button(&self) {
        self.state.lock().status |= SLEEP_BUTTON;
        self.refresh();
    }

    /// A line whose rise is the clock's alarm (RTC_STS).
    pub fn alarm_line(self: &Arc<Self>) -> IrqLine {
        struct Alarm(Weak<Pm>);
        impl IrqSink for Alarm {
            fn set_level(&self, _pin: u32, level: bool) {
                if let (true, Some(pm)) = (level, self.0.upgrade()) {
                    pm.state.lock().status |= RTC_ALARM;
                    pm.refresh();
                }
            }
        }
        IrqLine::new(Arc::new(Alarm(Arc::downgrade(self))), 0)
    }

    /// What of the block's state outlasts the reset that comes between sleep and waking: what woke the machine is to
    /// be read, and the guest still owns power management.
    pub fn waking(&self) -> WakeState {
        let state = self.state.lock();
        WakeState { status: state.status, control: state.control & SCI_ENABLE }
    }

    /// The machine has woken and was reset: `kept` is there again.
    pub fn woken(&self, kept: WakeState) {
        {
            let mut state = self.state.lock();
            state.status = kept.status;
            state.control = state.control & !SCI_ENABLE | kept.control;
        }
        self.refresh();
    }

    /// Whether the guest would hear of the power button now.
    pub fn power_button_is_heard(&self) -> bool {
        let state = self.state.lock();
        state.control & SCI_ENABLE != 0 && state.enable & POWER_BUTTON != 0
    }

    /// Raises general-purpose event `event` (0 to 63).
    pub fn raise_gpe(&self, event: u8) {
        self.state.lock().gpe_status |= 1u64.checked_shl(event.into()).unwrap_or(0);
        self.refresh();
    }

    /// How many times the timer's highest bit has changed, at VM time `now`, in all.
    fn toggles(&self, now: u64) -> u64 {
        ticks_in(now, PM_TIMER_HZ) >> self.toggle_shift()
    }

    fn toggle_shift(&self) -> u32 {
        if self.config.timer_32_bits { 31 } else { 23 }
    }

    fn timer_value(&self, now: u64) -> u32 {
        let ticks = ticks_in(now, PM_TIMER_HZ) as u32;
        if self.config.timer_32_bits { ticks } else { ticks & 0x00ff_ffff }
    }

    /// Brings the timer's status bit up to date.
    fn advance(&self, state: &mut PmState) -> u64 {
        let now = self.clock.now();
        let toggles = self.toggles(now);
        if toggles != state.timer_toggles {
            state.timer_toggles = toggles;
            state.status |= TIMER_STATUS;
        }
        now
    }

    /// Arms the timer for the next change of the highest bit, if the guest wants to hear of it, and drives
    /// the interrupt.
    fn refresh(&self) {
        let wakes = {
            let mut state = self.state.lock();
            self.advance(&mut state);
            if state.enable & TIMER_STATUS != 0 {
                let next = state.timer_toggles.saturating_add(1);
                let ticks = next.saturating_mul(1 << self.toggle_shift());
                self.overflow.set(Some(nanos_for(ticks, PM_TIMER_HZ)));
            } else {
                self.overflow.set(None);
            }
            state.wakes()
        };
        self.sci.update(|| self.state.lock().sci());
        if wakes {
            self.events.request(PowerEvent::Wake);
        }
    }

    fn read_register(&self, state: &PmState, now: u64, offset: u16) -> u8 {
        let byte = |value: u64, index: u16| value.to_le_bytes()[usize::from(index & 7)];
        match offset {
            0x00..=0x01 => byte(state.status.into(), offset),
            0x02..=0x03 => byte(state.enable.into(), offset - 2),
            0x04..=0x05 => byte(state.control.into(), offset - 4),
            0x06..=0x07 => 0,
            0x08..=0x0b => byte(self.timer_value(now).into(), offset - 8),
            0x20..=0x27 => byte(state.gpe_status, offset - 0x20),
            0x28..=0x2f => byte(state.gpe_enable, offset - 0x28),
            _ => 0xff,
        }
    }

    fn write_register(state: &mut PmState, offset: u16, value: u8) -> Option<PowerEvent> {
        let clear = |register: &mut u16, index: u16| *register &= !(u16::from(value) << (8 * index));
        let set = |register: &mut u16, index: u16, mask: u16| {
            let shift = 8 * index;
            *register = (*register & !(0xff << shift) | u16::from(value) << shift) & mask;
        };
        match offset {
            0x00..=0x01 => clear(&mut state.status, offset),
            0x02..=0x03 => set(&mut state.enable, offset - 2, ENABLE_MASK),
            0x04 => {
                // SCI_EN belongs to whoever owns the SMI command port.
                let sci = state.control & SCI_ENABLE;
                set(&mut state.control, 0, CONTROL_MASK & !SCI_ENABLE);
                state.control |= sci;
            }
            0x05 => {
                set(&mut state.control, 1, CONTROL_MASK);
                let written = u16::from(value) << 8;
                match (written >> SLEEP_TYPE_SHIFT & 7) as u8 {
                    SLEEP_TYPE_S5 if written & SLEEP_ENABLE != 0 => return Some(PowerEvent::PowerOff),
                    SLEEP_TYPE_S3 if written & SLEEP_ENABLE != 0 && !state.asleep => {
                        state.asleep = true;
                        return Some(PowerEvent::Sleep);
                    }
                    _ => {}
                }
            }
            0x20..=0x27 => state.gpe_status &= !(u64::from(value) << (8 * (offset - 0x20))),
            0x28..=0x2f => {
                let shift = 8 * (offset - 0x28);
                state.gpe_enable = state.gpe_enable & !(0xff << shift) | u64::from(value) << shift;
            }
            _ => {}
        }
        None
    }
}

impl PortSet for Pm {
    fn read_ports(&self, first: u16, data: &mut [u8]) {
        let mut state = self.state.lock();
        let now = self.advance(&mut state);
        for (port, byte) in (first..).zip(data) {
            *byte = match port {
                SMI_COMMAND_PORT => state.smi_command,
                SMI_SCRATCH_PORT => state.smi_scratch,
                _ => self.read_register(&state, now, port.wrapping_sub(PM_PORT_BASE)),
            };
        }
    }

    fn write_ports(&self, first: u16, data: &[u8]) {
        let mut event = None;
        {
            let mut state = self.state.lock();
            self.advance(&mut state);
            for (port, &value) in (first..).zip(data) {
                match port {
                    SMI_COMMAND_PORT => {
                        state.smi_command = value;
                        match value {
                            ACPI_ENABLE => state.control |= SCI_ENABLE,
                            ACPI_DISABLE => state.control &= !SCI_ENABLE,
                            _ => {}
                        }
                    }
                    SMI_SCRATCH_PORT => state.smi_scratch = value,
                    _ => {
                        let offset = port.wrapping_sub(PM_PORT_BASE);
                        event = event.or(Self::write_register(&mut state, offset, value));
                    }
                }
            }
        }
        // What it asks for comes before the end of its sleep, which may be at hand already.
        if let Some(event) = event {
            self.events.request(event);
        }
        self.refresh();
    }
}

impl Device for Pm {
    fn kind(&self) -> &'static str {
        Self::KIND
    }

    fn version(&self) -> u32 {
        Self::VERSION
    }

    fn reset(&self) {
        *self.state.lock() = PmState {
            control: if self.config.acpi_at_reset { SCI_ENABLE } else { 0 },
            timer_toggles: self.toggles(self.clock.now()),
            ..PmState::default()
        };
        self.refresh();
    }

    fn start(&self) {
        self.overflow.start();
        self.refresh();
    }

    fn stop(&self) {
        self.overflow.stop();
    }

    fn save(&self) -> SavedState {
        let mut state = self.state.lock();
        self.advance(&mut state);
        encode(Self::KIND, Self::VERSION, &*state)
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let decoded = decode_checked(Self::KIND, Self::VERSION, state, PmState::sound);
        take_over(self, decoded, |state| *self.state.lock() = state)?;
        self.refresh();
        Ok(())
    }
}

impl fmt::Debug for Pm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pm").field("config", &self.config).field("state", &self.state).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_bench::{EventLog, Ports, SignalLog, Time};
    use proptest::prelude::*;

    struct Bench {
        time: Time,
        pm: Arc<Pm>,
        ports: Ports,
        events: Arc<EventLog>,
        sci: IrqLine,
    }

    fn bench(config: PmConfig) -> Bench {
        let time = Time::new();
        let events = EventLog::new();
        let sci = SignalLog::new().line(SCI_GSI);
        let pm = Pm::new(config, &time.timers, sci.clone(), events.clone());
        Bench { time, ports: Ports::new(pm.port_regions()), pm, events, sci }
    }

    #[test]
    fn acpi_mode_is_switched_on_by_the_smi_port_only() {
        let bench = bench(PmConfig::default());
        bench.ports.write_wide(0x604, 2, 1);
        assert_eq!(bench.ports.read_wide(0x604, 2), 0);
        bench.ports.write(SMI_COMMAND_PORT, ACPI_ENABLE);
        assert_eq!(bench.ports.read_wide(0x604, 2), 1);
        bench.ports.write(SMI_COMMAND_PORT, ACPI_DISABLE);
        assert_eq!(bench.ports.read_wide(0x604, 2), 0);
    }

    #[test]
    fn the_power_button_interrupts_until_its_status_is_cleared() {
        let bench = bench(PmConfig { acpi_at_reset: true, ..PmConfig::default() });
        assert!(!bench.pm.power_button_is_heard());
        bench.ports.write_wide(0x602, 2, POWER_BUTTON.into());
        assert!(bench.pm.power_button_is_heard());
        bench.pm.press_power_button();
        assert!(bench.sci.level());
        assert_eq!(bench.ports.read_wide(0x600, 2), POWER_BUTTON.into());
        bench.ports.write_wide(0x600, 2, POWER_BUTTON.into());
        assert!(!bench.sci.level());
        bench.pm.raise_gpe(3);
        assert!(!bench.sci.level());
        bench.ports.write_wide(0x628, 2, 8);
        assert!(bench.sci.level());
        bench.ports.write_wide(0x620, 2, 8);
        assert!(!bench.sci.level());
    }

    #[test]
    fn soft_off_switches_the_machine_off() {
        let bench = bench(PmConfig::default());
        bench.ports.write_wide(0x604, 2, 5 << 10);
        assert!(bench.events.take().is_empty());
        bench.ports.write_wide(0x604, 2, 5 << 10 | 1 << 13);
        assert_eq!(bench.events.take(), [PowerEvent::PowerOff]);
        bench.ports.write_wide(0x604, 2, 2 << 10 | 1 << 13);
        assert!(bench.events.take().is_empty());
    }

    #[test]
    fn sleep_ends_by_what_was_enabled_for_it_and_by_the_power_button() {
        let bench = bench(PmConfig { acpi_at_reset: true, ..PmConfig::default() });
        let alarm = bench.pm.alarm_line();
        let sleep = |enable: u16| {
            bench.ports.write_wide(0x600, 2, u16::MAX.into());
            bench.ports.write_wide(0x602, 2, enable.into());
            bench.ports.write_wide(0x604, 2, 1 << 10 | 1 << 13);
        };
        sleep(0);
        alarm.set(true);
        alarm.set(false);
        assert_eq!(bench.events.take(), [PowerEvent::Sleep]);
        assert_eq!(bench.ports.read_wide(0x600, 2), RTC_ALARM.into());
        bench.pm.press_power_button();
        assert_eq!(bench.events.take(), [PowerEvent::Wake]);

        sleep(RTC_ALARM);
        alarm.set(true);
        assert_eq!(bench.events.take(), [PowerEvent::Sleep, PowerEvent::Wake]);
        let kept = bench.pm.waking();
        bench.pm.reset();
        bench.pm.woken(kept);
        assert_eq!(bench.ports.read_wide(0x600, 2), u32::from(WAKE_STATUS | RTC_ALARM));
        assert_eq!(bench.ports.read_wide(0x602, 4), 1 << 16, "nothing but SCI_EN is kept of the rest");

        // What is pending already ends it at once; a machine that sleeps cannot fall asleep again.
        bench.ports.write_wide(0x602, 2, RTC_ALARM.into());
        bench.ports.write_wide(0x604, 2, 1 << 10 | 1 << 13);
        assert_eq!(bench.events.take(), [PowerEvent::Sleep, PowerEvent::Wake]);
        sleep(0);
        let copy = Pm::new(
            PmConfig::default(),
            &bench.time.timers,
            SignalLog::new().line(SCI_GSI),
            bench.events.clone(),
        );
        copy.restore(&bench.pm.save()).unwrap();
        bench.events.take();
        copy.press_power_button();
        assert_eq!(bench.events.take(), [PowerEvent::Wake]);
    }

    #[test]
    fn the_timer_counts_vm_time_and_reports_its_overflow() {
        let bench = bench(PmConfig { timer_32_bits: false, acpi_at_reset: true });
        bench.time.clock.set(clock::NANOS_PER_SECOND);
        assert_eq!(bench.ports.read_wide(0x608, 4), 3_579_545);
        bench.ports.write_wide(0x602, 2, 1);
        bench.time.clock.set(nanos_for((1 << 23) - 1, PM_TIMER_HZ));
        assert_eq!(bench.ports.read_wide(0x600, 2), 0);
        bench.time.clock.set(nanos_for(1 << 23, PM_TIMER_HZ));
        assert_eq!(bench.ports.read_wide(0x600, 2), 1);
        bench.time.clock.set(nanos_for((1 << 24) + 5, PM_TIMER_HZ));
        assert_eq!(bench.ports.read_wide(0x608, 4), 5);
        bench.pm.refresh();
        assert!(bench.sci.level());
        bench.ports.write_wide(0x600, 2, 1);
        assert!(!bench.sci.level());
    }

    #[test]
    fn a_timer_interrupt_comes_without_an_access() {
        let bench = bench(PmConfig { timer_32_bits: false, acpi_at_reset: true });
        bench.ports.write_wide(0x602, 2, 1);
        bench.time.clock.set(nanos_for(1 << 23, PM_TIMER_HZ) - 1000);
        bench.time.clock.start();
        bench.time.timers.clock_changed();
        let begin = std::time::Instant::now();
        while !bench.sci.level() && begin.elapsed().as_secs() < 20 {
            std::thread::yield_now();
        }
        assert!(bench.sci.level());
    }

    type Step = (bool, u16, usize, u32, u32);

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let port = prop_oneof![0x600u16..0x640, 0xb2u16..0xb4];
        let width = prop_oneof![Just(1usize), Just(2), Just(4)];
        proptest::collection::vec((any::<bool>(), port, width, any::<u32>(), any::<u32>()), 0..40)
    }

    fn observe(bench: &Bench, &(write, port, len, value, pause): &Step) -> (u32, bool, Vec<PowerEvent>) {
        bench.time.pass(pause.into());
        if value & 0xf00 == 0 {
            bench.pm.press_power_button();
        }
        let mut result = 0;
        if write {
            bench.ports.write_wide(port, len, value);
        } else {
            result = bench.ports.read_wide(port, len);
        }
        bench.pm.refresh();
        (result, bench.sci.level(), bench.events.take())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        #[test]
        fn a_restored_block_goes_on_like_the_saved_one(before in steps(), after in steps()) {
            let first = bench(PmConfig::default());
            for step in &before {
                observe(&first, step);
            }
            let second = bench(PmConfig::default());
            second.time.clock.set(first.time.clock.now());
            second.pm.restore(&first.pm.save()).unwrap();
            prop_assert_eq!(first.sci.level(), second.sci.level());
            for step in &after {
                prop_assert_eq!(observe(&first, step), observe(&second, step));
            }
        }
    }
}
