//! Periodic interrupts that the host was too late for.

use clock::Nanos;
use serde::{Deserialize, Serialize};

/// The most ticks that are made up for after the host was late: enough for hiccups, and too few for the
/// guest to notice a storm.
pub(crate) const MAX_BACKLOG: u64 = 50;
/// The least time between two interrupts of one timer, whatever the guest programs.
pub(crate) const MIN_INTERVAL: Nanos = 50_000;

/// Ticks that are still to be delivered. They come at twice the timer's rate, so that a guest that counts
/// ticks catches up and still sees them apart.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Backlog {
    missed: u64,
    last_interrupt: Nanos,
}

impl Backlog {
    pub(crate) fn sound(&self) -> bool {
        self.missed <= MAX_BACKLOG
    }

    #[cfg(test)]
    pub(crate) fn missed(&self) -> u64 {
        self.missed
    }

    /// Gives the missed ticks up.
    pub(crate) fn clear(&mut self) {
        self.missed = 0;
    }

    /// Takes note that `due` ticks have become due by `now`; says whether to deliver one.
    pub(crate) fn deliver(&mut self, now: Nanos, due: u64, period: Nanos) -> bool {
        if due == 0 && (self.missed == 0 || now < self.catch_up(period)) {
            return false;
        }
        self.missed = (self.missed + due.min(MAX_BACKLOG + 1) - 1).min(MAX_BACKLOG);
        self.last_interrupt = now;
        true
    }

    fn catch_up(&self, period: Nanos) -> Nanos {
        self.last_interrupt.saturating_add((period / 2).max(MIN_INTERVAL))
    }

    /// When to look again, if the next tick falls due at `next`.
    pub(crate) fn deadline(&self, next: Option<Nanos>, period: Nanos) -> Option<Nanos> {
        let next = next.map(|next| next.max(self.last_interrupt.saturating_add(MIN_INTERVAL)));
        let catch_up = (self.missed > 0).then(|| self.catch_up(period));
        next.into_iter().chain(catch_up).min()
    }
}
