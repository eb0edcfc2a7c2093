//! PVH: Xen's "HVM direct boot" of an ELF file (Xen's docs/misc/pvh.pandoc and
//! public/arch-x86/hvm/start_info.h).

use crate::elf::ElfFile;
use crate::entry::EntryState;
use crate::layout::START_INFO;
use crate::{BootError, FileKind, Loader};

const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
const START_MAGIC: u32 = 0x336e_c578;
const START_VERSION: u32 = 1;
const HEADER_SIZE: u64 = 56;
const MODULE_SIZE: u64 = 32;
const REGION_SIZE: u64 = 24;

/// The 32-bit physical entry point that the note names, if it's there.
pub(crate) fn entry_point(elf: &ElfFile<'_>) -> Result<Option<u64>, BootError> {
    let Some(desc) = elf.note(b"Xen", XEN_ELFNOTE_PHYS32_ENTRY)? else { return Ok(None) };
    let mut value = [0; 8];
    match desc.len() {
        4 | 8 => value[..desc.len()].copy_from_slice(&desc),
        _ => {
            return Err(BootError::Unsupported {
                file: FileKind::Elf,
                what: "the note XEN_ELFNOTE_PHYS32_ENTRY has neither 4 nor 8 bytes",
            });
        }
    }
    Ok(Some(u64::from_le_bytes(value)))
}

/// Loads an ELF file with the note.
pub(crate) fn load(loader: &mut Loader<'_>) -> Result<EntryState, BootError> {
    let elf = ElfFile::parse(&loader.spec.kernel)?;
    let unusable =
        BootError::Unsupported { file: FileKind::Elf, what: "the PVH entry point isn't in a loaded segment" };
    let entry = entry_point(&elf)?.ok_or(unusable.clone())?;
    let inside = |start: u64, size: u64| entry.checked_sub(start).is_some_and(|offset| offset < size);
    let eip = u32::try_from(entry).map_err(|_| unusable.clone())?;
    if !elf.loadable().any(|segment| inside(segment.physical_address, segment.memory_size)) {
        return Err(unusable);
    }
    elf.load(loader)?;
    let cmdline = loader.write_cmdline(u64::MAX)?;
    let initrd = loader.write_initrd(&[1 << 32, u64::MAX])?;

    let module_list = START_INFO.start + HEADER_SIZE;
    let map_start = module_list + MODULE_SIZE;
    let regions = loader.spec.memory.regions();
    let max = ((START_INFO.end - map_start) / REGION_SIZE) as usize;
    if regions.len() > max {
        return Err(BootError::TooManyRegions { count: regions.len(), max });
    }
    let mut info = Vec::new();
    let put32 = |info: &mut Vec<u8>, value: u32| info.extend_from_slice(&value.to_le_bytes());
    let put64 = |info: &mut Vec<u8>, value: u64| info.extend_from_slice(&value.to_le_bytes());
    put32(&mut info, START_MAGIC);
    put32(&mut info, START_VERSION);
    put32(&mut info, 0); // flags
    put32(&mut info, initrd.is_some().into());
    put64(&mut info, if initrd.is_some() { module_list } else { 0 });
    put64(&mut info, cmdline);
    put64(&mut info, loader.spec.rsdp.unwrap_or(0));
    put64(&mut info, map_start);
    put32(&mut info, regions.len() as u32);
    put32(&mut info, 0);
    // The module: address, size, command line, reserved.
    let module = initrd.unwrap_or(0..0);
    for value in [module.start, module.end - module.start, 0, 0] {
        put64(&mut info, value);
    }
    for region in regions {
        put64(&mut info, region.range.start);
        put64(&mut info, region.range.end - region.range.start);
        put32(&mut info, region.kind as u32);
        put32(&mut info, 0);
    }
    loader.write(START_INFO.start, &info)?;
    let mut state = EntryState::protected32(loader.memory, eip)?;
    state.rbx = START_INFO.start;
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Part, Ram, elf32, elf64, note, spec};
    use crate::{BootSpec, CpuMode, MemoryMap, Protocol, load};
    use proptest::prelude::*;

    fn kernel() -> Vec<u8> {
        let note = note(b"Xen\0", 18, &0x10_0010u64.to_le_bytes());
        elf64(
            0x10_0000,
            &[Part::load(0x10_0000, b"\xf4kernel bytes of some length", 0x3000), Part::note(&note)],
        )
    }

    #[test]
    fn the_note_gives_the_entry() {
        let map = MemoryMap::pc(0x800_0000, 0, &[]).unwrap();
        let mut ram = Ram::new(&map);
        ram.fill(0x10_0000, 0x3000, 0xaa);
        let kernel = kernel();
        let loaded =
            load(&BootSpec { initrd: Some(b"disk"), rsdp: Some(0xf_5000), ..spec(&kernel, &map) }, &mut ram)
                .unwrap();
        assert_eq!(loaded.protocol, Protocol::Pvh);
        assert_eq!((loaded.entry.mode, loaded.entry.rip), (CpuMode::Protected32, 0x10_0010));
        assert_eq!(ram.read(0x10_0000, 7), b"\xf4kernel"[..7]);
        assert!(ram.read(0x10_0000 + 28, 0x3000 - 28).iter().all(|byte| *byte == 0));
        let info = loaded.entry.rbx;
        assert_eq!(ram.u32(info), START_MAGIC);
        assert_eq!(ram.u32(info + 12), 1);
        let module = ram.u64(info + 16);
        assert_eq!(ram.read(ram.u64(module), 4), b"disk");
        assert_eq!(ram.u64(module + 8), 4);
        assert_eq!(ram.read(ram.u64(info + 24), 13), b"console=ttyS0");
        assert_eq!(ram.u64(info + 32), 0xf_5000);
        let regions = ram.u64(info + 40);
        assert_eq!(ram.u32(info + 48), 4);
        assert_eq!((ram.u64(regions + 8), ram.u32(regions + 16)), (0x9_fc00, 1));
    }

    #[test]
    fn a_four_byte_note_in_a_32_bit_file_works_too() {
        let map = MemoryMap::pc(0x800_0000, 0, &[]).unwrap();
        let other = note(b"GNU\0", 18, b"12345");
        let note = [other, note(b"Xen\0", 18, &0x20_0000u32.to_le_bytes())].concat();
        let kernel = elf32(0, &[Part::note(&note), Part::load(0x20_0000, b"x", 1)]);
        let loaded = load(&spec(&kernel, &map), &mut Ram::new(&map)).unwrap();
        assert_eq!((loaded.protocol, loaded.entry.rip), (Protocol::Pvh, 0x20_0000));
    }

    #[test]
    fn an_entry_outside_the_kernel_or_a_kernel_outside_ram_is_refused() {
        let map = MemoryMap::pc(0x800_0000, 0, &[]).unwrap();
        let entry = note(b"Xen\0", 18, &0x30_0000u64.to_le_bytes());
        let away = elf64(0, &[Part::load(0x10_0000, b"x", 1), Part::note(&entry)]);
        let error = load(&spec(&away, &map), &mut Ram::new(&map)).unwrap_err();
        assert!(error.to_string().contains("entry point"), "{error}");
        let huge = elf64(0, &[Part::load(0x30_0000, b"x", u64::MAX), Part::note(&entry)]);
        let error = load(&spec(&huge, &map), &mut Ram::new(&map)).unwrap_err();
        assert!(matches!(error, BootError::OutsideRam { start: 0x30_0000, .. }), "{error}");
        let low = elf64(0, &[Part::load(0x8000, b"x", 0x30_0000), Part::note(&entry)]);
        let error = load(&spec(&low, &map), &mut Ram::new(&map)).unwrap_err();
        assert!(matches!(error, BootError::OutsideRam { start: 0x8000, .. }), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        #[test]
        fn damaged_files_never_panic(
            changes in proptest::collection::vec((4usize..0xd0, any::<u8>()), 0..12),
            length in proptest::option::of(0usize..0x200),
        ) {
            let map = MemoryMap::pc(0x200_0000, 0, &[]).unwrap();
            let mut file = kernel();
            for (at, byte) in changes {
                file[at] = byte;
            }
            file.truncate(length.unwrap_or(usize::MAX));
            if let Ok(loaded) = load(&spec(&file, &map), &mut Ram::new(&map)) {
                prop_assert!(!loaded.placed.is_empty());
            }
        }
    }
}
