//! I/O threads: one serves one queue, wakes when its doorbell rings, and stands still while the VM does.

use crate::loop_threads::{self, QueueServer};
use crate::thread_control::Shared;
use crate::{Interrupt, QueueError};
use parking_lot::Mutex;
use std::fmt;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Tells a queue's handler to return soon.
#[derive(Debug)]
pub struct StopToken<'a> {
    pub(crate) stop: &'a AtomicBool,
}

impl<'a> StopToken<'a> {
    /// A token that says to stop once `stop` is true.
    pub fn new(stop: &'a AtomicBool) -> Self {
        Self { stop }
    }

    /// Whether the handler is to return. It is called again when the VM runs on.
    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}

struct QueueThread {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for QueueThread {
    fn drop(&mut self) {
        self.shared.end();
        if let Some(thread) = self.thread.take() {
            // It does not panic: handlers' panics are caught.
            let _ = thread.join();
        }
    }
}

#[derive(Default)]
struct Inner {
    running: bool,
    threads: Vec<(u16, QueueThread)>,
}

/// Handlers of queues that have I/O threads, by the number of the queue whose doorbell wakes them.
#[derive(Default)]
pub(crate) struct HostThreads {
    inner: Mutex<Inner>,
}

impl HostThreads {
    /// Starts the thread `name` that calls `handler` whenever the doorbell of `queue` rings or the VM runs
    /// on. The handler returns when it has no more to do, and soon after its token says to stop. When it
    /// returns an error or panics, the device goes into the error state; in that state no handler is called.
    ///
    /// # Errors
    /// The host's, if it gives no thread or event descriptor.
    pub(crate) fn spawn(
        &self,
        queue: u16,
        name: &str,
        interrupt: Arc<dyn Interrupt>,
        mut handler: impl FnMut(&StopToken<'_>) -> Result<(), QueueError> + Send + 'static,
    ) -> std::io::Result<()> {
        self.start_thread(queue, name, move |shared| {
            while shared.wait() {
                if !interrupt.failed() {
                    let token = StopToken { stop: shared.stop() };
                    let panicked = || QueueError::Device("its I/O thread panicked".into());
                    let result = catch_unwind(AssertUnwindSafe(|| handler(&token)));
                    if let Err(error) = result.unwrap_or_else(|_| Err(panicked())) {
                        interrupt.fail(&error);
                    }
                }
                shared.set_idle();
            }
        })
    }

    /// Starts the thread `name` whose loop has `server` serve `queue` whenever its doorbell rings or the VM runs on.
    ///
    /// # Errors
    /// The host's, if it gives no thread or event descriptor.
    pub(crate) fn spawn_loop(
        &self,
        queue: u16,
        name: &str,
        interrupt: Arc<dyn Interrupt>,
        server: impl QueueServer + 'static,
    ) -> std::io::Result<()> {
        self.start_thread(queue, name, move |shared| loop_threads::run(shared, &interrupt, server))
    }

    fn start_thread(
        &self,
        queue: u16,
        name: &str,
        main: impl FnOnce(&Shared) + Send + 'static,
    ) -> std::io::Result<()> {
        let mut inner = self.inner.lock();
        let shared = Arc::new(Shared::new(inner.running)?);
        let for_thread = shared.clone();
        let first = ::device::start_hook();
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            if let Some(first) = first {
                first();
            }
            main(&for_thread);
        })?;
        // What became available before there was a thread is served too.
        shared.ring();
        inner.threads.push((queue, QueueThread { shared, thread: Some(thread) }));
        Ok(())
    }

    fn find(&self, queue: u16) -> Option<Arc<Shared>> {
        let inner = self.inner.lock();
        inner.threads.iter().find(|(number, _)| *number == queue).map(|(_, thread)| thread.shared.clone())
    }

    /// Rings the doorbell of `queue`, if a thread serves it. Never blocks for long.
    pub(crate) fn notify(&self, queue: u16) {
        if let Some(shared) = self.find(queue) {
            shared.ring();
        }
    }

    /// The event descriptor of the doorbell of `queue`.
    pub(crate) fn doorbell(&self, queue: u16) -> Option<Arc<OwnedFd>> {
        self.find(queue).map(|shared| shared.event().clone())
    }

    /// The VM begins to run. Every queue is looked at.
    pub(crate) fn start(&self) {
        let mut inner = self.inner.lock();
        inner.running = true;
        for (_, thread) in &inner.threads {
            thread.shared.set_running(true);
            thread.shared.ring();
        }
    }

    /// The VM is to stand still. On return no handler runs.
    pub(crate) fn stop(&self) {
        let shared: Vec<_> = {
            let mut inner = self.inner.lock();
            inner.running = false;
            inner.threads.iter().map(|(_, thread)| thread.shared.clone()).collect()
        };
        for shared in &shared {
            shared.set_running(false);
            // One that waits in its loop is to see it.
            shared.ring();
        }
        for shared in &shared {
            shared.wait_idle();
        }
    }

    /// Ends all threads. On return no handler runs, and none is called again. Not to be called on one of
    /// the threads.
    pub(crate) fn clear(&self) {
        let threads = std::mem::take(&mut self.inner.lock().threads);
        // All are told before the first is waited for.
        for (_, thread) in &threads {
            thread.shared.ask_to_stop();
        }
        drop(threads);
    }
}

impl fmt::Debug for HostThreads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.inner.lock();
        let queues: Vec<_> = inner.threads.iter().map(|(queue, _)| *queue).collect();
        f.debug_struct("HostThreads").field("running", &inner.running).field("queues", &queues).finish()
    }
}
