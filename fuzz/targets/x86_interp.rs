//! Any bytes as code, in any mode, with any registers.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vireo_fuzz::Input;

/// Values at the edges of what instructions do.
const VALUES: [u64; 12] = [
    0,
    1,
    0x7f,
    0x80,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0x0000_7fff_ffff_fff9,
    0xffff_8000_0000_0001,
    u64::MAX,
];

/// A register: an even number is an address in the guest's data, twice over; an odd one is taken as it is.
fn register(input: &mut Input<'_>) -> u64 {
    match input.u8() {
        edge @ 0..64 => VALUES[usize::from(edge) % VALUES.len()],
        64..96 => input.u64(),
        small @ 96..128 => u64::from(small) << 1 | 1,
        place => u64::from(place) << 1,
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    // Code comes first, so that short inputs have some; what is left are flags and registers.
    let mut bytes = vec![input.u8()];
    let len = input.u8().into();
    let code = input.bytes(len);
    bytes.extend(u64::from(input.u32()).to_le_bytes());
    for _ in 0..16 {
        bytes.extend(register(&mut input).to_le_bytes());
    }
    bytes.extend_from_slice(code);
    x86_interp::fuzz_bytes(&bytes);
});
