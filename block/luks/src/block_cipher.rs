//! The block ciphers, with one face: runs of blocks, in place.

use crate::algorithm::CipherAlgorithm;
use crate::{Error, Result};
use cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit};

/// A block cipher with its key. Each block is encrypted by itself; a call with many of them uses the processor best.
pub(crate) trait BlockCipher: Send + Sync {
    /// Encrypts blocks in place; `blocks` is a whole number of them.
    fn encrypt(&self, blocks: &mut [u8]);
    /// Decrypts blocks in place; `blocks` is a whole number of them.
    fn decrypt(&self, blocks: &mut [u8]);
}

impl<C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser + Send + Sync> BlockCipher for C {
    fn encrypt(&self, blocks: &mut [u8]) {
        let (blocks, rest) = Array::slice_as_chunks_mut(blocks);
        debug_assert!(rest.is_empty());
        self.encrypt_blocks(blocks);
    }

    fn decrypt(&self, blocks: &mut [u8]) {
        let (blocks, rest) = Array::slice_as_chunks_mut(blocks);
        debug_assert!(rest.is_empty());
        self.decrypt_blocks(blocks);
    }
}

/// The cipher with this key.
///
/// # Errors
/// The key's length is not the cipher's.
pub(crate) fn new(algorithm: CipherAlgorithm, key: &[u8]) -> Result<Box<dyn BlockCipher>> {
    fn keyed<C: KeyInit + BlockCipher + 'static>(key: &[u8]) -> Option<Box<dyn BlockCipher>> {
        Some(Box::new(C::new_from_slice(key).ok()?))
    }
    let expected = algorithm.key_bytes();
    let cipher = match algorithm {
        // Some of these take keys of several lengths.
        _ if key.len() != expected => None,
        CipherAlgorithm::Aes128 => keyed::<aes::Aes128>(key),
        CipherAlgorithm::Aes192 => keyed::<aes::Aes192>(key),
        CipherAlgorithm::Aes256 => keyed::<aes::Aes256>(key),
        CipherAlgorithm::Cast5 => keyed::<cast5::Cast5>(key),
        CipherAlgorithm::Serpent128 | CipherAlgorithm::Serpent192 | CipherAlgorithm::Serpent256 => {
            keyed::<serpent::Serpent>(key)
        }
        CipherAlgorithm::Twofish128 | CipherAlgorithm::Twofish192 | CipherAlgorithm::Twofish256 => {
            keyed::<twofish::Twofish>(key)
        }
    };
    cipher.ok_or(Error::KeyLength { length: key.len(), expected })
}
