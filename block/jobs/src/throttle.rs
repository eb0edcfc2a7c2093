//! Limits of users' speed: `block_set_io_throttle`.

use crate::storage::Storage;
use block_filters::{ThrottleGroup, ThrottleLimits};
use block_graph::{Admission, Errno, Error, Result};
use std::sync::Arc;

impl Storage {
    /// Has a device's requests keep within limits, which it shares with all others whose group has this name (of its
    /// own, that of the device). Limits that are all 0 are none.
    ///
    /// # Errors
    /// There is no such device, or the limits contradict one another.
    pub fn set_io_throttle(&self, device: &str, group: Option<&str>, limits: ThrottleLimits) -> Result<()> {
        limits.check()?;
        let missing = || Error::new(Errno::NOT_FOUND, format!("Device '{device}' not found"));
        let backend = self.backend(device).ok_or_else(missing)?;
        let mut groups = self.throttled.lock();
        let unlimited = limits.limits.iter().all(|limit| limit.rate == 0);
        if unlimited {
            groups.remove(device);
            backend.set_admission(None);
            return Ok(());
        }
        let name = group.unwrap_or(device);
        let shared = groups.values().find(|(known, _)| known == name).map(|(_, group)| group.clone());
        let shared = shared.unwrap_or_else(|| ThrottleGroup::new(limits));
        shared.set_limits(limits);
        groups.insert(device.to_owned(), (name.to_owned(), shared.clone()));
        let admission: Arc<dyn Admission> = shared;
        backend.set_admission(Some(admission));
        Ok(())
    }

    /// The group and the limits of a device, if it has any.
    pub fn io_throttle(&self, device: &str) -> Option<(String, ThrottleLimits)> {
        let groups = self.throttled.lock();
        groups.get(device).map(|(name, group)| (name.clone(), group.limits()))
    }
}
