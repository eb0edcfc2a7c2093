//! How long a halted vCPU looks for requests before it sleeps.

use std::time::{Duration, Instant};

/// How often a halted vCPU looks for requests where nobody said how long: a few microseconds, within which
/// answers to what it has just asked for often come, and waking from sleep takes longer than that.
const SPINS: u32 = 60;
/// How long looking takes at first, once it promises to pay.
const FIRST_WINDOW: Duration = Duration::from_micros(10);
/// Looks between two looks at the clock.
const LOOKS: u32 = 16;

/// How long a halted vCPU looks for requests before it sleeps. Up to the limit that was asked for the time
/// adapts: it grows while a longer look would have spared a sleep, and ends when sleeps are long.
#[derive(Debug)]
pub(crate) struct HaltPoll {
    most: Option<Duration>,
    window: Duration,
}

impl HaltPoll {
    /// Looks for `most` at the longest; for a few microseconds if nothing is given.
    pub(crate) fn new(most: Option<Duration>) -> Self {
        Self { most, window: Duration::ZERO }
    }

    /// Looks until `ready`, or until it is time to sleep; calls `sleep` then.
    pub(crate) fn wait(&mut self, ready: impl Fn() -> bool, sleep: impl FnOnce()) {
        let Some(most) = self.most else {
            for _ in 0..SPINS {
                if ready() {
                    return;
                }
                std::hint::spin_loop();
            }
            return sleep();
        };
        if most.is_zero() {
            return sleep();
        }
        let start = Instant::now();
        while start.elapsed() < self.window {
            for _ in 0..LOOKS {
                if ready() {
                    return;
                }
                std::hint::spin_loop();
            }
        }
        sleep();
        self.slept(start.elapsed(), most);
    }

    /// Adapts after a halt that ended `halted` after its begin, by sleeping.
    fn slept(&mut self, halted: Duration, most: Duration) {
        self.window =
            if halted > most { Duration::ZERO } else { (self.window * 2).max(FIRST_WINDOW).min(most) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn the_window_grows_with_short_halts_and_closes_with_a_long_one() {
        let most = Duration::from_micros(50);
        let mut poll = HaltPoll::new(Some(most));
        let mut windows = Vec::new();
        for micros in [40, 40, 50, 50, 51, 1] {
            poll.slept(Duration::from_micros(micros), most);
            windows.push(poll.window.as_micros());
        }
        assert_eq!(windows, [10, 20, 40, 50, 0, 10]);
    }

    #[test]
    fn it_sleeps_only_if_nothing_came() {
        for most in [None, Some(Duration::ZERO), Some(Duration::from_secs(1000))] {
            let slept = Cell::new(0);
            let mut poll = HaltPoll::new(most);
            poll.wait(|| false, || slept.set(slept.get() + 1));
            assert_eq!(slept.get(), 1, "{most:?}: there was no window yet, or it passed");
            poll.wait(|| true, || slept.set(slept.get() + 1));
            assert_eq!(slept.get(), if most == Some(Duration::ZERO) { 2 } else { 1 }, "{most:?}");
        }
    }
}
