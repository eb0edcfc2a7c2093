//! The compressed kernel in a bzImage, and unpacking it (Linux's Documentation/arch/x86/boot.rst,
//! `payload_offset` and `payload_length`).

use std::fmt;
use std::io::{self, Read};

use crate::setup_header::SetupHeader;
use crate::{BootError, FileKind};

/// Dictionaries that xz and LZMA may ask for, in KiB; the kernel's build uses 32 MiB at most.
const LZMA_MEMORY_KIB: u32 = 256 << 10;
/// Bytes of a block of LZ4's legacy format, all but the last (LZ4 Frame Format Description, "Legacy frame").
const LZ4_BLOCK: usize = 8 << 20;
const LZ4_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// What the kernel's build puts behind the compressed data: its size when unpacked. Gzip's own trailer has
/// the same place and meaning.
const SIZE_LEN: usize = 4;

/// How a kernel's payload is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Deflate in gzip's format.
    Gzip,
    /// LZMA2 in xz's format, perhaps filtered for x86 code.
    Xz,
    /// LZMA in its first format.
    Lzma,
    /// LZ4 in its legacy format.
    Lz4,
    /// Zstandard.
    Zstd,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lzma => "LZMA",
            Self::Lz4 => "LZ4",
            Self::Zstd => "zstd",
        })
    }
}

/// Why a bzImage's payload can't be unpacked. The kernel may still be able to do it itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnpackError {
    /// The header names none: a boot protocol before 2.08, or something else in a bzImage's clothes.
    #[error("the bzImage names no payload")]
    NoPayload,
    /// The header itself, or where it says that the payload is.
    #[error(transparent)]
    Header(#[from] BootError),
    /// A format that isn't known here.
    #[error("the payload begins with {start:02x?}, which is no format known here ({known})")]
    UnknownFormat {
        /// Its first bytes.
        start: [u8; 4],
        /// What it looks like, or what would be known.
        known: &'static str,
    },
    /// The size that the payload states is beyond what is allowed.
    #[error("the payload says that it unpacks to {stated} bytes; at most {limit} are accepted")]
    TooLarge {
        /// What it says.
        stated: u64,
        /// The most accepted.
        limit: u64,
    },
    /// It doesn't unpack to the size that it states.
    #[error("the payload says that it unpacks to {stated} bytes, and unpacks to {}", if *.more { "more" } else { "less" })]
    WrongSize {
        /// What it says.
        stated: u64,
        /// Whether there is more than that.
        more: bool,
    },
    /// The compressed data are damaged.
    #[error("the payload cannot be unpacked as {compression}: {reason}")]
    Damaged {
        /// Its format.
        compression: Compression,
        /// What the decompressor says.
        reason: String,
    },
}

/// The compressed kernel in a bzImage.
#[derive(Debug, Clone, Copy)]
pub struct Payload<'a> {
    /// How it's packed.
    pub compression: Compression,
    /// How many bytes it says that it unpacks to.
    pub stated_size: u64,
    /// The compressed data, without the size behind them unless that's part of the format.
    data: &'a [u8],
}

impl<'a> Payload<'a> {
    /// Finds the payload of `kernel`, a bzImage.
    ///
    /// # Errors
    /// [`UnpackError`] if there is none, or in no known format.
    pub fn find(kernel: &'a [u8]) -> Result<Self, UnpackError> {
        let header = SetupHeader::parse(&kernel.into())?;
        let Some(range) = header.payload.clone() else { return Err(UnpackError::NoPayload) };
        let truncated = BootError::Truncated {
            file: FileKind::BzImage,
            field: "payload",
            offset: range.start,
            need: range.end - range.start,
            have: kernel.len() as u64,
        };
        let place = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
        let bytes = place.and_then(|(start, end)| kernel.get(start..end)).ok_or(truncated)?;
        let Some((data, size)) = bytes.split_last_chunk::<SIZE_LEN>() else {
            return Err(UnpackError::NoPayload);
        };
        let compression = recognize(data)?;
        let data = if compression == Compression::Gzip { bytes } else { data };
        Ok(Self { compression, stated_size: u32::from_le_bytes(*size).into(), data })
    }

    /// Unpacks it. No more memory is used than `limit` and the decompressor's own.
    ///
    /// # Errors
    /// [`UnpackError`] if it's too large, damaged or of another size than it states.
    pub fn unpack(&self, limit: u64) -> Result<Vec<u8>, UnpackError> {
        let (stated, compression) = (self.stated_size, self.compression);
        if stated > limit {
            return Err(UnpackError::TooLarge { stated, limit });
        }
        let size = usize::try_from(stated).map_err(|_| UnpackError::TooLarge { stated, limit })?;
        let damaged = |reason: String| UnpackError::Damaged { compression, reason };
        let (bytes, more) = match compression {
            Compression::Gzip => read(size, flate2::read::GzDecoder::new(self.data)),
            Compression::Xz => {
                read(size, lzma_rust2::XzReader::new_mem_limit(self.data, false, LZMA_MEMORY_KIB))
            }
            Compression::Lzma => lzma_rust2::LzmaReader::new_mem_limit(self.data, LZMA_MEMORY_KIB, None)
                .and_then(|reader| read(size, reader)),
            Compression::Lz4 => lz4(size, self.data),
            Compression::Zstd => zstd(size, self.data),
        }
        .map_err(|error| damaged(error.to_string()))?;
        if more || bytes.len() != size {
            return Err(UnpackError::WrongSize { stated, more });
        }
        Ok(bytes)
    }
}

fn recognize(data: &[u8]) -> Result<Compression, UnpackError> {
    let known: [(&[u8], Compression); 5] = [
        (&[0x1f, 0x8b], Compression::Gzip),
        (&[0xfd, b'7', b'z', b'X', b'Z', 0], Compression::Xz),
        (&[0x5d, 0, 0], Compression::Lzma),
        (&LZ4_MAGIC, Compression::Lz4),
        (&[0x28, 0xb5, 0x2f, 0xfd], Compression::Zstd),
    ];
    if let Some((_, compression)) = known.iter().find(|(magic, _)| data.starts_with(magic)) {
        return Ok(*compression);
    }
    let mut start = [0; 4];
    for (to, from) in start.iter_mut().zip(data) {
        *to = *from;
    }
    let known = match start {
        [b'B', b'Z', b'h', _] => "it looks like bzip2",
        [0x89, b'L', b'Z', b'O'] => "it looks like LZO",
        _ => "known are gzip, xz, LZMA, LZ4 and zstd",
    };
    Err(UnpackError::UnknownFormat { start, known })
}

/// What `reader` has, and whether that is more than `size` bytes.
fn read(size: usize, reader: impl Read) -> io::Result<(Vec<u8>, bool)> {
    let mut bytes = Vec::with_capacity(size);
    let mut reader = reader.take(size as u64 + 1);
    // In pieces, so that the memory does not double when there is a byte too many.
    let mut piece = vec![0; 1 << 16];
    loop {
        let count = reader.read(&mut piece)?;
        let room = size - bytes.len();
        bytes.extend_from_slice(&piece[..count.min(room)]);
        if count == 0 || count > room {
            return Ok((bytes, count > room));
        }
    }
}

/// A sequence of blocks, each behind its compressed length.
fn lz4(size: usize, data: &[u8]) -> io::Result<(Vec<u8>, bool)> {
    let wrong = |reason: &str| io::Error::new(io::ErrorKind::InvalidData, reason.to_owned());
    let mut bytes = vec![0; size];
    let mut filled = 0;
    let mut rest = data;
    while let Some((word, after)) = rest.split_first_chunk::<4>() {
        rest = after;
        // Archives may be joined.
        if *word == LZ4_MAGIC {
            continue;
        }
        let len = u32::from_le_bytes(*word) as usize;
        let block = rest.get(..len).ok_or_else(|| wrong("a block goes past the end"))?;
        rest = &rest[len..];
        if filled == size {
            return Ok((bytes, true));
        }
        let end = size.min(filled + LZ4_BLOCK);
        let count = lz4_flex::block::decompress_into(block, &mut bytes[filled..end])
            .map_err(|error| wrong(&error.to_string()))?;
        filled += count;
        if count == 0 || (count < LZ4_BLOCK && !rest.is_empty()) {
            return Err(wrong("a block other than the last is short"));
        }
    }
    bytes.truncate(filled);
    Ok((bytes, false))
}

fn zstd(size: usize, data: &[u8]) -> io::Result<(Vec<u8>, bool)> {
    let mut bytes = Vec::with_capacity(size);
    // At once, without a window beside the output; what is larger than the output is refused.
    zstd::bulk::Decompressor::new()?.decompress_to_buffer(data, &mut bytes)?;
    Ok((bytes, false))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bzimage::tests::image_with;
    use std::io::Write;

    const LIMIT: u64 = 32 << 20;

    fn plain() -> Vec<u8> {
        (0..20u32 << 20).map(|index| ((index >> 8) ^ (index / 3)) as u8).collect()
    }

    fn lz4_legacy(plain: &[u8]) -> Vec<u8> {
        let mut packed = LZ4_MAGIC.to_vec();
        for chunk in plain.chunks(LZ4_BLOCK) {
            let block = lz4_flex::block::compress(chunk);
            packed.extend((block.len() as u32).to_le_bytes());
            packed.extend(block);
        }
        packed
    }

    fn gzip(plain: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(plain).unwrap();
        encoder.finish().unwrap()
    }

    fn with_size(mut packed: Vec<u8>, size: usize) -> Vec<u8> {
        packed.extend((size as u32).to_le_bytes());
        packed
    }

    fn unpack(payload: &[u8]) -> Result<Vec<u8>, UnpackError> {
        Payload::find(&image_with(payload))?.unpack(LIMIT)
    }

    #[test]
    fn what_kernels_are_packed_with_is_unpacked() {
        let plain = plain();
        let size = plain.len();
        for payload in [
            gzip(&plain),
            with_size(lz4_legacy(&plain), size),
            with_size(zstd::bulk::compress(&plain, 1).unwrap(), size),
        ] {
            assert!(unpack(&payload).unwrap() == plain);
        }
    }

    /// Made by `xz --check=crc32 --x86 --lzma2` and `xz --format=lzma` of 300 bytes "Vireo ".
    #[test]
    fn xz_and_lzma_are_unpacked() {
        let plain = b"Vireo ".repeat(50);
        let xz: &[u8] = include_bytes!("testing/vireo.xz");
        let lzma: &[u8] = include_bytes!("testing/vireo.lzma");
        for packed in [xz, lzma] {
            assert_eq!(unpack(&with_size(packed.to_vec(), 300)).unwrap(), plain);
            assert!(unpack(&with_size(packed[..packed.len() - 20].to_vec(), 300)).is_err());
        }
    }

    #[test]
    fn absurd_sizes_and_damage_are_named() {
        let plain = plain();
        let packs = [lz4_legacy(&plain), zstd::bulk::compress(&plain, 1).unwrap()];
        for packed in &packs {
            let absurd = unpack(&with_size(packed.clone(), u32::MAX as usize)).unwrap_err();
            assert_eq!(absurd, UnpackError::TooLarge { stated: u32::MAX.into(), limit: LIMIT });
            for wrong in [plain.len() - 1, plain.len() + 1, 0] {
                assert!(unpack(&with_size(packed.clone(), wrong)).is_err(), "{wrong}");
            }
            let mut damaged = packed.clone();
            damaged.truncate(packed.len() / 2);
            assert!(unpack(&with_size(damaged, plain.len())).is_err());
        }
        let mut short = gzip(&plain);
        let end = short.len() - 4;
        short[end..].copy_from_slice(&1000u32.to_le_bytes());
        let error = unpack(&short).unwrap_err();
        assert_eq!(error, UnpackError::WrongSize { stated: 1000, more: true });
        let error = unpack(b"BZh91AY&SY....").unwrap_err();
        assert!(error.to_string().contains("bzip2"), "{error}");
        assert_eq!(unpack(b"").unwrap_err(), UnpackError::NoPayload);
    }
}
