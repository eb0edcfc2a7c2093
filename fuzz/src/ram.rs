//! Guest memory for boot loaders: only where it is counts.

use ::boot::{BootSpec, DirectEntry, LoadMemory, MemoryMap, OutOfMemoryRange};

/// Memory that forgets, but knows where it is.
struct Ram<'a>(&'a MemoryMap);

impl LoadMemory for Ram<'_> {
    fn write(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), OutOfMemoryRange> {
        let error = OutOfMemoryRange { gpa, len: bytes.len() as u64 };
        let end = gpa.checked_add(bytes.len() as u64).ok_or(error)?;
        let inside = self.0.ram().any(|range| range.start <= gpa && end <= range.end);
        if inside { Ok(()) } else { Err(error) }
    }
}

/// Boots `kernel`, or finds out why not.
///
/// # Panics
/// If parts of the kernel and what it is given lie over one another or outside memory.
pub fn boot(kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str, high: bool) {
    let map = MemoryMap::pc(64 << 20, if high { 1 << 30 } else { 0 }, &[]).expect("a memory map");
    let rsdp = high.then_some(0xf_5000);
    check(&BootSpec {
        kernel: kernel.into(),
        initrd,
        cmdline,
        memory: &map,
        rsdp,
        direct: None,
        rng_seed: &[],
    });
}

/// Enters what `kernel`, a bzImage, was unpacked to, or finds out why not.
///
/// # Panics
/// As [`boot`].
pub fn boot_directly(kernel: &[u8], direct: DirectEntry<'_>) {
    let map = MemoryMap::pc(64 << 20, 0, &[]).expect("a memory map");
    let (cmdline, direct) = ("quiet", Some(direct));
    check(&BootSpec {
        kernel: kernel.into(),
        initrd: None,
        cmdline,
        memory: &map,
        rsdp: None,
        direct,
        rng_seed: &[7; 32],
    });
}

fn check(spec: &BootSpec<'_>) {
    let map = spec.memory;
    match ::boot::load(spec, &mut Ram(map)) {
        Ok(loaded) => {
            for (index, placed) in loaded.placed.iter().enumerate() {
                let range = &placed.range;
                let inside = |ram: &std::ops::Range<u64>| ram.start <= range.start && range.end <= ram.end;
                assert!(map.ram().any(inside), "{placed:?} is not in memory");
                for other in &loaded.placed[..index] {
                    let apart = other.range.end <= range.start || range.end <= other.range.start;
                    assert!(apart || range.is_empty(), "{placed:?} lies over {other:?}");
                }
            }
            assert!(!loaded.placed.is_empty());
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
