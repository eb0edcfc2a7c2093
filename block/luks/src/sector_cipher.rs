//! A cipher of disk sectors: algorithm, mode, IV generator and key.

use crate::algorithm::{CipherAlgorithm, CipherMode, HashAlgorithm, IvAlgorithm};
use crate::block_cipher;
use crate::iv::IvGenerator;
use crate::modes::{GROUP, MOST_BLOCK, Mode, SECTOR_BYTES};
use crate::{Error, Result};
use std::fmt;

/// Encrypts and decrypts runs of sectors in place. It has no state besides the key, so that any number of threads
/// may use one at once.
pub struct SectorCipher {
    mode: Mode,
    iv: IvGenerator,
}

impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SectorCipher").field("mode", &self.mode.mode).finish_non_exhaustive()
    }
}

impl SectorCipher {
    /// The cipher with this key; `iv_hash` is ESSIV's, and ignored by other generators.
    ///
    /// # Errors
    /// The parts do not go together, or the key has the wrong length.
    pub fn new(
        algorithm: CipherAlgorithm,
        mode: CipherMode,
        iv: IvAlgorithm,
        iv_hash: Option<HashAlgorithm>,
        key: &[u8],
    ) -> Result<Self> {
        let expected = algorithm.mode_key_bytes(mode);
        if key.len() != expected {
            return Err(Error::KeyLength { length: key.len(), expected });
        }
        if mode == CipherMode::Xts && algorithm.block_bytes() != MOST_BLOCK {
            return Err(Error::ModeUnsupported(mode));
        }
        let (data_key, tweak_key) = key.split_at(algorithm.key_bytes());
        let tweak = match mode {
            CipherMode::Xts => Some(block_cipher::new(algorithm, tweak_key)?),
            _ => None,
        };
        Ok(Self {
            mode: Mode {
                mode,
                data: block_cipher::new(algorithm, data_key)?,
                tweak,
                block: algorithm.block_bytes(),
            },
            iv: IvGenerator::new(iv, algorithm, iv_hash, key)?,
        })
    }

    /// The cipher of old encrypted qcow and qcow2 images: AES-128 in CBC mode, with the password's first 16 bytes as
    /// its key. It is no protection; it is here to read what has it.
    #[must_use]
    pub fn legacy_qcow(password: &[u8]) -> Self {
        let mut key = zeroize::Zeroizing::new([0; 16]);
        let used = password.len().min(key.len());
        key[..used].copy_from_slice(&password[..used]);
        let cipher =
            Self::new(CipherAlgorithm::Aes128, CipherMode::Cbc, IvAlgorithm::Plain64, None, &key[..]);
        cipher.expect("the key has the cipher's length")
    }

    /// Encrypts sectors in place, of which the first has the number `first`.
    ///
    /// # Panics
    /// `data` is no whole number of sectors.
    pub fn encrypt(&self, first: u64, data: &mut [u8]) {
        self.groups(first, data, Mode::encrypt);
    }

    /// Decrypts sectors in place, of which the first has the number `first`.
    ///
    /// # Panics
    /// `data` is no whole number of sectors.
    pub fn decrypt(&self, first: u64, data: &mut [u8]) {
        self.groups(first, data, Mode::decrypt);
    }

    fn groups(&self, first: u64, data: &mut [u8], apply: fn(&Mode, &mut [u8], &mut [u8])) {
        assert!(data.len().is_multiple_of(SECTOR_BYTES), "{} bytes are no whole sectors", data.len());
        let mut ivs = [0; GROUP * MOST_BLOCK];
        for (index, group) in data.chunks_mut(GROUP * SECTOR_BYTES).enumerate() {
            let ivs = &mut ivs[..group.len() / SECTOR_BYTES * self.mode.block];
            self.iv.fill(first.wrapping_add((index * GROUP) as u64), ivs, self.mode.block);
            apply(&self.mode, ivs, group);
        }
    }
}
