//! Character devices on Unix sockets.

use parking_lot::{Condvar, Mutex};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

/// The client of a listening socket, when there is one.
#[derive(Default)]
struct Peer {
    stream: Mutex<Option<Arc<UnixStream>>>,
    arrived: Condvar,
}

/// Output to the client there is; without one it is lost.
pub(crate) struct PeerOutput(Arc<Peer>);

/// Input from one client after the other. It never ends.
pub(crate) struct PeerInput(Arc<Peer>);

/// Makes a socket at `path` to listen on. One that nobody listens on any more is replaced.
///
/// # Errors
/// The host's; among them that something else is there.
pub fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    // Connections to files of any kind are refused.
    let is_socket = || std::fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket());
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    if UnixStream::connect(path).is_err_and(refused) && is_socket() {
        std::fs::remove_file(path)?;
    }
    UnixListener::bind(path)
}

/// Listens at `path`, one client at a time.
pub(crate) fn listen(path: &Path, wait: bool) -> io::Result<(PeerOutput, PeerInput)> {
    let listener = bind_unix(path)?;
    let peer = Arc::new(Peer::default());
    if wait {
        let (stream, _) = listener.accept()?;
        *peer.stream.lock() = Some(Arc::new(stream));
    }
    let for_thread = peer.clone();
    std::thread::Builder::new().name("serial-accept".into()).spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut current = for_thread.stream.lock();
            // A second client waits until the first has gone.
            while current.is_some() {
                for_thread.arrived.wait(&mut current);
            }
            *current = Some(Arc::new(stream));
            for_thread.arrived.notify_all();
        }
    })?;
    Ok((PeerOutput(peer.clone()), PeerInput(peer)))
}

impl Peer {
    fn leave(&self, stream: &Arc<UnixStream>) {
        let mut current = self.stream.lock();
        if current.as_ref().is_some_and(|held| Arc::ptr_eq(held, stream)) {
            *current = None;
            self.arrived.notify_all();
        }
    }
}

impl Write for PeerOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let stream = self.0.stream.lock().clone();
        if let Some(stream) = stream
            && (&*stream).write_all(bytes).is_err()
        {
            self.0.leave(&stream);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for PeerInput {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let stream = {
                let mut current = self.0.stream.lock();
                loop {
                    match &*current {
                        Some(stream) => break stream.clone(),
                        None => self.0.arrived.wait(&mut current),
                    }
                }
            };
            match (&*stream).read(buffer) {
                Ok(0) => self.0.leave(&stream),
                Ok(count) => return Ok(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.0.leave(&stream),
            }
        }
    }
}
