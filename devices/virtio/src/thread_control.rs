//! What an I/O thread and those that ring it, stop it and end it share.

use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Debug)]
struct Control {
    running: bool,
    exit: bool,
    /// The handler runs, or is about to.
    busy: bool,
}

/// What a thread, those that ring, and those that stop it share.
#[derive(Debug)]
pub(crate) struct Shared {
    event: Arc<OwnedFd>,
    /// The event descriptor was written to since the thread last read it: saves system calls.
    rung: AtomicBool,
    /// The handler is to return.
    stop: AtomicBool,
    control: Mutex<Control>,
    changed: Condvar,
}

impl Shared {
    /// Of a thread whose VM runs or not.
    pub(crate) fn new(running: bool) -> std::io::Result<Self> {
        Ok(Self {
            event: Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?),
            rung: AtomicBool::new(false),
            stop: AtomicBool::new(!running),
            control: Mutex::new(Control { running, exit: false, busy: false }),
            changed: Condvar::new(),
        })
    }

    /// Wakes the thread.
    pub(crate) fn ring(&self) {
        if !self.rung.swap(true, Ordering::SeqCst) {
            // Fails only if the counter is at its maximum, in which case the thread wakes anyway.
            let _ = rustix::io::write(&*self.event, &1u64.to_ne_bytes());
        }
    }

    /// The doorbell.
    pub(crate) fn event(&self) -> &Arc<OwnedFd> {
        &self.event
    }

    /// Whether the handler is to return.
    pub(crate) fn stop(&self) -> &AtomicBool {
        &self.stop
    }

    /// Waits for the doorbell.
    pub(crate) fn take_ring(&self) -> std::io::Result<()> {
        let mut count = [0; 8];
        while let Err(error) = rustix::io::read(&*self.event, &mut count) {
            if error != rustix::io::Errno::INTR {
                return Err(error.into());
            }
        }
        self.rung.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// Waits for the doorbell and then until the VM runs. `false`: the thread is to end.
    pub(crate) fn wait(&self) -> bool {
        if let Err(error) = self.take_ring() {
            tracing::error!("an I/O thread's event descriptor fails: {error}");
            return false;
        }
        self.wait_until_running()
    }

    /// Waits until the VM runs. `false`: the thread is to end.
    pub(crate) fn wait_until_running(&self) -> bool {
        let mut control = self.control.lock();
        while !control.running && !control.exit {
            self.changed.wait(&mut control);
        }
        control.busy = !control.exit;
        control.busy
    }

    /// The handler has returned.
    pub(crate) fn set_idle(&self) {
        self.control.lock().busy = false;
        self.changed.notify_all();
    }

    /// The thread is to end.
    pub(crate) fn end(&self) {
        self.control.lock().exit = true;
        self.ask_to_stop();
        self.changed.notify_all();
    }

    /// The handler is to return.
    pub(crate) fn ask_to_stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.ring();
    }

    /// The VM runs, or is to stand still.
    pub(crate) fn set_running(&self, running: bool) {
        let mut control = self.control.lock();
        control.running = running;
        self.stop.store(!running, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Returns when no handler runs.
    pub(crate) fn wait_idle(&self) {
        let mut control = self.control.lock();
        while control.busy {
            self.changed.wait(&mut control);
        }
    }
}
