//! Images in qcow2 format with damage.

use crate::Input;
use block_graph::Preallocation;
use qcow2::create::{CreateSpec, create};
use qcow2::storage::{MemoryFile, at_once};

/// Bytes of the virtual disk.
const SIZE: u64 = 192 << 10;

/// An image that a fuzzer's bytes describe: the bytes themselves, or one of this implementation's with some words
/// changed, which gets further. `None` if the bytes are too few.
pub fn damaged_image(data: &[u8]) -> Option<Vec<u8>> {
    let (shape, data) = data.split_first()?;
    if shape & 7 == 0 {
        return Some(data.to_vec());
    }
    let cluster_bits = [9, 9, 10, 12, 14, 14, 16, 16][usize::from(shape & 7)];
    let version = if shape & 0x10 != 0 { 3 } else { 2 };
    let spec = CreateSpec {
        size: SIZE,
        version,
        cluster_bits,
        refcount_order: if version == 3 { u32::from(shape >> 5).min(6) } else { 4 },
        extended_l2: version == 3 && cluster_bits >= 14 && shape & 8 != 0,
        preallocation: if shape & 8 != 0 { Preallocation::Metadata } else { Preallocation::Off },
        ..CreateSpec::default()
    };
    let file = MemoryFile::default();
    at_once(create(&file, None, &spec, None)).expect("the options go together");
    let mut image = file.into_bytes();
    let mut input = Input::new(data);
    while !input.is_empty() {
        let word = usize::from(input.u16()) % (image.len() / 8).max(1);
        let Some(bytes) = image.get_mut(word * 8..word * 8 + 8) else { break };
        let old = u64::from_be_bytes(bytes.try_into().expect("eight bytes"));
        let new = match input.u8() % 6 {
            0 => input.u64(),
            1 => old ^ 1 << (input.u8() % 64),
            // An entry of a table.
            2 => u64::from(input.u8()) << cluster_bits | 1 << 63,
            3 => u64::from(input.u8()) << cluster_bits,
            4 => old.wrapping_add(u64::from(input.u8())),
            _ => u64::from(input.u32()),
        };
        bytes.copy_from_slice(&new.to_be_bytes());
    }
    Some(image)
}
