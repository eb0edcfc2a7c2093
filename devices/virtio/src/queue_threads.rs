//! What serves a device's queues.

use crate::inline_handlers::InlineHandlers;
use crate::loop_threads::{QueueServer, Wake};
use crate::threads::HostThreads;
use crate::{Interrupt, QueueError, StopToken};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// What serves the queues of a device, by the number of the queue whose doorbell rings for it: an I/O thread each, or,
/// where the machine wants that ([`Interrupt::serves_inline`]) and for fuzzers, the thread that rings the doorbell.
#[derive(Debug, Default)]
pub struct QueueThreads {
    threads: HostThreads,
    inline: InlineHandlers,
}

impl QueueThreads {
    /// No threads, of a device that is not started.
    pub fn new() -> Self {
        Self::default()
    }

    /// Has `handler` called whenever the doorbell of `queue` rings or the VM runs on, by a thread called `name`. The
    /// handler returns when it has no more to do, and soon after its token says to stop. When it returns an error or
    /// panics, the device goes into the error state; in that state no handler is called.
    ///
    /// # Errors
    /// The host's, if it gives no thread or event descriptor.
    pub fn spawn(
        &self,
        queue: u16,
        name: &str,
        interrupt: Arc<dyn Interrupt>,
        handler: impl FnMut(&StopToken<'_>) -> Result<(), QueueError> + Send + 'static,
    ) -> std::io::Result<()> {
        if cfg!(feature = "fuzzing") || interrupt.serves_inline() {
            self.inline.add(queue, interrupt, handler);
            return Ok(());
        }
        self.threads.spawn(queue, name, interrupt, handler)
    }

    /// Has `server` serve `queue` on the loop of a thread called `name`, with many requests in flight.
    ///
    /// # Errors
    /// The host's, if it gives no thread or event descriptor.
    pub fn spawn_loop(
        &self,
        queue: u16,
        name: &str,
        interrupt: Arc<dyn Interrupt>,
        mut server: impl QueueServer + 'static,
    ) -> std::io::Result<()> {
        if cfg!(feature = "fuzzing") || interrupt.serves_inline() {
            self.inline
                .add(queue, interrupt, move |stop| io_loop::block_on(server.serve(&Wake::inline(stop.stop))));
            return Ok(());
        }
        self.threads.spawn_loop(queue, name, interrupt, server)
    }

    /// Rings the doorbell of `queue`. Never blocks for long, but for what is served inline.
    pub fn notify(&self, queue: u16) {
        self.threads.notify(queue);
        self.inline.notify(queue);
    }

    /// The event descriptor of the doorbell of `queue`, if a thread serves it.
    pub fn doorbell(&self, queue: u16) -> Option<Arc<OwnedFd>> {
        self.threads.doorbell(queue)
    }

    /// The VM begins to run. Every queue is looked at that there may be something in.
    pub fn start(&self) {
        self.threads.start();
        self.inline.start();
    }

    /// The VM is to stand still. On return no handler runs.
    pub fn stop(&self) {
        self.threads.stop();
        self.inline.stop();
    }

    /// Forgets all handlers. On return none runs, and none is called again. Not to be called by one of them.
    pub fn clear(&self) {
        self.threads.clear();
        self.inline.clear();
    }
}
