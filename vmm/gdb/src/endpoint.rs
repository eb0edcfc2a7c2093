//! Where the stub listens.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// How long a client may leave what the stub has to say unread before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where it listens if no host is named: whoever connects has the whole guest.
const LOOPBACK: &str = "127.0.0.1";

/// Where the stub listens, as in `--gdb`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A TCP port of the host; of the loopback interface unless a host is named.
    Tcp {
        /// The name or address to listen at.
        host: String,
        /// The port; 0 has the host choose one.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

/// Why the stub cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The words name nothing to listen at.
    #[error("{0:?} is not possible; accepted are tcp::PORT, tcp:HOST:PORT and unix:PATH")]
    Words(String),
    /// The host refuses.
    #[error("gdb cannot be listened for at {endpoint}: {source}")]
    Host {
        /// Where.
        endpoint: Endpoint,
        /// The host's reason.
        source: io::Error,
    },
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let wrong = || EndpointError::Words(text.into());
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(path.into()));
        }
        let (host, port) =
            text.strip_prefix("tcp:").and_then(|rest| rest.rsplit_once(':')).ok_or_else(wrong)?;
        if !port.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(wrong());
        }
        let port = port.parse().map_err(|_| wrong())?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let host = if host.is_empty() { LOOPBACK } else { host };
        Ok(Self::Tcp { host: host.into(), port })
    }
}

impl Endpoint {
    /// Removes the socket's file, as nobody listens any more.
    pub(crate) fn forget(&self) {
        if let Self::Unix(path) = self {
            let _ = std::fs::remove_file(path); // somebody else may have
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Listens for gdb.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    endpoint: Endpoint,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Begins to listen. A Unix socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// [`EndpointError::Host`] if the host refuses.
    pub fn bind(endpoint: &Endpoint) -> Result<Self, EndpointError> {
        let failed = |source| EndpointError::Host { endpoint: endpoint.clone(), source };
        match endpoint {
            Endpoint::Tcp { host, port } => {
                let socket = TcpListener::bind((host.as_str(), *port)).map_err(failed)?;
                let port = socket.local_addr().map_or(*port, |address| address.port());
                let endpoint = Endpoint::Tcp { host: host.clone(), port };
                Ok(Self { socket: Socket::Tcp(socket), endpoint })
            }
            Endpoint::Unix(path) => {
                let socket = Socket::Unix(chardev::bind_unix(path).map_err(failed)?);
                Ok(Self { socket, endpoint: endpoint.clone() })
            }
        }
    }

    /// Where it listens, with the port that the host chose.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Waits for the next client.
    pub(crate) fn accept(&self) -> io::Result<Stream> {
        match &self.socket {
            Socket::Tcp(socket) => {
                let (stream, _) = socket.accept()?;
                stream.set_nodelay(true)?;
                stream.set_write_timeout(Some(PATIENCE))?;
                Ok(Stream::Tcp(stream))
            }
            Socket::Unix(socket) => {
                let (stream, _) = socket.accept()?;
                stream.set_write_timeout(Some(PATIENCE))?;
                Ok(Stream::Unix(stream))
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.endpoint.forget();
    }
}

/// A client's connection.
#[derive(Debug)]
pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Tcp(stream) => stream.try_clone().map(Self::Tcp),
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
        }
    }

    /// Ends the connection, for whoever reads from it too.
    pub(crate) fn shut_down(&self) {
        let both = std::net::Shutdown::Both;
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(both),
            Self::Unix(stream) => stream.shutdown(both),
        }; // the client may have done so
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_written_as_qemu_has_them() {
        let tcp = |host: &str, port| Endpoint::Tcp { host: host.into(), port };
        for (text, endpoint) in [
            ("tcp::1234", tcp(LOOPBACK, 1234)),
            ("tcp:0.0.0.0:1", tcp("0.0.0.0", 1)),
            ("tcp:[::1]:65535", tcp("::1", 65535)),
            ("unix:/a/b", Endpoint::Unix("/a/b".into())),
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap(), endpoint, "{text}");
            assert_eq!(endpoint.to_string().parse::<Endpoint>().unwrap(), endpoint);
        }
        for text in [
            "",
            "1234",
            "tcp:",
            "tcp:1234",
            "tcp::",
            "tcp::65536",
            "tcp::+1",
            "tcp::x",
            "unix:",
            "unix",
            "udp::1",
        ] {
            let error = text.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains("accepted are tcp::PORT"), "{text}: {error}");
        }
    }

    #[test]
    fn a_port_that_is_taken_is_one_line() {
        let first = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let error = Listener::bind(first.endpoint()).unwrap_err().to_string();
        assert!(
            error.starts_with("gdb cannot be listened for at tcp:127.0.0.1:") && !error.contains('\n'),
            "{error}"
        );
    }

    #[test]
    fn sockets_that_were_left_behind_are_replaced_and_files_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let endpoint = Endpoint::Unix(folder.path().join("gdb"));
        drop(UnixListener::bind(folder.path().join("gdb")).unwrap());
        let listener = Listener::bind(&endpoint).unwrap();
        assert!(Listener::bind(&endpoint).is_err());
        drop(listener);
        assert!(!folder.path().join("gdb").exists());
        std::fs::write(folder.path().join("gdb"), "a disk").unwrap();
        assert!(matches!(Listener::bind(&endpoint), Err(EndpointError::Host { .. })));
        assert!(folder.path().join("gdb").exists());
    }
}
