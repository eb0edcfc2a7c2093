//! A device's use of the timer service.

use clock::{Nanos, Timer, TimerService};
use parking_lot::Mutex;
use std::fmt;
use std::sync::Arc;

/// A timer that is told again and again when its device wants to be called, and that stands still while the
/// VM does.
pub(crate) struct DeviceTimer {
    timer: Timer,
    /// Whether the VM stands still. The callback holds the lock while it runs.
    stopped: Arc<Mutex<bool>>,
}

impl DeviceTimer {
    pub(crate) fn new(timers: &TimerService, callback: impl Fn() + Send + Sync + 'static) -> Self {
        let stopped = Arc::new(Mutex::new(false));
        let for_callback = stopped.clone();
        let timer = timers.timer(move || {
            let stopped = for_callback.lock();
            if !*stopped {
                callback();
            }
        });
        Self { timer, stopped }
    }

    /// Sets when the callback is to run. A guest that polls a register does not change that, and then the
    /// service's thread is not disturbed. (This never calls back: the device's lock may be held.)
    pub(crate) fn set(&self, deadline: Option<Nanos>) {
        if self.timer.deadline() != deadline {
            match deadline {
                Some(deadline) => self.timer.arm_at(deadline),
                None => self.timer.disarm(),
            }
        }
    }

    /// Returns when the callback does not run and will not before [`DeviceTimer::start`].
    pub(crate) fn stop(&self) {
        *self.stopped.lock() = true;
    }

    /// Lets the callback run again. The device must set the deadline anew.
    pub(crate) fn start(&self) {
        *self.stopped.lock() = false;
    }
}

impl fmt::Debug for DeviceTimer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.timer.fmt(f)
    }
}
