//! What every device is: access traits, lifecycle and saved state.
//!
//! A device implements [`Device`], plus the access traits for the ways in which a guest reaches it. All
//! methods take `&self`: a device guards its state with a lock of its own, and no lock is held while it
//! calls an interrupt line, a timer or guest memory that could call back.

mod saved_state;
mod thread_start;

pub use saved_state::{MAX_STATE_LEN, SavedState, StateError, decode, encode};
pub use thread_start::{StartHook, set_start_hook, start_hook};

/// Guest accesses in physical memory. `offset` counts from the start of the region that the device was
/// mapped at; `data` is 1, 2, 4 or 8 bytes long, little-endian, and never reaches past the region's end.
pub trait MmioDevice: Send + Sync {
    /// A guest's load. Bytes that no register backs read as the device's specification says, else zero.
    fn mmio_read(&self, offset: u64, data: &mut [u8]);
    /// A guest's store. What the device does not know it ignores.
    fn mmio_write(&self, offset: u64, data: &[u8]);
}

/// Guest accesses to I/O ports. `offset` counts from the first port of the region; `data` is 1, 2 or 4
/// bytes long, little-endian.
pub trait PioDevice: Send + Sync {
    /// `IN`. Ports that no register backs read as all ones.
    fn pio_read(&self, offset: u16, data: &mut [u8]);
    /// `OUT`. What the device does not know it ignores.
    fn pio_write(&self, offset: u16, data: &[u8]);
}

/// A part of the VM with state that a guest can see.
///
/// `save` is called only between `stop` and `start`.
pub trait Device: Send + Sync {
    /// The device's kind, e.g. `"serial-16550"`: names its saved state's format. Never changes.
    fn kind(&self) -> &'static str;
    /// The version of the saved state that [`Device::save`] writes.
    fn version(&self) -> u32;
    /// Back to the state after power-on.
    fn reset(&self);
    /// The VM begins to run: host-side work may begin.
    fn start(&self) {}
    /// The VM is about to stand still: returns when no host-side work is under way.
    fn stop(&self) {}
    /// The guest-visible state, all of it.
    fn save(&self) -> SavedState;
    /// Takes over a state that `save` of this or an older version wrote. The device was made with the same
    /// fixed configuration. The state is untrusted input.
    ///
    /// # Errors
    /// [`StateError`] if the state is of another kind, of an unknown version, or no state of this device;
    /// the device is then as after `reset`.
    fn restore(&self, state: &SavedState) -> Result<(), StateError>;
}
