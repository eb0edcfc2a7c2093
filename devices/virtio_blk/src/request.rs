//! Requests (5.2.6): a header, data, and a status byte.

use crate::errors::{ErrorAction, Failures};
use crate::{SECTOR_SIZE, SERIAL_LEN, feature, guest_io};
use block_graph::{Backend, Errno, Error, WriteFlags, ZeroFlags};
use guest_memory::GuestMemory;
use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use virtio::{Chain, QueueError};

/// The most sectors in one range of a discard request.
pub(crate) const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// The most sectors in one range of a write-zeroes request: some hosts must really write them.
pub(crate) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 16;
/// The most ranges in one request.
pub(crate) const MAX_RANGES: u32 = 16;

/// Request types.
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// Bytes of the header: type, reserved, sector.
const HEADER_LEN: u32 = 16;
/// Bytes of a range: sector, number of sectors, flags.
const RANGE_LEN: usize = 16;
/// A range's flag: space may be given back.
const RANGE_UNMAP: u32 = 1;

/// Status bytes.
const STATUS_OK: u8 = 0;

const STATUS_IO_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

/// Why a request did not succeed; the device goes on.
#[derive(Debug)]
enum Failure {
    /// It makes no sense.
    IoError,
    /// There is no such request.
    Unsupported,
    /// The host failed it.
    Host(Error),
}

/// How many requests the host failed.
static FAILURES: AtomicU64 = AtomicU64::new(0);

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        if error.errno() == Errno::NOT_SUPPORTED {
            return Self::Unsupported;
        }
        // A guest can make as many as it likes: the 1st, 2nd, 4th, 8th… are written down.
        let count = FAILURES.fetch_add(1, Ordering::Relaxed) + 1;
        if count.is_power_of_two() {
            tracing::warn!("a guest's disk request failed (number {count}): {error}");
        }
        Self::Host(error)
    }
}

/// What all queues of a device share.
pub(crate) struct Disk {
    pub(crate) backend: Arc<Backend>,
    /// Writes reach stable storage before they end, whatever the driver chooses.
    write_through: bool,
    serial: [u8; SERIAL_LEN],
    /// The features that the driver accepted.
    pub(crate) features: AtomicU64,
    /// The driver's choice between write-back and write-through, if it has one.
    pub(crate) write_back: AtomicBool,
    /// What becomes of what the host failed.
    pub(crate) failures: Failures,
}

impl Disk {
    pub(crate) fn new(backend: Arc<Backend>, serial: &str, failures: Failures) -> Self {
        let mut bytes = [0; SERIAL_LEN];
        for (byte, value) in bytes.iter_mut().zip(serial.bytes()) {
            *byte = value;
        }
        let write_through = backend.flags().write_through;
        let (features, write_back) = (AtomicU64::new(0), AtomicBool::new(!write_through));
        Self { backend, write_through, serial: bytes, features, write_back, failures }
    }

    /// As before a driver came.
    pub(crate) fn reset(&self) {
        self.features.store(0, Ordering::SeqCst);
        self.write_back.store(!self.write_through, Ordering::SeqCst);
        self.failures.set_kept(Vec::new());
    }

    /// Carries out the request in `chain`. Returns the number of bytes written to the chain, or `None` if it is to be
    /// kept until the VM runs on.
    ///
    /// # Errors
    /// [`QueueError`] if there is no place for header or status, so that it is no request.
    pub(crate) async fn request(
        &self,
        memory: &GuestMemory,
        keep: &Arc<dyn Any + Send + Sync>,
        chain: &Chain,
    ) -> Result<Option<u32>, QueueError> {
        let data_in = chain.writable_len().checked_sub(1);
        let data_out = chain.readable_len().checked_sub(HEADER_LEN);
        let (Some(data_in), Some(data_out)) = (data_in, data_out) else {
            return Err(QueueError::BadRequest("a block request without header or status"));
        };
        let mut header = [0; HEADER_LEN as usize];
        chain.read(memory, 0, &mut header)?;
        let [a, b, c, d, _, _, _, _, e, f, g, h, i, j, k, l] = header;
        let sector = u64::from_le_bytes([e, f, g, h, i, j, k, l]);
        let request = Request { memory, keep, chain, sector, data_in, data_out };
        let kind = u32::from_le_bytes([a, b, c, d]);
        let result = match kind {
            kind::IN => self.read(&request).await,
            kind::OUT => self.write(&request).await,
            kind::FLUSH => self.flush().await,
            kind::GET_ID => self.identify(&request),
            kind::DISCARD => self.ranges(&request, false).await,
            kind::WRITE_ZEROES => self.ranges(&request, true).await,
            _ => Err(Failure::Unsupported),
        };
        let status = match result {
            Ok(()) => STATUS_OK,
            Err(Failure::IoError) => STATUS_IO_ERROR,
            Err(Failure::Unsupported) => STATUS_UNSUPPORTED,
            Err(Failure::Host(error)) => match self.failures.decide(kind == kind::IN, &error) {
                ErrorAction::Report => STATUS_IO_ERROR,
                ErrorAction::Ignore => STATUS_OK,
                ErrorAction::Stop => return Ok(None),
            },
        };
        chain.write(memory, data_in, &[status])?;
        Ok(Some(chain.writable_len()))
    }

    /// The offset in bytes of `sectors` sectors from `sector` on.
    fn place(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let end = self.backend.len() / SECTOR_SIZE;
        let sectors = len / SECTOR_SIZE;
        let fits = sector.checked_add(sectors).is_some_and(|last| last <= end);
        if fits && len.is_multiple_of(SECTOR_SIZE) { Ok(sector * SECTOR_SIZE) } else { Err(Failure::IoError) }
    }

    async fn read(&self, request: &Request<'_>) -> Result<(), Failure> {
        let offset = self.place(request.sector, request.data_in.into())?;
        let slices = request.chain.writable_slices(request.memory, 0, request.data_in);
        let slices = slices.map_err(|_| Failure::IoError)?;
        let result = self.backend.read(offset, &guest_io::memory(&slices, request.keep)).await;
        // Even an error may have come after part of the data.
        guest_io::written(&slices);
        Ok(result?)
    }

    async fn write(&self, request: &Request<'_>) -> Result<(), Failure> {
        self.check_writable()?;
        let offset = self.place(request.sector, request.data_out.into())?;
        let slices = request.chain.readable_slices(request.memory, HEADER_LEN, request.data_out);
        let memory = guest_io::memory(&slices.map_err(|_| Failure::IoError)?, request.keep);
        let flags = if self.is_write_through() { WriteFlags::FUA } else { WriteFlags::empty() };
        Ok(self.backend.write(offset, &memory, flags).await?)
    }

    /// Whether what is written is on stable storage when the request ends.
    fn is_write_through(&self) -> bool {
        let features = self.features.load(Ordering::SeqCst);
        let write_back = if features & feature::CONFIG_WCE != 0 {
            self.write_back.load(Ordering::SeqCst)
        } else {
            // Drivers that do not know of flushes rely on it (5.2.5.2).
            features & feature::FLUSH != 0
        };
        self.write_through || !write_back
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.backend.read_only() { Err(Failure::IoError) } else { Ok(()) }
    }

    async fn flush(&self) -> Result<(), Failure> {
        Ok(self.backend.flush().await?)
    }

    fn identify(&self, request: &Request<'_>) -> Result<(), Failure> {
        let len = SERIAL_LEN.min(request.data_in as usize);
        request.chain.write(request.memory, 0, &self.serial[..len]).map_err(|_| Failure::IoError)
    }

    /// Discard and write-zeroes requests, whose data are ranges.
    async fn ranges(&self, request: &Request<'_>, zero: bool) -> Result<(), Failure> {
        self.check_writable()?;
        let len = request.data_out as usize;
        if len == 0 || !len.is_multiple_of(RANGE_LEN) || len > RANGE_LEN * MAX_RANGES as usize {
            return Err(Failure::IoError);
        }
        let mut data = [0; RANGE_LEN * MAX_RANGES as usize];
        let data = &mut data[..len];
        request.chain.read(request.memory, HEADER_LEN, data).map_err(|_| Failure::IoError)?;
        // All are checked before the first has an effect.
        let mut list = Vec::with_capacity(len / RANGE_LEN);
        for range in data.as_chunks::<RANGE_LEN>().0 {
            let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *range;
            let sector = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
            let sectors = u32::from_le_bytes([i, j, k, l]);
            let flags = u32::from_le_bytes([m, n, o, p]);
            let (most, known) =
                if zero { (MAX_WRITE_ZEROES_SECTORS, RANGE_UNMAP) } else { (MAX_DISCARD_SECTORS, 0) };
            if flags & !known != 0 {
                return Err(Failure::Unsupported);
            }
            if sectors > most {
                return Err(Failure::IoError);
            }
            let bytes = u64::from(sectors) * SECTOR_SIZE;
            list.push((self.place(sector, bytes)?, bytes, flags & RANGE_UNMAP != 0));
        }
        for (offset, bytes, unmap) in list.into_iter().filter(|(_, bytes, _)| *bytes > 0) {
            if zero {
                let flags = if unmap { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
                self.backend.write_zeroes(offset, bytes, flags).await?;
            } else {
                self.backend.discard(offset, bytes).await?;
            }
        }
        if self.is_write_through() { self.flush().await } else { Ok(()) }
    }
}

struct Request<'a> {
    memory: &'a GuestMemory,
    keep: &'a Arc<dyn Any + Send + Sync>,
    chain: &'a Chain,
    sector: u64,
    /// Bytes that the device may write before the status.
    data_in: u32,
    /// Bytes that the device may read after the header.
    data_out: u32,
}
