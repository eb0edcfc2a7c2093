//! What a client of the control socket sends, against a VM that does what it is asked: any bytes are answered, and the
//! conversation goes on.
#![no_main]

use libfuzzer_sys::fuzz_target;

/// What is said to one byte of a client's, at most on average: the longest answer is the introspection's, to a command
/// of some thirty bytes.
const MOST_PER_BYTE: usize = 64 << 10;

fuzz_target!(|data: &[u8]| {
    let Some((cut, data)) = data.split_first() else { return };
    let said = control::fuzzing::converse(data, usize::from(*cut));
    assert!(said.len() <= MOST_PER_BYTE * (data.len() + 1), "{} bytes said to {}", said.len(), data.len());
    // However the bytes are divided, the same is said.
    assert_eq!(said, control::fuzzing::converse(data, 4096));
    for line in said.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let line = std::str::from_utf8(line).expect("text");
        assert!(line.starts_with('{') && line.ends_with("}\r"), "{line}");
    }
});
