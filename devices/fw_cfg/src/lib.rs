//! The firmware configuration device ("QEMU Firmware Configuration Device", docs/specs/fw_cfg): items under
//! 16-bit keys, which a guest selects by one port and reads by another, or has copied to memory.
//!
//! Items are fixed once the device is made, and a guest only reads them.

mod items;
#[cfg(test)]
mod tests;

pub use items::{FwCfgError, Items, key};

use device::{Device, PioDevice, SavedState, StateError, decode, encode};
use guest_memory::GuestMemory;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;

/// The first port: the selector, 16 bits, to be written.
pub const SELECTOR_PORT: u16 = 0x510;
/// How many ports the selector and the data register take.
pub const SELECTOR_PORT_COUNT: u16 = 2;
/// The first port of the 64-bit, big-endian address of a copy's description.
pub const DMA_PORT: u16 = 0x514;
/// How many ports that address takes.
pub const DMA_PORT_COUNT: u16 = 8;

/// What the address register reads: "QEMU CFG".
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";
/// Bytes in a copy's description: control, length, address.
const DESCRIPTION_LEN: usize = 16;
const CONTROL_ERROR: u32 = 1;
const CONTROL_READ: u32 = 1 << 1;
const CONTROL_SKIP: u32 = 1 << 2;
const CONTROL_SELECT: u32 = 1 << 3;
const CONTROL_WRITE: u32 = 1 << 4;

/// The device.
pub struct FwCfg {
    // Fixed configuration.
    items: Items,
    // Host glue.
    memory: GuestMemory,
    // Guest-visible state.
    state: Mutex<State>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    selected: u16,
    /// How many bytes of the item have been read.
    offset: u32,
    /// The upper half of the address of a copy's description.
    dma_high: u32,
}

impl FwCfg {
    /// The device's kind in saved states.
    pub const KIND: &'static str = "fw-cfg";
    const VERSION: u32 = 1;

    /// A device that has `items` and copies them to `memory`.
    pub fn new(items: Items, memory: GuestMemory) -> Arc<Self> {
        Arc::new(Self { items, memory, state: Mutex::default() })
    }

    /// What is at [`SELECTOR_PORT`].
    pub fn selector(self: &Arc<Self>) -> Arc<dyn PioDevice> {
        Arc::new(Selector(self.clone()))
    }

    /// What is at [`DMA_PORT`].
    pub fn dma(self: &Arc<Self>) -> Arc<dyn PioDevice> {
        Arc::new(Dma(self.clone()))
    }

    /// Copies as the description at `address` says, and writes the result into it.
    fn copy(&self, state: &mut State, address: u64) {
        let mut description = [0; DESCRIPTION_LEN];
        if self.memory.read(address, &mut description).is_err() {
            return;
        }
        let word = |at: usize| {
            description[at..].first_chunk().map_or(0, |bytes: &[u8; 4]| u32::from_be_bytes(*bytes))
        };
        let (control, length) = (word(0), word(4));
        let target = u64::from(word(8)) << 32 | u64::from(word(12));
        if control & CONTROL_SELECT != 0 {
            state.selected = (control >> 16) as u16;
            state.offset = 0;
        }
        let failed = if control & CONTROL_READ != 0 {
            self.copy_item(state, target, length).is_err()
        } else if control & CONTROL_WRITE != 0 {
            // No item may be written.
            state.offset = state.offset.saturating_add(length);
            true
        } else {
            if control & CONTROL_SKIP != 0 {
                state.offset = state.offset.saturating_add(length);
            }
            false
        };
        let result = if failed { CONTROL_ERROR } else { 0 };
        // The description was read from there; a guest that made it go away meanwhile hears nothing.
        let _ = self.memory.write(address, &result.to_be_bytes());
    }

    /// Copies `length` bytes of the selected item, and zeroes once it ends.
    fn copy_item(
        &self,
        state: &mut State,
        target: u64,
        length: u32,
    ) -> Result<(), guest_memory::MemoryError> {
        static ZEROES: [u8; 4096] = [0; 4096];
        let item = self.items.get(state.selected);
        let from = item.len().min(state.offset as usize);
        let bytes = &item[from..item.len().min(from + length as usize)];
        state.offset = state.offset.saturating_add(length);
        self.memory.write(target, bytes)?;
        let mut done = bytes.len() as u64;
        while done < length.into() {
            let piece = (u64::from(length) - done).min(ZEROES.len() as u64);
            self.memory.write(target.saturating_add(done), &ZEROES[..piece as usize])?;
            done += piece;
        }
        Ok(())
    }
}

/// The selector and the data register.
struct Selector(Arc<FwCfg>);

impl PioDevice for Selector {
    fn pio_read(&self, _offset: u16, data: &mut [u8]) {
        let state = &mut *self.0.state.lock();
        let item = self.0.items.get(state.selected);
        // The data register is one byte wide; wider reads are those of several bytes.
        for byte in data {
            *byte = item.get(state.offset as usize).copied().unwrap_or(0);
            state.offset = state.offset.saturating_add(1);
        }
    }

    fn pio_write(&self, offset: u16, data: &[u8]) {
        if let (0, &[low, high]) = (offset, data) {
            let state = &mut *self.0.state.lock();
            state.selected = u16::from_le_bytes([low, high]);
            state.offset = 0;
        }
    }
}

/// The address of a copy's description.
struct Dma(Arc<FwCfg>);

impl PioDevice for Dma {
    fn pio_read(&self, offset: u16, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = DMA_SIGNATURE.get(usize::from(offset) + index).copied().unwrap_or(0);
        }
    }

    fn pio_write(&self, offset: u16, data: &[u8]) {
        let Some(value) = data.first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes)) else { return };
        let state = &mut *self.0.state.lock();
        match offset {
            0 => state.dma_high = value,
            4 => {
                let address = u64::from(std::mem::take(&mut state.dma_high)) << 32 | u64::from(value);
                self.0.copy(state, address);
            }
            _ => {}
        }
    }
}

impl Device for FwCfg {
    fn kind(&self) -> &'static str {
        Self::KIND
    }

    fn version(&self) -> u32 {
        Self::VERSION
    }

    fn reset(&self) {
        *self.state.lock() = State::default();
    }

    fn save(&self) -> SavedState {
        let State { selected, offset, dma_high } = self.state.lock().clone();
        encode(Self::KIND, Self::VERSION, &State { selected, offset, dma_high })
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        self.reset();
        *self.state.lock() = decode(Self::KIND, Self::VERSION, state)?;
        Ok(())
    }
}

impl fmt::Debug for FwCfg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FwCfg").field("state", &self.state).finish_non_exhaustive()
    }
}
