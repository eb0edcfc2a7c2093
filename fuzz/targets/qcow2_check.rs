//! An image that anyone wrote: checking it ends, repairing it leaves nothing that a repair finds, and nothing panics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qcow2::check::{Fix, check};
use qcow2::storage::{MemoryFile, at_once};
use vireo_fuzz::damaged_image;

fuzz_target!(|data: &[u8]| {
    let Some(image) = damaged_image(data) else { return };
    let mut lines = 0u32;
    let file = MemoryFile::new(image);
    let found = at_once(check(&file, Fix::NONE, &mut |_| lines += 1));
    if let Ok(report) = &found
        && lines == 0
    {
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "something was found and not told of");
    }
    let Ok(fixed) = at_once(check(&file, Fix::ALL, &mut |_| ())) else { return };
    if fixed.corruptions == 0 && fixed.check_errors == 0 {
        let again = at_once(check(&file, Fix::NONE, &mut |_| ())).expect("what was repaired can be checked");
        assert_eq!((again.corruptions, again.leaks, again.check_errors), (0, 0, 0), "a repair left something");
    }
});
