//! ELF files of all sorts: PVH, multiboot and Linux's 64-bit entry.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vireo_fuzz::{Elf, Input, boot};

const LOAD: u32 = 1;
const NOTE: u32 = 4;

/// An address that a kernel may have, or none that it may.
fn address(input: &mut Input<'_>) -> u64 {
    match input.u8() % 4 {
        0 => input.number(),
        _ => 0x10_0000 + u64::from(input.u16()) * 0x10,
    }
}

fn note(input: &mut Input<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..input.below(3) {
        let name: &[u8] = input.pick(&[b"Xen\0".as_slice(), b"GNU\0", b""]);
        let kind = if input.flag() { 18 } else { input.number() as u32 };
        let value = address(input).to_le_bytes();
        let len = input.pick(&[8, 4, 4, 5, 0]);
        let len_field = if input.flag() { len as u32 } else { input.number() as u32 };
        bytes.extend((name.len() as u32).to_le_bytes());
        bytes.extend(len_field.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend_from_slice(name);
        bytes.extend_from_slice(&value[..len]);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// A segment with a multiboot header in it.
fn multiboot(input: &mut Input<'_>) -> Vec<u8> {
    let flags = u32::from(input.u8() % 8);
    let checksum = 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags);
    [0x1bad_b002, flags, checksum, 0].iter().flat_map(|word| word.to_le_bytes()).collect()
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let mut elf = Elf::default();
    for _ in 0..input.below(6) {
        match input.u8() % 8 {
            0 | 1 => elf.segment(NOTE, 0, &note(&mut input), 0),
            2 => {
                let header = multiboot(&mut input);
                elf.segment(LOAD, address(&mut input), &header, 0x100);
            }
            3 => elf.header([(); 8].map(|()| input.number())),
            _ => {
                let at = address(&mut input);
                let len = input.u8().into();
                let contents = input.bytes(len);
                let more = if input.flag() { input.u16().into() } else { input.number() };
                elf.segment(LOAD, at, contents, more.saturating_add(contents.len() as u64));
            }
        }
    }
    let is_64 = input.flag();
    let mut file = elf.build(is_64, address(&mut input));
    let high = input.flag();
    if input.flag() {
        vireo_fuzz::patch(&mut input, &mut file);
    }
    boot(&file, high.then_some(&[1; 100]), "quiet", high);
});
