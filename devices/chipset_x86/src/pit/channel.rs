//! One counter of the 8254.

use serde::{Deserialize, Serialize};

/// A counter. Time is given as `tick`, the number of input clocks since VM time 0, and the count is computed
/// from it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Channel {
    /// 0 to 5.
    mode: u8,
    bcd: bool,
    /// 1: low byte only, 2: high byte only, 3: low, then high.
    access: u8,
    /// The count that it counts down from: 1 to 0x10000.
    reload: u32,
    /// A count has been written since the mode was set.
    loaded: bool,
    /// The tick at which counting began, if it is not stopped by the gate.
    start: u64,
    /// Stopped by the gate, after this many ticks.
    stopped: Option<u64>,
    gate: bool,
    /// Modes 1 and 5: the gate has risen since the mode was set.
    triggered: bool,
    /// A count that takes effect later: in modes 2 and 3 when the cycle of this number ends, in modes 1 and
    /// 5 with the next trigger.
    next_reload: Option<(u32, u64)>,
    /// The low byte of a count whose high byte is still to be written.
    low_byte: Option<u8>,
    /// The next byte read is the high one.
    high_next: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

impl Channel {
    pub(super) fn new(gate: bool) -> Self {
        Self {
            mode: 0,
            bcd: false,
            access: 3,
            reload: 0x1_0000,
            loaded: false,
            start: 0,
            stopped: None,
            gate,
            triggered: false,
            next_reload: None,
            low_byte: None,
            high_next: false,
            latched_count: None,
            latched_status: None,
        }
    }

    pub(super) fn sound(&self) -> bool {
        let count = |count: u32| (1..=0x1_0000).contains(&count);
        self.mode <= 5
            && (1..=3).contains(&self.access)
            && count(self.reload)
            && self.next_reload.is_none_or(|(reload, _)| count(reload))
    }

    pub(super) fn gate(&self) -> bool {
        self.gate
    }

    pub(super) fn reload(&self) -> u32 {
        self.reload
    }

    fn elapsed(&self, tick: u64) -> u64 {
        self.stopped.unwrap_or_else(|| tick.saturating_sub(self.start))
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    /// Modes 1 and 5 begin with a rise of the gate, the others with the count.
    fn is_gate_triggered(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    fn is_counting(&self) -> bool {
        self.loaded && (!self.is_gate_triggered() || self.triggered)
    }

    /// The tick, not after `tick`, at which a waiting count of a periodic mode took effect.
    pub(super) fn reload_boundary(&self, tick: u64) -> Option<u64> {
        let (_, cycle) = self.next_reload.filter(|_| self.is_periodic() && self.stopped.is_none())?;
        let ticks = cycle.saturating_add(1).saturating_mul(self.reload.into());
        Some(self.start.saturating_add(ticks)).filter(|boundary| *boundary <= tick)
    }

    /// Lets a waiting count take effect if its time has come.
    pub(super) fn settle(&mut self, tick: u64) {
        if let Some(boundary) = self.reload_boundary(tick)
            && let Some((reload, _)) = self.next_reload.take()
        {
            self.start = boundary;
            self.reload = reload;
        }
    }

    /// How many times the output has risen, `tick` included, since counting began.
    pub(super) fn edges(&self, tick: u64) -> u64 {
        if !self.is_counting() {
            return 0;
        }
        let elapsed = self.elapsed(tick);
        let reload = u64::from(self.reload);
        if self.is_periodic() { elapsed / reload } else { u64::from(elapsed >= reload) }
    }

    /// The tick of the next rise of the output after `tick`.
    pub(super) fn next_edge(&self, tick: u64) -> Option<u64> {
        if !self.is_counting() || self.stopped.is_some() {
            return None;
        }
        let cycles = if self.is_periodic() { self.edges(tick).saturating_add(1) } else { 1 };
        Some(self.start.saturating_add(cycles.saturating_mul(self.reload.into()))).filter(|edge| *edge > tick)
    }

    /// The level of the output.
    pub(super) fn output(&self, tick: u64) -> bool {
        if !self.is_counting() {
            return self.mode != 0;
        }
        let elapsed = self.elapsed(tick);
        let reload = u64::from(self.reload);
        match self.mode {
            0 | 1 => elapsed >= reload,
            2 => !self.gate || elapsed % reload != reload - 1,
            3 => !self.gate || elapsed % reload < reload.div_ceil(2),
            _ => elapsed != reload,
        }
    }

    /// The counting element's value.
    fn count(&self, tick: u64) -> u16 {
        let reload = u64::from(self.reload);
        let modulus = if self.bcd { 10_000 } else { 0x1_0000 };
        let elapsed = if self.is_counting() { self.elapsed(tick) } else { 0 };
        let value = match self.mode {
            2 => reload - elapsed % reload,
            3 => {
                let half = reload.div_ceil(2);
                let position = elapsed % reload;
                let in_half = if position < half { position } else { position - half };
                (reload & !1).saturating_sub(2 * in_half)
            }
            _ => (reload + modulus - elapsed % modulus) % modulus,
        };
        if self.bcd { to_bcd(value % modulus) } else { value as u16 }
    }

    fn status(&self, tick: u64) -> u8 {
        let null_count = !self.loaded || self.next_reload.is_some();
        u8::from(self.output(tick)) << 7
            | u8::from(null_count) << 6
            | self.access << 4
            | self.mode << 1
            | u8::from(self.bcd)
    }

    pub(super) fn latch_count(&mut self, tick: u64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.count(tick));
        }
    }

    pub(super) fn latch_status(&mut self, tick: u64) {
        if self.latched_status.is_none() {
            self.latched_status = Some(self.status(tick));
        }
    }

    /// A control word for this counter.
    pub(super) fn set_mode(&mut self, control: u8) {
        let mode = control >> 1 & 7;
        *self = Self {
            mode: if mode > 5 { mode - 4 } else { mode },
            bcd: control & 1 != 0,
            access: control >> 4 & 3,
            reload: self.reload,
            ..Self::new(self.gate)
        };
    }

    /// The data port is read.
    pub(super) fn read(&mut self, tick: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let count = self.latched_count.unwrap_or_else(|| self.count(tick));
        let high = match self.access {
            1 => false,
            2 => true,
            _ => {
                self.high_next = !self.high_next;
                !self.high_next
            }
        };
        if high || self.access == 1 {
            self.latched_count = None;
        }
        if high { (count >> 8) as u8 } else { count as u8 }
    }

    /// The data port is written. Says whether counting begins anew.
    pub(super) fn write(&mut self, tick: u64, value: u8) -> bool {
        let count = match (self.access, self.low_byte.take()) {
            (1, _) => u16::from(value),
            (2, _) => u16::from(value) << 8,
            (_, Some(low)) => u16::from(value) << 8 | u16::from(low),
            (_, None) => {
                self.low_byte = Some(value);
                if self.mode == 0 {
                    self.loaded = false; // the first byte stops the count
                }
                return false;
            }
        };
        let reload = match (self.bcd, count) {
            (true, 0) => 10_000,
            (true, count) => from_bcd(count).max(1),
            (false, 0) => 0x1_0000,
            (false, count) => count.into(),
        };
        if self.is_counting() && (self.is_periodic() || self.is_gate_triggered()) {
            let cycle = self.elapsed(tick) / u64::from(self.reload);
            self.next_reload = Some((reload, cycle));
            return false;
        }
        self.reload = reload;
        self.loaded = true;
        self.start = tick;
        self.stopped = (!self.gate && !self.is_gate_triggered()).then_some(0);
        true
    }

    pub(super) fn set_gate(&mut self, tick: u64, gate: bool) {
        if std::mem::replace(&mut self.gate, gate) == gate {
            return;
        }
        if self.is_gate_triggered() {
            if gate && self.loaded {
                self.take_next_reload();
                self.triggered = true;
                self.start = tick;
            }
        } else if !gate {
            self.stopped = self.loaded.then(|| self.elapsed(tick));
        } else if let Some(elapsed) = self.stopped.take() {
            // Modes 0 and 4 go on where they stopped, 2 and 3 begin anew.
            let done = if self.is_periodic() { 0 } else { elapsed };
            if self.is_periodic() {
                self.take_next_reload();
            }
            self.start = tick.saturating_sub(done);
        }
    }

    fn take_next_reload(&mut self) {
        if let Some((reload, _)) = self.next_reload.take() {
            self.reload = reload;
        }
    }
}

fn to_bcd(value: u64) -> u16 {
    (0..4).fold(0, |bcd, digit| bcd | ((value / 10u64.pow(digit) % 10) as u16) << (4 * digit))
}

fn from_bcd(bcd: u16) -> u32 {
    (0..4).fold(0, |value, digit| value + u32::from(bcd >> (4 * digit) & 0xf) * 10u32.pow(digit))
}
