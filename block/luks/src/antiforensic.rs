//! The anti-forensic splitter (LUKS On-Disk Format, section 2.4): key material is spread over many stripes, all of
//! which are needed to get it back, so that overwriting any of them destroys it.

use crate::algorithm::HashAlgorithm;
use crate::{Error, Result};
use zeroize::Zeroizing;

/// Diffuses `block` in place: each digest-sized piece becomes the hash of its number and itself.
fn diffuse(hash: HashAlgorithm, block: &mut [u8]) {
    for (number, piece) in block.chunks_mut(hash.digest_bytes()).enumerate() {
        let digest = hash.digest(&[&(number as u32).to_be_bytes(), piece]);
        piece.copy_from_slice(&digest[..piece.len()]);
    }
}

fn xor(into: &mut [u8], from: &[u8]) {
    for (into, from) in into.iter_mut().zip(from) {
        *into ^= from;
    }
}

/// Splits `key` into `stripes` pieces of its length, one after the other.
///
/// # Errors
/// The system gives no random bytes.
pub(crate) fn split(hash: HashAlgorithm, key: &[u8], stripes: usize) -> Result<Zeroizing<Vec<u8>>> {
    let mut split = Zeroizing::new(vec![0; key.len() * stripes]);
    let (random, last) = split.split_at_mut(key.len() * (stripes - 1));
    getrandom::fill(random).map_err(|error| Error::Random(error.to_string()))?;
    let mut block = Zeroizing::new(vec![0; key.len()]);
    for stripe in random.chunks(key.len()) {
        xor(&mut block, stripe);
        diffuse(hash, &mut block);
    }
    last.copy_from_slice(key);
    xor(last, &block);
    Ok(split)
}

/// Merges what [`split`] made: the key is as long as one of the stripes, and `split` a whole number of them.
pub(crate) fn merge(hash: HashAlgorithm, split: &[u8], key_bytes: usize) -> Zeroizing<Vec<u8>> {
    let (random, last) = split.split_at(split.len() - key_bytes);
    let mut key = Zeroizing::new(vec![0; key_bytes]);
    for stripe in random.chunks(key_bytes) {
        xor(&mut key, stripe);
        diffuse(hash, &mut key);
    }
    xor(&mut key, last);
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_split_merges_and_needs_every_stripe() {
        for &hash in HashAlgorithm::ALL {
            for key_bytes in [16, 24, 48, 64] {
                let key: Vec<u8> = (0..key_bytes as u8).collect();
                let mut split = split(hash, &key, 40).unwrap();
                assert_eq!(split.len(), 40 * key_bytes);
                assert_eq!(*merge(hash, &split, key_bytes), key, "{hash}");
                split[7 * key_bytes] ^= 1;
                assert_ne!(*merge(hash, &split, key_bytes), key, "{hash}");
            }
        }
    }

    #[test]
    fn diffusion_is_that_of_the_specification() {
        // SHA-256 of a number and of its piece, the last piece cut.
        let mut block: Vec<u8> = (0..48).collect();
        diffuse(HashAlgorithm::Sha256, &mut block);
        let first = HashAlgorithm::Sha256.digest(&[&[0, 0, 0, 0], &(0..32).collect::<Vec<u8>>()]);
        let second = HashAlgorithm::Sha256.digest(&[&[0, 0, 0, 1], &(32..48).collect::<Vec<u8>>()]);
        assert_eq!(block[..32], first[..]);
        assert_eq!(block[32..], second[..16]);
    }
}
