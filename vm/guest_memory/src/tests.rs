#![allow(clippy::single_range_in_vec_init)] // regions are ranges, and there may be one of them

use super::*;
use parking_lot::Mutex;

#[derive(Default)]
struct Recorder(Mutex<Vec<(u64, u64)>>);

impl CodeWriteHook for Recorder {
    fn code_written(&self, gpa: u64, len: u64) {
        self.0.lock().push((gpa, len));
    }
}

impl DeviceWriteHook for Recorder {
    fn device_wrote(&self, gpa: u64, len: u64) {
        self.0.lock().push((gpa, len));
    }
}

fn two_regions() -> GuestMemory {
    GuestMemory::new(&[0x10_0000..0x10_4000, 0..0x2000]).unwrap()
}

#[test]
fn bytes_stay_where_they_were_written() {
    let memory = two_regions();
    memory.write(0x1ffc, &[1, 2, 3, 4]).unwrap();
    let mut data = [0; 4];
    memory.read(0x1ffc, &mut data).unwrap();
    assert_eq!(data, [1, 2, 3, 4]);
    assert!(memory.write(0x1ffd, &data).is_err());
    assert!(memory.read(0x5000, &mut data).is_err());
    assert!(memory.contains(0x10_0000, 0x4000) && !memory.contains(0x10_0000, 0x4001));
    assert_eq!(memory.len(), 0x6000);
    let page = memory.host_page(0x10_1234).unwrap();
    assert_eq!(memory.gpa_of(page.ptr), Some(0x10_1000));
    assert!(memory.host_page(0x2000).is_none());
}

#[test]
fn bad_regions_are_refused() {
    for regions in [&[0..0][..], &[0..0x1001], &[0..0x2000, 0x1000..0x3000]] {
        assert!(matches!(GuestMemory::new(regions), Err(MemoryError::BadRegion(_))));
    }
}

#[test]
fn the_dirty_log_names_the_pages_written() {
    let memory = two_regions();
    memory.write(0, &[1]).unwrap();
    memory.set_dirty_log(true);
    assert!(!memory.may_write_directly(0));
    memory.write(0x10_0fff, &[1, 2]).unwrap();
    memory.written(0x1000, 8);
    assert!(memory.may_write_directly(0x1000) && memory.is_dirty(0x10_1000));
    let mut pages = Vec::new();
    memory.take_dirty(|page| pages.push(page));
    assert_eq!(pages, [0x1000, 0x10_0000, 0x10_1000]);
    memory.take_dirty(|page| panic!("{page:#x} is still dirty"));
}

#[test]
fn writes_to_code_reach_the_hook() {
    let memory = two_regions();
    let recorder = Arc::new(Recorder::default());
    memory.set_code_hook(recorder.clone());
    memory.write(0x1000, &[1]).unwrap();
    memory.mark_code(0x1000);
    assert!(!memory.may_write_directly(0x1008));
    memory.write(0xffe, &[1, 2, 3, 4]).unwrap();
    memory.unmark_code(0x1000);
    memory.write(0x1000, &[1]).unwrap();
    assert_eq!(*recorder.0.lock(), [(0x1000, 2)]);
}

#[test]
fn the_device_hook_is_told_of_writes_through_the_backend_only() {
    let memory = two_regions();
    let recorder = Arc::new(Recorder::default());
    memory.set_device_write_hook(recorder.clone());
    memory.backend().write_obj(7u32, GuestAddress(0x10_0ffe)).unwrap();
    memory.write(0x1ff0, &[1; 16]).unwrap();
    memory.written(0x1000, 8);
    memory.changed(0x1ff8, 0x10);
    assert_eq!(recorder.0.lock().pop(), Some((0x1ff8, 8)), "what is memory of it");
    let mut seen = [false; 0x20];
    for (gpa, len) in recorder.0.lock().drain(..) {
        assert!((0x10_0ffe..0x10_1002).contains(&gpa) || (0x1ff0..0x2000).contains(&gpa), "{gpa:#x}");
        for at in gpa..gpa + len {
            seen[at as usize & 0x1f] = true;
        }
    }
    assert!(seen[0x1e] && seen[0x1f] && seen[0] && seen[1] && seen[0x10..].iter().all(|seen| *seen));
}
