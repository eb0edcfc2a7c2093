//! apt's sources and images' names.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &str| image_store::fuzzing::sources(data));
