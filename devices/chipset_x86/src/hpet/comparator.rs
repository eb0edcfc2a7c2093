//! One timer of the HPET.

use super::{Capabilities, HPET_HZ};
use crate::backlog::Backlog;
use clock::{Nanos, nanos_for};
use irq::MsiMessage;
use serde::{Deserialize, Serialize};

const LEVEL: u64 = 1 << 1;
const ENABLE: u64 = 1 << 2;
const PERIODIC: u64 = 1 << 3;
const PERIODIC_CAPABLE: u64 = 1 << 4;
const SIZE_64: u64 = 1 << 5;
const SET_VALUE: u64 = 1 << 6;
const MODE_32: u64 = 1 << 8;
const ROUTE_SHIFT: u32 = 9;
const MESSAGES: u64 = 1 << 14;
const MESSAGES_CAPABLE: u64 = 1 << 15;
/// What a guest can write.
const WRITABLE: u64 = LEVEL | ENABLE | PERIODIC | SET_VALUE | MODE_32 | 0x1f << ROUTE_SHIFT | MESSAGES;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Comparator {
    /// The writable bits of the configuration.
    config: u64,
    comparator: u64,
    /// What is added to the comparator each time, in periodic mode.
    period: u64,
    /// Where messages go: the value, and above it the address.
    route: u64,
    /// The main counter's value up to which matches were noticed.
    seen: u64,
    backlog: Backlog,
}

impl Default for Comparator {
    fn default() -> Self {
        Self { config: 0, comparator: u64::MAX, period: 0, route: 0, seen: 0, backlog: Backlog::default() }
    }
}

impl Comparator {
    pub(super) fn sound(&self, capabilities: &Capabilities) -> bool {
        self.config & !WRITABLE == 0
            && (self.config & MESSAGES == 0 || capabilities.messages)
            && self.backlog.sound()
            && (self.comparator | self.period) & !self.mask() == 0
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.config & ENABLE != 0
    }

    pub(super) fn is_level(&self) -> bool {
        self.config & LEVEL != 0
    }

    pub(super) fn sends_messages(&self) -> bool {
        self.config & MESSAGES != 0
    }

    pub(super) fn message(&self) -> MsiMessage {
        MsiMessage { address: self.route >> 32, data: self.route as u32 }
    }

    /// The I/O APIC's input that the timer is routed to.
    pub(super) fn input(&self) -> u32 {
        (self.config >> ROUTE_SHIFT & 0x1f) as u32
    }

    fn mask(&self) -> u64 {
        if self.config & MODE_32 != 0 { 0xffff_ffff } else { u64::MAX }
    }

    fn is_periodic(&self) -> bool {
        self.config & PERIODIC != 0
    }

    fn period_nanos(&self) -> Nanos {
        nanos_for(self.period, HPET_HZ)
    }

    /// How many ticks after the counter's value `from` the comparator matches next.
    fn distance(&self, from: u64) -> u64 {
        // One more than the mask would be a whole turn, which for 64 bits is never.
        self.comparator.wrapping_sub(from).wrapping_sub(1) & self.mask()
    }

    /// The main counter was halted, started or set.
    pub(super) fn counter_was_set(&mut self, value: u64) {
        self.seen = value;
        self.backlog.clear();
    }

    /// Notices matches up to `counter`; says whether there is an interrupt to send.
    pub(super) fn advance(&mut self, now: Nanos, counter: u64) -> bool {
        let passed = counter.wrapping_sub(self.seen);
        let distance = self.distance(self.seen); // less one
        self.seen = counter;
        let mut due = 0;
        if distance < passed {
            due = 1;
            if self.is_periodic() && self.period != 0 {
                let more = (passed - distance - 1) / self.period;
                due = more.saturating_add(1);
                self.comparator = self.comparator.wrapping_add(self.period.wrapping_mul(due)) & self.mask();
            }
        }
        if !self.is_enabled() {
            self.backlog.clear();
            return false;
        }
        if self.is_level() || !self.is_periodic() {
            due = due.min(1); // there is nothing to make up for
        }
        self.backlog.deliver(now, due, self.period_nanos())
    }

    /// When it matches next, or has a missed tick to make up for. The counter is at `counter` and VM time at
    /// `tick`.
    pub(super) fn deadline(&self, tick: u64, counter: u64) -> Option<Nanos> {
        if !self.is_enabled() {
            return None;
        }
        let ticks = self.distance(counter).saturating_add(1);
        let next = nanos_for(tick.saturating_add(ticks), HPET_HZ);
        self.backlog.deadline(Some(next), self.period_nanos())
    }

    pub(super) fn config(&self, capabilities: &Capabilities) -> u64 {
        let messages = if capabilities.messages { MESSAGES_CAPABLE } else { 0 };
        self.config | PERIODIC_CAPABLE | SIZE_64 | messages | u64::from(capabilities.routes) << 32
    }

    pub(super) fn set_config(&mut self, value: u64, capabilities: &Capabilities) {
        let old = self.config;
        self.config = value & WRITABLE;
        if !capabilities.messages {
            self.config &= !MESSAGES;
        }
        if capabilities.routes >> self.input() & 1 == 0 {
            // An input that the timer cannot be routed to is not taken.
            self.config &= !(0x1f << ROUTE_SHIFT);
        }
        self.comparator &= self.mask();
        self.period &= self.mask();
        if (old ^ self.config) & (PERIODIC | LEVEL | ENABLE) != 0 {
            self.backlog.clear();
        }
    }

    pub(super) fn comparator(&self) -> u64 {
        self.comparator
    }

    /// Writes the bits `mask` of the comparator: in periodic mode of the period, and with "set value" of
    /// both.
    pub(super) fn set_comparator(&mut self, value: u64, mask: u64) {
        let merge = |old: u64| (old & !mask | value & mask) & self.mask();
        let (comparator, period) = (merge(self.comparator), merge(self.period));
        if self.is_periodic() {
            self.period = period;
        }
        if !self.is_periodic() || self.config & SET_VALUE != 0 {
            self.comparator = comparator;
        }
        self.config &= !SET_VALUE;
        self.backlog.clear();
    }

    pub(super) fn route(&self) -> u64 {
        self.route
    }

    pub(super) fn set_route(&mut self, value: u64) {
        self.route = value;
    }
}
