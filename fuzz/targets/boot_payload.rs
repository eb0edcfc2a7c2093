//! What a bzImage unpacks to, in each format that is unpacked on the host: an ELF file with a relocation table.
#![no_main]

use boot::{DirectEntry, SetupHeader, Vmlinux};
use libfuzzer_sys::fuzz_target;
use vireo_fuzz::{Elf, Input, boot_directly, bzimage, pack, patch};

/// Where Linux's virtual addresses of its own code begin, and where the kernel asks to be.
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
const BASE: u64 = 0x100_0000;
/// The most bytes that are unpacked.
const LIMIT: u64 = 32 << 20;

fn kernel(input: &mut Input<'_>) -> Vec<u8> {
    let mut elf = Elf::default();
    for _ in 0..input.below(5) {
        let at = if input.one_in(8) { input.number() } else { BASE + u64::from(input.u16()) * 0x10 };
        let len = input.u8().into();
        let more = if input.one_in(4) { input.number() } else { input.u16().into() };
        let contents = input.bytes(len);
        elf.segment(1, at, contents, more.saturating_add(contents.len() as u64));
    }
    let entry = if input.one_in(8) { input.number() } else { BASE + input.below(0x100) };
    let mut file = elf.build(!input.one_in(8), entry);
    for _ in 0..input.below(5) {
        file.extend([0; 4]);
        for _ in 0..input.below(16) {
            let address = match input.u8() % 8 {
                0 => input.number(),
                1 => 0,
                _ => KERNEL_MAP + BASE + u64::from(input.u16()),
            };
            file.extend((address as u32).to_le_bytes());
        }
    }
    file
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let mut plain = kernel(&mut input);
    if input.one_in(4) {
        patch(&mut input, &mut plain);
    }
    let repeated = if input.one_in(16) { input.u16().into() } else { 1 };
    let size = if input.one_in(8) { input.u32() } else { (plain.len() * repeated) as u32 };
    let format = input.u8();
    let random = input.flag().then(|| input.u64());
    let mut payload = pack(format, &plain, repeated);
    if input.flag() {
        patch(&mut input, &mut payload);
    }
    payload.extend(size.to_le_bytes());
    let file = bzimage(&payload);
    let header = SetupHeader::parse(&(&file).into()).expect("the header is as it should be");
    let mut vmlinux = match Vmlinux::unpack(&file, LIMIT) {
        Ok((vmlinux, _)) => vmlinux,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            // What was packed is looked at all the same.
            Vmlinux::from_bytes(plain)
        }
    };
    assert!(vmlinux.bytes().len() as u64 <= LIMIT);
    if let Some(random) = random
        && vmlinux.slide(&header, random).is_err()
    {
        return;
    }
    boot_directly(&file, DirectEntry { vmlinux: &vmlinux, place: random });
});
