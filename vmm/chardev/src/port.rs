//! A serial port or console connected to a character device.

use crate::endpoint::read_events;
use crate::gate::{Gate, PatientOutput, PortGate, PortInput, Receiver};
use crate::{ChardevError, Endpoint, InputEvent, RawTerminal};
use parking_lot::{Condvar, Mutex};
use serial::{BufferedOutput, Serial, SerialBackend};
use std::collections::VecDeque;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;
use virtio_console::{ConsoleBackend, PortConfig, VirtioConsole};

/// How much output may wait for a slow reader before the guest's transmitter looks busy.
const OUTPUT_BUFFER: usize = 64 << 10;
/// How much input may wait for a guest that does not take it.
const INPUT_BUFFER: usize = 64 << 10;

/// Told of what a person at the terminal wants of the program itself.
pub type PortEvents = Arc<dyn Fn(InputEvent) + Send + Sync>;

/// What ports are connected with.
#[derive(Clone)]
pub struct Surroundings {
    /// Hears of the escape keys.
    pub events: PortEvents,
    /// What stands between the ports and the world, if anything does.
    pub gate: Option<Arc<dyn Gate>>,
}

/// The guest's side of a connection.
trait GuestPort: Send + Sync {
    /// Takes what it can and returns how much.
    fn receive(&self, input: &PortInput) -> usize;
}

impl GuestPort for Serial {
    fn receive(&self, input: &PortInput) -> usize {
        match input {
            PortInput::Bytes(bytes) => Self::receive(self, bytes),
            PortInput::Break => self.receive_break().into(),
        }
    }
}

impl GuestPort for VirtioConsole {
    fn receive(&self, input: &PortInput) -> usize {
        match input {
            PortInput::Bytes(bytes) => Self::receive(self, 0, bytes),
            // It knows no break.
            PortInput::Break => 1,
        }
    }
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

/// Makes a serial port by `make`, connected to `endpoint`.
///
/// # Errors
/// [`ChardevError`] if the host cannot start the threads that carry the characters.
pub fn connect_serial(
    endpoint: Endpoint,
    around: Surroundings,
    make: impl FnOnce(Arc<dyn SerialBackend>) -> Arc<Serial>,
) -> Result<(Arc<Serial>, PortConnection), ChardevError> {
    let Endpoint { output, input, terminal, raw, .. } = endpoint;
    let output = BufferedOutput::new(output, OUTPUT_BUFFER).map_err(threads)?;
    let guest = Later::default();
    let gate = around.gate.map(|gate| gate.port(guest.receiver()));
    let port = match &gate {
        Some(gate) => make(Arc::new(PatientOutput { output: output.clone(), gate: gate.clone() })),
        None => make(output.clone()),
    };
    if gate.is_none() {
        output.connect(&port);
    }
    guest.set(Arc::<Serial>::downgrade(&port));
    if let Some(input) = input {
        feed(&output, guest, gate, around.events, |event| read_events(input, terminal, event))?;
    }
    Ok((port, PortConnection { output, _raw: raw }))
}

/// Makes a virtio console, connected to `endpoint`.
///
/// # Errors
/// [`ChardevError`] if the host cannot start the threads that carry the characters.
pub fn connect_console(
    endpoint: Endpoint,
    around: Surroundings,
) -> Result<(Arc<VirtioConsole>, PortConnection), ChardevError> {
    let Endpoint { output, input, terminal, raw, .. } = endpoint;
    let output = BufferedOutput::new(output, OUTPUT_BUFFER).map_err(threads)?;
    let guest = Later::default();
    let gate = around.gate.map(|gate| gate.port(guest.receiver()));
    let backend: Arc<dyn SerialBackend> = match &gate {
        Some(gate) => Arc::new(PatientOutput { output: output.clone(), gate: gate.clone() }),
        None => output.clone(),
    };
    let config = PortConfig::console(Arc::new(ConsoleOutput(backend)));
    let console = VirtioConsole::new(vec![config])
        .map_err(|error| ChardevError::new("a console", std::io::Error::other(error.to_string())))?;
    let console = Arc::new(console);
    let ready = Arc::downgrade(&console);
    if gate.is_none() {
        output.on_output_room(move || {
            if let Some(console) = ready.upgrade() {
                console.transmit_ready(0);
            }
        });
    }
    guest.set(Arc::<VirtioConsole>::downgrade(&console));
    if let Some(input) = input {
        feed(&output, guest, gate, around.events, |event| read_events(input, terminal, event))?;
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

struct ConsoleOutput(Arc<dyn SerialBackend>);

impl ConsoleBackend for ConsoleOutput {
    fn write(&self, bytes: &[u8]) -> usize {
        self.0.write(bytes)
    }
    fn input_room(&self) {
        self.0.input_room();
    }
}

/// The guest's side of a connection that is being made.
#[derive(Clone, Default)]
struct Later(Arc<OnceLock<Weak<dyn GuestPort>>>);

impl Later {
    fn set(&self, port: Weak<dyn GuestPort>) {
        let first = self.0.set(port).is_ok();
        debug_assert!(first, "a port is made once");
    }

    fn get(&self) -> Option<Arc<dyn GuestPort>> {
        self.0.get()?.upgrade()
    }

    /// What gives the guest input.
    fn receiver(&self) -> Receiver {
        let guest = self.clone();
        Box::new(move |input| guest.get().map_or(0, |guest| guest.receive(input)))
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
    guest: Later,
    gate: Option<Arc<dyn PortGate>>,
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
    let feeder = move || match gate {
        Some(gate) => waiting.feed(|input| gate.input(input)),
        None => waiting.feed(|input| Some(guest.get()?.receive(input))),
    };
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

    /// Hands input to the guest until there is no more of either: `give` says how much was taken.
    fn feed(&self, give: impl Fn(&PortInput) -> Option<usize>) {
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
            let bytes: Vec<u8> = std::mem::take(&mut queue.bytes).into();
            let (taken, bytes) = parking_lot::MutexGuard::unlocked(&mut queue, || {
                // One that finds no room is lost.
                let all = (0..breaks).all(|_| give(&PortInput::Break).is_some());
                let bytes = PortInput::Bytes(bytes);
                let taken = if all && !bytes.is_empty() { give(&bytes) } else { all.then_some(0) };
                (taken, bytes)
            });
            let (Some(taken), PortInput::Bytes(mut bytes)) = (taken, bytes) else { return };
            bytes.drain(..taken);
            let mut rest = VecDeque::from(bytes);
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
