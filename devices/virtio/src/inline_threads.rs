//! [`QueueThreads`] for fuzzers: without threads. Ringing a doorbell serves its queue at once, on the thread
//! that rings, so that the same input always does the same. A handler's panic is not caught.

use crate::{Interrupt, QueueError, StopToken};
use parking_lot::Mutex;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

type Handler = Box<dyn FnMut(&StopToken<'_>) -> Result<(), QueueError> + Send>;

/// What would be a thread.
struct Served {
    queue: u16,
    interrupt: Arc<dyn Interrupt>,
    /// Locked while it runs: a doorbell that rings meanwhile is for it to notice.
    handler: Mutex<Handler>,
    rung: AtomicBool,
}

impl Served {
    fn serve(&self, running: bool) {
        self.rung.store(true, Ordering::SeqCst);
        let never = AtomicBool::new(false);
        while running
            && let Some(mut handler) = self.handler.try_lock()
            && self.rung.swap(false, Ordering::SeqCst)
        {
            if !self.interrupt.failed()
                && let Err(error) = handler(&StopToken::new(&never))
            {
                self.interrupt.fail(&error);
            }
        }
    }
}

#[derive(Default)]
struct Inner {
    running: bool,
    served: Vec<Arc<Served>>,
}

/// The queues' handlers of a device, by the number of the queue whose doorbell calls them.
#[derive(Default)]
pub struct QueueThreads {
    inner: Mutex<Inner>,
}

impl QueueThreads {
    /// No handlers, of a device that is not started.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the handler for the doorbell of `queue`, and calls it for the first time if the VM runs. When
    /// it returns an error the device goes into the error state; in that state no handler is called.
    ///
    /// # Errors
    /// None.
    pub fn spawn(
        &self,
        queue: u16,
        _name: &str,
        interrupt: Arc<dyn Interrupt>,
        handler: impl FnMut(&StopToken<'_>) -> Result<(), QueueError> + Send + 'static,
    ) -> std::io::Result<()> {
        let handler: Handler = Box::new(handler);
        let rung = AtomicBool::new(false);
        let served = Arc::new(Served { queue, interrupt, handler: Mutex::new(handler), rung });
        let running = {
            let mut inner = self.inner.lock();
            inner.served.push(served.clone());
            inner.running
        };
        served.serve(running);
        Ok(())
    }

    /// Rings the doorbell of `queue`.
    pub fn notify(&self, queue: u16) {
        let (served, running) = {
            let inner = self.inner.lock();
            (inner.served.iter().find(|served| served.queue == queue).cloned(), inner.running)
        };
        if let Some(served) = served {
            served.serve(running);
        }
    }

    /// There are no event descriptors.
    pub fn doorbell(&self, _queue: u16) -> Option<Arc<OwnedFd>> {
        None
    }

    /// The VM begins to run. Every queue is looked at.
    pub fn start(&self) {
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
    pub fn stop(&self) {
        self.inner.lock().running = false;
    }

    /// Forgets all handlers.
    pub fn clear(&self) {
        // Dropped without the lock held.
        let served = std::mem::take(&mut self.inner.lock().served);
        drop(served);
    }
}

impl fmt::Debug for QueueThreads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.inner.lock();
        let queues: Vec<_> = inner.served.iter().map(|served| served.queue).collect();
        f.debug_struct("QueueThreads").field("running", &inner.running).field("queues", &queues).finish()
    }
}
