//! Initialization vectors of sectors.

use crate::Result;
use crate::algorithm::{CipherAlgorithm, HashAlgorithm, IvAlgorithm};
use crate::block_cipher::{self, BlockCipher};

/// Makes initialization vectors of sector numbers.
pub(crate) enum IvGenerator {
    Plain,
    Plain64,
    Essiv(Box<dyn BlockCipher>),
}

impl IvGenerator {
    /// The generator for sectors encrypted by `cipher` with this key; `hash` is ESSIV's.
    ///
    /// # Errors
    /// ESSIV's hash is missing, or its digest is no key of the cipher's family.
    pub(crate) fn new(
        algorithm: IvAlgorithm,
        cipher: CipherAlgorithm,
        hash: Option<HashAlgorithm>,
        key: &[u8],
    ) -> Result<Self> {
        Ok(match algorithm {
            IvAlgorithm::Plain => Self::Plain,
            IvAlgorithm::Plain64 => Self::Plain64,
            IvAlgorithm::Essiv => {
                let hash = hash.ok_or(crate::Error::NoIvHash)?;
                let salt = hash.digest(&[key]);
                Self::Essiv(block_cipher::new(cipher.essiv_cipher(hash)?, &salt)?)
            }
        })
    }

    /// Fills `ivs` with the vectors of the sectors from `first` on, each `block` bytes long.
    pub(crate) fn fill(&self, first: u64, ivs: &mut [u8], block: usize) {
        for (index, iv) in ivs.chunks_exact_mut(block).enumerate() {
            let sector = first.wrapping_add(index as u64);
            let number = if matches!(self, Self::Plain) { sector & 0xffff_ffff } else { sector };
            let (low, high) = iv.split_at_mut(8);
            low.copy_from_slice(&number.to_le_bytes());
            high.fill(0);
        }
        if let Self::Essiv(cipher) = self {
            cipher.encrypt(ivs);
        }
    }
}
