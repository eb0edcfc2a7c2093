//! Where the control socket is.

use std::fmt;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;

/// Where it is reached if no host is named: whoever connects has the whole guest.
const LOOPBACK: &str = "127.0.0.1";

/// What is listened at or connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp {
        /// The name or address.
        host: String,
        /// The port; 0 has the host choose one to listen at.
        port: u16,
    },
}

/// Where clients are, as in `--qmp`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// Clients connect.
    Listen {
        /// Where.
        at: Address,
        /// The VM starts when the first has.
        wait: bool,
    },
    /// The one client listens.
    Connect(Address),
    /// The one client is at the program's standard input and output.
    Stdio,
}

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The words name nothing.
    #[error(
        "{0:?} is not possible; accepted are unix:PATH[,server=on|off][,wait=on|off], \
         tcp:HOST:PORT[,server=on|off][,wait=on|off] and stdio"
    )]
    Words(String),
    /// The host refuses.
    #[error("the control socket {endpoint} cannot be had: {source}")]
    Host {
        /// Where.
        endpoint: String,
        /// The host's reason.
        source: io::Error,
    },
}

impl FromStr for Address {
    type Err = EndpointError;

    /// `unix:PATH`, `tcp:HOST:PORT`, or a path alone.
    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let wrong = || EndpointError::Words(text.into());
        if let Some(rest) = text.strip_prefix("tcp:") {
            let (host, port) = rest.rsplit_once(':').ok_or_else(wrong)?;
            let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
            let port = port.parse().ok().filter(|_| digits).ok_or_else(wrong)?;
            let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
            let host = if host.is_empty() { LOOPBACK } else { host };
            return Ok(Self::Tcp { host: host.into(), port });
        }
        let path = text.strip_prefix("unix:").unwrap_or(text);
        if path.is_empty() { Err(wrong()) } else { Ok(Self::Unix(path.into())) }
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        if text == "stdio" {
            return Ok(Self::Stdio);
        }
        let wrong = || EndpointError::Words(text.into());
        let mut words = text.split(',');
        let name = words.next().filter(|name| name.starts_with("unix:") || name.starts_with("tcp:"));
        let at = name.ok_or_else(wrong)?.parse().map_err(|_| wrong())?;
        let (mut server, mut wait) = (true, false);
        for word in words {
            match word {
                "server" | "server=on" => server = true,
                "server=off" => server = false,
                "wait" | "wait=on" => wait = true,
                "nowait" | "wait=off" => wait = false,
                _ => return Err(wrong()),
            }
        }
        Ok(if server { Self::Listen { at, wait } } else { Self::Connect(at) })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Address {
    /// Connects to it.
    ///
    /// # Errors
    /// [`EndpointError::Host`].
    pub(crate) fn connect(&self) -> Result<OwnedFd, EndpointError> {
        match self {
            Self::Unix(path) => UnixStream::connect(path).map(Into::into),
            Self::Tcp { host, port } => TcpStream::connect((host.as_str(), *port)).map(Into::into),
        }
        .map_err(|source| EndpointError::Host { endpoint: self.to_string(), source })
    }
}

#[derive(Debug)]
enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// An endpoint that was made ready.
#[derive(Debug)]
pub struct Bound {
    /// What clients connect to.
    pub(crate) listener: Option<OwnedFd>,
    /// The client that is there already.
    pub(crate) first: Option<OwnedFd>,
    /// Where it is, with the port that the host chose; `None` for standard input and output.
    pub(crate) at: Option<Address>,
}

impl Endpoint {
    /// Begins to listen, or connects. A Unix socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// [`EndpointError::Host`].
    pub fn bind(&self) -> Result<Bound, EndpointError> {
        let (at, wait) = match self {
            Self::Stdio => return Ok(Bound { listener: None, first: None, at: None }),
            Self::Connect(at) => {
                return Ok(Bound { listener: None, first: Some(at.connect()?), at: None });
            }
            Self::Listen { at, wait } => (at, *wait),
        };
        let failed = |source| EndpointError::Host { endpoint: at.to_string(), source };
        let (socket, at) = match at {
            Address::Unix(path) => (Socket::Unix(chardev::bind_unix(path).map_err(failed)?), at.clone()),
            Address::Tcp { host, port } => {
                let socket = TcpListener::bind((host.as_str(), *port)).map_err(failed)?;
                let port = socket.local_addr().map_or(*port, |address| address.port());
                (Socket::Tcp(socket), Address::Tcp { host: host.clone(), port })
            }
        };
        let first = match (&socket, wait) {
            (_, false) => None,
            (Socket::Unix(socket), true) => Some(socket.accept().map_err(failed)?.0.into()),
            (Socket::Tcp(socket), true) => Some(socket.accept().map_err(failed)?.0.into()),
        };
        let listener = match socket {
            Socket::Unix(socket) => socket.into(),
            Socket::Tcp(socket) => socket.into(),
        };
        Ok(Bound { listener: Some(listener), first, at: Some(at) })
    }
}

impl Bound {
    /// Where clients connect to, if they do.
    pub fn address(&self) -> Option<&Address> {
        self.at.as_ref()
    }
}

/// Removes a socket's file when nobody listens any more.
#[derive(Debug)]
pub(crate) struct SocketFile(pub(crate) PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0); // somebody else may have
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_written_as_qemu_has_them() {
        let unix = Address::Unix("/a/b".into());
        let tcp = |host: &str, port| Address::Tcp { host: host.into(), port };
        let listen = |at: &Address, wait| Endpoint::Listen { at: at.clone(), wait };
        for (text, endpoint) in [
            ("unix:/a/b", listen(&unix, false)),
            ("unix:/a/b,server=on,wait=off", listen(&unix, false)),
            ("unix:/a/b,server,nowait", listen(&unix, false)),
            ("unix:/a/b,server=on,wait=on", listen(&unix, true)),
            ("unix:/a/b,server=off", Endpoint::Connect(unix.clone())),
            ("tcp::4444", listen(&tcp(LOOPBACK, 4444), false)),
            ("tcp:[::1]:1,server=off", Endpoint::Connect(tcp("::1", 1))),
            ("stdio", Endpoint::Stdio),
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap(), endpoint, "{text}");
        }
        for text in ["", "/a/b", "unix:", "tcp:1", "tcp::", "tcp::+1", "tcp::65536", "unix:/a,x=y", "pty"] {
            let error = text.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains("accepted are unix:PATH"), "{text}: {error}");
        }
    }

    #[test]
    fn sockets_that_were_left_behind_are_replaced_and_files_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        drop(UnixListener::bind(&path).unwrap());
        let endpoint: Endpoint = format!("unix:{}", path.display()).parse().unwrap();
        let bound = endpoint.bind().unwrap();
        let error = endpoint.bind().unwrap_err().to_string();
        assert!(error.contains("Address already in use") && !error.contains('\n'), "{error}");
        drop((bound, SocketFile(path.clone())));
        std::fs::write(&path, "a disk").unwrap();
        assert!(endpoint.bind().is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"a disk");
    }
}
