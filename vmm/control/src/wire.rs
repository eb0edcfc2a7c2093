//! A client's bytes: from and to a socket, or standard input and output.

use io_loop::Stream;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// A client's bytes.
pub(crate) enum Wire {
    Socket(Stream),
    Stdio(Arc<OwnedFd>),
}

impl Wire {
    /// Standard input and output.
    ///
    /// # Errors
    /// The host's, if it has no descriptor left.
    pub(crate) fn stdio() -> io::Result<Self> {
        Ok(Self::Stdio(Arc::new(io::stdin().as_fd().try_clone_to_owned()?)))
    }

    /// A connected socket.
    ///
    /// # Errors
    /// The host's.
    pub(crate) fn socket(socket: OwnedFd) -> io::Result<Self> {
        Stream::from_socket(socket).map(Self::Socket)
    }

    /// Reads at least one byte; 0 says that there will be no more.
    pub(crate) async fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Socket(stream) => stream.read(into).await,
            Self::Stdio(input) => {
                io_loop::readable(input).await?;
                Ok(rustix::io::read(&**input, into)?)
            }
        }
    }

    /// Writes all of `bytes`.
    pub(crate) async fn write(&self, bytes: Vec<u8>) -> io::Result<()> {
        match self {
            Self::Socket(stream) => stream.write_all(&bytes).await,
            Self::Stdio(_) => {
                io_loop::blocking(move || {
                    let mut output = io::stdout().lock();
                    output.write_all(&bytes)?;
                    output.flush()
                })
                .await
            }
        }
    }

    /// Ends the conversation.
    pub(crate) fn end(&self) {
        if let Self::Socket(stream) = self {
            let _ = stream.shutdown(std::net::Shutdown::Both); // the client may have
        }
    }
}
