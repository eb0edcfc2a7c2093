//! Doorbells that an accelerator can ring by itself: guest stores turned into events.

use crate::VirtioDevice;
use parking_lot::Mutex;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

/// A guest store that rings a queue's doorbell.
#[derive(Debug, Clone)]
pub struct Doorbell {
    /// The guest physical address.
    pub address: u64,
    /// The value of the store, of 4 bytes; without it stores of any value and width count.
    pub data: Option<u32>,
    /// The queue's number.
    pub queue: u16,
    /// Where a 1 is to be written.
    pub event: Arc<OwnedFd>,
}

/// Told which doorbells a device has, for an accelerator that turns guest stores into events.
pub trait DoorbellSink: Send + Sync {
    /// The doorbells are these from now on, in place of those before. When this returns the events of the
    /// ones before are not written to any more. A store that is turned into no event reaches the device's
    /// registers, which does the same.
    fn replace(&self, doorbells: Vec<Doorbell>);
}

/// How doorbells lie in a transport's registers.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Places {
    /// Each has an address of its own: the first one's offset, and the distance between them.
    Apart(u64, u64),
    /// All are the register at this offset, to which the queue's number is written.
    Together(u64),
}

#[derive(Debug, Clone, Copy, Default)]
struct State {
    /// Where the registers are, if the guest can reach them.
    base: Option<u64>,
    /// The driver is there.
    active: bool,
}

/// A device's doorbells, and who is told of them.
pub(crate) struct Doorbells {
    device: Arc<dyn VirtioDevice>,
    places: Places,
    sink: OnceLock<Box<dyn DoorbellSink>>,
    state: Mutex<State>,
}

impl Doorbells {
    pub(crate) fn new(device: Arc<dyn VirtioDevice>, places: Places) -> Self {
        Self { device, places, sink: OnceLock::new(), state: Mutex::default() }
    }

    /// Has `sink` told from now on. To be called once.
    pub(crate) fn connect(&self, sink: Box<dyn DoorbellSink>) {
        let first = self.sink.set(sink).is_ok();
        debug_assert!(first, "doorbells are connected once");
        self.change(|_| {});
    }

    /// The registers are at `base` now.
    pub(crate) fn set_base(&self, base: Option<u64>) {
        self.change(|state| state.base = base);
    }

    /// The driver came or goes.
    pub(crate) fn set_active(&self, active: bool) {
        self.change(|state| state.active = active);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock();
        let before = (state.base, state.active);
        change(&mut state);
        if let Some(sink) = self.sink.get()
            && before != (state.base, state.active)
        {
            sink.replace(self.list(*state));
        }
    }

    fn list(&self, state: State) -> Vec<Doorbell> {
        let Some(base) = state.base.filter(|_| state.active) else { return Vec::new() };
        let queues = 0..self.device.queue_sizes().len() as u16;
        let doorbell = |queue: u16| {
            let (offset, data) = match self.places {
                Places::Apart(first, distance) => (first + distance * u64::from(queue), None),
                Places::Together(offset) => (offset, Some(queue.into())),
            };
            Some(Doorbell { address: base + offset, data, queue, event: self.device.doorbell(queue)? })
        };
        queues.filter_map(doorbell).collect()
    }
}

impl fmt::Debug for Doorbells {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Doorbells")
            .field("places", &self.places)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}
