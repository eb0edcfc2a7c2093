//! Virtio doorbells that the accelerator turns into events.

use accel::{AccelError, AccelVm, DoorbellAddress, Doorbells};
use parking_lot::Mutex;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use virtio::{Doorbell, DoorbellSink};

/// One device's doorbells with the accelerator.
struct AccelDoorbells {
    accel: Arc<dyn Doorbells>,
    registered: Mutex<Vec<Doorbell>>,
}

/// Where a device's doorbells go, if the accelerator of `vm` does such things.
pub(crate) fn sink(vm: &dyn AccelVm) -> Option<Box<dyn DoorbellSink>> {
    let accel = vm.doorbells()?;
    Some(Box::new(AccelDoorbells { accel, registered: Mutex::default() }))
}

/// The arguments of a registration, and of taking it back.
fn arguments(doorbell: &Doorbell) -> (DoorbellAddress, u32, Option<u64>, BorrowedFd<'_>) {
    let (len, data) = doorbell.data.map_or((0, None), |data| (4, Some(data.into())));
    (DoorbellAddress::Mmio(doorbell.address), len, data, doorbell.event.as_fd())
}

/// Only speed is lost if the accelerator refuses: the store reaches the device's registers.
fn say(doorbell: &Doorbell, result: Result<(), AccelError>) -> bool {
    if let Err(error) = &result {
        tracing::warn!("the doorbell at {:#x} is rung the slow way: {error}", doorbell.address);
    }
    result.is_ok()
}

impl DoorbellSink for AccelDoorbells {
    fn replace(&self, doorbells: Vec<Doorbell>) {
        let mut registered = self.registered.lock();
        for doorbell in registered.drain(..) {
            let (address, len, data, event) = arguments(&doorbell);
            say(&doorbell, self.accel.unregister(address, len, data, event));
        }
        for doorbell in doorbells {
            let (address, len, data, event) = arguments(&doorbell);
            if say(&doorbell, self.accel.register(address, len, data, event)) {
                registered.push(doorbell);
            }
        }
    }
}
