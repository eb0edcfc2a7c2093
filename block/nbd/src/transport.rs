//! A connection's bytes, in the clear or encrypted.

use crate::tls::TlsStream;
use io_loop::{IoVec, Stream};
use std::io;
use std::net::Shutdown;

/// A connection. One task may read while another writes. A future that is dropped halfway leaves the stream in the
/// middle of a message: whoever does so must end the connection.
#[derive(Debug)]
pub(crate) enum Transport {
    Plain(Stream),
    Tls(Box<TlsStream>),
}

impl Transport {
    pub(crate) async fn read_exact(&self, into: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.read_exact(into).await,
            Self::Tls(stream) => stream.read_exact(into).await,
        }
    }

    /// Reads at least one byte; 0 says that the other side will send no more. Nothing is lost if this is dropped.
    pub(crate) async fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(into).await,
            Self::Tls(stream) => stream.read(into).await,
        }
    }

    /// Fills `into`, or finds that the other side ended before the first byte.
    pub(crate) async fn read_exact_or_end(&self, into: &mut [u8]) -> io::Result<bool> {
        let got = self.read(into).await?;
        if got == 0 {
            return Ok(false);
        }
        self.read_exact(&mut into[got..]).await?;
        Ok(true)
    }

    pub(crate) async fn read_exact_vec(&self, into: &IoVec) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.read_exact_vec(into).await,
            Self::Tls(stream) => stream.read_exact_vec(into).await,
        }
    }

    pub(crate) async fn write_all(&self, from: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.write_all(from).await,
            Self::Tls(stream) => stream.write_all(from).await,
        }
    }

    pub(crate) async fn write_all_vec(&self, from: &IoVec) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.write_all_vec(from).await,
            Self::Tls(stream) => stream.write_all_vec(from).await,
        }
    }

    /// Tells the other side of TLS that nothing follows.
    pub(crate) async fn say_goodbye(&self) {
        if let Self::Tls(stream) = self {
            stream.say_goodbye().await;
        }
    }

    /// Ends the connection in both directions; whoever waits for it is woken.
    pub(crate) fn shut_down(&self) {
        let stream = match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => stream.socket(),
        };
        // What is gone already cannot be ended.
        let _ = stream.shutdown(Shutdown::Both);
    }
}
