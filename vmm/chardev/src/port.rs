//! A serial port connected to a character device.

use crate::endpoint::read_events;
use crate::{ChardevError, Endpoint, InputEvent, RawTerminal};
use parking_lot::{Condvar, Mutex};
use serial::{BufferedOutput, Serial, SerialBackend};
use std::sync::Arc;
use std::time::Duration;

/// How much output may wait for a slow reader before the guest's transmitter looks busy.
const OUTPUT_BUFFER: usize = 64 << 10;

/// Told of what a person at the terminal wants of the program itself.
pub type PortEvents = Arc<dyn Fn(InputEvent) + Send + Sync>;

/// The host's end of a connected port. Dropping it restores the terminal.
pub struct PortConnection {
    output: Arc<BufferedOutput>,
    _raw: Option<RawTerminal>,
}

impl PortConnection {
    /// Waits until what the guest sent is written, at most for `timeout`.
    pub fn drain(&self, timeout: Duration) {
        self.output.drain(timeout);
    }
}

/// Makes a port by `make`, connected to `endpoint`. `events` hears of the escape keys.
///
/// # Errors
/// [`ChardevError`] if the host cannot start the threads that carry the characters.
pub fn connect_serial(
    endpoint: Endpoint,
    events: PortEvents,
    make: impl FnOnce(Arc<dyn SerialBackend>) -> Arc<Serial>,
) -> Result<(Arc<Serial>, PortConnection), ChardevError> {
    let threads = |error| ChardevError::new("a serial port's threads", error);
    let output = BufferedOutput::new(endpoint.output, OUTPUT_BUFFER).map_err(threads)?;
    let port = make(output.clone());
    output.connect(&port);
    if let Some(input) = endpoint.input {
        let room = Arc::new((Mutex::new(()), Condvar::new()));
        let for_callback = room.clone();
        output.on_input_room(move || {
            let _held = for_callback.0.lock();
            for_callback.1.notify_all();
        });
        let receiver = Arc::downgrade(&port);
        let terminal = endpoint.terminal;
        std::thread::Builder::new()
            .name("serial-input".into())
            .spawn(move || {
                read_events(input, terminal, &mut |event| {
                    let Some(port) = receiver.upgrade() else { return };
                    match event {
                        InputEvent::Bytes(bytes) => send_all(&port, &bytes, &room),
                        InputEvent::Break => {
                            port.receive_break();
                        }
                        other => events(other),
                    }
                });
            })
            .map_err(threads)?;
    }
    Ok((port, PortConnection { output, _raw: endpoint.raw }))
}

fn send_all(port: &Serial, mut bytes: &[u8], room: &(Mutex<()>, Condvar)) {
    while !bytes.is_empty() {
        let mut held = room.0.lock();
        let taken = port.receive(bytes);
        bytes = &bytes[taken..];
        if taken == 0 {
            // The bound is for a guest that is reset meanwhile, which makes room without a word.
            room.1.wait_for(&mut held, Duration::from_millis(100));
        }
    }
}
