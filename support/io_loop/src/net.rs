//! Stream sockets.

use crate::buffer::IoVec;
use crate::local_loop::current;
use crate::unix;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, SocketFlags};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

/// A connected stream socket. One task may read while another writes.
#[derive(Debug, Clone)]
pub struct Stream {
    socket: Arc<OwnedFd>,
}

impl Stream {
    /// A connected socket that somebody else made.
    ///
    /// # Errors
    /// The host's.
    pub fn from_socket(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self { socket: Arc::new(socket) })
    }

    /// Connects to a TCP address; small messages are sent at once.
    ///
    /// # Errors
    /// The host's.
    pub async fn connect_tcp(address: SocketAddr) -> io::Result<Self> {
        let stream = crate::pool::blocking(move || TcpStream::connect(address)).await?;
        stream.set_nodelay(true)?;
        Self::from_socket(stream.into())
    }

    /// Connects to a Unix socket.
    ///
    /// # Errors
    /// The host's.
    pub async fn connect_unix(path: &Path) -> io::Result<Self> {
        let path = path.to_owned();
        let stream = crate::pool::blocking(move || UnixStream::connect(path)).await?;
        Self::from_socket(stream.into())
    }

    /// The descriptor.
    pub fn descriptor(&self) -> &Arc<OwnedFd> {
        &self.socket
    }

    /// Calls `call` until it does not have to wait.
    async fn when_ready(
        &self,
        events: i16,
        mut call: impl FnMut(&OwnedFd) -> io::Result<usize>,
    ) -> io::Result<usize> {
        loop {
            match call(&self.socket) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    current().await_ready(&self.socket, events)?.await?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    /// Reads at least one byte; 0 says that the other side will send no more.
    ///
    /// # Errors
    /// The host's.
    pub async fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        self.when_ready(libc::POLLIN, |socket| {
            Ok(rustix::net::recv(socket, &mut *into, RecvFlags::DONTWAIT)?.0)
        })
        .await
    }

    /// Writes at least one byte.
    ///
    /// # Errors
    /// The host's.
    pub async fn write(&self, from: &[u8]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        self.when_ready(libc::POLLOUT, |socket| Ok(rustix::net::send(socket, from, flags)?)).await
    }

    /// Fills `into`.
    ///
    /// # Errors
    /// The host's, or [`io::ErrorKind::UnexpectedEof`].
    pub async fn read_exact(&self, into: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            match self.read(&mut into[done..]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                more => done += more,
            }
        }
        Ok(())
    }

    /// Writes all of `from`.
    ///
    /// # Errors
    /// The host's.
    pub async fn write_all(&self, from: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < from.len() {
            done += self.write(&from[done..]).await?;
        }
        Ok(())
    }

    /// Fills `into`, straight to the memory.
    ///
    /// # Errors
    /// The host's, or [`io::ErrorKind::UnexpectedEof`].
    pub async fn read_exact_vec(&self, into: &IoVec) -> io::Result<()> {
        let mut rest = into.clone();
        while !rest.is_empty() {
            match self.when_ready(libc::POLLIN, |socket| unix::receive(socket, &rest)).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                more => rest = rest.slice(more..rest.len()),
            }
        }
        Ok(())
    }

    /// Writes all of `from`, straight from the memory.
    ///
    /// # Errors
    /// The host's.
    pub async fn write_all_vec(&self, from: &IoVec) -> io::Result<()> {
        let mut rest = from.clone();
        while !rest.is_empty() {
            let sent = self.when_ready(libc::POLLOUT, |socket| unix::send(socket, &rest)).await?;
            rest = rest.slice(sent..rest.len());
        }
        Ok(())
    }

    /// Ends sending, receiving or both; whoever waits for it is woken.
    ///
    /// # Errors
    /// The host's.
    pub fn shutdown(&self, how: std::net::Shutdown) -> io::Result<()> {
        let how = match how {
            std::net::Shutdown::Read => Shutdown::Read,
            std::net::Shutdown::Write => Shutdown::Write,
            std::net::Shutdown::Both => Shutdown::Both,
        };
        match rustix::net::shutdown(&self.socket, how) {
            Err(Errno::NOTCONN) | Ok(()) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// A socket that others connect to.
#[derive(Debug)]
pub struct Listener {
    socket: Arc<OwnedFd>,
}

impl Listener {
    /// A listening socket that somebody else made.
    ///
    /// # Errors
    /// The host's.
    pub fn from_socket(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self { socket: Arc::new(socket) })
    }

    /// Listens at a TCP address; port 0 takes a free one.
    ///
    /// # Errors
    /// The host's.
    pub fn bind_tcp(address: SocketAddr) -> io::Result<Self> {
        Self::from_socket(TcpListener::bind(address)?.into())
    }

    /// Listens at a path, which must not exist.
    ///
    /// # Errors
    /// The host's.
    pub fn bind_unix(path: &Path) -> io::Result<Self> {
        Self::from_socket(UnixListener::bind(path)?.into())
    }

    /// The descriptor.
    pub fn descriptor(&self) -> &Arc<OwnedFd> {
        &self.socket
    }

    /// Waits for the next connection.
    ///
    /// # Errors
    /// The host's, such as too many open files; later calls may succeed.
    pub async fn accept(&self) -> io::Result<Stream> {
        loop {
            match rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => {
                    // Unix sockets have no such option.
                    let _ = rustix::net::sockopt::set_tcp_nodelay(&socket, true);
                    return Ok(Stream { socket: Arc::new(socket) });
                }
                Err(Errno::AGAIN) => {
                    current().await_ready(&self.socket, libc::POLLIN)?.await?;
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
