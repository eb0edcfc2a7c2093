//! The image file's bytes, as code that works on metadata sees them.
//!
//! Check, repair, creation and bitmaps run on this small trait rather than on a node, so that a test, or a fuzz target,
//! can give them any file.

use async_trait::async_trait;
use block_graph::{Errno, NodeRef, Preallocation, Truncate, WriteFlags, ZeroFlags};
use io_loop::IoBuffer;
use std::io;

/// The most bytes that are read or written at once.
pub const MAX_TRANSFER: usize = 1 << 20;

/// A file that metadata is read from and written to.
#[async_trait(?Send)]
pub trait Storage {
    /// The file's length in bytes.
    fn len(&self) -> u64;

    /// Whether the file has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `into` from `offset` on; what lies past the file's end is read as zeros.
    async fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Writes `from` at `offset`; the file grows if need be.
    async fn write(&self, offset: u64, from: &[u8]) -> io::Result<()>;

    /// Makes `len` bytes from `offset` on read as zeros; with `allocate`, space is taken for them.
    async fn write_zeroes(&self, offset: u64, len: u64, allocate: bool) -> io::Result<()>;

    /// Gives back the space of `len` bytes from `offset` on, if that is possible: nobody needs them.
    async fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    /// Cuts or grows the file; what is new reads as zeros.
    async fn set_len(&self, len: u64) -> io::Result<()>;

    /// Takes space for `len` bytes from `offset` on, of undefined cost but without writing data; the file grows if need
    /// be.
    async fn reserve(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Returns when everything that was written before will survive a loss of power.
    async fn flush(&self) -> io::Result<()>;
}

/// Reads `len` bytes at `offset`, in pieces of at most [`MAX_TRANSFER`].
///
/// The caller has checked `len` against the format's bounds.
pub async fn read_vec(file: &dyn Storage, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    for (index, piece) in bytes.chunks_mut(MAX_TRANSFER).enumerate() {
        file.read(offset + (index * MAX_TRANSFER) as u64, piece).await?;
    }
    Ok(bytes)
}

/// Writes `from` at `offset`, in pieces of at most [`MAX_TRANSFER`].
pub async fn write_all(file: &dyn Storage, offset: u64, from: &[u8]) -> io::Result<()> {
    for (index, piece) in from.chunks(MAX_TRANSFER).enumerate() {
        file.write(offset + (index * MAX_TRANSFER) as u64, piece).await?;
    }
    Ok(())
}

/// A node of the graph as a file.
#[derive(Clone, Debug)]
pub struct NodeFile(pub NodeRef);

#[async_trait(?Send)]
impl Storage for NodeFile {
    fn len(&self) -> u64 {
        self.0.len()
    }

    async fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let len = self.0.len();
        let there = len.saturating_sub(offset).min(into.len() as u64) as usize;
        into[there..].fill(0);
        if there > 0 {
            let mut buffer = IoBuffer::scratch(there);
            self.0.read(offset, &buffer.io()).await?;
            into[..there].copy_from_slice(buffer.bytes());
        }
        Ok(())
    }

    async fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        Ok(self.0.write(offset, &IoBuffer::from(from).into_io(), WriteFlags::empty()).await?)
    }

    async fn write_zeroes(&self, offset: u64, len: u64, allocate: bool) -> io::Result<()> {
        let flags = if allocate { ZeroFlags::empty() } else { ZeroFlags::MAY_UNMAP };
        Ok(self.0.write_zeroes(offset, len, flags).await?)
    }

    async fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let there = self.0.len().saturating_sub(offset).min(len);
        Ok(self.0.discard(offset, there).await?)
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        Ok(self.0.truncate(len, Truncate::default()).await?)
    }

    async fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        let end =
            offset.checked_add(len).ok_or_else(|| io::Error::from_raw_os_error(Errno::TOO_LARGE.number()))?;
        let how = Truncate { preallocation: Preallocation::Falloc, ..Truncate::default() };
        // Only what is new is allocated: the caller reserves before it writes.
        if end > self.0.len() { Ok(self.0.truncate(end, how).await?) } else { Ok(()) }
    }

    async fn flush(&self) -> io::Result<()> {
        Ok(self.0.flush().await?)
    }
}

#[cfg(any(test, feature = "testing"))]
pub use memory::{MemoryFile, at_once};

#[cfg(any(test, feature = "testing"))]
mod memory {
    use super::{Storage, async_trait};
    use std::cell::RefCell;
    use std::io;
    use std::task::{Context, Poll, Waker};

    /// A file in memory.
    #[derive(Debug, Default)]
    pub struct MemoryFile {
        bytes: RefCell<Vec<u8>>,
    }

    impl MemoryFile {
        /// How long a file may become.
        const MAX_LEN: u64 = 256 << 20;

        /// A file of these bytes.
        pub fn new(bytes: Vec<u8>) -> Self {
            Self { bytes: RefCell::new(bytes) }
        }

        /// The file's bytes.
        pub fn into_bytes(self) -> Vec<u8> {
            self.bytes.into_inner()
        }

        fn grow(&self, end: u64) -> io::Result<()> {
            if end > Self::MAX_LEN {
                return Err(rustix::io::Errno::NOSPC.into());
            }
            let mut bytes = self.bytes.borrow_mut();
            if end as usize > bytes.len() {
                bytes.resize(end as usize, 0);
            }
            Ok(())
        }
    }

    #[async_trait(?Send)]
    impl Storage for MemoryFile {
        fn len(&self) -> u64 {
            self.bytes.borrow().len() as u64
        }

        async fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
            let bytes = self.bytes.borrow();
            let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
            let there = (bytes.len() - start).min(into.len());
            into[..there].copy_from_slice(&bytes[start..start + there]);
            into[there..].fill(0);
            Ok(())
        }

        async fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
            self.grow(offset.saturating_add(from.len() as u64))?;
            self.bytes.borrow_mut()[offset as usize..][..from.len()].copy_from_slice(from);
            Ok(())
        }

        async fn write_zeroes(&self, offset: u64, len: u64, _allocate: bool) -> io::Result<()> {
            self.grow(offset.saturating_add(len))?;
            self.bytes.borrow_mut()[offset as usize..][..len as usize].fill(0);
            Ok(())
        }

        async fn set_len(&self, len: u64) -> io::Result<()> {
            self.grow(len)?;
            self.bytes.borrow_mut().truncate(len as usize);
            Ok(())
        }

        async fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
            self.grow(offset.saturating_add(len))
        }

        async fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The result of a future that never waits.
    ///
    /// # Panics
    /// If it does.
    pub fn at_once<F: Future>(future: F) -> F::Output {
        let mut future = std::pin::pin!(future);
        match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(output) => output,
            Poll::Pending => panic!("a future waited that had nothing to wait for"),
        }
    }
}
