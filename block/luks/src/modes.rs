//! The modes: how a sector's blocks are encrypted, given its initialization vector.
//!
//! A block cipher is fastest when it gets many blocks that do not depend on each other, and where a mode chains the
//! blocks of a sector, those of several sectors still do not. So every mode works on a *group* of sectors at a time.

use crate::algorithm::CipherMode;
use crate::block_cipher::BlockCipher;

/// The size of a sector, in bytes: the unit that has an initialization vector.
pub const SECTOR_BYTES: usize = 512;
/// How many sectors a group has at most.
pub(crate) const GROUP: usize = 16;
/// The longest block, in bytes.
pub(crate) const MOST_BLOCK: usize = 16;
/// How many sectors a mode works on at a time where it needs memory for each: as many as keep the widest units busy,
/// few enough for that memory to cost little.
const WIDE: usize = 4;
/// Blocks of 16 bytes in a sector.
const XTS_BLOCKS: usize = SECTOR_BYTES / MOST_BLOCK;

/// A mode with its ciphers.
pub(crate) struct Mode {
    pub(crate) mode: CipherMode,
    /// What encrypts blocks of data.
    pub(crate) data: Box<dyn BlockCipher>,
    /// XTS's second cipher, which encrypts the tweaks.
    pub(crate) tweak: Option<Box<dyn BlockCipher>>,
    /// Length of blocks, in bytes.
    pub(crate) block: usize,
}

impl Mode {
    /// Encrypts up to [`GROUP`] sectors in place; `ivs` has one vector of a block's length for each.
    pub(crate) fn encrypt(&self, ivs: &mut [u8], sectors: &mut [u8]) {
        match self.mode {
            CipherMode::Ecb => self.data.encrypt(sectors),
            CipherMode::Cbc => self.encrypt_cbc(ivs, sectors),
            CipherMode::Ctr => self.apply_ctr(ivs, sectors),
            CipherMode::Xts => self.apply_xts(ivs, sectors, |blocks| self.data.encrypt(blocks)),
        }
    }

    /// Decrypts up to [`GROUP`] sectors in place; `ivs` has one vector of a block's length for each.
    pub(crate) fn decrypt(&self, ivs: &mut [u8], sectors: &mut [u8]) {
        match self.mode {
            CipherMode::Ecb => self.data.decrypt(sectors),
            CipherMode::Cbc => self.decrypt_cbc(ivs, sectors),
            CipherMode::Ctr => self.apply_ctr(ivs, sectors),
            CipherMode::Xts => self.apply_xts(ivs, sectors, |blocks| self.data.decrypt(blocks)),
        }
    }

    /// XTS (IEEE 1619, 5.3): the same but for `cipher`, which encrypts or decrypts the masked blocks.
    fn apply_xts(&self, tweaks: &mut [u8], sectors: &mut [u8], cipher: impl Fn(&mut [u8])) {
        if let Some(tweak) = &self.tweak {
            tweak.encrypt(tweaks);
        }
        let mut masks = [[0_u128; XTS_BLOCKS]; WIDE];
        let (tweaks, _) = tweaks.as_chunks::<MOST_BLOCK>();
        for (sectors, tweaks) in sectors.chunks_mut(WIDE * SECTOR_BYTES).zip(tweaks.chunks(WIDE)) {
            for (masks, tweak) in masks.iter_mut().zip(tweaks) {
                let mut mask = u128::from_le_bytes(*tweak);
                for place in masks {
                    *place = mask;
                    mask = times_x(mask);
                }
            }
            xor_blocks(sectors, masks.as_flattened());
            cipher(sectors);
            xor_blocks(sectors, masks.as_flattened());
        }
    }

    /// CBC (SP 800-38A, 6.2): a sector's blocks depend on each other, so the n-th blocks of all sectors go together.
    fn encrypt_cbc(&self, lanes: &mut [u8], sectors: &mut [u8]) {
        for at in (0..SECTOR_BYTES).step_by(self.block) {
            let blocks = sectors.chunks_exact(SECTOR_BYTES).map(|sector| &sector[at..at + self.block]);
            for (lane, block) in lanes.chunks_exact_mut(self.block).zip(blocks) {
                xor(lane, block);
            }
            self.data.encrypt(lanes);
            let blocks =
                sectors.chunks_exact_mut(SECTOR_BYTES).map(|sector| &mut sector[at..at + self.block]);
            for (lane, block) in lanes.chunks_exact(self.block).zip(blocks) {
                block.copy_from_slice(lane);
            }
        }
    }

    fn decrypt_cbc(&self, ivs: &[u8], sectors: &mut [u8]) {
        let mut saved = [0; WIDE * SECTOR_BYTES];
        for (sectors, ivs) in sectors.chunks_mut(WIDE * SECTOR_BYTES).zip(ivs.chunks(WIDE * self.block)) {
            let saved = &mut saved[..sectors.len()];
            saved.copy_from_slice(sectors);
            self.data.decrypt(sectors);
            let chained = saved.chunks_exact(SECTOR_BYTES).zip(ivs.chunks_exact(self.block));
            for (sector, (cipher_text, iv)) in sectors.chunks_exact_mut(SECTOR_BYTES).zip(chained) {
                let (first, others) = sector.split_at_mut(self.block);
                xor(first, iv);
                xor(others, cipher_text);
            }
        }
    }

    /// CTR (SP 800-38A, 6.5) with the whole block as a big-endian counter: decrypts what it encrypted.
    fn apply_ctr(&self, ivs: &[u8], sectors: &mut [u8]) {
        let mut stream = [0; WIDE * SECTOR_BYTES];
        for (sectors, ivs) in sectors.chunks_mut(WIDE * SECTOR_BYTES).zip(ivs.chunks(WIDE * self.block)) {
            let stream = &mut stream[..sectors.len()];
            for (stream, iv) in stream.chunks_exact_mut(SECTOR_BYTES).zip(ivs.chunks_exact(self.block)) {
                self.fill_counters(iv, stream);
            }
            self.data.encrypt(stream);
            xor(sectors, stream);
        }
    }

    /// Fills a sector's blocks with a counter's values from `iv` on.
    fn fill_counters(&self, iv: &[u8], blocks: &mut [u8]) {
        let unused = MOST_BLOCK - self.block;
        let mut counter = [0; MOST_BLOCK];
        counter[unused..].copy_from_slice(iv);
        let counter = u128::from_be_bytes(counter);
        for (index, block) in blocks.chunks_exact_mut(self.block).enumerate() {
            // A shorter block takes the low bytes: its counter wraps by itself.
            block.copy_from_slice(&counter.wrapping_add(index as u128).to_be_bytes()[unused..]);
        }
    }
}

/// Multiplies by x in GF(2^128) as XTS numbers its bits (IEEE 1619, 5.2).
fn times_x(value: u128) -> u128 {
    let carry = if value >> 127 == 1 { 0x87 } else { 0 };
    (value << 1) ^ carry
}

fn xor_blocks(data: &mut [u8], masks: &[u128]) {
    let (blocks, _) = data.as_chunks_mut::<MOST_BLOCK>();
    for (block, mask) in blocks.iter_mut().zip(masks) {
        *block = (u128::from_le_bytes(*block) ^ mask).to_le_bytes();
    }
}

fn xor(into: &mut [u8], from: &[u8]) {
    for (into, from) in into.iter_mut().zip(from) {
        *into ^= from;
    }
}
