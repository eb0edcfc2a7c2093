//! What hears of what happens to the VM, and tells clients and commands that wait for it.

use crate::block_events;
use crate::events::Hub;
use crate::vm_events;
use machine::{ErrorAction, VmEvent};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What happened to the VM: what a command that waits for something, or is asked, looks at.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) resumed: AtomicU64,
    pub(crate) reset: AtomicU64,
    /// The drives for which the VM stands still, and whether for want of space.
    pub(crate) io_errors: Mutex<HashMap<String, bool>>,
}

impl Counts {
    pub(crate) fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::SeqCst);
    }
}

/// What hears of what happens to the VM before there is a server, and tells its clients.
#[derive(Debug, Clone, Default)]
pub struct Ear {
    pub(crate) hub: Arc<Hub>,
    pub(crate) counts: Arc<Counts>,
}

impl Ear {
    /// Something happened to the VM.
    pub fn hear(&self, event: &VmEvent) {
        match event {
            VmEvent::Resumed => {
                Counts::count(&self.counts.resumed);
                self.counts.io_errors.lock().clear();
            }
            VmEvent::IoError(report) if report.action == ErrorAction::Stop => {
                self.counts.io_errors.lock().insert(report.drive.clone(), report.no_space);
            }
            VmEvent::Reset { .. } => Counts::count(&self.counts.reset),
            _ => {}
        }
        vm_events::send(&self.hub, event, self.counts.resumed.load(Ordering::SeqCst));
        self.hub.changed();
    }

    /// A job on the VM's disks did something.
    pub fn hear_job(&self, event: &jobs::Event) {
        block_events::send(&self.hub, event);
    }
}
