//! The server: exports, and connections of clients.

mod connection;
mod export;
pub mod handshake;

pub use export::{Export, ExportOptions};

use crate::proto::*;
use crate::tls::ServerCredentials;
use crate::transport::Transport;
use connection::Connection;
use handshake::{Exports, Next, OfferedExport, ServerHandshake, Session, TlsPolicy};
use io_loop::Stream;
use parking_lot::RwLock;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;

/// A server of exports. Whoever accepts connections has it serve each; exports come and go meanwhile.
#[derive(Debug)]
pub struct Server {
    exports: RwLock<Vec<Arc<Export>>>,
    credentials: Option<ServerCredentials>,
    /// How long a handshake may take; zero is for ever.
    handshake_limit: Duration,
}

/// Why a client's connection ended otherwise than by its goodbye.
#[derive(Debug, Error)]
pub enum SessionError {
    /// The connection failed.
    #[error("connection failed: {0}")]
    Io(#[from] io::Error),
    /// The client broke the protocol.
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
    /// TLS did not come about.
    #[error("TLS handshake failed: {0}")]
    Tls(#[source] io::Error),
    /// The handshake took too long.
    #[error("handshake took more than {0:?}")]
    Late(Duration),
}

/// How a client's connection ended.
#[derive(Debug)]
pub struct Ended {
    /// The client got as far as to the transmission phase.
    pub negotiated: bool,
    /// What was wrong, if anything.
    pub result: Result<(), SessionError>,
}

struct Offers(Vec<Arc<Export>>);

impl Exports for Offers {
    fn all(&self) -> Vec<OfferedExport> {
        self.0.iter().map(|export| export.offer()).collect()
    }

    fn find(&self, name: &str) -> Option<OfferedExport> {
        self.0.iter().find(|export| export.options().name == name).map(|export| export.offer())
    }
}

/// A wire that reads and writes in the course of a handshake, and what it has become.
enum Shaken {
    Session(Transport, Session, Arc<Export>),
    Goodbye,
}

impl Server {
    /// A server without exports. With credentials, it speaks to nobody without TLS.
    pub fn new(credentials: Option<ServerCredentials>, handshake_limit: Duration) -> Self {
        Self { exports: RwLock::default(), credentials, handshake_limit }
    }

    /// Adds an export. `false` says that there is one of its name, which stays.
    pub fn add(&self, export: Export) -> bool {
        let mut exports = self.exports.write();
        let is_new = exports.iter().all(|known| known.options().name != export.options().name);
        if is_new {
            exports.push(Arc::new(export));
        }
        is_new
    }

    /// Removes an export. Clients that use it go on.
    pub fn remove(&self, name: &str) -> Option<Arc<Export>> {
        let mut exports = self.exports.write();
        let at = exports.iter().position(|export| export.options().name == name)?;
        Some(exports.remove(at))
    }

    /// Serves a client until it or the connection ends. All that it asked for has been done then.
    pub async fn serve(&self, stream: Stream) -> Ended {
        let shaken = if self.handshake_limit.is_zero() {
            self.shake_hands(&stream).await
        } else {
            let shaken = io_loop::timeout(self.handshake_limit, self.shake_hands(&stream)).await;
            shaken.unwrap_or(Err(SessionError::Late(self.handshake_limit)))
        };
        let ended = match shaken {
            Ok(Shaken::Session(transport, session, export)) => {
                let result = Connection::new(transport, session, export).serve().await;
                Ended { negotiated: true, result }
            }
            Ok(Shaken::Goodbye) => Ended { negotiated: false, result: Ok(()) },
            Err(error) => Ended { negotiated: false, result: Err(error) },
        };
        // What is gone already cannot be ended.
        let _ = stream.shutdown(std::net::Shutdown::Both);
        ended
    }

    async fn shake_hands(&self, stream: &Stream) -> Result<Shaken, SessionError> {
        let policy = if self.credentials.is_some() { TlsPolicy::Required } else { TlsPolicy::Off };
        let mut handshake = ServerHandshake::new(policy);
        let mut transport = Transport::Plain(stream.clone());
        transport.write_all(&handshake.hello().encode()).await?;
        let mut flags = [0; 4];
        transport.read_exact(&mut flags).await?;
        handshake.client_flags(flags)?;
        let (mut header, mut data, mut out) = ([0; OptionHeader::SIZE], Vec::new(), Vec::new());
        loop {
            if !transport.read_exact_or_end(&mut header).await? {
                return Ok(Shaken::Goodbye);
            }
            let OptionHeader { option, len } = OptionHeader::decode(&header)?;
            data.clear();
            data.resize(len as usize, 0);
            transport.read_exact(&mut data).await?;
            out.clear();
            let offers = Offers(self.exports.read().clone());
            let next = handshake.option(option, &data, &offers, &mut out);
            transport.write_all(&out).await?;
            match next {
                Next::Option => {}
                Next::Close => return Ok(Shaken::Goodbye),
                Next::StartTls => {
                    let credentials = self.credentials.as_ref();
                    let credentials =
                        credentials.ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))?;
                    let tls = credentials.accept(stream.clone()).await.map_err(SessionError::Tls)?;
                    transport = Transport::Tls(Box::new(tls));
                }
                Next::Transmission(session) => {
                    let export = offers.0.into_iter().find(|export| export.options().name == session.export);
                    // The offers have not changed since the handshake found it among them.
                    let Some(export) = export else { return Ok(Shaken::Goodbye) };
                    return Ok(Shaken::Session(transport, session, export));
                }
            }
        }
    }
}
