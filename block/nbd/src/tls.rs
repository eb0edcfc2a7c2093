//! TLS: streams, and credentials in the files that QEMU's `tls-creds-x509` has.

use futures_util::lock::Mutex as AsyncMutex;
use io_loop::{IoVec, Stream};
use parking_lot::Mutex;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    ClientConfig, ClientConnection, Connection, DigitallySignedStruct, RootCertStore, ServerConfig,
    ServerConnection, SignatureScheme,
};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use thiserror::Error;

/// What is wrong with credentials.
#[derive(Debug, Error)]
pub enum CredentialsError {
    /// A file is missing or cannot be read.
    #[error("Unable to access credentials {}: {error}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A file has no certificate, key or revocation list in PEM form.
    #[error("Unable to import {}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The parts do not fit each other.
    #[error("Unable to use the credentials in {}: {error}", directory.display())]
    Unusable {
        /// Where they are.
        directory: PathBuf,
        /// Why.
        error: String,
    },
    /// A host name that certificates cannot have.
    #[error("Invalid TLS host name '{0}'")]
    HostName(String),
}

/// A server's credentials.
#[derive(Clone, Debug)]
pub struct ServerCredentials(Arc<ServerConfig>);

/// A client's credentials.
#[derive(Clone, Debug)]
pub struct ClientCredentials(Arc<ClientConfig>);

fn read_file(path: &Path) -> Result<Vec<u8>, CredentialsError> {
    std::fs::read(path).map_err(|error| CredentialsError::File { path: path.to_owned(), error })
}

fn content(path: &Path, reason: impl ToString) -> CredentialsError {
    CredentialsError::Content { path: path.to_owned(), reason: reason.to_string() }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    let bytes = read_file(path)?;
    let list: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match list {
        Ok(list) if list.is_empty() => Err(content(path, "no certificate in it")),
        Ok(list) => Ok(list),
        Err(error) => Err(content(path, error)),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, CredentialsError> {
    PrivateKeyDer::from_pem_slice(&read_file(path)?).map_err(|error| content(path, error))
}

/// The authorities of `ca-cert.pem`.
fn authorities(directory: &Path) -> Result<RootCertStore, CredentialsError> {
    let path = directory.join("ca-cert.pem");
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&path)? {
        roots.add(certificate).map_err(|error| content(&path, error))?;
    }
    Ok(roots)
}

/// The revocations of `ca-crl.pem`, which need not be there.
fn revocations(directory: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, CredentialsError> {
    let path = directory.join("ca-crl.pem");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let bytes = read_file(&path)?;
    let list: Result<_, _> = CertificateRevocationListDer::pem_slice_iter(&bytes).collect();
    list.map_err(|error| content(&path, error))
}

impl ServerCredentials {
    /// The files `ca-cert.pem`, `server-cert.pem`, `server-key.pem` and, if it is there, `ca-crl.pem` in `directory`.
    /// With `verify_peer`, clients without a certificate of the authority are turned away.
    ///
    /// # Errors
    /// Files that are missing or not what they should be.
    pub fn from_directory(directory: &Path, verify_peer: bool) -> Result<Self, CredentialsError> {
        let unusable = |error: &dyn ToString| CredentialsError::Unusable {
            directory: directory.to_owned(),
            error: error.to_string(),
        };
        let roots = Arc::new(authorities(directory)?);
        let chain = certificates(&directory.join("server-cert.pem"))?;
        let key = private_key(&directory.join("server-key.pem"))?;
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(&error))?;
        let builder = if verify_peer {
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                .with_crls(revocations(directory)?)
                .build()
                .map_err(|error| unusable(&error))?;
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let config = builder.with_single_cert(chain, key).map_err(|error| unusable(&error))?;
        Ok(Self(Arc::new(config)))
    }

    pub(crate) async fn accept(&self, stream: Stream) -> io::Result<TlsStream> {
        let server = ServerConnection::new(self.0.clone()).map_err(io::Error::other)?;
        TlsStream::handshake(stream, server.into()).await
    }
}

impl ClientCredentials {
    /// The files `ca-cert.pem` and, if they are there, `client-cert.pem`, `client-key.pem` and `ca-crl.pem` in
    /// `directory`. Without `verify_peer`, any server is taken for the right one.
    ///
    /// # Errors
    /// Files that are missing or not what they should be.
    pub fn from_directory(directory: &Path, verify_peer: bool) -> Result<Self, CredentialsError> {
        let unusable = |error: &dyn ToString| CredentialsError::Unusable {
            directory: directory.to_owned(),
            error: error.to_string(),
        };
        let roots = Arc::new(authorities(directory)?);
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(&error))?;
        let builder = if verify_peer {
            let verifier = rustls::client::WebPkiServerVerifier::builder_with_provider(roots, provider)
                .with_crls(revocations(directory)?)
                .build()
                .map_err(|error| unusable(&error))?;
            builder.with_webpki_verifier(verifier)
        } else {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyServer::new(&provider)))
        };
        let (certificate, key) = (directory.join("client-cert.pem"), directory.join("client-key.pem"));
        let config = if certificate.exists() || key.exists() {
            builder
                .with_client_auth_cert(certificates(&certificate)?, private_key(&key)?)
                .map_err(|error| unusable(&error))?
        } else {
            builder.with_no_client_auth()
        };
        Ok(Self(Arc::new(config)))
    }

    pub(crate) async fn connect(&self, stream: Stream, host: &str) -> io::Result<TlsStream> {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| io::Error::other(CredentialsError::HostName(host.to_owned())))?;
        let client = ClientConnection::new(self.0.clone(), name).map_err(io::Error::other)?;
        TlsStream::handshake(stream, client.into()).await
    }
}

/// Takes any certificate, as its user asked for; signatures must be right nevertheless.
#[derive(Debug)]
struct AnyServer(WebPkiSupportedAlgorithms);

impl AnyServer {
    fn new(provider: &CryptoProvider) -> Self {
        Self(provider.signature_verification_algorithms)
    }
}

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}

/// How many encrypted bytes are read at once, and how many clear ones are encrypted at once.
const PIECE: usize = 64 << 10;

/// The state of TLS, and what came of it that it has not looked at.
#[derive(Debug)]
struct State {
    tls: Connection,
    raw: Vec<u8>,
    /// Where in `raw` the bytes begin that are still to be looked at.
    seen: usize,
}

/// A stream over which TLS runs.
#[derive(Debug)]
pub(crate) struct TlsStream {
    socket: Stream,
    state: Mutex<State>,
    /// Held by who writes to the socket: what TLS wants to be sent is sent in its order.
    output: AsyncMutex<()>,
}

impl TlsStream {
    async fn handshake(socket: Stream, tls: Connection) -> io::Result<Self> {
        let state = Mutex::new(State { tls, raw: Vec::new(), seen: 0 });
        let stream = Self { socket, state, output: AsyncMutex::new(()) };
        loop {
            stream.flush().await?;
            if !stream.state.lock().tls.is_handshaking() {
                return Ok(stream);
            }
            let result = stream.take_in().await;
            if result.is_err() {
                // The other side learns why.
                let _ = stream.flush().await;
            }
            if !result? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    pub(crate) fn socket(&self) -> &Stream {
        &self.socket
    }

    /// Has TLS look at more bytes; `false` says that there will be none.
    async fn take_in(&self) -> io::Result<bool> {
        let emptied = {
            let mut state = self.state.lock();
            if state.seen < state.raw.len() {
                state.digest()?;
                None
            } else {
                state.seen = 0;
                let mut raw = std::mem::take(&mut state.raw);
                raw.resize(PIECE, 0);
                Some(raw)
            }
        };
        let Some(mut raw) = emptied else { return Ok(true) };
        let got = self.socket.read(&mut raw).await?;
        raw.truncate(got);
        let answers = {
            let mut state = self.state.lock();
            state.raw = raw;
            if got == 0 {
                state.tls.read_tls(&mut io::empty())?;
                return Ok(false);
            }
            state.digest()?;
            state.tls.wants_write() && !state.tls.is_handshaking()
        };
        if answers {
            self.flush().await?;
        }
        Ok(true)
    }

    /// Reads at least one byte; 0 says that the other side said goodbye.
    pub(crate) async fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.state.lock().tls.reader().read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
            self.take_in().await?;
        }
    }

    pub(crate) async fn read_exact(&self, into: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            match self.read(&mut into[done..]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                more => done += more,
            }
        }
        Ok(())
    }

    pub(crate) async fn read_exact_vec(&self, into: &IoVec) -> io::Result<()> {
        let mut piece = vec![0; into.len().min(PIECE)];
        let mut done = 0;
        while done < into.len() {
            let most = piece.len().min(into.len() - done);
            match self.read(&mut piece[..most]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                more => {
                    into.copy_from(done, &piece[..more]);
                    done += more;
                }
            }
        }
        Ok(())
    }

    pub(crate) async fn write_all(&self, mut from: &[u8]) -> io::Result<()> {
        while !from.is_empty() {
            let most = from.len().min(PIECE);
            let taken = self.state.lock().tls.writer().write(&from[..most])?;
            from = &from[taken..];
            self.flush().await?;
        }
        Ok(())
    }

    pub(crate) async fn write_all_vec(&self, from: &IoVec) -> io::Result<()> {
        let mut piece = vec![0; from.len().min(PIECE)];
        let mut done = 0;
        while done < from.len() {
            let most = piece.len().min(from.len() - done);
            from.slice(done..done + most).copy_to(0, &mut piece[..most]);
            self.write_all(&piece[..most]).await?;
            done += most;
        }
        Ok(())
    }

    pub(crate) async fn say_goodbye(&self) {
        self.state.lock().tls.send_close_notify();
        // The other side may be gone.
        let _ = self.flush().await;
    }

    /// Sends what TLS wants to be sent.
    async fn flush(&self) -> io::Result<()> {
        let _in_order = self.output.lock().await;
        let mut out = Vec::new();
        {
            let mut state = self.state.lock();
            while state.tls.wants_write() {
                state.tls.write_tls(&mut out)?;
            }
        }
        self.socket.write_all(&out).await
    }
}

impl State {
    fn digest(&mut self) -> io::Result<()> {
        let mut rest = &self.raw[self.seen..];
        let before = rest.len();
        self.tls.read_tls(&mut rest)?;
        self.seen += before - rest.len();
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        self.tls.process_new_packets().map(drop).map_err(invalid)
    }
}
