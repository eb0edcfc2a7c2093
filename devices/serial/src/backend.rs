//! Where a serial port's characters go on the host.

use crate::Serial;
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The host's end of a serial port.
///
/// All methods are called by vCPU threads in the middle of a guest's access: none may wait for the outside
/// world. No lock of the device's state is held; but `write` must not call the device back.
pub trait SerialBackend: Send + Sync {
    /// Takes what it can of `bytes`, from the first on, and returns how many. If that is none, the device
    /// keeps them until [`Serial::transmit_ready`] is called, and the guest sees a busy transmitter.
    fn write(&self, bytes: &[u8]) -> usize;

    /// The receiver has room again, after [`Serial::receive`] had to refuse bytes.
    fn input_room(&self) {}

    /// The guest changed these outputs.
    fn modem_outputs(&self, _data_terminal_ready: bool, _request_to_send: bool) {}

    /// The guest switched the break condition on or off.
    fn send_break(&self, _on: bool) {}
}

struct Queue {
    bytes: VecDeque<u8>,
    /// The thread is writing bytes that are no longer in `bytes`.
    writing: bool,
    /// The device was refused and waits to hear of room.
    refused: bool,
    output_room: Option<Arc<dyn Fn() + Send + Sync>>,
    input_room: Option<Arc<dyn Fn() + Send + Sync>>,
    closed: bool,
    /// Writing failed: from here on output is dropped, so that a guest does not hang on a closed terminal.
    failed: Option<io::ErrorKind>,
}

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    capacity: usize,
}

/// A backend that collects output in a bounded buffer, which a thread of its own writes to any
/// [`Write`] in as large pieces as have come together, flushing after each.
pub struct BufferedOutput {
    shared: Arc<Shared>,
}

impl BufferedOutput {
    /// A backend that writes to `sink` and holds up to `capacity` bytes that `sink` has not taken yet.
    ///
    /// # Errors
    /// The host's, if it cannot start a thread.
    pub fn new(sink: Box<dyn Write + Send>, capacity: usize) -> io::Result<Arc<Self>> {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue {
                bytes: VecDeque::new(),
                writing: false,
                refused: false,
                output_room: None,
                input_room: None,
                closed: false,
                failed: None,
            }),
            changed: Condvar::new(),
            capacity: capacity.max(1),
        });
        let for_thread = shared.clone();
        std::thread::Builder::new().name("serial-output".into()).spawn(move || for_thread.run(sink))?;
        Ok(Arc::new(Self { shared }))
    }

    /// Names the port that is to hear when there is room for output again.
    pub fn connect(&self, port: &Arc<Serial>) {
        let port = Arc::downgrade(port);
        self.on_output_room(move || {
            if let Some(port) = port.upgrade() {
                port.transmit_ready();
            }
        });
    }

    /// Sets what is called when there is room for output again.
    pub fn on_output_room(&self, callback: impl Fn() + Send + Sync + 'static) {
        self.shared.queue.lock().output_room = Some(Arc::new(callback));
    }

    /// Sets what is called when the port's receiver has room again.
    pub fn on_input_room(&self, callback: impl Fn() + Send + Sync + 'static) {
        self.shared.queue.lock().input_room = Some(Arc::new(callback));
    }

    /// Waits until all output is written, at most for `timeout`; says whether it is.
    pub fn drain(&self, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        let mut queue = self.shared.queue.lock();
        while !queue.bytes.is_empty() || queue.writing {
            if self.shared.changed.wait_until(&mut queue, end).timed_out() {
                return queue.bytes.is_empty() && !queue.writing;
            }
        }
        true
    }

    /// The error that ended writing, if one did.
    pub fn failure(&self) -> Option<io::ErrorKind> {
        self.shared.queue.lock().failed
    }
}

impl Shared {
    fn run(&self, mut sink: Box<dyn Write + Send>) {
        let mut queue = self.queue.lock();
        loop {
            let refused = std::mem::take(&mut queue.refused);
            if queue.bytes.is_empty() && !refused {
                if queue.closed {
                    return;
                }
                self.changed.wait(&mut queue);
                continue;
            }
            let mut bytes = std::mem::take(&mut queue.bytes);
            queue.writing = true;
            let told = if refused { queue.output_room.clone() } else { None };
            let result = MutexGuard::unlocked(&mut queue, || {
                // The buffer is empty now: the device may fill it while this piece is written.
                if let Some(callback) = told {
                    callback();
                }
                sink.write_all(bytes.make_contiguous()).and_then(|()| sink.flush())
            });
            queue.writing = false;
            if let Err(error) = result {
                queue.failed = Some(error.kind());
                queue.bytes.clear();
            }
            if queue.bytes.is_empty() {
                bytes.clear();
                queue.bytes = bytes; // its memory is used again
            }
            self.changed.notify_all();
        }
    }
}

impl SerialBackend for BufferedOutput {
    fn write(&self, bytes: &[u8]) -> usize {
        let mut queue = self.shared.queue.lock();
        if queue.failed.is_some() {
            return bytes.len();
        }
        let taken = bytes.len().min(self.shared.capacity.saturating_sub(queue.bytes.len()));
        let wake = queue.bytes.is_empty() && taken > 0;
        queue.bytes.extend(&bytes[..taken]);
        if taken < bytes.len() {
            queue.refused = true;
        }
        if wake {
            self.shared.changed.notify_all();
        }
        taken
    }

    fn input_room(&self) {
        let callback = self.shared.queue.lock().input_room.clone();
        if let Some(callback) = callback {
            callback();
        }
    }
}

impl Drop for BufferedOutput {
    /// The thread writes what is left, and is not waited for: its sink may never take it.
    fn drop(&mut self) {
        self.shared.queue.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

impl fmt::Debug for BufferedOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let queue = self.shared.queue.lock();
        f.debug_struct("BufferedOutput").field("waiting", &queue.bytes.len()).finish_non_exhaustive()
    }
}
