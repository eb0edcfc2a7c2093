//! Lists of packages, and the order of versions.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vireo_fuzz::Input;

const KEYS: &[&str] = &["Package", "Version", "Depends", "Filename", "Size", "SHA256"];
const NAMES: &[&str] = &["linux-image-cloud-amd64", "linux-image-6.1", "other"];

/// Stanzas with the keys that matter.
fn stanzas(input: &mut Input<'_>) -> Vec<u8> {
    let mut list = Vec::new();
    while !input.is_empty() {
        let key = input.pick(KEYS);
        list.extend_from_slice(key.as_bytes());
        list.extend_from_slice(b": ");
        match key {
            "Package" => list.extend_from_slice(input.pick(NAMES).as_bytes()),
            "SHA256" if input.flag() => list.extend_from_slice(&[b'a'; 64]),
            "Filename" if input.flag() => list.extend_from_slice(b"pool/"),
            "Depends" if input.flag() => list.extend_from_slice(b"a | b, linux-image-6.1 (= 1)"),
            _ => {}
        }
        let len = input.below(24) as usize;
        list.extend_from_slice(input.bytes(len));
        list.push(b'\n');
        if input.one_in(8) {
            list.push(b'\n');
        }
    }
    list
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    match input.u8() % 3 {
        0 => image_store::fuzzing::packages(input.rest()),
        1 => image_store::fuzzing::packages(&stanzas(&mut input)),
        _ => {
            let texts = [(); 3].map(|()| {
                let len = input.below(12) as usize;
                input.text(len)
            });
            let [a, b, c] = &texts;
            image_store::fuzzing::versions([a, b, c]);
        }
    }
});
