//! Kernel modules and the initramfs that they go into.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vireo_fuzz::Input;

/// An object file with one section, `.modinfo`, besides the sections' names.
fn object(info: &[u8]) -> Vec<u8> {
    const NAMES: &[u8] = b"\0.modinfo\0.shstrtab\0";
    let mut file = vec![0; 64];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    let at = file.len() as u64;
    file.extend_from_slice(info);
    let names_at = file.len() as u64;
    file.extend_from_slice(NAMES);
    let table = file.len() as u64;
    file.resize(file.len() + 3 * 64, 0);
    let mut put = |at: u64, bytes: &[u8]| file[at as usize..][..bytes.len()].copy_from_slice(bytes);
    put(0x28, &table.to_le_bytes());
    put(0x3a, &[64, 0, 3, 0, 2, 0]);
    for (index, name, at, len) in [(1, 1, at, info.len()), (2, 10, names_at, NAMES.len())] {
        let header = table + 64 * index;
        put(header, &[name]);
        put(header + 24, &at.to_le_bytes());
        put(header + 32, &(len as u64).to_le_bytes());
    }
    file
}

fn info(input: &mut Input<'_>) -> Vec<u8> {
    const ITEMS: &[&[u8]] = &[
        b"depends=",
        b"depends=m1,m2",
        b"softdep=pre: m2 post: m0",
        b"alias=",
        b"alias=pci:v",
        b"license=GPL",
    ];
    let mut bytes = Vec::new();
    for _ in 0..input.below(6) {
        bytes.extend_from_slice(input.pick(ITEMS));
        let len = input.below(8) as usize;
        bytes.extend_from_slice(input.bytes(len));
        bytes.push(0);
    }
    bytes
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    if input.one_in(8) {
        let mut program = b"\x7fELF".to_vec();
        program.extend_from_slice(input.rest());
        return image_store::fuzzing::busybox(&program);
    }
    let mut objects: Vec<Vec<u8>> = (0..3).map(|_| object(&info(&mut input))).collect();
    for object in &mut objects {
        if input.flag() {
            vireo_fuzz::patch(&mut input, object);
        }
    }
    let objects: Vec<&[u8]> = objects.iter().map(Vec::as_slice).collect();
    image_store::fuzzing::kernel_modules(&objects);
});
