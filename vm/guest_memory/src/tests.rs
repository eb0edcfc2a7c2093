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
fn read_only_regions_are_for_processors_only() {
    let memory = two_regions();
    let [first, second] = [memory.regions()[0].gpa, memory.regions()[1].gpa];
    memory.set_read_only(second, true).unwrap();
    assert!(memory.is_read_only(second + PAGE_SIZE - 1) && !memory.is_read_only(first));
    assert!(memory.may_write_directly(first) && !memory.may_write_directly(second));
    // Who loads a ROM writes it.
    memory.write(second, &[7]).unwrap();
    let mut byte = [0];
    memory.read(second, &mut byte).unwrap();
    assert_eq!(byte, [7]);
    memory.set_read_only(second, false).unwrap();
    assert!(memory.may_write_directly(second));
    assert!(matches!(
        memory.set_read_only(second + PAGE_SIZE, true),
        Err(MemoryError::NoRegion { gpa }) if gpa == second + PAGE_SIZE
    ));
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

/// Fields of this process's mapping that holds the first byte of `memory`, as `/proc/self/smaps` has them.
fn smaps(memory: &GuestMemory) -> String {
    let start = memory.host_page(memory.regions()[0].gpa).unwrap().ptr as u64;
    let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let head = |line: &str| {
        let (first, rest) = line.split_once('-')?;
        let first = u64::from_str_radix(first, 16).ok()?;
        let last = u64::from_str_radix(rest.split(' ').next()?, 16).ok()?;
        Some(first..last)
    };
    let mut found = String::new();
    let mut inside = false;
    for line in text.lines() {
        if let Some(range) = head(line) {
            inside = range.contains(&start);
        }
        if inside {
            found.push_str(line);
            found.push('\n');
        }
    }
    assert!(!found.is_empty(), "no mapping at {start:#x}");
    found
}

/// The flags of the mapping, each between blanks.
fn flags(memory: &GuestMemory) -> String {
    let text = smaps(memory);
    let flags = text.lines().find_map(|line| line.strip_prefix("VmFlags:")).unwrap();
    format!(" {} ", flags.trim())
}

/// The value of a field in KiB.
fn kib(memory: &GuestMemory, field: &str) -> u64 {
    let text = smaps(memory);
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
    line.trim().strip_suffix("kB").unwrap().trim().parse().unwrap()
}

const MIB: u64 = 1 << 20;

fn make(bytes: u64, options: &MemoryOptions) -> Result<GuestMemory, MemoryError> {
    GuestMemory::with_options(&[0..bytes], options, &|_, _| {})
}

#[test]
fn advice_reaches_the_mapping() {
    let advised =
        MemoryOptions { transparent_huge: Some(true), merge: true, dump: false, ..Default::default() };
    let memory = make(4 * MIB, &advised).unwrap();
    let found = flags(&memory);
    for flag in [" hg ", " mg ", " dd "] {
        assert!(found.contains(flag), "{flag} in {found}");
    }
    let against = MemoryOptions { transparent_huge: Some(false), ..Default::default() };
    let memory = make(4 * MIB, &against).unwrap();
    let found = flags(&memory);
    assert!(found.contains(" nh ") && !found.contains(" mg ") && !found.contains(" dd "), "{found}");
    assert!(memory.host_page(0).unwrap().ptr.addr().is_multiple_of(2 << 20));
    assert!(memory.file().is_none());
    let shared = MemoryOptions { merge: true, shared: true, ..Default::default() };
    assert!(matches!(make(MIB, &shared), Err(MemoryError::NotMergeable("shared memory"))));
}

#[test]
fn allocation_in_advance_is_complete_and_told() {
    let options =
        MemoryOptions { prealloc: true, prealloc_threads: Some(3), shared: true, ..Default::default() };
    let told = Mutex::new(Vec::new());
    let regions = [0..100 * MIB, 1 << 32..(1 << 32) + 4 * MIB];
    let memory =
        GuestMemory::with_options(&regions, &options, &|done, all| told.lock().push((done, all))).unwrap();
    assert_eq!(kib(&memory, "Rss"), 100 << 10);
    let mut told = told.into_inner();
    told.sort_unstable();
    assert_eq!(told.len(), 5, "chunks of 32 MiB, and the rest of each region");
    assert_eq!(told.last(), Some(&(104 * MIB, 104 * MIB)));
    assert_eq!(memory.pages_in_use().unwrap().len() as u64, 104 * MIB / PAGE_SIZE);
}

#[test]
fn locked_memory_is_locked_and_kept() {
    for (lock, resident) in [(Lock::On, 1 << 10), (Lock::OnFault, 4)] {
        let memory = make(MIB, &MemoryOptions { lock, ..Default::default() }).unwrap();
        memory.write(0, &[7]).unwrap();
        assert!(flags(&memory).contains(" lo "));
        assert_eq!(kib(&memory, "Locked"), resident, "{lock:?}");
        memory.discard(0..MIB).unwrap();
        let mut data = [0];
        memory.read(0, &mut data).unwrap();
        assert_eq!(data, [7]);
    }
}

#[test]
fn what_is_given_back_reads_as_zeros() {
    for shared in [false, true] {
        let options = MemoryOptions { shared, transparent_huge: Some(false), ..Default::default() };
        let memory = GuestMemory::with_options(&[0..MIB, 2 * MIB..3 * MIB], &options, &|_, _| {}).unwrap();
        for gpa in [0x1000, 0x5000, 2 * MIB + 0x3000] {
            memory.write(gpa, &[1]).unwrap();
        }
        assert_eq!(memory.pages_in_use().unwrap(), [0x1000, 0x5000, 2 * MIB + 0x3000], "shared: {shared}");
        let recorder = Arc::new(Recorder::default());
        memory.set_device_write_hook(recorder.clone());
        // Parts of pages stay.
        memory.discard(0x4800..2 * MIB + 0x3fff).unwrap();
        assert_eq!(memory.pages_in_use().unwrap(), [0x1000, 2 * MIB + 0x3000]);
        assert_eq!(*recorder.0.lock(), [(0x5000, MIB - 0x5000), (2 * MIB, 0x3000)]);
        let mut data = [9];
        memory.read(0x5000, &mut data).unwrap();
        assert_eq!(data, [0]);
    }
}

#[test]
fn files_hold_shared_memory_and_start_private_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("memory");
    let file = |shared, path: &std::path::Path| MemoryOptions {
        source: MemorySource::File(path.to_owned()),
        shared,
        ..Default::default()
    };
    assert!(matches!(make(MIB, &file(false, &path)), Err(MemoryError::File { .. })), "it is missing");
    let memory = make(MIB, &file(true, &path)).unwrap();
    memory.write(0x2345, b"kept").unwrap();
    drop(memory);
    assert_eq!(&std::fs::read(&path).unwrap()[0x2345..0x2349], b"kept");

    let memory = make(MIB, &file(false, &path)).unwrap();
    let mut data = [0; 4];
    memory.read(0x2345, &mut data).unwrap();
    assert_eq!(&data, b"kept");
    memory.write(0x2345, b"lost").unwrap();
    assert!(memory.file().is_none() && memory.pages_in_use().unwrap().len() == 256);
    drop(memory);
    assert_eq!(&std::fs::read(&path).unwrap()[0x2345..0x2349], b"kept");

    for shared in [true, false] {
        let error = make(2 * MIB, &file(shared, &path)).unwrap_err();
        assert!(matches!(error, MemoryError::FileTooSmall { len: MIB, .. }), "{error}");
    }
    let in_folder = make(MIB, &file(true, folder.path())).unwrap();
    in_folder.write(0, b"x").unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "it has no name");
    assert!(make(MIB, &file(false, folder.path())).is_err());
    assert!(make(MIB, &file(true, std::path::Path::new("/dev/null"))).is_err());
    assert!(make(MIB, &file(true, std::path::Path::new("/nonexistent/x"))).is_err());
}

#[test]
fn more_than_a_file_system_has_is_refused() {
    let shm = std::path::Path::new("/dev/shm");
    if !shm.is_dir() {
        eprintln!("LEFT OUT: /dev/shm is missing");
        return;
    }
    let options =
        MemoryOptions { source: MemorySource::File(shm.to_owned()), shared: true, ..Default::default() };
    let error = make(1 << 50, &options).unwrap_err();
    let refused = matches!(error, MemoryError::NoSpace { .. } | MemoryError::HostTooSmall { .. });
    assert!(refused, "{error}");
}

#[test]
fn memory_is_bound_to_nodes() {
    let policies = [NodePolicy::Bind, NodePolicy::Preferred, NodePolicy::Interleave];
    for (policy, word) in policies.into_iter().zip(["bind:0", "prefer:0", "interleave:0"]) {
        let bindings = vec![NodeBinding { range: MIB..3 * MIB, nodes: vec![0], policy }];
        let memory = make(4 * MIB, &MemoryOptions { bindings, ..Default::default() }).unwrap();
        memory.write(MIB, &[1]).unwrap();
        let address = format!("{:x} ", memory.host_page(MIB).unwrap().ptr as u64);
        let Ok(maps) = std::fs::read_to_string("/proc/self/numa_maps") else {
            eprintln!("LEFT OUT: this kernel has no /proc/self/numa_maps");
            return;
        };
        let line = maps.lines().find(|line| line.starts_with(&address)).expect("a mapping of its own");
        assert!(line.contains(word), "{line}");
    }
    let missing = NodeBinding { range: 0..MIB, nodes: vec![4711], policy: NodePolicy::Bind };
    let options = MemoryOptions { bindings: vec![missing], ..Default::default() };
    assert!(matches!(make(MIB, &options), Err(MemoryError::NoHostNode { node: 4711, .. })));
}

#[test]
fn huge_pages_are_used_or_the_cure_is_named() {
    const HUGE: u64 = 2 << 20;
    if !huge_page_sizes().contains(&HUGE) {
        eprintln!("LEFT OUT: this host has no huge pages of 2 MiB");
        return;
    }
    for shared in [false, true] {
        let source = MemorySource::HugePages(HUGE);
        let options = MemoryOptions { source, shared, ..Default::default() };
        let error = make(HUGE + PAGE_SIZE, &options).unwrap_err();
        assert!(matches!(error, MemoryError::Unaligned { .. }), "{error}");
        // No host has that many.
        let error = make(1 << 46, &options).unwrap_err();
        assert!(matches!(error, MemoryError::TooFewHugePages { needed, .. } if needed == 1 << 25), "{error}");
        match make(HUGE, &options) {
            Ok(memory) => {
                memory.write(0, &[1]).unwrap();
                assert!(flags(&memory).contains(" ht "));
                assert_eq!(kib(&memory, "KernelPageSize"), 2048);
            }
            Err(error) => {
                assert!(matches!(error, MemoryError::TooFewHugePages { .. }), "{error}");
                eprintln!("LEFT OUT: use of huge pages: {error}");
            }
        }
    }
}
