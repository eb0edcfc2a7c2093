//! Any bytes as code, in any mode, with any registers.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| x86_interp::fuzz_bytes(data));
