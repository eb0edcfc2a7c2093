//! What encrypted guest data need.

use crate::format::header::CryptMethod;
use crate::parameters::Password;
use block_graph::{Errno, Error, RangeLock, Result};
use luks::{SECTOR_BYTES, SectorCipher, Volume};
use parking_lot::RwLock;
use std::sync::Arc;

/// The unit of encryption, in bytes.
pub(crate) const SECTOR: u64 = SECTOR_BYTES as u64;

/// What an encrypted image's data need.
#[derive(Debug)]
pub(crate) struct Crypt {
    /// `None` if only metadata are looked at.
    cipher: Option<Arc<SectorCipher>>,
    /// Sectors are numbered by their place in the file; otherwise by the guest's.
    physical: bool,
    /// The LUKS header.
    pub(crate) volume: RwLock<Option<Volume>>,
    /// What the image was opened with.
    pub(crate) password: Password,
    /// Sectors that are being written.
    pub(crate) writing: RangeLock,
}

impl Crypt {
    pub(crate) fn new(
        method: CryptMethod,
        cipher: Option<SectorCipher>,
        volume: Option<Volume>,
        password: Password,
    ) -> Self {
        Self {
            cipher: cipher.map(Arc::new),
            physical: method == CryptMethod::Luks,
            volume: RwLock::new(volume),
            password,
            writing: RangeLock::new(),
        }
    }

    /// The cipher of the data.
    pub(crate) fn cipher(&self) -> Result<Arc<SectorCipher>> {
        self.cipher.clone().ok_or_else(|| Error::new(Errno::INVALID, "The image was opened without its key"))
    }

    /// The number of the first sector of data at `host`, of the guest's offset `guest`.
    pub(crate) fn sector(&self, host: u64, guest: u64) -> u64 {
        (if self.physical { host } else { guest }) / SECTOR
    }
}
