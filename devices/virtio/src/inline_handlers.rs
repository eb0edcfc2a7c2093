//! Queues without threads: ringing a doorbell serves its queue at once, on the thread that rings, so that the same
//! guest, or a fuzzer's input, always does the same.

use crate::{Interrupt, QueueError, StopToken};
use parking_lot::Mutex;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

type Handler = Box<dyn FnMut(&StopToken<'_>) -> Result<(), QueueError> + Send>;

/// What would be a thread.
struct Served {
    queue: u16,
    interrupt: Arc<dyn Interrupt>,
    /// Locked while it runs: a doorbell that rings meanwhile is for it to notice.
    handler: Mutex<Handler>,
    /// There may be something to do. At first there is: what became available before.
    rung: AtomicBool,
}

impl Served {
    fn ring(&self, running: bool) {
        self.rung.store(true, Ordering::SeqCst);
        self.serve(running);
    }

    /// Calls the handler if the doorbell was rung.
    fn serve(&self, running: bool) {
        let never = AtomicBool::new(false);
        while running
            && let Some(mut handler) = self.handler.try_lock()
            && self.rung.swap(false, Ordering::SeqCst)
        {
            if !self.interrupt.failed()
                && let Err(error) = call(&mut handler, &StopToken::new(&never))
            {
                self.interrupt.fail(&error);
            }
        }
    }
}

/// Calls a handler. To fuzzers its panics are what they look for.
fn call(handler: &mut Handler, stop: &StopToken<'_>) -> Result<(), QueueError> {
    if cfg!(feature = "fuzzing") {
        return handler(stop);
    }
    let panicked = || QueueError::Device("its queue's handler panicked".into());
    catch_unwind(AssertUnwindSafe(|| handler(stop))).unwrap_or_else(|_| Err(panicked()))
}

#[derive(Default)]
struct Inner {
    running: bool,
    served: Vec<Arc<Served>>,
}

/// The queues' handlers of a device, by the number of the queue whose doorbell calls them.
#[derive(Default)]
pub(crate) struct InlineHandlers {
    inner: Mutex<Inner>,
}

impl InlineHandlers {
    /// Takes the handler for the doorbell of `queue`, and calls it for the first time if the VM runs. When it
    /// returns an error or panics the device goes into the error state; in that state no handler is called.
    pub(crate) fn add(
        &self,
        queue: u16,
        interrupt: Arc<dyn Interrupt>,
        handler: impl FnMut(&StopToken<'_>) -> Result<(), QueueError> + Send + 'static,
    ) {
        let handler: Handler = Box::new(handler);
        let rung = AtomicBool::new(true);
        let served = Arc::new(Served { queue, interrupt, handler: Mutex::new(handler), rung });
        let running = {
            let mut inner = self.inner.lock();
            inner.served.push(served.clone());
            inner.running
        };
        served.serve(running);
    }

    /// Rings the doorbell of `queue`.
    pub(crate) fn notify(&self, queue: u16) {
        let (served, running) = {
            let inner = self.inner.lock();
            (inner.served.iter().find(|served| served.queue == queue).cloned(), inner.running)
        };
        if let Some(served) = served {
            served.ring(running);
        }
    }

    /// The VM begins to run. Queues are looked at whose doorbells rang meanwhile, and new ones: one that a guest is in
    /// the middle of filling is not, so that stopping the VM makes no difference to it.
    pub(crate) fn start(&self) {
        let served = {
            let mut inner = self.inner.lock();
            inner.running = true;
            inner.served.clone()
        };
        for served in served {
            served.serve(true);
        }
    }

    /// The VM is to stand still.
    pub(crate) fn stop(&self) {
        self.inner.lock().running = false;
    }

    /// Forgets all handlers.
    pub(crate) fn clear(&self) {
        // Dropped without the lock held.
        let served = std::mem::take(&mut self.inner.lock().served);
        drop(served);
    }
}

impl fmt::Debug for InlineHandlers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.inner.lock();
        let queues: Vec<_> = inner.served.iter().map(|served| served.queue).collect();
        f.debug_struct("InlineHandlers").field("running", &inner.running).field("queues", &queues).finish()
    }
}
