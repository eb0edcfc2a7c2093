//! The timer's arithmetic (Intel SDM volume 3, 11.5.4). One tick of the bus clock is one nanosecond.

use clock::Nanos;

/// The shortest time between two interrupts of a periodic timer. What a guest asks for beyond that is
/// skipped: no processor could take it, and the host's timer thread must not be kept busy with it.
const SHORTEST_PERIOD: Nanos = 20_000;

/// How the timer counts: bits 17 and 18 of its LVT entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
    /// The reserved code: does not count.
    Reserved,
}

impl TimerMode {
    pub(crate) fn of(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }
}

/// Bus ticks per timer tick, from the divide configuration register.
pub(crate) fn divisor(divide: u32) -> u64 {
    let code = divide & 3 | divide >> 1 & 4;
    1 << ((code + 1) & 7)
}

/// A timer that counts down from `initial` since `start`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Countdown {
    pub(crate) start: Nanos,
    pub(crate) initial: u32,
    pub(crate) divisor: u64,
    pub(crate) periodic: bool,
}

impl Countdown {
    fn period(&self) -> Nanos {
        u64::from(self.initial) * self.divisor
    }

    /// When the cycle that a periodic timer is in at `now` began.
    pub(crate) fn cycle_start(&self, now: Nanos) -> Nanos {
        let cycles = now.saturating_sub(self.start).checked_div(self.period()).unwrap_or(0);
        self.start + cycles * self.period()
    }

    /// The current count register.
    pub(crate) fn current(&self, now: Nanos) -> u32 {
        if self.initial == 0 {
            return 0;
        }
        let elapsed = now.saturating_sub(self.start) / self.divisor;
        let initial = u64::from(self.initial);
        let left = if self.periodic { initial - elapsed % initial } else { initial.saturating_sub(elapsed) };
        left as u32
    }

    /// The first expiry after `last`, the moment up to which expiries have been dealt with.
    pub(crate) fn next_expiry(&self, last: Nanos) -> Option<Nanos> {
        if self.initial == 0 {
            return None;
        }
        let first = self.start.saturating_add(self.period());
        if last < first {
            return Some(first);
        }
        if !self.periodic {
            return None;
        }
        let periods = (last - self.start) / self.period() + 1;
        let next = self.start.saturating_add(periods.saturating_mul(self.period()));
        Some(next.max(last.saturating_add(SHORTEST_PERIOD)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divide_configurations_are_the_manual_s() {
        let table = [(0b0000, 2), (0b0001, 4), (0b0010, 8), (0b0011, 16), (0b1000, 32), (0b1001, 64)];
        for (code, expected) in table.into_iter().chain([(0b1010, 128), (0b1011, 1)]) {
            assert_eq!(divisor(code), expected, "{code:#b}");
        }
    }

    #[test]
    fn one_shots_expire_once_and_periodic_timers_again_and_again() {
        let once = Countdown { start: 1000, initial: 50_000, divisor: 2, periodic: false };
        assert_eq!((once.current(1000), once.current(1002), once.current(1_000_000)), (50_000, 49_999, 0));
        assert_eq!((once.next_expiry(1000), once.next_expiry(101_000)), (Some(101_000), None));
        let periodic = Countdown { periodic: true, ..once };
        assert_eq!((periodic.current(101_000), periodic.current(101_002)), (50_000, 49_999));
        assert_eq!(periodic.next_expiry(101_000), Some(201_000));
        assert_eq!(periodic.next_expiry(350_000), Some(401_000));
    }

    #[test]
    fn absurdly_short_periods_are_stretched_and_long_ones_do_not_overflow() {
        let short = Countdown { start: 0, initial: 1, divisor: 1, periodic: true };
        assert_eq!(short.next_expiry(7), Some(7 + SHORTEST_PERIOD));
        let long = Countdown { start: u64::MAX - 5, initial: u32::MAX, divisor: 128, periodic: true };
        assert_eq!(long.next_expiry(0), Some(u64::MAX));
    }
}
