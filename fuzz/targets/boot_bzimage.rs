//! Damaged bzImages.
#![no_main]

use boot::SetupHeader;
use libfuzzer_sys::fuzz_target;
use vireo_fuzz::{Input, boot};

/// Fields of the setup header with their lengths, and where the version's text is.
const FIELDS: &[(usize, usize)] = &[
    (0x1f1, 1),
    (0x1f4, 4),
    (0x1fe, 2),
    (0x201, 1),
    (0x206, 2),
    (0x20e, 2),
    (0x211, 1),
    (0x22c, 4),
    (0x230, 4),
    (0x234, 1),
    (0x236, 2),
    (0x238, 4),
    (0x258, 8),
    (0x260, 4),
    (0x300, 8),
];

/// A bzImage of protocol 2.15 with two setup sectors.
fn image() -> Vec<u8> {
    let mut file = vec![0; 3 * 512 + 0x1230];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[2]);
    put(0x1f4, &0x123u32.to_le_bytes());
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
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x80_0000u32.to_le_bytes());
    put(0x300, b"6.1.0-test (someone)\0");
    file
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let mut kernel = image();
    for _ in 0..input.below(8) {
        let (at, len) = input.pick(FIELDS);
        kernel[at..at + len].copy_from_slice(&input.number().to_le_bytes()[..len]);
    }
    let initrd = vec![0; usize::from(input.u16())];
    let high = input.flag();
    vireo_fuzz::patch(&mut input, &mut kernel);
    if let Ok(header) = SetupHeader::parse(&(&kernel).into()) {
        assert!(header.kernel_offset + header.kernel_size <= kernel.len() as u64);
    }
    boot(&kernel, Some(&initrd), "console=ttyS0", high);
});
