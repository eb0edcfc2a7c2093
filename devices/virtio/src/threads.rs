//! I/O threads: one serves one queue, wakes when its doorbell rings, and stands still while the VM does.

use crate::{Interrupt, QueueError};
use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, eventfd};
use std::fmt;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Tells a queue's handler to return soon.
#[derive(Debug)]
pub struct StopToken<'a> {
    stop: &'a AtomicBool,
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

#[derive(Debug)]
struct Control {
    running: bool,
    exit: bool,
    /// The handler runs, or is about to.
    busy: bool,
}

#[derive(Debug)]
struct Shared {
    event: Arc<OwnedFd>,
    /// The event descriptor was written to since the thread last read it: saves system calls.
    rung: AtomicBool,
    /// The handler is to return.
    stop: AtomicBool,
    control: Mutex<Control>,
    changed: Condvar,
}

impl Shared {
    fn ring(&self) {
        if !self.rung.swap(true, Ordering::SeqCst) {
            // Fails only if the counter is at its maximum, in which case the thread wakes anyway.
            let _ = rustix::io::write(&*self.event, &1u64.to_ne_bytes());
        }
    }

    /// Waits for the doorbell and then until the VM runs. `false`: the thread is to end.
    fn wait(&self) -> bool {
        let mut count = [0; 8];
        while let Err(error) = rustix::io::read(&*self.event, &mut count) {
            if error != rustix::io::Errno::INTR {
                tracing::error!("an I/O thread's event descriptor fails: {error}");
                return false;
            }
        }
        self.rung.store(false, Ordering::SeqCst);
        let mut control = self.control.lock();
        while !control.running && !control.exit {
            self.changed.wait(&mut control);
        }
        control.busy = !control.exit;
        control.busy
    }

    fn set_running(&self, running: bool) {
        let mut control = self.control.lock();
        control.running = running;
        self.stop.store(!running, Ordering::SeqCst);
        self.changed.notify_all();
    }

    fn wait_idle(&self) {
        let mut control = self.control.lock();
        while control.busy {
            self.changed.wait(&mut control);
        }
    }
}

struct QueueThread {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for QueueThread {
    fn drop(&mut self) {
        {
            let mut control = self.shared.control.lock();
            control.exit = true;
            self.shared.stop.store(true, Ordering::SeqCst);
            self.shared.changed.notify_all();
        }
        self.shared.ring();
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
        let mut inner = self.inner.lock();
        let shared = Arc::new(Shared {
            event: Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?),
            rung: AtomicBool::new(false),
            stop: AtomicBool::new(!inner.running),
            control: Mutex::new(Control { running: inner.running, exit: false, busy: false }),
            changed: Condvar::new(),
        });
        let for_thread = shared.clone();
        let first = ::device::start_hook();
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            if let Some(first) = first {
                first();
            }
            while for_thread.wait() {
                if !interrupt.failed() {
                    let token = StopToken { stop: &for_thread.stop };
                    let panicked = || QueueError::Device("its I/O thread panicked".into());
                    let result = catch_unwind(AssertUnwindSafe(|| handler(&token)));
                    if let Err(error) = result.unwrap_or_else(|_| Err(panicked())) {
                        interrupt.fail(&error);
                    }
                }
                for_thread.control.lock().busy = false;
                for_thread.changed.notify_all();
            }
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
        self.find(queue).map(|shared| shared.event.clone())
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
            thread.shared.stop.store(true, Ordering::SeqCst);
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
