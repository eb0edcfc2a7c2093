//! Kernels that are packed, by the simplest means that each format has: what is stored as it is.

/// A stream of xz, and one of LZMA, of 300 bytes.
const XZ: &[u8] = include_bytes!("../../vm/boot/src/testing/vireo.xz");
const LZMA: &[u8] = include_bytes!("../../vm/boot/src/testing/vireo.lzma");
/// Bytes that one block of each format holds.
const BLOCK: usize = 0xffff;

/// A bzImage of protocol 2.15 with two setup sectors, and `payload` behind the code.
pub fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 3 * 512 + 0x1230];
    let at = file.len();
    file.extend_from_slice(payload);
    file.resize(file.len().next_multiple_of(16), 0);
    let size = (file.len() - 3 * 512) as u32;
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[2]);
    put(0x1f4, &(size / 16).to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x20e, &0x0100u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1, 21]);
    put(0x236, &0x7fu16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x248, &((at - 3 * 512) as u32).to_le_bytes());
    put(0x24c, &(payload.len() as u32).to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x80_0000u32.to_le_bytes());
    put(0x300, b"6.1.0-test (someone)\0");
    file
}

/// `plain`, `repeated` times, in format number `format`. What there is of xz and LZMA is always the same.
pub fn pack(format: u8, plain: &[u8], repeated: usize) -> Vec<u8> {
    match format % 6 {
        0 => gzip(&plain.repeat(repeated)),
        1 => XZ.to_vec(),
        2 => LZMA.to_vec(),
        3 => lz4(&plain.repeat(repeated)),
        4 => zstd(plain, repeated),
        _ => plain.to_vec(),
    }
}

/// Stored blocks of deflate (RFC 1951, 3.2.4) in gzip's frame (RFC 1952), without the length at its end, which
/// has the place of the size that any payload ends with.
fn gzip(plain: &[u8]) -> Vec<u8> {
    let mut out = b"\x1f\x8b\x08\0\0\0\0\0\0\xff".to_vec();
    for block in plain.chunks(BLOCK) {
        let len = block.len() as u16;
        out.push(0);
        out.extend(len.to_le_bytes());
        out.extend((!len).to_le_bytes());
        out.extend_from_slice(block);
    }
    out.extend([1, 0, 0, 0xff, 0xff]);
    out.extend(crc32(plain).to_le_bytes());
    out
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ 0xedb8_8320 };
    !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
}

/// A sequence that is all literals (LZ4 Block Format Description), in the legacy frame.
fn lz4(plain: &[u8]) -> Vec<u8> {
    let mut block = Vec::new();
    if plain.len() < 15 {
        block.push((plain.len() as u8) << 4);
    } else {
        block.push(0xf0);
        let more = plain.len() - 15;
        block.extend(std::iter::repeat_n(0xff, more / 255));
        block.push((more % 255) as u8);
    }
    block.extend_from_slice(plain);
    let mut out = vec![0x02, 0x21, 0x4c, 0x18];
    out.extend((block.len() as u32).to_le_bytes());
    out.extend(block);
    out
}

/// Raw blocks (RFC 8878, 3.1.1.2), or one of a byte that is repeated.
fn zstd(plain: &[u8], repeated: usize) -> Vec<u8> {
    // A window of 8 MiB, no checksum, no size.
    let mut out = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 0x68];
    let blocks: Vec<&[u8]> = plain.chunks(BLOCK).collect();
    for (index, block) in blocks.iter().enumerate() {
        let last = u32::from(index + 1 == blocks.len() && repeated == 1);
        out.extend_from_slice(&((block.len() as u32) << 3 | last).to_le_bytes()[..3]);
        out.extend_from_slice(block);
    }
    if repeated != 1 {
        out.extend_from_slice(&((repeated as u32) << 3 | 2 | 1).to_le_bytes()[..3]);
        out.push(0x90);
    }
    out
}
