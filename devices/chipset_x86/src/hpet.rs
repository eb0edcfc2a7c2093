//! The high precision event timer (IA-PC HPET Specification 1.0a).

mod comparator;

use crate::device_timer::DeviceTimer;
use crate::ports::{decode_checked, take_over};
use clock::{Nanos, TimerService, VmClock, ticks_in};
use comparator::Comparator;
use device::{Device, MmioDevice, SavedState, StateError, encode};
use irq::{IrqLine, MsiMessage, MsiTarget, OrderedLine};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::{Arc, Weak};

/// Where a PC's only HPET is in guest physical memory.
pub const HPET_ADDRESS: u64 = 0xfed0_0000;
/// The length of its region.
pub const HPET_LEN: u64 = 0x400;
/// The main counter's frequency.
pub const HPET_HZ: u64 = 100_000_000;
/// The low half of the capabilities register, for the ACPI table: Intel's, legacy replacement, a 64-bit
/// counter, three timers, revision 1.
pub const HPET_BLOCK_ID: u32 = 0x8086_a201;

const TIMERS: usize = 3;
const FEMTOSECONDS_PER_SECOND: u64 = 1_000_000_000_000_000;
const CAPABILITIES: u64 = (FEMTOSECONDS_PER_SECOND / HPET_HZ) << 32 | HPET_BLOCK_ID as u64;

const REG_CAPABILITIES: u64 = 0x000;
const REG_CONFIG: u64 = 0x010;
const REG_STATUS: u64 = 0x020;
const REG_COUNTER: u64 = 0x0f0;
const REG_TIMERS: u64 = 0x100;
const TIMER_STRIDE: u64 = 0x20;
const TIMER_CONFIG: u64 = 0x00;
const TIMER_COMPARATOR: u64 = 0x08;
const TIMER_ROUTE: u64 = 0x10;

const CONFIG_ENABLE: u64 = 1 << 0;
const CONFIG_LEGACY: u64 = 1 << 1;

/// How an HPET is wired to the rest of the machine.
pub struct HpetWiring {
    /// The lines of timers 0 and 1 in legacy replacement: to the PIT's and the real-time clock's inputs.
    pub legacy: [IrqLine; 2],
    /// The I/O APIC's inputs (0 to 31) that timers can be routed to.
    pub routes: Vec<(u32, IrqLine)>,
    /// Called when the guest switches legacy replacement, which takes the PIT and the real-time clock off
    /// their inputs.
    pub set_legacy_replacement: Box<dyn Fn(bool) + Send + Sync>,
    /// Where timers send messages ("FSB interrupts"), if they can.
    pub messages: Option<Arc<dyn MsiTarget>>,
}

/// Where a timer's interrupt goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route {
    Nowhere,
    /// An index into the HPET's outputs.
    Output(usize),
    Message(MsiMessage),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct HpetState {
    config: u64,
    /// Level-triggered interrupts that are active, a bit per timer.
    status: u64,
    /// The main counter while it is halted; while it runs, what it is ahead of VM time's ticks.
    counter: u64,
    timers: [Comparator; TIMERS],
}

impl HpetState {
    fn new() -> Self {
        Self { config: 0, status: 0, counter: 0, timers: Default::default() }
    }

    fn sound(&self, capabilities: &Capabilities) -> bool {
        self.config & !(CONFIG_ENABLE | CONFIG_LEGACY) == 0
            && self.status < 1 << TIMERS
            && self.timers.iter().all(|timer| timer.sound(capabilities))
    }

    fn is_running(&self) -> bool {
        self.config & CONFIG_ENABLE != 0
    }

    fn is_legacy(&self) -> bool {
        self.config & CONFIG_LEGACY != 0
    }

    fn counter(&self, now: Nanos) -> u64 {
        if self.is_running() { ticks_in(now, HPET_HZ).wrapping_add(self.counter) } else { self.counter }
    }

    fn set_counter(&mut self, now: Nanos, value: u64) {
        self.counter = if self.is_running() { value.wrapping_sub(ticks_in(now, HPET_HZ)) } else { value };
        for timer in &mut self.timers {
            timer.counter_was_set(value);
        }
    }

    fn set_config(&mut self, now: Nanos, value: u64) {
        let counter = self.counter(now);
        let was_running = self.is_running();
        self.config = value & (CONFIG_ENABLE | CONFIG_LEGACY);
        if was_running != self.is_running() {
            self.set_counter(now, counter);
        }
    }

    /// Brings everything up to `now`. The result says, by bit, which timers are to send an edge.
    fn advance(&mut self, now: Nanos) -> u8 {
        if !self.is_running() {
            return 0;
        }
        let counter = self.counter(now);
        let mut edges = 0;
        for (index, timer) in self.timers.iter_mut().enumerate() {
            if timer.advance(now, counter) {
                if timer.is_level() {
                    self.status |= 1 << index;
                } else {
                    edges |= 1 << index;
                }
            }
        }
        edges
    }

    /// When `advance` is to be called next for interrupts to be in time.
    fn deadline(&self, now: Nanos) -> Option<Nanos> {
        if !self.is_running() {
            return None;
        }
        let counter = self.counter(now);
        let tick = ticks_in(now, HPET_HZ);
        let pending = |index: usize| self.status >> index & 1 != 0;
        let deadline = |(index, timer): (usize, &Comparator)| {
            // A level that is active already can come to nothing new.
            if timer.is_level() && pending(index) { None } else { timer.deadline(tick, counter) }
        };
        self.timers.iter().enumerate().filter_map(deadline).min()
    }

    fn read(&self, register: u64, now: Nanos, capabilities: &Capabilities) -> u64 {
        match register {
            REG_CAPABILITIES => CAPABILITIES,
            REG_CONFIG => self.config,
            REG_STATUS => self.status,
            REG_COUNTER => self.counter(now),
            REG_TIMERS.. => {
                let index = ((register - REG_TIMERS) / TIMER_STRIDE) as usize;
                let Some(timer) = self.timers.get(index) else { return 0 };
                match (register - REG_TIMERS) % TIMER_STRIDE {
                    TIMER_CONFIG => timer.config(capabilities),
                    TIMER_COMPARATOR => timer.comparator(),
                    TIMER_ROUTE => timer.route(),
                    _ => 0,
                }
            }
            _ => 0,
        }
    }

    /// Writes the bits `mask` of `register`.
    fn write(&mut self, register: u64, value: u64, mask: u64, now: Nanos, capabilities: &Capabilities) {
        let merge = |old: u64| old & !mask | value & mask;
        match register {
            REG_CONFIG => self.set_config(now, merge(self.config)),
            REG_STATUS => self.status &= !(value & mask),
            REG_COUNTER => self.set_counter(now, merge(self.counter(now))),
            REG_TIMERS.. => {
                let index = ((register - REG_TIMERS) / TIMER_STRIDE) as usize;
                let Some(timer) = self.timers.get_mut(index) else { return };
                match (register - REG_TIMERS) % TIMER_STRIDE {
                    TIMER_CONFIG => {
                        timer.set_config(merge(timer.config(capabilities)), capabilities);
                        if !timer.is_level() {
                            self.status &= !(1 << index);
                        }
                    }
                    TIMER_COMPARATOR => timer.set_comparator(value, mask),
                    TIMER_ROUTE => timer.set_route(merge(timer.route())),
                    _ => {}
                }
            }
            _ => {}
        }
    }
}

/// What this HPET's timers can do, by its wiring.
#[derive(Debug, Clone, Copy)]
struct Capabilities {
    /// The I/O APIC's inputs that timers can be routed to, as a bit mask.
    routes: u32,
    messages: bool,
}

/// The HPET, with three timers, all of which can be periodic.
pub struct Hpet {
    // Fixed configuration.
    capabilities: Capabilities,
    // Host glue.
    clock: VmClock,
    timer: DeviceTimer,
    /// The two legacy lines, then those that `routes` names.
    outputs: Vec<OrderedLine>,
    routes: Vec<u32>,
    set_legacy_replacement: Box<dyn Fn(bool) + Send + Sync>,
    messages: Option<Arc<dyn MsiTarget>>,
    // Guest-visible state.
    state: Mutex<HpetState>,
}

impl Hpet {
    /// The timer's kind in saved states.
    pub const KIND: &'static str = "hpet";
    const VERSION: u32 = 1;

    /// An HPET, halted at 0. It is reached through memory: [`HPET_LEN`] bytes at [`HPET_ADDRESS`].
    pub fn new(timers: &TimerService, wiring: HpetWiring) -> Arc<Self> {
        let HpetWiring { legacy, routes, set_legacy_replacement, messages } = wiring;
        let (numbers, lines): (Vec<u32>, Vec<IrqLine>) =
            routes.into_iter().filter(|route| route.0 < 32).unzip();
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let weak = weak.clone();
            Self {
                capabilities: Capabilities {
                    routes: numbers.iter().fold(0, |mask, number| mask | 1 << number),
                    messages: messages.is_some(),
                },
                clock: timers.clock().clone(),
                timer: DeviceTimer::new(timers, move || {
                    if let Some(hpet) = weak.upgrade() {
                        hpet.access(|_, _| {});
                    }
                }),
                outputs: legacy.into_iter().chain(lines).map(OrderedLine::new).collect(),
                routes: numbers,
                set_legacy_replacement,
                messages,
                state: Mutex::new(HpetState::new()),
            }
        })
    }

    /// Where timer `index` interrupts.
    fn route(&self, state: &HpetState, index: usize) -> Route {
        let timer = &state.timers[index];
        if !state.is_running() || !timer.is_enabled() {
            Route::Nowhere
        } else if state.is_legacy() && index < 2 {
            Route::Output(index)
        } else if timer.sends_messages() {
            Route::Message(timer.message())
        } else {
            let place = self.routes.iter().position(|number| *number == timer.input());
            place.map_or(Route::Nowhere, |place| Route::Output(place + 2))
        }
    }

    /// The level of output `output`: whether a level-triggered timer that is routed there is active.
    fn output_level(&self, state: &HpetState, output: usize) -> bool {
        (0..TIMERS)
            .any(|index| state.status >> index & 1 != 0 && self.route(state, index) == Route::Output(output))
    }

    /// Does `access` on the state as it is now, and what comes of it: interrupts, the timer's next
    /// deadline. (Arming a timer never calls back, so that the lock may be held.)
    fn access(&self, access: impl FnOnce(&mut HpetState, Nanos)) {
        let mut edges = [Route::Nowhere; TIMERS];
        let legacy = {
            let mut state = self.state.lock();
            let now = self.clock.now();
            let due = state.advance(now);
            for (index, edge) in edges.iter_mut().enumerate() {
                if due >> index & 1 != 0 {
                    *edge = self.route(&state, index);
                }
            }
            let was_legacy = state.is_legacy();
            access(&mut state, now);
            self.timer.set(state.deadline(now));
            (was_legacy != state.is_legacy()).then_some(state.is_legacy())
        };
        for edge in edges {
            match edge {
                Route::Nowhere => {}
                Route::Output(output) => self.outputs[output].pulse(),
                Route::Message(message) => {
                    if let Some(target) = &self.messages {
                        target.signal(message);
                    }
                }
            }
        }
        if let Some(on) = legacy {
            (self.set_legacy_replacement)(on);
        }
        self.update_lines();
    }

    /// Puts another state in place of the present one, which has no more effects.
    fn replace(&self, new: HpetState) {
        let legacy = {
            let mut state = self.state.lock();
            let was_legacy = state.is_legacy();
            *state = new;
            self.timer.set(state.deadline(self.clock.now()));
            (was_legacy != state.is_legacy()).then_some(state.is_legacy())
        };
        if let Some(on) = legacy {
            (self.set_legacy_replacement)(on);
        }
        self.update_lines();
    }

    fn update_lines(&self) {
        for (output, line) in self.outputs.iter().enumerate() {
            line.update(|| self.output_level(&self.state.lock(), output));
        }
    }
}

/// Which register an access is to, its bits there, and how far they are shifted. Only aligned accesses of
/// four and eight bytes are defined.
fn decode_access(offset: u64, len: usize) -> Option<(u64, u64, u32)> {
    match (offset % 8, len) {
        (0, 8) => Some((offset, u64::MAX, 0)),
        (0, 4) => Some((offset, 0xffff_ffff, 0)),
        (4, 4) => Some((offset - 4, 0xffff_ffff << 32, 32)),
        _ => None,
    }
}

impl MmioDevice for Hpet {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some((register, _, shift)) = decode_access(offset, data.len()) else { return };
        let mut value = 0;
        if register == REG_COUNTER {
            // The one register that guests read all the time has no side effects.
            let state = self.state.lock();
            value = state.counter(self.clock.now());
        } else {
            self.access(|state, now| value = state.read(register, now, &self.capabilities));
        }
        let bytes = (value >> shift).to_le_bytes();
        data.copy_from_slice(&bytes[..data.len()]);
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        let Some((register, mask, shift)) = decode_access(offset, data.len()) else { return };
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes) << shift;
        self.access(|state, now| state.write(register, value, mask, now, &self.capabilities));
    }
}

impl Device for Hpet {
    fn kind(&self) -> &'static str {
        Self::KIND
    }

    fn version(&self) -> u32 {
        Self::VERSION
    }

    fn reset(&self) {
        self.replace(HpetState::new());
    }

    fn start(&self) {
        self.timer.start();
        self.access(|_, _| {});
    }

    fn stop(&self) {
        self.timer.stop();
    }

    fn save(&self) -> SavedState {
        encode(Self::KIND, Self::VERSION, &*self.state.lock())
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let sound = |state: &HpetState| state.sound(&self.capabilities);
        let decoded = decode_checked(Self::KIND, Self::VERSION, state, sound);
        take_over(self, decoded, |state| self.replace(state))
    }
}

impl fmt::Debug for Hpet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hpet").field("state", &self.state).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
