//! Signed release files.
#![no_main]

use libfuzzer_sys::fuzz_target;

const BEGIN: &str = "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n";
const FIELDS: &str = "Codename: trixie\nAcquire-By-Hash: yes\nSHA256:\n";
const SIGNATURE: &str = "\n-----BEGIN PGP SIGNATURE-----\n\nabc\n-----END PGP SIGNATURE-----\n";

fuzz_target!(|data: &[u8]| {
    let Some((form, data)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(data);
    let digits = "0123456789abcdef".repeat(4);
    match form % 4 {
        0 => image_store::fuzzing::release(&text),
        1 => image_store::fuzzing::release(&format!("{BEGIN}{text}{SIGNATURE}")),
        2 => image_store::fuzzing::release(&format!("{BEGIN}{FIELDS} {digits} 7 a\n{text}{SIGNATURE}")),
        _ => image_store::fuzzing::release(&format!("{FIELDS} {digits} {text}")),
    }
});
