//! ELF files of a few instructions.

/// A program header's type (1: to be loaded), contents and address.
pub type Part<'a> = (u32, &'a [u8], u32);

/// A program of 32-bit code for x86, with one segment for each part.
pub fn elf32(entry: u32, parts: &[Part<'_>]) -> Vec<u8> {
    let mut file = b"\x7fELF\x01\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2, 0, 3, 0, 1, 0, 0, 0]);
    for word in [entry, 52, 0, 0] {
        file.extend(word.to_le_bytes());
    }
    for half in [52u16, 32, parts.len() as u16, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let mut offset = 52 + 32 * parts.len() as u32;
    for (kind, bytes, address) in parts {
        let len = bytes.len() as u32;
        for word in [*kind, offset, *address, *address, len, len, 7, 4] {
            file.extend(word.to_le_bytes());
        }
        offset += len;
    }
    parts.iter().for_each(|(_, bytes, _)| file.extend_from_slice(bytes));
    file
}

/// The header by which a loader knows a multiboot kernel (Multiboot Specification 0.6.96, 3.1), without wishes.
pub fn multiboot_header() -> Vec<u8> {
    const MAGIC: u32 = 0x1bad_b002;
    [MAGIC, 0, 0u32.wrapping_sub(MAGIC)].iter().flat_map(|word| word.to_le_bytes()).collect()
}
