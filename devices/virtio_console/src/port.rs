//! One port: bytes in both directions.

use crate::{ConsoleBackend, PortConfig};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::Arc;
use virtio::{QueueError, QueueHandle, StopToken};

/// How many bytes of input a port holds for a guest that does not take them.
pub const INPUT_CAPACITY: usize = 1 << 16;

/// Bytes copied at once.
const PIECE: usize = 4096;

/// How many output buffers are taken before it is the input's turn.
const OUTPUT_TURN: usize = 64;

/// A port's guest-visible state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PortState {
    /// Input that the guest did not take yet.
    input: VecDeque<u8>,
    /// How many bytes of the first available output buffer the backend took.
    sent: u32,
    /// A program in the guest has it open.
    guest_open: bool,
    /// Somebody is at the host's end.
    connected: bool,
}

impl PortState {
    fn new() -> Self {
        Self { connected: true, ..Self::default() }
    }

    pub(crate) fn is_valid(&self) -> bool {
        self.input.len() <= INPUT_CAPACITY
    }
}

#[derive(Debug)]
struct Inner {
    state: PortState,
    /// There is a driver, and whether it opens and closes ports.
    driver: Option<bool>,
    /// Input was refused, and the backend is to hear of room.
    refused: bool,
}

impl Inner {
    fn takes_input(&self) -> bool {
        self.driver.is_some_and(|multiport| !multiport || self.state.guest_open)
    }
}

pub(crate) struct Port {
    pub(crate) name: String,
    pub(crate) console: bool,
    backend: Arc<dyn ConsoleBackend>,
    inner: Mutex<Inner>,
}

impl Port {
    pub(crate) fn new(config: PortConfig) -> Self {
        let PortConfig { name, console, backend } = config;
        let inner = Inner { state: PortState::new(), driver: None, refused: false };
        Self { name, console, backend, inner: Mutex::new(inner) }
    }

    /// The driver is ready, and opens and closes ports if `multiport`.
    pub(crate) fn activate(&self, multiport: bool) {
        let room = {
            let mut inner = self.inner.lock();
            inner.driver = Some(multiport);
            inner.takes_input() && std::mem::take(&mut inner.refused)
        };
        if room {
            self.backend.input_room();
        }
    }

    /// Back to no driver. Input not taken yet is dropped: it was for the driver before.
    pub(crate) fn reset(&self) {
        let was_open = {
            let mut inner = self.inner.lock();
            let connected = inner.state.connected;
            let was_open = inner.state.guest_open;
            inner.state = PortState { connected, ..PortState::default() };
            inner.driver = None;
            was_open
        };
        if was_open {
            self.backend.guest_opened(false);
        }
    }

    pub(crate) fn save(&self) -> PortState {
        self.inner.lock().state.clone()
    }

    pub(crate) fn restore(&self, state: PortState) {
        let open = state.guest_open;
        self.inner.lock().state = state;
        if open {
            self.backend.guest_opened(true);
        }
    }

    /// Takes input from the host.
    pub(crate) fn receive(&self, bytes: &[u8]) -> usize {
        let mut inner = self.inner.lock();
        let room = if inner.takes_input() { INPUT_CAPACITY - inner.state.input.len() } else { 0 };
        let taken = room.min(bytes.len());
        inner.state.input.extend(&bytes[..taken]);
        inner.refused |= taken < bytes.len();
        taken
    }

    /// Says whether that is a change.
    pub(crate) fn set_connected(&self, connected: bool) -> bool {
        let mut inner = self.inner.lock();
        std::mem::replace(&mut inner.state.connected, connected) != connected
    }

    pub(crate) fn connected(&self) -> bool {
        self.inner.lock().state.connected
    }

    /// The guest opens or closes the port.
    pub(crate) fn set_guest_open(&self, open: bool) {
        let (changed, room) = {
            let mut inner = self.inner.lock();
            let changed = std::mem::replace(&mut inner.state.guest_open, open) != open;
            if !open {
                inner.state.input.clear();
            }
            (changed, open && std::mem::take(&mut inner.refused))
        };
        if changed {
            self.backend.guest_opened(open);
        }
        if room {
            self.backend.input_room();
        }
    }

    /// Writes one character past all queues.
    pub(crate) fn write_now(&self, character: u8) {
        self.backend.write(&[character]);
    }

    /// Serves both queues until there is nothing to do for either.
    pub(crate) fn serve(
        &self,
        receive: &QueueHandle,
        transmit: &QueueHandle,
        stop: &StopToken<'_>,
    ) -> Result<(), QueueError> {
        loop {
            let more_output = self.output(transmit, stop)?;
            self.input(receive, stop)?;
            if !more_output || stop.stopping() {
                return Ok(());
            }
        }
    }

    /// Hands output to the backend. `true`: there is more, and the backend would take it.
    fn output(&self, queue: &QueueHandle, stop: &StopToken<'_>) -> Result<bool, QueueError> {
        for _ in 0..OUTPUT_TURN {
            if stop.stopping() {
                return Ok(false);
            }
            let Some(chain) = queue.pop()? else { return queue.enable_doorbell() };
            let mut piece = [0; PIECE];
            loop {
                // A restored value, or the driver changed the buffer: it may be past the end.
                let sent = self.inner.lock().state.sent.min(chain.readable_len());
                let len = PIECE.min((chain.readable_len() - sent) as usize);
                if len == 0 {
                    break;
                }
                chain.read(&queue.memory, sent, &mut piece[..len])?;
                let taken = if stop.stopping() { 0 } else { self.backend.write(&piece[..len]).min(len) };
                if taken == 0 {
                    // To be gone on with from here.
                    queue.put_back();
                    return Ok(false);
                }
                self.inner.lock().state.sent = sent + taken as u32;
            }
            self.inner.lock().state.sent = 0;
            queue.complete(&chain, 0)?;
        }
        Ok(true)
    }

    /// Puts input into the guest's buffers while there are both.
    fn input(&self, queue: &QueueHandle, stop: &StopToken<'_>) -> Result<(), QueueError> {
        let mut piece = [0; PIECE];
        while !stop.stopping() && !self.inner.lock().state.input.is_empty() {
            let Some(chain) = queue.pop()? else {
                if queue.enable_doorbell()? {
                    continue;
                }
                return Ok(());
            };
            if chain.writable_len() == 0 {
                return Err(QueueError::BadRequest("a buffer for input that cannot be written"));
            }
            let (len, room) = {
                let mut inner = self.inner.lock();
                let len = inner.state.input.len().min(PIECE).min(chain.writable_len() as usize);
                for (byte, value) in piece.iter_mut().zip(inner.state.input.drain(..len)) {
                    *byte = value;
                }
                (len, std::mem::take(&mut inner.refused))
            };
            chain.write(&queue.memory, 0, &piece[..len])?;
            queue.complete(&chain, len as u32)?;
            if room {
                self.backend.input_room();
            }
        }
        Ok(())
    }
}
