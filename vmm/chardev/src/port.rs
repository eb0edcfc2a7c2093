//! A serial port or console connected to a character device.

use crate::endpoint::read_events;
use crate::{ChardevError, Endpoint, InputEvent, RawTerminal};
use parking_lot::{Condvar, Mutex};
use serial::{BufferedOutput, Serial, SerialBackend};
use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::Duration;
use virtio_console::{ConsoleBackend, PortConfig, VirtioConsole};

/// How much output may wait for a slow reader before the guest's transmitter looks busy.
const OUTPUT_BUFFER: usize = 64 << 10;
/// How much input may wait for a guest that does not take it.
const INPUT_BUFFER: usize = 64 << 10;

/// Told of what a person at the terminal wants of the program itself.
pub type PortEvents = Arc<dyn Fn(InputEvent) + Send + Sync>;

/// The guest's side of a connection.
trait GuestPort: Send + Sync {
    /// Takes what it can and returns how much.
    fn receive(&self, bytes: &[u8]) -> usize;
    fn receive_break(&self);
}

impl GuestPort for Serial {
    fn receive(&self, bytes: &[u8]) -> usize {
        Self::receive(self, bytes)
    }
    fn receive_break(&self) {
        Self::receive_break(self);
    }
}

impl GuestPort for VirtioConsole {
    fn receive(&self, bytes: &[u8]) -> usize {
        Self::receive(self, 0, bytes)
    }
    /// A virtio console knows no break.
    fn receive_break(&self) {}
}

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

/// Makes a serial port by `make`, connected to `endpoint`. `events` hears of the escape keys.
///
/// # Errors
/// [`ChardevError`] if the host cannot start the threads that carry the characters.
pub fn connect_serial(
    endpoint: Endpoint,
    events: PortEvents,
    make: impl FnOnce(Arc<dyn SerialBackend>) -> Arc<Serial>,
) -> Result<(Arc<Serial>, PortConnection), ChardevError> {
    let Endpoint { output, input, terminal, raw, .. } = endpoint;
    let output = BufferedOutput::new(output, OUTPUT_BUFFER).map_err(threads)?;
    let port = make(output.clone());
    output.connect(&port);
    if let Some(input) = input {
        let guest: Weak<dyn GuestPort> = Arc::<Serial>::downgrade(&port);
        feed(&output, guest, events, |event| read_events(input, terminal, event))?;
    }
    Ok((port, PortConnection { output, _raw: raw }))
}

/// Makes a virtio console, connected to `endpoint`. `events` hears of the escape keys.
///
/// # Errors
/// [`ChardevError`] if the host cannot start the threads that carry the characters.
pub fn connect_console(
    endpoint: Endpoint,
    events: PortEvents,
) -> Result<(Arc<VirtioConsole>, PortConnection), ChardevError> {
    let Endpoint { output, input, terminal, raw, .. } = endpoint;
    let output = BufferedOutput::new(output, OUTPUT_BUFFER).map_err(threads)?;
    let config = PortConfig::console(Arc::new(ConsoleOutput(output.clone())));
    let console = VirtioConsole::new(vec![config])
        .map_err(|error| ChardevError::new("a console", std::io::Error::other(error.to_string())))?;
    let console = Arc::new(console);
    let ready = Arc::downgrade(&console);
    output.on_output_room(move || {
        if let Some(console) = ready.upgrade() {
            console.transmit_ready(0);
        }
    });
    if let Some(input) = input {
        let guest: Weak<dyn GuestPort> = Arc::<VirtioConsole>::downgrade(&console);
        feed(&output, guest, events, |event| read_events(input, terminal, event))?;
    }
    Ok((console, PortConnection { output, _raw: raw }))
}

/// A port that only sends, connected to `endpoint`: what sends, without waiting, and the connection. What finds no
/// room is lost.
///
/// # Errors
/// [`ChardevError`] if the host cannot start the thread that carries the characters.
pub fn connect_output(
    endpoint: Endpoint,
) -> Result<(impl Fn(&[u8]) + Send + Sync + 'static, PortConnection), ChardevError> {
    let Endpoint { output, raw, .. } = endpoint;
    let output = BufferedOutput::new(output, OUTPUT_BUFFER).map_err(threads)?;
    let sink = output.clone();
    let send = move |bytes: &[u8]| {
        SerialBackend::write(&*sink, bytes);
    };
    Ok((send, PortConnection { output, _raw: raw }))
}

struct ConsoleOutput(Arc<BufferedOutput>);

impl ConsoleBackend for ConsoleOutput {
    fn write(&self, bytes: &[u8]) -> usize {
        SerialBackend::write(&*self.0, bytes)
    }
    fn input_room(&self) {
        SerialBackend::input_room(&*self.0);
    }
}

fn threads(error: std::io::Error) -> ChardevError {
    ChardevError::new("a port's threads", error)
}

/// Input on its way to a guest.
#[derive(Default)]
struct Waiting {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    breaks: usize,
    ended: bool,
}

/// Starts a thread that reads events by `read`, and one that feeds them to `guest`. Two, so that the
/// escape keys work while the guest takes no input.
fn feed(
    output: &BufferedOutput,
    guest: Weak<dyn GuestPort>,
    events: PortEvents,
    read: impl FnOnce(&mut dyn FnMut(InputEvent)) + Send + 'static,
) -> Result<(), ChardevError> {
    let waiting = Arc::new(Waiting::default());
    let for_callback = waiting.clone();
    output.on_input_room(move || {
        let _held = for_callback.queue.lock();
        for_callback.changed.notify_all();
    });
    let for_reader = waiting.clone();
    let reader = move || {
        read(&mut |event| match event {
            InputEvent::Bytes(bytes) => for_reader.push(&bytes),
            InputEvent::Break => {
                for_reader.queue.lock().breaks += 1;
                for_reader.changed.notify_all();
            }
            other => events(other),
        });
        for_reader.queue.lock().ended = true;
        for_reader.changed.notify_all();
    };
    std::thread::Builder::new().name("serial-input".into()).spawn(reader).map_err(threads)?;
    let feeder = move || waiting.feed(&guest);
    std::thread::Builder::new().name("serial-feed".into()).spawn(feeder).map_err(threads)?;
    Ok(())
}

impl Waiting {
    /// Adds input, when there is room for it.
    fn push(&self, bytes: &[u8]) {
        let mut queue = self.queue.lock();
        while queue.bytes.len() >= INPUT_BUFFER {
            self.changed.wait(&mut queue);
        }
        queue.bytes.extend(bytes);
        self.changed.notify_all();
    }

    /// Hands input to the guest until there is no more of either.
    fn feed(&self, guest: &Weak<dyn GuestPort>) {
        let mut queue = self.queue.lock();
        loop {
            if queue.bytes.is_empty() && queue.breaks == 0 {
                if queue.ended {
                    return;
                }
                self.changed.wait(&mut queue);
                continue;
            }
            let breaks = std::mem::take(&mut queue.breaks);
            let bytes = std::mem::take(&mut queue.bytes);
            let taken = parking_lot::MutexGuard::unlocked(&mut queue, || {
                let guest = guest.upgrade()?;
                for _ in 0..breaks {
                    guest.receive_break();
                }
                Some(guest.receive(bytes.as_slices().0))
            });
            let Some(taken) = taken else { return };
            let mut rest = bytes;
            rest.drain(..taken);
            rest.extend(std::mem::take(&mut queue.bytes));
            queue.bytes = rest;
            self.changed.notify_all();
            if taken == 0 && !queue.bytes.is_empty() {
                // The bound is for a guest that makes room without a word, by a reset.
                self.changed.wait_for(&mut queue, Duration::from_millis(50));
            }
        }
    }
}
