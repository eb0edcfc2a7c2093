//! Any bytes as a kernel.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vireo_fuzz::{Input, boot};

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let high = input.flag();
    let len = input.u8().into();
    let cmdline = input.text(len);
    boot(input.rest(), high.then_some(b"initrd"), &cmdline, high);
});
