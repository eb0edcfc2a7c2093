//! The 8254 programmable interval timer (Intel 8254 data sheet) and system control port B (0x61).

mod channel;

use crate::backlog::Backlog;
use crate::device_timer::DeviceTimer;
use crate::ports::{PortRegion, PortSet, decode_checked, region, take_over};
use channel::Channel;
use clock::{Nanos, TimerService, VmClock, nanos_for, ticks_in};
use device::{Device, SavedState, StateError, encode};
use irq::{IrqLine, OrderedLine};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::{Arc, Weak};

/// First port and number of ports of the timer.
pub const PIT_PORTS: (u16, u16) = (0x40, 4);
/// System control port B: the speaker, channel 2's gate and output, the refresh toggle.
pub const SYSTEM_CONTROL_B_PORT: u16 = 0x61;
/// The timer's input frequency.
pub const PIT_HZ: u64 = 1_193_182;

const CONTROL_PORT: u16 = 0x43;
/// The timer channel that sounds the speaker.
const SPEAKER: usize = 2;
/// Port B's bits that a guest can write: gate, speaker data, parity and I/O check enables.
const PORT_B_WRITABLE: u8 = 0x0f;
/// The time between two memory refreshes, which port B's bit 4 shows.
const REFRESH_NANOS: u64 = 15_085;

#[derive(Debug, Clone, Serialize, Deserialize)]
struct PitState {
    channels: [Channel; 3],
    port_b: u8,
    /// Channel 0's rising edges since it was programmed that were made into interrupts or given up.
    edges_done: u64,
    backlog: Backlog,
}

impl PitState {
    fn new() -> Self {
        let mut channels = [Channel::new(true), Channel::new(true), Channel::new(false)];
        // Nothing counts until it is programmed.
        channels[SPEAKER].set_gate(0, false);
        Self { channels, port_b: 0, edges_done: 0, backlog: Backlog::default() }
    }

    fn sound(&self) -> bool {
        self.channels.iter().all(Channel::sound)
            && self.backlog.sound()
            && self.port_b & !PORT_B_WRITABLE == 0
            && self.channels[0].gate()
            && self.channels[1].gate()
            && self.channels[SPEAKER].gate() == (self.port_b & 1 != 0)
    }

    /// Channel 0's period.
    fn period(&self) -> Nanos {
        nanos_for(self.channels[0].reload().into(), PIT_HZ)
    }

    /// Brings everything up to `now`; says whether channel 0 is to interrupt.
    fn advance(&mut self, now: Nanos) -> bool {
        let tick = ticks_in(now, PIT_HZ);
        let mut due = 0;
        if let Some(boundary) = self.channels[0].reload_boundary(tick) {
            due += self.channels[0].edges(boundary).saturating_sub(self.edges_done);
            self.edges_done = 0;
        }
        for channel in &mut self.channels {
            channel.settle(tick);
        }
        let edges = self.channels[0].edges(tick);
        due += edges.saturating_sub(self.edges_done);
        self.edges_done = edges;
        self.backlog.deliver(now, due, self.period())
    }

    /// When `advance` is to be called next for channel 0's interrupt to be in time.
    fn deadline(&self, now: Nanos) -> Option<Nanos> {
        let edge = self.channels[0].next_edge(ticks_in(now, PIT_HZ)).map(|tick| nanos_for(tick, PIT_HZ));
        self.backlog.deadline(edge, self.period())
    }

    fn read(&mut self, port: u16, now: Nanos) -> u8 {
        let tick = ticks_in(now, PIT_HZ);
        match port {
            0x40..=0x42 => self.channels[usize::from(port - 0x40)].read(tick),
            SYSTEM_CONTROL_B_PORT => {
                let refresh = ((now / REFRESH_NANOS) & 1) as u8;
                let output = u8::from(self.channels[SPEAKER].output(tick));
                self.port_b | refresh << 4 | output << 5
            }
            _ => 0xff, // the control word cannot be read back
        }
    }

    fn write(&mut self, port: u16, value: u8, now: Nanos) {
        let tick = ticks_in(now, PIT_HZ);
        match port {
            0x40..=0x42 => {
                let index = usize::from(port - 0x40);
                if self.channels[index].write(tick, value) && index == 0 {
                    self.edges_done = 0;
                }
            }
            CONTROL_PORT => self.write_control(tick, value),
            SYSTEM_CONTROL_B_PORT => {
                self.port_b = value & PORT_B_WRITABLE;
                self.channels[SPEAKER].set_gate(tick, value & 1 != 0);
            }
            _ => {}
        }
    }

    fn write_control(&mut self, tick: u64, value: u8) {
        let index = usize::from(value >> 6);
        if let Some(channel) = self.channels.get_mut(index) {
            if value & 0x30 == 0 {
                channel.latch_count(tick);
            } else {
                channel.set_mode(value);
                if index == 0 {
                    self.edges_done = 0;
                    self.backlog.clear();
                }
            }
            return;
        }
        // The read-back command.
        for (index, channel) in self.channels.iter_mut().enumerate() {
            if value & 2 << index != 0 {
                if value & 0x20 == 0 {
                    channel.latch_count(tick);
                }
                if value & 0x10 == 0 {
                    channel.latch_status(tick);
                }
            }
        }
    }
}

/// The interval timer. Channel 0 interrupts with a pulse at each rise of its output.
///
/// If the host is late, the ticks that were missed are made up for at twice the rate, up to a bound.
pub struct Pit {
    // Host glue.
    clock: VmClock,
    timer: DeviceTimer,
    line: OrderedLine,
    // Guest-visible state.
    state: Mutex<PitState>,
}

impl Pit {
    /// The timer's kind in saved states.
    pub const KIND: &'static str = "pit-8254";
    const VERSION: u32 = 1;

    /// A timer whose channel 0 interrupts by `line`.
    pub fn new(timers: &TimerService, line: IrqLine) -> Arc<Self> {
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let weak = weak.clone();
            Self {
                clock: timers.clock().clone(),
                timer: DeviceTimer::new(timers, move || {
                    if let Some(pit) = weak.upgrade() {
                        pit.access(|_, _| {});
                    }
                }),
                line: OrderedLine::new(line),
                state: Mutex::new(PitState::new()),
            }
        })
    }

    /// The ports to map.
    pub fn port_regions(self: &Arc<Self>) -> Vec<PortRegion> {
        [PIT_PORTS, (SYSTEM_CONTROL_B_PORT, 1)].map(|ports| region(self, ports)).into()
    }

    /// Does `access` on the state as it is now, and what comes of it: an interrupt, the timer's next
    /// deadline. (Arming a timer never calls back, so that the lock may be held.)
    fn access(&self, access: impl FnOnce(&mut PitState, Nanos)) {
        let interrupt = {
            let mut state = self.state.lock();
            let now = self.clock.now();
            let interrupt = state.advance(now);
            access(&mut state, now);
            self.timer.set(state.deadline(now));
            interrupt
        };
        if interrupt {
            self.line.pulse();
        }
    }

    /// Puts another state in place of the present one, which has no more effects.
    fn replace(&self, new: PitState) {
        let mut state = self.state.lock();
        *state = new;
        self.timer.set(state.deadline(self.clock.now()));
    }
}

impl PortSet for Pit {
    fn read_ports(&self, first: u16, data: &mut [u8]) {
        self.access(|state, now| {
            for (port, byte) in (first..).zip(data) {
                *byte = state.read(port, now);
            }
        });
    }

    fn write_ports(&self, first: u16, data: &[u8]) {
        self.access(|state, now| {
            for (port, &value) in (first..).zip(data) {
                state.write(port, value, now);
            }
        });
    }
}

impl Device for Pit {
    fn kind(&self) -> &'static str {
        Self::KIND
    }

    fn version(&self) -> u32 {
        Self::VERSION
    }

    fn reset(&self) {
        self.replace(PitState::new());
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
        let decoded = decode_checked(Self::KIND, Self::VERSION, state, PitState::sound);
        take_over(self, decoded, |state| self.replace(state))
    }
}

impl fmt::Debug for Pit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pit").field("state", &self.state).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
