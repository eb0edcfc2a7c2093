//! MSI-X: the vector table, the pending bits and the capability's control bits (6.1.4 and 7.7.2).

use crate::PciError;
use irq::{MsiMessage, MsiTarget};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;

/// Bytes in one entry of the vector table.
pub const MSIX_ENTRY_SIZE: u64 = 16;

/// The most vectors that a function may have.
pub const MSIX_MAX_VECTORS: u16 = 2048;

/// The message control bit that turns MSI-X on.
pub(crate) const CONTROL_ENABLE: u16 = 1 << 15;
/// The message control bit that masks all vectors.
pub(crate) const CONTROL_MASK_ALL: u16 = 1 << 14;
/// The bit of an entry's vector control that masks it.
const VECTOR_MASKED: u32 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

/// Entries are masked after reset.
const RESET_ENTRY: Entry = Entry { address: 0, data: 0, control: VECTOR_MASKED };

#[derive(Debug)]
struct State {
    enabled: bool,
    mask_all: bool,
    entries: Vec<Entry>,
    pending: Vec<bool>,
}

impl State {
    fn may_send(&self, vector: usize) -> bool {
        self.enabled && !self.mask_all && self.entries[vector].control & VECTOR_MASKED == 0
    }

    fn message(&self, vector: usize) -> MsiMessage {
        MsiMessage { address: self.entries[vector].address, data: self.entries[vector].data }
    }

    /// The messages of vectors that are pending and no longer masked; they are pending no more.
    fn take_sendable(&mut self) -> Vec<MsiMessage> {
        let ready = |state: &Self, vector: &usize| state.pending[*vector] && state.may_send(*vector);
        let vectors: Vec<_> = (0..self.entries.len()).filter(|vector| ready(self, vector)).collect();
        vectors
            .into_iter()
            .map(|vector| {
                self.pending[vector] = false;
                self.message(vector)
            })
            .collect()
    }
}

/// The saved vector table and pending bits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    entries: Vec<Entry>,
    pending: Vec<bool>,
}

/// A function's MSI-X vectors.
pub struct Msix {
    target: Arc<dyn MsiTarget>,
    vectors: u16,
    state: Mutex<State>,
}

impl Msix {
    pub(crate) fn new(vectors: u16, target: Arc<dyn MsiTarget>) -> Result<Self, PciError> {
        if vectors == 0 || vectors > MSIX_MAX_VECTORS {
            return Err(PciError::BadVectorCount(vectors));
        }
        let count = usize::from(vectors);
        let state = State {
            enabled: false,
            mask_all: false,
            entries: vec![RESET_ENTRY; count],
            pending: vec![false; count],
        };
        Ok(Self { target, vectors, state: Mutex::new(state) })
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> u16 {
        self.vectors
    }

    /// Whether the guest turned MSI-X on; then the function must not use INTx.
    pub fn enabled(&self) -> bool {
        self.state.lock().enabled
    }

    /// Sends the message of `vector`, or notes it as pending while masked. While MSI-X is off, and for
    /// vectors that do not exist, nothing happens.
    pub fn signal(&self, vector: u16) {
        let vector = usize::from(vector);
        let message = {
            let mut state = self.state.lock();
            if !state.enabled || vector >= state.entries.len() {
                return;
            }
            if !state.may_send(vector) {
                state.pending[vector] = true;
                return;
            }
            state.message(vector)
        };
        self.target.signal(message);
    }

    /// A guest's load from the vector table; `offset` counts from its start. Past its end, zeros.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock();
        for (index, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(index as u64);
            let entry = usize::try_from(at / MSIX_ENTRY_SIZE).ok().and_then(|index| state.entries.get(index));
            *byte = entry.map_or(0, |entry| {
                let bits = u128::from(entry.address)
                    | u128::from(entry.data) << 64
                    | u128::from(entry.control) << 96;
                bits.to_le_bytes()[(at % MSIX_ENTRY_SIZE) as usize]
            });
        }
    }

    /// A guest's store to the vector table: aligned dwords and qwords only (6.1.4.2), others are lost.
    pub fn table_write(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let messages = {
            let mut state = self.state.lock();
            let Some(entry) =
                usize::try_from(offset / MSIX_ENTRY_SIZE).ok().and_then(|index| state.entries.get_mut(index))
            else {
                return;
            };
            for (index, dword) in data.chunks_exact(4).enumerate() {
                let value = u32::from_le_bytes([dword[0], dword[1], dword[2], dword[3]]);
                match (offset % MSIX_ENTRY_SIZE) / 4 + index as u64 {
                    0 => entry.address = entry.address & !0xffff_ffff | u64::from(value & !3),
                    1 => entry.address = entry.address & 0xffff_ffff | u64::from(value) << 32,
                    2 => entry.data = value,
                    _ => entry.control = value & VECTOR_MASKED,
                }
            }
            state.take_sendable()
        };
        self.send(messages);
    }

    /// A guest's load from the pending bit array; `offset` counts from its start.
    pub fn pba_read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock();
        for (index, byte) in data.iter_mut().enumerate() {
            let first = offset.saturating_add(index as u64).saturating_mul(8);
            *byte = (0..8).fold(0, |bits, bit| {
                let vector = usize::try_from(first.saturating_add(bit)).unwrap_or(usize::MAX);
                bits | u8::from(state.pending.get(vector) == Some(&true)) << bit
            });
        }
    }

    /// The capability's message control register was written.
    pub(crate) fn set_control(&self, control: u16) {
        let messages = {
            let mut state = self.state.lock();
            state.enabled = control & CONTROL_ENABLE != 0;
            state.mask_all = control & CONTROL_MASK_ALL != 0;
            state.take_sendable()
        };
        self.send(messages);
    }

    fn send(&self, messages: Vec<MsiMessage>) {
        for message in messages {
            self.target.signal(message);
        }
    }

    pub(crate) fn reset(&self) {
        let mut state = self.state.lock();
        state.enabled = false;
        state.mask_all = false;
        state.entries.fill(RESET_ENTRY);
        state.pending.fill(false);
    }

    pub(crate) fn save(&self) -> MsixState {
        let state = self.state.lock();
        MsixState { entries: state.entries.clone(), pending: state.pending.clone() }
    }

    /// Takes over a saved table. Nothing is sent: `control` is what it was when the table was saved, so
    /// that whatever is pending is masked.
    pub(crate) fn restore(&self, saved: &MsixState, control: u16) -> bool {
        let count = usize::from(self.vectors);
        if saved.entries.len() != count || saved.pending.len() != count {
            return false;
        }
        let mut state = self.state.lock();
        state.entries.clone_from(&saved.entries);
        for entry in &mut state.entries {
            entry.address &= !3;
            entry.control &= VECTOR_MASKED;
        }
        state.pending.clone_from(&saved.pending);
        state.enabled = control & CONTROL_ENABLE != 0;
        state.mask_all = control & CONTROL_MASK_ALL != 0;
        true
    }
}

impl fmt::Debug for Msix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Msix").field("vectors", &self.vectors).finish_non_exhaustive()
    }
}
