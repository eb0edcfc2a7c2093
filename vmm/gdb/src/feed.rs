//! Connections, and what comes in on them: a thread accepts one client after the other and reads, so that what it sends
//! can stop a VM that runs.

use crate::endpoint::{Listener, Stream};
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::Arc;
use std::time::Duration;

/// Bytes that wait at most; a client that sends more waits.
const MOST: usize = 64 << 10;
/// Between attempts to accept where the host refuses for now.
const RETRY: Duration = Duration::from_millis(200);

#[derive(Default)]
struct State {
    /// A client that nobody serves yet.
    client: Option<Stream>,
    /// There is a client.
    connected: bool,
    /// What it sent.
    data: VecDeque<u8>,
    /// It sends no more.
    closed: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// What clients send.
pub(crate) struct Feed {
    shared: Arc<Shared>,
}

impl Feed {
    /// Begins to accept clients; `wake` is called whenever there is something new.
    ///
    /// # Errors
    /// The host's, if it has no thread for it.
    pub(crate) fn start(listener: Listener, wake: impl Fn() + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let for_thread = shared.clone();
        std::thread::Builder::new().name("gdb".into()).spawn(move || {
            loop {
                match listener.accept().and_then(|stream| Ok((stream.try_clone()?, stream))) {
                    Ok((reader, client)) => for_thread.read(reader, client, &wake),
                    Err(error) => {
                        tracing::warn!("no client of the gdb stub can be accepted: {error}");
                        std::thread::sleep(RETRY);
                    }
                }
            }
        })?;
        Ok(Self { shared })
    }

    /// The client that nobody serves yet.
    pub(crate) fn take_client(&self) -> Option<Stream> {
        self.shared.state.lock().client.take()
    }

    /// The next byte that the client sent, if there is one already.
    pub(crate) fn byte(&self) -> Option<u8> {
        let mut state = self.shared.state.lock();
        let byte = state.data.pop_front();
        if state.data.is_empty() {
            self.shared.changed.notify_all();
        }
        byte
    }

    /// Whether the client sends no more than what is there.
    pub(crate) fn is_closed(&self) -> bool {
        let state = self.shared.state.lock();
        state.closed && state.data.is_empty()
    }

    /// The client is done with: the next may come.
    pub(crate) fn release(&self, client: &Stream) {
        client.shut_down();
        self.shared.state.lock().connected = false;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    /// Reads what a client sends, until it is released.
    fn read(&self, mut reader: Stream, client: Stream, wake: &impl Fn()) {
        *self.state.lock() = State { client: Some(client), connected: true, ..State::default() };
        wake();
        let mut buffer = [0; 4096];
        loop {
            let count = match reader.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result.unwrap_or(0),
            };
            let mut state = self.state.lock();
            while state.connected && state.data.len() >= MOST {
                self.changed.wait(&mut state);
            }
            state.data.extend(&buffer[..count]);
            state.closed = count == 0;
            let done = count == 0 || !state.connected;
            drop(state);
            wake();
            if done {
                break;
            }
        }
        let mut state = self.state.lock();
        while state.connected {
            self.changed.wait(&mut state);
        }
    }
}
