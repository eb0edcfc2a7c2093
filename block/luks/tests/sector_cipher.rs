//! Sector ciphers: published vectors, and every mode beside one that is written as its specification reads.

use aes::cipher::{Array, BlockCipherEncrypt, KeyInit};
use luks::{CipherAlgorithm, CipherMode, Error, HashAlgorithm, IvAlgorithm, SECTOR_BYTES, SectorCipher};

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

/// IEEE 1619-2007, annex B, vectors 4 (sector 0) and 5 (sector 1, on vector 4's cipher text): XTS-AES-128.
#[test]
fn xts_aes_128_of_ieee_1619() {
    let key = bytes("27182818284590452353602874713526 31415926535897932384626433832795");
    let cipher =
        SectorCipher::new(CipherAlgorithm::Aes128, CipherMode::Xts, IvAlgorithm::Plain64, None, &key)
            .unwrap();
    let mut sector: Vec<u8> = (0..512).map(|index| index as u8).collect();
    cipher.encrypt(0, &mut sector);
    assert_eq!(sector[..32], bytes("27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c")[..]);
    cipher.encrypt(1, &mut sector);
    assert_eq!(sector[..32], bytes("264d3ca8512194fec312c8c9891f279fefdd608d0c027b60483a3fa811d65ee5")[..]);
    cipher.decrypt(1, &mut sector);
    cipher.decrypt(0, &mut sector);
    assert!(sector.iter().enumerate().all(|(index, &byte)| byte == index as u8));
}

/// IEEE 1619-2007, annex B, vector 10 (sector 0xff): XTS-AES-256.
#[test]
fn xts_aes_256_of_ieee_1619() {
    let key = bytes(
        "2718281828459045235360287471352662497757247093699959574966967627
         3141592653589793238462643383279502884197169399375105820974944592",
    );
    let cipher =
        SectorCipher::new(CipherAlgorithm::Aes256, CipherMode::Xts, IvAlgorithm::Plain64, None, &key)
            .unwrap();
    let mut sector: Vec<u8> = (0..512).map(|index| index as u8).collect();
    cipher.encrypt(0xff, &mut sector);
    assert_eq!(sector[..32], bytes("1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b")[..]);
}

fn xor(a: &[u8], b: &[u8]) -> Vec<u8> {
    a.iter().zip(b).map(|(a, b)| a ^ b).collect()
}

/// One sector in a mode, block by block, with AES-128.
fn plainly(mode: CipherMode, key: &[u8], iv: &[u8], sector: &[u8]) -> Vec<u8> {
    let cipher = aes::Aes128::new_from_slice(&key[..16]).unwrap();
    let encrypt = |cipher: &aes::Aes128, block: &[u8]| {
        let mut block = Array::try_from(block).unwrap();
        cipher.encrypt_block(&mut block);
        block.to_vec()
    };
    let mut chain = iv.to_vec();
    if mode == CipherMode::Xts {
        chain = encrypt(&aes::Aes128::new_from_slice(&key[16..]).unwrap(), iv);
    }
    let mut out = Vec::new();
    for block in sector.chunks(16) {
        match mode {
            CipherMode::Ecb => out.extend(encrypt(&cipher, block)),
            CipherMode::Cbc => {
                chain = encrypt(&cipher, &xor(&chain, block));
                out.extend(&chain);
            }
            CipherMode::Ctr => {
                out.extend(xor(&encrypt(&cipher, &chain), block));
                for byte in chain.iter_mut().rev() {
                    *byte = byte.wrapping_add(1);
                    if *byte != 0 {
                        break;
                    }
                }
            }
            CipherMode::Xts => {
                out.extend(xor(&encrypt(&cipher, &xor(&chain, block)), &chain));
                let carry = chain[15] >> 7;
                for at in (1..16).rev() {
                    chain[at] = (chain[at] << 1) | (chain[at - 1] >> 7);
                }
                chain[0] = (chain[0] << 1) ^ (carry * 0x87);
            }
        }
    }
    out
}

#[test]
fn every_mode_does_what_it_does_block_by_block() {
    let key: Vec<u8> = (0..32).map(|index| index * 7 + 3).collect();
    // More than two groups of sectors, across the limit of 32-bit sector numbers.
    let first = 0xffff_ffec_u64;
    let plain: Vec<u8> = (0..37 * 512).map(|index: usize| (index * 31 + index / 251) as u8).collect();
    for &mode in CipherMode::ALL {
        for &iv in IvAlgorithm::ALL {
            let key = if mode == CipherMode::Xts { &key[..] } else { &key[..16] };
            let hash = Some(HashAlgorithm::Sha256);
            let cipher = SectorCipher::new(CipherAlgorithm::Aes128, mode, iv, hash, key).unwrap();
            let mut data = plain.clone();
            cipher.encrypt(first, &mut data);
            for (index, (encrypted, plain)) in data.chunks(512).zip(plain.chunks(512)).enumerate() {
                let mut number = [0; 16];
                let sector = first + index as u64;
                let sector = if iv == IvAlgorithm::Plain { sector & 0xffff_ffff } else { sector };
                number[..8].copy_from_slice(&sector.to_le_bytes());
                if iv == IvAlgorithm::Essiv {
                    use sha2::Digest;
                    let salted = aes::Aes256::new(&sha2::Sha256::digest(key));
                    let mut block = Array::from(number);
                    salted.encrypt_block(&mut block);
                    number = block.into();
                }
                assert!(encrypted == plainly(mode, key, &number, plain), "{mode}-{iv}, sector {index}");
            }
            cipher.decrypt(first, &mut data);
            assert!(data == plain, "{mode}-{iv}");
        }
    }
}

#[test]
fn every_cipher_comes_back_and_sectors_differ() {
    for &algorithm in CipherAlgorithm::ALL {
        for &mode in CipherMode::ALL {
            let key: Vec<u8> = (0..algorithm.mode_key_bytes(mode)).map(|index| index as u8).collect();
            let made = SectorCipher::new(algorithm, mode, IvAlgorithm::Plain64, None, &key);
            if algorithm == CipherAlgorithm::Cast5 && mode == CipherMode::Xts {
                assert_eq!(made.unwrap_err().to_string(), "Unsupported cipher mode xts");
                continue;
            }
            let cipher = made.unwrap();
            let mut data = vec![0x42; 20 * SECTOR_BYTES];
            cipher.encrypt(5, &mut data);
            if mode != CipherMode::Ecb {
                assert_ne!(data[..512], data[512..1024], "{algorithm} {mode}");
            }
            // The same in pieces of other sizes.
            let mut pieces = vec![0x42; 20 * SECTOR_BYTES];
            let (one, others) = pieces.split_at_mut(SECTOR_BYTES);
            cipher.encrypt(5, one);
            cipher.encrypt(6, others);
            assert!(pieces == data, "{algorithm} {mode}");
            cipher.decrypt(5, &mut data);
            assert!(data.iter().all(|&byte| byte == 0x42), "{algorithm} {mode}");
        }
    }
}

#[test]
fn keys_and_hashes_that_do_not_fit_are_refused() {
    let new = |algorithm, mode, iv, hash, length| {
        SectorCipher::new(algorithm, mode, iv, hash, &vec![0; length]).unwrap_err()
    };
    let (aes, xts, cbc) = (CipherAlgorithm::Aes128, CipherMode::Xts, CipherMode::Cbc);
    assert_eq!(new(aes, xts, IvAlgorithm::Plain, None, 16), Error::KeyLength { length: 16, expected: 32 });
    let serpent = CipherAlgorithm::Serpent192;
    assert_eq!(
        new(serpent, cbc, IvAlgorithm::Plain, None, 32).to_string(),
        "Cipher key length 32 should be 24"
    );
    assert_eq!(
        new(aes, cbc, IvAlgorithm::Essiv, Some(HashAlgorithm::Sha512), 16).to_string(),
        "No AES cipher with key size 64 available"
    );
    assert_eq!(
        new(CipherAlgorithm::Cast5, cbc, IvAlgorithm::Essiv, Some(HashAlgorithm::Sha1), 16).to_string(),
        "Cipher cast5-128 not supported with essiv"
    );
    assert_eq!(new(aes, cbc, IvAlgorithm::Essiv, None, 16), Error::NoIvHash);
}
