//! The timer service: one host thread that calls back at moments of VM time.

use crate::{Nanos, VmClock};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

type Callback = Arc<dyn Fn() + Send + Sync>;

struct Queue {
    /// Armed timers by deadline; the timer's number makes a key unique.
    armed: BTreeMap<(Nanos, u64), Callback>,
    deadlines: HashMap<u64, Nanos>,
    next_number: u64,
    shut_down: bool,
}

struct Shared {
    clock: VmClock,
    queue: Mutex<Queue>,
    changed: Condvar,
    /// Told that the earliest deadline is another.
    earlier: Mutex<Option<Callback>>,
}

/// Calls timers back at their deadlines of VM time, on a thread of its own. While the clock stands still
/// nothing fires.
pub struct TimerService {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl TimerService {
    /// A service on `clock`, with its thread.
    ///
    /// # Errors
    /// The host's, if it cannot start a thread.
    pub fn new(clock: VmClock) -> std::io::Result<Arc<Self>> {
        let shared = Arc::new(Shared::new(clock));
        let for_thread = shared.clone();
        let thread = std::thread::Builder::new().name("timers".into()).spawn(move || for_thread.run())?;
        Ok(Arc::new(Self { shared, thread: Some(thread) }))
    }

    /// A service on `clock` without a thread: timers wait until [`TimerService::fire_next`] is called. For
    /// clocks that count, tests and fuzzers, in which the host's scheduler must not decide what happens when.
    pub fn without_thread(clock: VmClock) -> Arc<Self> {
        Arc::new(Self { shared: Arc::new(Shared::new(clock)), thread: None })
    }

    /// Calls back the timer with the earliest deadline, on this thread, if that deadline is reached; says
    /// whether there was one.
    pub fn fire_next(&self) -> bool {
        self.shared.fire_next(&mut self.shared.queue.lock())
    }

    /// The earliest deadline, if a timer is armed.
    pub fn next_deadline(&self) -> Option<Nanos> {
        self.shared.queue.lock().armed.keys().next().map(|(deadline, _)| *deadline)
    }

    /// Has `told` called whenever a timer is armed with an earlier deadline than all others, on the thread that arms
    /// it: for who calls [`TimerService::fire_next`].
    pub fn on_earlier(&self, told: impl Fn() + Send + Sync + 'static) {
        *self.shared.earlier.lock() = Some(Arc::new(told));
    }

    /// The clock whose time the deadlines are in.
    pub fn clock(&self) -> &VmClock {
        &self.shared.clock
    }

    /// A timer that calls `callback`, on the service's thread, each time it expires. It is not armed. The
    /// callback may arm and disarm timers, this one included.
    pub fn timer(&self, callback: impl Fn() + Send + Sync + 'static) -> Timer {
        let mut queue = self.shared.queue.lock();
        queue.next_number += 1;
        Timer {
            number: queue.next_number,
            callback: Arc::new(callback),
            shared: Arc::downgrade(&self.shared),
            clock: self.shared.clock.clone(),
        }
    }

    /// To be called after the clock was started, stopped or set: deadlines are looked at anew.
    pub fn clock_changed(&self) {
        let _queue = self.shared.queue.lock();
        self.shared.changed.notify_all();
    }
}

impl Drop for TimerService {
    fn drop(&mut self) {
        self.shared.queue.lock().shut_down = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for TimerService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TimerService").field("clock", &self.shared.clock).finish_non_exhaustive()
    }
}

impl Shared {
    fn new(clock: VmClock) -> Self {
        let queue =
            Queue { armed: BTreeMap::new(), deadlines: HashMap::new(), next_number: 0, shut_down: false };
        Self { clock, queue: Mutex::new(queue), changed: Condvar::new(), earlier: Mutex::new(None) }
    }

    fn run(&self) {
        let mut queue = self.queue.lock();
        while !queue.shut_down {
            if self.fire_next(&mut queue) {
                continue;
            }
            let now = self.clock.now();
            match queue.armed.keys().next() {
                // Reached meanwhile.
                Some((deadline, _)) if *deadline <= now => {}
                Some((deadline, _)) if self.clock.is_running() => {
                    let left = Duration::from_nanos(*deadline - now);
                    self.changed.wait_for(&mut queue, left);
                }
                _ => self.changed.wait(&mut queue),
            }
        }
    }

    /// Calls the first timer back if its deadline is reached, without the lock; says whether it was.
    fn fire_next(&self, queue: &mut MutexGuard<'_, Queue>) -> bool {
        let Some(&(deadline, number)) = queue.armed.keys().next() else { return false };
        if self.clock.now() < deadline {
            return false;
        }
        let callback = queue.armed.remove(&(deadline, number));
        queue.deadlines.remove(&number);
        if let Some(callback) = callback {
            MutexGuard::unlocked(queue, || callback());
        }
        true
    }
}

/// One timer. Dropping it disarms it.
pub struct Timer {
    number: u64,
    callback: Callback,
    shared: Weak<Shared>,
    clock: VmClock,
}

impl Timer {
    /// Arms the timer for the moment `deadline` of VM time (at once if that is past); an earlier deadline
    /// of this timer is forgotten.
    pub fn arm_at(&self, deadline: Nanos) {
        let Some(shared) = self.shared.upgrade() else { return };
        let mut queue = shared.queue.lock();
        if let Some(old) = queue.deadlines.insert(self.number, deadline) {
            queue.armed.remove(&(old, self.number));
        }
        queue.armed.insert((deadline, self.number), self.callback.clone());
        if queue.armed.keys().next() == Some(&(deadline, self.number)) {
            shared.changed.notify_all();
            drop(queue);
            let told = shared.earlier.lock().clone();
            if let Some(told) = told {
                told();
            }
        }
    }

    /// Arms the timer for `delay` from now.
    pub fn arm_after(&self, delay: Nanos) {
        self.arm_at(self.clock.now().saturating_add(delay));
    }

    /// Disarms the timer. A callback already under way on the service's thread goes on.
    pub fn disarm(&self) {
        let Some(shared) = self.shared.upgrade() else { return };
        let mut queue = shared.queue.lock();
        if let Some(old) = queue.deadlines.remove(&self.number) {
            queue.armed.remove(&(old, self.number));
        }
    }

    /// The moment the timer is armed for.
    pub fn deadline(&self) -> Option<Nanos> {
        self.shared.upgrade()?.queue.lock().deadlines.get(&self.number).copied()
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.disarm();
    }
}

impl fmt::Debug for Timer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timer").field("number", &self.number).field("deadline", &self.deadline()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn timers_fire_in_order_and_only_while_the_clock_runs() {
        let clock = VmClock::new();
        let service = TimerService::new(clock.clone()).unwrap();
        let (sender, receiver) = mpsc::channel();
        let timers: Vec<_> = [2_000_000u64, 1_000_000]
            .map(|deadline| {
                let sender = sender.clone();
                let timer = service.timer(move || sender.send(deadline).unwrap());
                timer.arm_at(deadline);
                timer
            })
            .into();
        assert!(receiver.recv_timeout(Duration::from_millis(20)).is_err());
        clock.start();
        service.clock_changed();
        assert_eq!(receiver.recv_timeout(Duration::from_secs(10)), Ok(1_000_000));
        assert_eq!(receiver.recv_timeout(Duration::from_secs(10)), Ok(2_000_000));
        assert!(timers.iter().all(|timer| timer.deadline().is_none()));
    }

    #[test]
    fn without_a_thread_timers_wait_to_be_fired() {
        let clock = VmClock::new();
        let service = TimerService::without_thread(clock.clone());
        let (sender, receiver) = mpsc::channel();
        let timers = [20, 10].map(|deadline| {
            let sender = sender.clone();
            let timer = service.timer(move || sender.send(deadline).unwrap());
            timer.arm_at(deadline);
            timer
        });
        assert!(!service.fire_next());
        clock.set(20);
        assert!(receiver.try_recv().is_err());
        assert!(service.fire_next() && service.fire_next() && !service.fire_next());
        assert_eq!(receiver.try_iter().collect::<Vec<_>>(), [10, 20]);
        assert_eq!(service.next_deadline(), None);
        let (told, heard) = mpsc::channel();
        service.on_earlier(move || told.send(()).unwrap());
        timers[1].arm_at(7);
        timers[0].arm_at(5);
        timers[1].arm_at(30);
        assert_eq!((service.next_deadline(), heard.try_iter().count()), (Some(5), 2));
        assert!(service.fire_next());
        assert_eq!(receiver.try_recv(), Ok(20));
    }

    #[test]
    fn a_disarmed_timer_does_not_fire() {
        let clock = VmClock::new();
        clock.start();
        let service = TimerService::new(clock).unwrap();
        let (sender, receiver) = mpsc::channel();
        let timer = service.timer(move || sender.send(()).unwrap());
        timer.arm_after(50_000_000);
        timer.disarm();
        assert!(receiver.recv_timeout(Duration::from_millis(120)).is_err());
        timer.arm_after(0);
        assert_eq!(receiver.recv_timeout(Duration::from_secs(10)), Ok(()));
    }
}
