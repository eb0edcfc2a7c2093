//! Debian packages: ar, gzip or xz, and tar.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vireo_fuzz::Input;

/// A member of an ar archive.
fn member(archive: &mut Vec<u8>, name: &str, contents: &[u8]) {
    let header = format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, 100_644, contents.len());
    archive.extend_from_slice(header.as_bytes());
    archive.extend_from_slice(contents);
    archive.resize(archive.len().next_multiple_of(2), b'\n');
}

/// A header of a tar archive, with a checksum that is right.
fn tar_header(input: &mut Input<'_>, size: u64) -> [u8; 512] {
    let mut header = [0; 512];
    let name = input.bytes(12);
    header[..2].copy_from_slice(b"./");
    header[2..2 + name.len()].copy_from_slice(name);
    if input.flag() {
        header[2] = b'a';
    }
    header[100..107].copy_from_slice(b"0000644");
    let claimed = if input.one_in(4) { input.number() } else { size };
    let digits = format!("{:011o}", claimed & 0o777_7777_7777);
    header[124..135].copy_from_slice(digits.as_bytes());
    header[156] = input.pick(b"0\x00005LxgKS17");
    let magic: &[u8; 8] = input.pick(&[b"ustar\x0000", b"ustar  \x00", b"\x00\x00\x00\x00\x00\x00\x00\x00"]);
    header[257..265].copy_from_slice(magic);
    // What only some kinds of archives have: a longer name, holes.
    let at = 345 + input.below(160) as usize;
    for (to, from) in header[at..].iter_mut().zip(input.bytes(24)) {
        *to = *from;
    }
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    header
}

fn tar(input: &mut Input<'_>) -> Vec<u8> {
    let mut archive = Vec::new();
    while !input.is_empty() {
        let len = input.below(64) as usize;
        let contents = input.bytes(len);
        archive.extend(tar_header(input, contents.len() as u64));
        archive.extend_from_slice(contents);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let mut deb = b"!<arch>\n".to_vec();
    let form = input.u8() % 6;
    if form == 0 {
        deb = input.rest().to_vec();
    } else if form == 1 {
        deb.extend_from_slice(input.rest());
    } else {
        member(&mut deb, "debian-binary", b"2.0\n");
        match form {
            2 => member(&mut deb, "data.tar.gz", input.rest()),
            3 => member(&mut deb, "data.tar.xz", input.rest()),
            _ => member(&mut deb, "data.tar", &tar(&mut input)),
        }
    }
    image_store::fuzzing::package(&deb);
});
