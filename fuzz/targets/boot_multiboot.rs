//! Flat multiboot kernels with addresses of all sorts.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vireo_fuzz::{Input, boot};

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let mut kernel = vec![0x90; usize::from(input.u8()) * 4];
    let flags = if input.flag() { 1 << 16 | u32::from(input.u8()) } else { input.u32() };
    let checksum = 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags);
    let near = 0x10_0000 + u32::from(input.u16());
    let mut words = vec![0x1bad_b002, flags, checksum];
    for _ in 0..5 {
        words.push(match input.u8() % 4 {
            0 => input.number() as u32,
            1 => 0,
            _ => near.wrapping_add(input.u8().into()),
        });
    }
    kernel.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    let high = input.flag();
    kernel.extend_from_slice(input.rest());
    boot(&kernel, high.then_some(b"module"), "root=/dev/vda", high);
});
