//! Random numbers: the host's, or those of a generator with a seed.

use chacha20::ChaCha20Rng;
use chacha20::rand_core::{Rng, SeedableRng};
use parking_lot::Mutex;
use rustix::rand::{GetRandomFlags, getrandom};
use std::fmt;
use std::sync::Arc;

/// Streams of numbers with one seed: who draws how many from one makes no difference to the others.
pub(super) const PROCESSOR: u64 = 0;
/// The stream of the virtio entropy device.
pub(crate) const DEVICE: u64 = 1;
/// The stream of kernels' addresses and their own seeds.
pub(crate) const KERNEL: u64 = 2;

/// Where random numbers come from.
#[derive(Clone)]
pub(crate) enum Entropy {
    /// The host.
    Host,
    /// ChaCha20.
    Seeded(Arc<Mutex<ChaCha20Rng>>),
}

impl Entropy {
    /// The stream of that number with that seed.
    pub(super) fn seeded(seed: u64, stream: u64) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        let mut generator = ChaCha20Rng::from_seed(key);
        generator.set_stream(stream);
        Self::Seeded(Arc::new(Mutex::new(generator)))
    }

    /// Fills `bytes`. `false`: the host has none yet, early in its own start.
    pub(crate) fn fill(&self, bytes: &mut [u8]) -> bool {
        match self {
            Self::Host => {
                let len = bytes.len();
                getrandom(bytes, GetRandomFlags::NONBLOCK).is_ok_and(|count| count == len)
            }
            Self::Seeded(generator) => {
                generator.lock().fill_bytes(bytes);
                true
            }
        }
    }

    /// 64 bits of a generator with a seed, or of the host if it has some.
    pub(super) fn word(&self) -> u64 {
        let mut bytes = [0; 8];
        self.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }
}

impl fmt::Debug for Entropy {
    /// Without the numbers.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if matches!(self, Self::Host) { "Host" } else { "Seeded" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_numbers_and_streams_differ() {
        let words = |seed, stream| {
            let entropy = Entropy::seeded(seed, stream);
            [entropy.word(), entropy.word()]
        };
        assert_eq!(words(7, DEVICE), words(7, DEVICE));
        assert_ne!(words(7, DEVICE), words(7, KERNEL));
        assert_ne!(words(7, DEVICE), words(8, DEVICE));
        assert_ne!(words(7, DEVICE)[0], words(7, DEVICE)[1]);
        // What recordings rely on.
        assert_eq!(words(0, PROCESSOR)[0].to_le_bytes(), [0x76, 0xb8, 0xe0, 0xad, 0xa0, 0xf1, 0x3d, 0x90]);
    }
}
