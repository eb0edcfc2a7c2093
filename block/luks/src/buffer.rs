//! Encrypting and decrypting whole buffers, with more than one processor where there is enough to do.

use crate::sector_cipher::SectorCipher;
use io_loop::{IoBuffer, offload};
use std::sync::Arc;

/// What a long request is best divided into, in bytes, so that several processors have something to do.
pub const PART: u64 = 128 << 10;
/// How many parts of one request are best on their way at once.
pub const PARTS_AT_ONCE: usize = 8;
/// From how many bytes on another thread does the computation. Below, handing it over takes longer.
const WORTH_A_THREAD: usize = 32 << 10;

impl SectorCipher {
    /// Encrypts a buffer in place, on another thread if that is worth it; its first sector has the number `first`.
    ///
    /// # Panics
    /// The buffer is no whole number of sectors.
    pub async fn encrypt_buffer(self: &Arc<Self>, first: u64, buffer: IoBuffer) -> IoBuffer {
        self.change_buffer(first, buffer, Self::encrypt).await
    }

    /// Decrypts a buffer in place, on another thread if that is worth it; its first sector has the number `first`.
    ///
    /// # Panics
    /// The buffer is no whole number of sectors.
    pub async fn decrypt_buffer(self: &Arc<Self>, first: u64, buffer: IoBuffer) -> IoBuffer {
        self.change_buffer(first, buffer, Self::decrypt).await
    }

    async fn change_buffer(
        self: &Arc<Self>,
        first: u64,
        mut buffer: IoBuffer,
        how: fn(&Self, u64, &mut [u8]),
    ) -> IoBuffer {
        if buffer.len() < WORTH_A_THREAD {
            how(self, first, buffer.bytes_mut());
            return buffer;
        }
        let cipher = self.clone();
        offload(move || {
            how(&cipher, first, buffer.bytes_mut());
            buffer
        })
        .await
    }
}
