//! What guest, host and people ask of the whole machine, and the thread that carries it out hears.

use crate::ending::Quitter;
use crate::run_state::{RunState, RunStatus};
use accel::{DebugStop, StopToken};
use chipset_x86::{PowerEvent, PowerEvents};
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::Arc;

/// Something asked of the whole machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    /// The guest's firmware interfaces ask for something.
    Power(PowerEvent),
    /// A vCPU shut down.
    TripleFault {
        /// Which.
        vcpu: u32,
    },
    /// The accelerator failed.
    InternalError(String),
    /// A vCPU met what a debugger asked for.
    Debug {
        /// Which.
        vcpu: u32,
        /// What it met.
        stop: DebugStop,
    },
    /// A replay has come to its recording's end.
    Replayed {
        /// The recording was cut off.
        cut: bool,
    },
    /// A replay is not what was recorded.
    Diverged(String),
    /// A recording cannot be written.
    RecordingFailed(String),
    /// Somebody wants the VM to stand still for a while.
    Pause,
    /// Somebody wants the VM to stand still until they want it to run on; why.
    Hold(RunState),
    /// Somebody wants it to run on.
    Resume,
    /// Somebody wants it to be reset.
    Reset,
    /// A person or another program wants the VM to end now.
    Quit(Quitter),
}

impl Request {
    /// Whether it comes from the host: the guest's own, and what a debugger has it stop for, are of no account while
    /// the VM stands still.
    pub(crate) fn is_of_host(&self) -> bool {
        match self {
            Self::Quit(_) | Self::Pause | Self::InternalError(_) => true,
            Self::Replayed { .. } | Self::Diverged(_) | Self::RecordingFailed(_) => true,
            Self::Power(_) | Self::TripleFault { .. } | Self::Debug { .. } => false,
            // A debugger holds it already, and goes on as these want.
            Self::Hold(_) | Self::Resume | Self::Reset => false,
        }
    }

    /// Whether it is a wish of people's, who make few, and not the guest's, which may make any number.
    fn is_of_people(&self) -> bool {
        matches!(self, Self::Quit(_) | Self::Pause | Self::Hold(_) | Self::Resume | Self::Reset)
    }
}

/// A queue of requests.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    queue: Mutex<VecDeque<Request>>,
    arrived: Condvar,
    /// What stops the vCPUs that run.
    running: Mutex<Option<StopToken>>,
    /// What the VM is doing, and who hears of it.
    pub(crate) status: Arc<RunStatus>,
}

impl Requests {
    /// The most that wait: a guest that asks for more, faster than they are carried out, repeats itself.
    const MOST: usize = 64;

    pub(crate) fn push(&self, request: Request) {
        let mut queue = self.queue.lock();
        let known = request.is_of_people() && queue.back() == Some(&request)
            || request == Request::Pause && queue.contains(&request);
        if !known && (queue.len() < Self::MOST || request.is_of_people()) {
            queue.push_back(request);
        }
        self.arrived.notify_all();
    }

    /// The same, for a vCPU that is to do nothing after the instruction by which it asks.
    pub(crate) fn push_and_stop(&self, request: Request) {
        self.push(request);
        if let Some(stop) = &*self.running.lock() {
            stop.stop();
        }
    }

    /// Whether nothing was asked for.
    pub(crate) fn is_empty(&self) -> bool {
        self.queue.lock().is_empty()
    }

    /// The next request, if there is one.
    pub(crate) fn take(&self) -> Option<Request> {
        self.queue.lock().pop_front()
    }

    /// Forgets stops of a debugger's that come again when the VM goes on, or mean nothing then.
    pub(crate) fn clear_stops(&self) {
        let again = |request: &Request| {
            matches!(request, Request::Debug { stop: DebugStop::Step | DebugStop::Breakpoint { .. }, .. })
        };
        self.queue.lock().retain(|request| !again(request));
    }

    /// Waits for the next request.
    pub(crate) fn wait(&self) -> Request {
        self.wait_for(|_| true)
    }

    /// Waits for the next request that is `wanted`; the others stay.
    pub(crate) fn wait_for(&self, wanted: impl Fn(&Request) -> bool) -> Request {
        let mut queue = self.queue.lock();
        loop {
            let found = queue.iter().position(&wanted).and_then(|at| queue.remove(at));
            if let Some(request) = found {
                return request;
            }
            self.arrived.wait(&mut queue);
        }
    }

    /// Has requests of the guest's stop the vCPUs that run with `stop`.
    pub(crate) fn set_running(&self, stop: Option<StopToken>) {
        *self.running.lock() = stop;
    }

    /// Forgets what a guest asked for before a reset; people's wishes stay.
    pub(crate) fn clear(&self) {
        self.queue.lock().retain(|request| request.is_of_people() && *request != Request::Reset);
    }
}

impl PowerEvents for Requests {
    fn request(&self, event: PowerEvent) {
        self.push_and_stop(Request::Power(event));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use accel::{WatchKind, Watchpoint};

    #[test]
    fn what_the_guest_asked_for_stays_while_it_stands_still() {
        let requests = Requests::default();
        let point = Watchpoint { address: 0x1000, len: 4, kind: WatchKind::Write };
        let watched = Request::Debug { vcpu: 1, stop: DebugStop::Watchpoint(point) };
        let stepped = Request::Debug { vcpu: 1, stop: DebugStop::Step };
        let guests = [Request::Power(PowerEvent::Reset), Request::TripleFault { vcpu: 1 }, watched, stepped];
        guests.iter().for_each(|request| requests.push(request.clone()));
        requests.push(Request::Pause);
        requests.push(Request::Quit(Quitter::Signal));
        assert_eq!(requests.wait_for(Request::is_of_host), Request::Pause);
        assert_eq!(requests.wait_for(Request::is_of_host), Request::Quit(Quitter::Signal));
        requests.clear_stops();
        let left: Vec<_> = std::iter::from_fn(|| requests.take()).collect();
        assert_eq!(left, guests[..3], "a step comes again by itself");
    }
}
