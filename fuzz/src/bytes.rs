//! Files that are nearly right.

use crate::Input;

/// Damages `bytes`: some of them change, and the end may be missing or have more behind it.
pub fn patch(input: &mut Input<'_>, bytes: &mut Vec<u8>) {
    for _ in 0..input.below(16) {
        let at = input.u16();
        let new = input.below(9) as usize;
        for (index, value) in input.bytes(new).iter().enumerate() {
            let at = usize::from(at).wrapping_add(index);
            if let Some(byte) = at.checked_rem(bytes.len()).and_then(|at| bytes.get_mut(at)) {
                *byte = *value;
            }
        }
    }
    match input.u8() % 8 {
        0 => bytes.truncate(input.u16().into()),
        1 => bytes.extend_from_slice(input.rest()),
        _ => {}
    }
}

/// Program headers and their contents, as an ELF file has them.
#[derive(Debug, Default)]
pub struct Elf {
    headers: Vec<[u64; 8]>,
    contents: Vec<u8>,
}

impl Elf {
    /// Adds a segment of `kind` with `contents`, for `memory` bytes at `address`.
    pub fn segment(&mut self, kind: u32, address: u64, contents: &[u8], memory: u64) {
        let offset = self.contents.len() as u64;
        self.contents.extend_from_slice(contents);
        self.header([kind.into(), 7, offset, address, address, contents.len() as u64, memory, 4]);
    }

    /// Adds a header of any contents: kind, flags, offset after the headers, virtual and physical address,
    /// bytes in the file and in memory, alignment.
    pub fn header(&mut self, header: [u64; 8]) {
        self.headers.push(header);
    }

    /// The file.
    pub fn build(&self, is_64: bool, entry: u64) -> Vec<u8> {
        let (header_len, entry_len) = if is_64 { (64u64, 56u64) } else { (52, 32) };
        let word = if is_64 { 8 } else { 4 };
        let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        file[4] = if is_64 { 2 } else { 1 };
        let mut put = |value: u64, size: usize| file.extend_from_slice(&value.to_le_bytes()[..size]);
        put(2, 2);
        put(if is_64 { 62 } else { 3 }, 2);
        put(1, 4);
        for value in [entry, header_len, 0] {
            put(value, word);
        }
        put(0, 4);
        for value in [header_len, entry_len, self.headers.len() as u64, 0, 0, 0] {
            put(value, 2);
        }
        let first = header_len + entry_len * self.headers.len() as u64;
        for [kind, flags, offset, at, physical, size, memory, align] in &self.headers {
            put(*kind, 4);
            if is_64 {
                put(*flags, 4);
            }
            for value in [offset.wrapping_add(first), *at, *physical, *size, *memory] {
                put(value, word);
            }
            if !is_64 {
                put(*flags, 4);
            }
            put(*align, word);
        }
        file.extend_from_slice(&self.contents);
        file
    }
}
