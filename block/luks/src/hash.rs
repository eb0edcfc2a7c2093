//! Digests, PBKDF2 (RFC 8018) with HMAC of each of them, and how many of its iterations take how long.

use crate::algorithm::HashAlgorithm;
use crate::{Error, Result};
use hmac::Hmac;
use rustix::time::{ClockId, clock_gettime};
use sha2::digest::Digest;
use std::time::Duration;
use zeroize::Zeroizing;

/// How long a measurement of the key derivation's speed takes at least.
const MEASURE: Duration = Duration::from_millis(40);

fn digest_of<D: Digest>(parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
    let mut digest = D::new();
    for part in parts {
        digest.update(part);
    }
    Zeroizing::new(digest.finalize().to_vec())
}

impl HashAlgorithm {
    /// The digest of the parts, one after the other.
    pub(crate) fn digest(self, parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
        match self {
            Self::Md5 => digest_of::<md5::Md5>(parts),
            Self::Sha1 => digest_of::<sha1::Sha1>(parts),
            Self::Sha224 => digest_of::<sha2::Sha224>(parts),
            Self::Sha256 => digest_of::<sha2::Sha256>(parts),
            Self::Sha384 => digest_of::<sha2::Sha384>(parts),
            Self::Sha512 => digest_of::<sha2::Sha512>(parts),
            Self::Ripemd160 => digest_of::<ripemd::Ripemd160>(parts),
        }
    }

    /// A key of `bytes` bytes from a password: PBKDF2 with HMAC of this hash.
    pub(crate) fn pbkdf2(
        self,
        password: &[u8],
        salt: &[u8],
        iterations: u32,
        bytes: usize,
    ) -> Result<Zeroizing<Vec<u8>>> {
        let mut key = Zeroizing::new(vec![0; bytes]);
        let derive = match self {
            Self::Md5 => pbkdf2::pbkdf2::<Hmac<md5::Md5>>,
            Self::Sha1 => pbkdf2::pbkdf2::<Hmac<sha1::Sha1>>,
            Self::Sha224 => pbkdf2::pbkdf2::<Hmac<sha2::Sha224>>,
            Self::Sha256 => pbkdf2::pbkdf2::<Hmac<sha2::Sha256>>,
            Self::Sha384 => pbkdf2::pbkdf2::<Hmac<sha2::Sha384>>,
            Self::Sha512 => pbkdf2::pbkdf2::<Hmac<sha2::Sha512>>,
            Self::Ripemd160 => pbkdf2::pbkdf2::<Hmac<ripemd::Ripemd160>>,
        };
        derive(password, salt, iterations, &mut key).map_err(|_| Error::Pbkdf(self))?;
        Ok(key)
    }

    /// How many iterations of [`Self::pbkdf2`] for a key of `bytes` bytes take `time` of this thread's processor
    /// time. The answer may be 0, and more than a header can say.
    pub(crate) fn iterations_in(self, time: Duration, bytes: usize) -> Result<u128> {
        let mut iterations = 1024_u32;
        loop {
            let before = thread_time();
            self.pbkdf2(b"a password of usual length", &[0x5a; 32], iterations, bytes)?;
            let took = thread_time().checked_sub(before).ok_or(Error::CpuTime)?;
            if took >= MEASURE {
                return Ok(u128::from(iterations) * time.as_nanos() / took.as_nanos());
            }
            iterations = iterations.checked_mul(4).ok_or(Error::CpuTime)?;
        }
    }
}

/// The processor time that this thread has used.
fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn pbkdf2_of_rfc_6070_and_others() {
        let derive = |hash: HashAlgorithm, iterations, bytes| {
            hex(&hash.pbkdf2(b"password", b"salt", iterations, bytes).unwrap())
        };
        assert_eq!(derive(HashAlgorithm::Sha1, 1, 20), "0c60c80f961f0e71f3a9b524af6012062fe037a6");
        assert_eq!(derive(HashAlgorithm::Sha1, 4096, 20), "4b007901b765489abead49d926f721d065a429c1");
        let expected = "c5e478d59288c841aa530db6845c4c8d962893a001ce4e11a4963873aa98134a";
        assert_eq!(derive(HashAlgorithm::Sha256, 4096, 32), expected);
        let expected = "d197b1b33db0143e018b12f3d1d1479e6cdebdcc97c5c0f87f6902e072f457b5\
                        143f30602641b3d55cd335988cb36b84376060ecd532e039b742a239434af2d5";
        assert_eq!(derive(HashAlgorithm::Sha512, 4096, 64), expected);
    }

    #[test]
    fn digests_have_their_lengths_and_take_parts_as_a_whole() {
        for &hash in HashAlgorithm::ALL {
            let whole = hash.digest(&[b"in two parts"]);
            assert_eq!(whole.len(), hash.digest_bytes(), "{hash}");
            assert_eq!(whole, hash.digest(&[b"in two", b" parts"]), "{hash}");
        }
        assert_eq!(
            hex(&HashAlgorithm::Ripemd160.digest(&[b"abc"])),
            "8eb208f7e05d987a9b044a8e98c6b087f15a0bfc"
        );
        assert_eq!(hex(&HashAlgorithm::Md5.digest(&[b"abc"])), "900150983cd24fb0d6963f7d28e17f72");
    }

    #[test]
    fn a_longer_time_has_more_iterations() {
        let short = HashAlgorithm::Sha256.iterations_in(Duration::from_millis(1), 32).unwrap();
        let long = HashAlgorithm::Sha256.iterations_in(Duration::from_secs(100), 32).unwrap();
        assert!(short < long, "{short} in 1 ms, {long} in 100 s");
        assert_eq!(HashAlgorithm::Sha1.iterations_in(Duration::ZERO, 20).unwrap(), 0);
    }
}
