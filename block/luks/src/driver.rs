//! An encrypted disk as a node.

use crate::buffer::{PART, PARTS_AT_ONCE};
use crate::modes::SECTOR_BYTES;
use crate::place::{HeaderPlace, failed};
use crate::sector_cipher::SectorCipher;
use crate::volume::Volume;
use block_graph::{
    Driver, Edge, Errno, Error, Image, ImageInfo, Limits, MAX_LEN, NodeRef, OpenFlags, Options, Progress,
    RangeLock, Result, Role, Secrets, Truncate, WriteFlags, async_trait,
};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use io_loop::{IoBuffer, IoVec};
use parking_lot::RwLock;
use std::any::Any;
use std::sync::Arc;
use zeroize::Zeroizing;

const SECTOR: u64 = SECTOR_BYTES as u64;

/// An encrypted disk.
#[derive(Debug)]
pub struct LuksDisk {
    file: Arc<Edge>,
    /// The file with the header, where it is not the one with the data.
    header: Option<Arc<Edge>>,
    volume: RwLock<Volume>,
    /// Where the payload begins in the file, in bytes.
    payload: u64,
    /// None if only the header is looked at.
    cipher: Option<Arc<SectorCipher>>,
    password: Zeroizing<Vec<u8>>,
    key_secret: Option<String>,
    secrets: Arc<Secrets>,
    /// The sectors that are being written.
    writes: RangeLock,
}

/// One part of a request: where it is on the disk, and how long.
type Part = (u64, u64);

/// A request in whole sectors, in parts.
fn parts(start: u64, end: u64) -> impl Iterator<Item = Part> {
    (0..(end - start).div_ceil(PART)).map(move |index| {
        let at = start + index * PART;
        (at, PART.min(end - at))
    })
}

impl LuksDisk {
    /// Opens the disk that is in `file`; `header` has its header, if it is not `file` itself. `key_secret` names the
    /// password, which only a look at the header does without (`flags.no_io`).
    ///
    /// # Errors
    /// The files', what is wrong with the header, or the password is missing or opens nothing.
    pub async fn open(
        file: NodeRef,
        header: Option<NodeRef>,
        key_secret: Option<String>,
        secrets: Arc<Secrets>,
        flags: OpenFlags,
    ) -> Result<Self> {
        let mut password = Zeroizing::default();
        if !flags.no_io {
            let missing = || Error::invalid("Parameter 'key-secret' is required for cipher");
            password = Zeroizing::new(secrets.get(key_secret.as_ref().ok_or_else(missing)?)?.to_vec());
        }
        let place = HeaderPlace { node: header.clone().unwrap_or_else(|| file.clone()), offset: 0 };
        let volume = place.open(header.is_some()).await?;
        let cipher = if flags.no_io {
            None
        } else {
            let key = place.unlock(&volume, &password).await?;
            Some(Arc::new(volume.sector_cipher(&key).map_err(failed)?))
        };
        let payload = volume.payload_offset();
        if payload > file.len() {
            let message =
                format!("The encrypted payload begins at byte {payload}, the file has {}", file.len());
            return Err(Error::new(Errno::IO, message));
        }
        Ok(Self {
            file: Edge::new(Role::File, file),
            header: header.map(|node| Edge::new(Role::Data, node)),
            payload,
            volume: RwLock::new(volume),
            cipher,
            password,
            key_secret,
            secrets,
            writes: RangeLock::new(),
        })
    }

    fn place(&self) -> HeaderPlace {
        let edge = self.header.as_ref().unwrap_or(&self.file);
        HeaderPlace { node: edge.node(), offset: 0 }
    }

    fn cipher(&self) -> Result<&Arc<SectorCipher>> {
        let closed =
            || Error::new(Errno::INVALID, "The disk was opened without its key, to look at its header");
        self.cipher.as_ref().ok_or_else(closed)
    }

    /// A request in whole sectors: where it begins and ends. It is within the file, and far from the end of numbers.
    fn sectors(&self, offset: u64, len: usize) -> Result<(u64, u64)> {
        let end = offset.checked_add(len as u64).and_then(|end| end.checked_next_multiple_of(SECTOR));
        let end = end.filter(|end| end.checked_add(self.payload).is_some_and(|end| end <= i64::MAX as u64));
        Ok((offset - offset % SECTOR, end.ok_or_else(|| Error::errno_only(Errno::INVALID))?))
    }

    /// The plain text of whole sectors; what the file has not is as if its sectors were zero there.
    async fn plain(&self, cipher: &Arc<SectorCipher>, (at, len): Part) -> Result<IoBuffer> {
        let mut buffer = IoBuffer::scratch(len as usize);
        let memory = buffer.io();
        self.file.node().read(self.payload + at, &memory).await?;
        drop(memory);
        Ok(cipher.decrypt_buffer(at / SECTOR, buffer).await)
    }

    async fn read_part(
        &self,
        cipher: &Arc<SectorCipher>,
        offset: u64,
        into: &IoVec,
        part: Part,
    ) -> Result<()> {
        let buffer = self.plain(cipher, part).await?;
        let (from, to) = (part.0.max(offset), (part.0 + part.1).min(offset + into.len() as u64));
        let bytes = &buffer.bytes()[(from - part.0) as usize..(to - part.0) as usize];
        into.copy_from((from - offset) as usize, bytes);
        Ok(())
    }

    async fn write_part(
        &self,
        cipher: &Arc<SectorCipher>,
        offset: u64,
        from: &IoVec,
        (at, len): Part,
        flags: WriteFlags,
    ) -> Result<()> {
        let mut buffer = IoBuffer::scratch(len as usize);
        let end = offset + from.len() as u64;
        // The first and last sector, where they are not written as a whole.
        let first = (at < offset).then_some(0);
        let last = (at + len > end).then(|| len - SECTOR).filter(|last| first != Some(*last));
        for sector in first.into_iter().chain(last) {
            let old = self.plain(cipher, (at + sector, SECTOR)).await?;
            buffer.bytes_mut()[sector as usize..][..SECTOR_BYTES].copy_from_slice(old.bytes());
        }
        let (start, stop) = (at.max(offset), (at + len).min(end));
        let plain = &mut buffer.bytes_mut()[(start - at) as usize..(stop - at) as usize];
        from.copy_to((start - offset) as usize, plain);
        let buffer = cipher.encrypt_buffer(at / SECTOR, buffer).await;
        // A disk may end within a sector.
        let there = len.min(self.len().saturating_sub(at)) as usize;
        let memory = buffer.into_io();
        self.file.node().write(self.payload + at, &memory.slice(0..there), flags).await
    }
}

#[async_trait(?Send)]
impl Driver for LuksDisk {
    fn format_name(&self) -> &'static str {
        "luks"
    }

    fn len(&self) -> u64 {
        self.file.node().len().saturating_sub(self.payload)
    }

    fn limits(&self) -> Limits {
        let below = self.file.node().driver().limits();
        Limits {
            request_alignment: below.request_alignment.max(SECTOR as u32),
            memory_alignment: 1,
            max_write_zeroes: 0,
            max_discard: 0,
            ..below
        }
    }

    fn edges(&self) -> Vec<Arc<Edge>> {
        std::iter::once(&self.file).chain(&self.header).cloned().collect()
    }

    async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        let cipher = self.cipher()?;
        let (start, end) = self.sectors(offset, into.len())?;
        if end - start <= PART {
            return self.read_part(cipher, offset, into, (start, end - start)).await;
        }
        let reads = parts(start, end).map(|part| self.read_part(cipher, offset, into, part));
        stream::iter(reads).buffer_unordered(PARTS_AT_ONCE).try_collect().await
    }

    async fn write(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()> {
        let cipher = self.cipher()?;
        let (start, end) = self.sectors(offset, from.len())?;
        let _held = self.writes.lock(start..end).await;
        if end - start <= PART {
            return self.write_part(cipher, offset, from, (start, end - start), flags).await;
        }
        let writes = parts(start, end).map(|part| self.write_part(cipher, offset, from, part, flags));
        stream::iter(writes).buffer_unordered(PARTS_AT_ONCE).try_collect().await
    }

    async fn flush(&self) -> Result<()> {
        self.file.node().flush().await
    }

    async fn truncate(&self, len: u64, how: Truncate) -> Result<()> {
        let end = len.checked_add(self.payload).filter(|end| *end <= MAX_LEN);
        let too_large = || Error::new(Errno::TOO_LARGE, "The requested file size is too large");
        self.file.node().truncate(end.ok_or_else(too_large)?, how).await
    }

    async fn reopen(&self, options: &mut Options, flags: OpenFlags) -> Result<()> {
        let file = self.file.node();
        file.driver().reopen(&mut options.take_child("file"), flags.for_file()).await?;
        file.set_flags(flags.for_file());
        Ok(())
    }

    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }

    fn allocated_size(&self) -> Option<u64> {
        self.file.node().driver().allocated_size()
    }

    fn open_options(&self) -> Options {
        let mut options = Options::new();
        if let Some(secret) = &self.key_secret {
            options.set("key-secret", secret.as_str());
        }
        options
    }

    fn debug_event(&self, event: &'static str) {
        self.file.node().driver().debug_event(event);
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[async_trait(?Send)]
impl Image for LuksDisk {
    fn info(&self) -> ImageInfo {
        ImageInfo {
            encrypted: true,
            specific: Some(("luks", self.volume.read().info())),
            ..ImageInfo::default()
        }
    }

    async fn amend(&self, options: &mut Options, _progress: Progress<'_>, force: bool) -> Result<()> {
        let volume = self.volume.read().clone();
        let changed = self.place().amend(&volume, options, &self.secrets, &self.password, force).await?;
        *self.volume.write() = changed;
        Ok(())
    }
}
