//! Devices with several separate ranges of I/O ports.

use device::{Device, PioDevice, StateError, decode};
use serde::de::DeserializeOwned;
use std::fmt;
use std::sync::Arc;

/// A range of I/O ports and the device to map there.
#[derive(Clone)]
pub struct PortRegion {
    /// The first port.
    pub first: u16,
    /// How many ports.
    pub count: u16,
    /// What the guest reaches there.
    pub device: Arc<dyn PioDevice>,
}

impl fmt::Debug for PortRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PortRegion").field("first", &self.first).field("count", &self.count).finish()
    }
}

/// A device that tells its registers apart by port number.
pub(crate) trait PortSet: Send + Sync + 'static {
    fn read_ports(&self, first: u16, data: &mut [u8]);
    fn write_ports(&self, first: u16, data: &[u8]);
}

/// Names the range `(first, count)` of a device's ports.
pub(crate) fn region<D: PortSet>(device: &Arc<D>, (first, count): (u16, u16)) -> PortRegion {
    PortRegion { first, count, device: Arc::new(Window { device: device.clone(), first }) }
}

struct Window<D> {
    device: Arc<D>,
    first: u16,
}

impl<D: PortSet> PioDevice for Window<D> {
    fn pio_read(&self, offset: u16, data: &mut [u8]) {
        self.device.read_ports(self.first.wrapping_add(offset), data);
    }

    fn pio_write(&self, offset: u16, data: &[u8]) {
        self.device.write_ports(self.first.wrapping_add(offset), data);
    }
}

/// Has `put` take over what was decoded from a saved state, or resets `device` if that was refused. (A reset
/// before a good state is taken over would move the device's interrupt lines for a moment.)
pub(crate) fn take_over<T>(
    device: &impl Device,
    decoded: Result<T, StateError>,
    put: impl FnOnce(T),
) -> Result<(), StateError> {
    match decoded {
        Ok(value) => {
            put(value);
            Ok(())
        }
        Err(error) => {
            device.reset();
            Err(error)
        }
    }
}

/// Decodes a saved state and refuses it if `sound` finds values that the device cannot have reached.
pub(crate) fn decode_checked<T: DeserializeOwned>(
    kind: &'static str,
    version: u32,
    state: &device::SavedState,
    sound: impl FnOnce(&T) -> bool,
) -> Result<T, StateError> {
    let value = decode(kind, version, state)?;
    if sound(&value) { Ok(value) } else { Err(StateError::malformed(kind, "impossible register values")) }
}
