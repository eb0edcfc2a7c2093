//! The control queues of a console with several ports (5.3.6.2).

use crate::port::Port;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use virtio::{QueueError, QueueHandle, StopToken};

/// Events.
const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// Bytes of a message: port, event, value.
const MESSAGE_LEN: usize = 8;
/// Bytes of the longest message.
const MAX_MESSAGE: usize = MESSAGE_LEN + crate::MAX_NAME;

/// So many messages may wait for the driver's buffers before no more of the driver's are looked at. One of
/// the driver's has no more than [`MAX_ANSWERS`] for an answer.
const MANY_MESSAGES: usize = 64;
const MAX_ANSWERS: usize = if crate::MAX_PORTS > 4 { crate::MAX_PORTS } else { 4 };
/// So many messages may wait in all, the host's own included: when there are more, the oldest go.
const MAX_MESSAGES: usize = MANY_MESSAGES + 4 * MAX_ANSWERS;

#[derive(Debug, Default)]
struct Inner {
    size: (u16, u16),
    /// Messages for the driver.
    messages: VecDeque<Vec<u8>>,
}

pub(crate) struct Control {
    ports: Arc<[Arc<Port>]>,
    inner: Mutex<Inner>,
}

fn message(port: usize, event: u16, value: u16, extra: &[u8]) -> Vec<u8> {
    let mut bytes = (port as u32).to_le_bytes().to_vec();
    bytes.extend(event.to_le_bytes());
    bytes.extend(value.to_le_bytes());
    bytes.extend(extra);
    bytes
}

impl Control {
    pub(crate) fn new(ports: Arc<[Arc<Port>]>) -> Self {
        Self { ports, inner: Mutex::new(Inner { size: (80, 25), messages: VecDeque::new() }) }
    }

    pub(crate) fn reset(&self) {
        self.inner.lock().messages.clear();
    }

    pub(crate) fn size(&self) -> (u16, u16) {
        self.inner.lock().size
    }

    pub(crate) fn set_size(&self, columns: u16, rows: u16) {
        self.inner.lock().size = (columns, rows);
    }

    pub(crate) fn save(&self) -> Vec<Vec<u8>> {
        self.inner.lock().messages.iter().cloned().collect()
    }

    pub(crate) fn is_valid(messages: &[Vec<u8>]) -> bool {
        messages.len() <= MAX_MESSAGES && messages.iter().all(|message| message.len() <= MAX_MESSAGE)
    }

    pub(crate) fn restore(&self, messages: Vec<Vec<u8>>) {
        self.inner.lock().messages = messages.into();
    }

    fn send(&self, message: Vec<u8>) {
        let mut inner = self.inner.lock();
        if inner.messages.len() >= MAX_MESSAGES {
            inner.messages.pop_front();
        }
        inner.messages.push_back(message);
    }

    /// Tells the driver the size of all consoles.
    pub(crate) fn send_sizes(&self) {
        for (index, _) in self.ports.iter().enumerate().filter(|(_, port)| port.console) {
            self.send_size(index);
        }
    }

    fn send_size(&self, port: usize) {
        let (columns, rows) = self.size();
        let [a, b] = columns.to_le_bytes();
        let [c, d] = rows.to_le_bytes();
        self.send(message(port, RESIZE, 0, &[a, b, c, d]));
    }

    /// Tells the driver whether somebody is at the host's end of `port`.
    pub(crate) fn send_connected(&self, port: usize) {
        let connected = self.ports.get(port).is_some_and(|port| port.connected());
        self.send(message(port, PORT_OPEN, connected.into(), &[]));
    }

    /// Serves both control queues until there is nothing to do for either.
    pub(crate) fn serve(
        &self,
        receive: &QueueHandle,
        transmit: &QueueHandle,
        stop: &StopToken<'_>,
    ) -> Result<(), QueueError> {
        loop {
            self.deliver(receive, stop)?;
            if stop.stopping() || self.inner.lock().messages.len() >= MANY_MESSAGES {
                // The driver's doorbell for more buffers goes on with this.
                return Ok(());
            }
            let Some(chain) = transmit.pop()? else {
                if transmit.enable_doorbell()? {
                    continue;
                }
                return Ok(());
            };
            let mut bytes = [0; MESSAGE_LEN];
            chain.read(&transmit.memory, 0, &mut bytes)?;
            let [a, b, c, d, e, f, g, h] = bytes;
            self.answer(
                u32::from_le_bytes([a, b, c, d]),
                u16::from_le_bytes([e, f]),
                u16::from_le_bytes([g, h]),
            );
            transmit.complete(&chain, 0)?;
        }
    }

    /// Puts messages into the driver's buffers while there are both.
    fn deliver(&self, queue: &QueueHandle, stop: &StopToken<'_>) -> Result<(), QueueError> {
        while !stop.stopping() && !self.inner.lock().messages.is_empty() {
            let Some(chain) = queue.pop()? else {
                if queue.enable_doorbell()? {
                    continue;
                }
                return Ok(());
            };
            let Some(message) = self.inner.lock().messages.pop_front() else {
                queue.put_back();
                return Ok(());
            };
            chain.write(&queue.memory, 0, &message)?;
            queue.complete(&chain, message.len() as u32)?;
        }
        Ok(())
    }

    /// The driver's message. What it says of ports that do not exist, and events that are not the driver's
    /// to send, mean nothing.
    fn answer(&self, id: u32, event: u16, value: u16) {
        if event == DEVICE_READY {
            if value == 1 {
                for index in 0..self.ports.len() {
                    self.send(message(index, DEVICE_ADD, 0, &[]));
                }
            }
            return;
        }
        let index = id as usize;
        let Some(port) = self.ports.get(index) else { return };
        match event {
            PORT_READY if value == 1 => {
                if port.console {
                    self.send(message(index, CONSOLE_PORT, 1, &[]));
                    self.send_size(index);
                }
                if !port.name.is_empty() {
                    self.send(message(index, PORT_NAME, 1, port.name.as_bytes()));
                }
                self.send_connected(index);
            }
            PORT_OPEN => port.set_guest_open(value != 0),
            _ => {}
        }
    }
}
