//! Execution by counts of instructions: everything that happens to the vCPU happens at exact counts, so that the same
//! guest does the same whenever it runs.
//!
//! Instructions, interrupts and exceptions that are delivered count one each. The vCPU runs up to the count at which
//! the next timer is due or something is to come from outside, and calls the timers itself. A repeated string
//! instruction that pauses is gone on with before anything else: how often it pauses does not matter then.

use accel::{External, Idle, Moment, StopToken};
use clock::{Counter, TimerService};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use x86_core::{Cpu, flags};

/// Timers that are called at one boundary at most: one that is due again at once is not to stop the processor for good.
const MOST_TIMERS: u32 = 64;

/// What a VM needs that executes by counts.
pub(crate) struct Counted {
    pub(crate) counter: Arc<Counter>,
    timers: Arc<TimerService>,
    external: OnceLock<Arc<dyn External>>,
}

impl Counted {
    /// What is needed if the clock of `timers` counts instructions.
    pub(crate) fn new(timers: &Arc<TimerService>) -> Option<Self> {
        let counter = timers.clock().counter()?.clone();
        Some(Self { counter, timers: timers.clone(), external: OnceLock::new() })
    }

    pub(crate) fn set_external(&self, external: Arc<dyn External>) {
        let first = self.external.set(external).is_ok();
        debug_assert!(first, "it is set once");
    }

    /// Has `look` be called when a timer is armed that is due earlier than the vCPU was to run.
    pub(crate) fn connect(&self, look: impl Fn() + Send + Sync + 'static) {
        self.timers.on_earlier(look);
    }

    fn now(&self) -> Moment {
        Moment { count: self.counter.count(), time: self.counter.now() }
    }

    /// Something was executed or delivered.
    pub(crate) fn count_one(&self) {
        self.counter.set_count(self.counter.count() + 1);
    }

    /// Between two instructions: calls the timers that are due, and lets in what comes from outside.
    pub(crate) fn at_boundary(&self, cpu: &Cpu) {
        for _ in 0..MOST_TIMERS {
            if !self.timers.fire_next() {
                break;
            }
        }
        if let Some(external) = self.external.get() {
            external.at_boundary(self.now(), &|| digest(cpu));
        }
    }

    /// The count up to which the processor may run: beyond that of now.
    pub(crate) fn end(&self) -> u64 {
        let timer = self.timers.next_deadline().map_or(u64::MAX, |deadline| self.counter.count_at(deadline));
        let external = self.external.get().map_or(u64::MAX, |external| external.next_count());
        timer.min(external).max(self.counter.count() + 1)
    }

    /// The processor waits for an interrupt. `wait` waits until there is something to look at, at most so long, and says
    /// whether there is.
    pub(crate) fn idle(&self, cpu: &Cpu, stop: &StopToken, wait: impl Fn(Option<Duration>) -> bool) {
        let now = self.now();
        let deadline = self.timers.next_deadline();
        let nobody = || deadline.map_or(Idle::Stand, Idle::Skip);
        match self.external.get().map_or_else(nobody, |external| external.idle(now, deadline)) {
            Idle::Skip(time) => self.counter.advance_to(time),
            Idle::Stand => {
                wait(None);
            }
            Idle::Sleep => {
                let begin = Instant::now();
                let whole = deadline.map(|deadline| Duration::from_nanos(deadline.saturating_sub(now.time)));
                if !wait(whole) {
                    self.counter.advance_to(deadline.unwrap_or(now.time));
                    return;
                }
                // The host's time is the guest's only where somebody outside is to see it.
                let waiting = self.external.get().is_some_and(|external| external.is_waiting());
                if stop.is_stopped() || !waiting {
                    return;
                }
                let slept = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
                let woke = now.time.saturating_add(slept).min(deadline.unwrap_or(u64::MAX));
                self.counter.advance_to(woke);
                if let Some(external) = self.external.get() {
                    external.woke(self.now(), &|| digest(cpu));
                }
            }
        }
    }

    /// The run ends.
    pub(crate) fn stopped(&self, cpu: &Cpu) {
        if let Some(external) = self.external.get() {
            external.stopped(self.now(), &|| digest(cpu));
        }
    }

    pub(crate) fn random(&self) -> Option<u64> {
        self.external.get().map(|external| external.random())
    }
}

/// A number made of what programs see of a processor: general registers, RIP, RFLAGS, control registers and segments, by
/// FNV-1a.
fn digest(cpu: &Cpu) -> u64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x100_0000_01b3;
    let system = [cpu.rip, cpu.rflags & !flags::RF, cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4, u64::from(cpu.cpl)];
    let segments = cpu.segments.iter().flat_map(|segment| [u64::from(segment.selector), segment.base]);
    let words = cpu.regs.into_iter().chain(system).chain(segments);
    words.flat_map(u64::to_le_bytes).fold(OFFSET, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME))
}
