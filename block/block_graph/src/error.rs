//! What goes wrong in the block layer.

use std::fmt;
use std::io;
use std::sync::Arc;

/// The result of block operations.
pub type Result<T> = std::result::Result<T, Error>;

/// An error number of the host: what a guest, a peer and an error policy decide by.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

impl Errno {
    /// Input/output error.
    pub const IO: Self = Self(libc::EIO);
    /// Invalid argument.
    pub const INVALID: Self = Self(libc::EINVAL);
    /// No space left on device.
    pub const NO_SPACE: Self = Self(libc::ENOSPC);
    /// Operation not supported.
    pub const NOT_SUPPORTED: Self = Self(libc::ENOTSUP);
    /// Operation not permitted.
    pub const NOT_PERMITTED: Self = Self(libc::EPERM);
    /// Permission denied.
    pub const ACCESS: Self = Self(libc::EACCES);
    /// No such file or directory.
    pub const NOT_FOUND: Self = Self(libc::ENOENT);
    /// File exists.
    pub const EXISTS: Self = Self(libc::EEXIST);
    /// Device or resource busy.
    pub const BUSY: Self = Self(libc::EBUSY);
    /// File too large.
    pub const TOO_LARGE: Self = Self(libc::EFBIG);
    /// Read-only file system.
    pub const READ_ONLY: Self = Self(libc::EROFS);
    /// Resource temporarily unavailable.
    pub const AGAIN: Self = Self(libc::EAGAIN);
    /// Cannot allocate memory.
    pub const NO_MEMORY: Self = Self(libc::ENOMEM);
    /// Numerical result out of range.
    pub const RANGE: Self = Self(libc::ERANGE);
    /// No medium found.
    pub const NO_MEDIUM: Self = Self(libc::ENOMEDIUM);
    /// The error number `number`; what is none becomes an I/O error.
    pub fn new(number: i32) -> Self {
        if number > 0 { Self(number) } else { Self::IO }
    }

    /// The number, positive.
    pub fn number(self) -> i32 {
        self.0
    }
}

/// The C library's text, such as "No space left on device".
impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = io::Error::from_raw_os_error(self.0).to_string();
        f.write_str(text.split(" (os error").next().unwrap_or(&text))
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({self})", self.0)
    }
}

/// An error of the block layer: an error number, and a message that says what failed and where.
///
/// The message is what the image tools print. A format's own typed error can be got back with [`Error::typed`].
#[derive(Clone)]
pub struct Error {
    errno: Errno,
    inner: Arc<Inner>,
}

#[derive(Clone)]
struct Inner {
    message: String,
    hints: Vec<String>,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error with a message of its own.
    pub fn new(errno: Errno, message: impl Into<String>) -> Self {
        Self { errno, inner: Arc::new(Inner { message: message.into(), hints: Vec::new(), source: None }) }
    }

    /// An error that has no more to say than its number.
    pub fn errno_only(errno: Errno) -> Self {
        Self::new(errno, errno.to_string())
    }

    /// A typed error of a format or protocol, whose text is the message.
    pub fn of(errno: Errno, error: impl std::error::Error + Send + Sync + 'static) -> Self {
        let message = error.to_string();
        Self { errno, inner: Arc::new(Inner { message, hints: Vec::new(), source: Some(Arc::new(error)) }) }
    }

    /// Something that a driver does not have.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(Errno::NOT_SUPPORTED, message)
    }

    /// An argument that makes no sense.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Errno::INVALID, message)
    }

    /// The error number.
    pub fn errno(&self) -> Errno {
        self.errno
    }

    /// The same error, with what was being done before it: "context: message".
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        let inner = Arc::make_mut(&mut self.inner);
        inner.message = format!("{context}: {}", inner.message);
        self
    }

    /// The same error with a line of advice, which tools print after the message.
    #[must_use]
    pub fn hint(mut self, line: impl Into<String>) -> Self {
        Arc::make_mut(&mut self.inner).hints.push(line.into());
        self
    }

    /// Lines of advice.
    pub fn hints(&self) -> &[String] {
        &self.inner.hints
    }

    /// The typed error that it was made of, if it is a `T`.
    pub fn typed<T: std::error::Error + 'static>(&self) -> Option<&T> {
        self.inner.source.as_deref()?.downcast_ref()
    }

    /// The same message with another number.
    #[must_use]
    pub fn with_errno(mut self, errno: Errno) -> Self {
        self.errno = errno;
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.inner.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.errno, self.inner.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&**self.inner.source.as_ref()?)
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        match (error.raw_os_error(), error.kind()) {
            (Some(number), _) => Self::errno_only(Errno::new(number)),
            (None, io::ErrorKind::Unsupported) => Self::of(Errno::NOT_SUPPORTED, error),
            (None, io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData) => {
                Self::of(Errno::INVALID, error)
            }
            (None, io::ErrorKind::NotFound) => Self::of(Errno::NOT_FOUND, error),
            (None, _) => Self::of(Errno::IO, error),
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        Self::from_raw_os_error(error.errno.number())
    }
}
