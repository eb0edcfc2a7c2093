//! Multiboot 1 (the Multiboot Specification, version 0.6.96).

use crate::elf::{ElfFile, load_part};
use crate::entry::EntryState;
use crate::fields::Fields;
use crate::layout::{COMMAND_LINE, MULTIBOOT_INFO};
use crate::{BootError, FileKind, Loader, RegionKind};

const HEADER_MAGIC: u32 = 0x1bad_b002;
const LOADER_MAGIC: u32 = 0x2bad_b002;
/// The header lies within this many bytes, on a multiple of four.
const SEARCH_LENGTH: usize = 8192;
/// Bits 0 to 15 of the flags are requirements; these are the ones that are met: modules on page
/// boundaries, memory information, and a video mode, which is a wish.
const KNOWN_REQUIREMENTS: u32 = 0b111;
const HAS_ADDRESSES: u32 = 1 << 16;
const INFO_MEMORY: u32 = 1;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MEMORY_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;
const INFO_SIZE: u64 = 120;
const MODULE_SIZE: u64 = 16;
const LOADER_NAME: &[u8] = b"Vireo\0";
const REGION_SIZE: u64 = 24;

/// The offset of the multiboot header in a file that begins with `head`, if there's one.
pub(crate) fn find_header(head: &[u8]) -> Option<u64> {
    let searched = &head[..head.len().min(SEARCH_LENGTH)];
    let word = |chunk: &[u8]| chunk.try_into().map(u32::from_le_bytes).unwrap_or(0);
    searched.chunks_exact(4).enumerate().find_map(|(index, chunk)| {
        let rest = head.get(index * 4..index * 4 + 12)?;
        let sum = word(chunk).wrapping_add(word(&rest[4..8])).wrapping_add(word(&rest[8..12]));
        (word(chunk) == HEADER_MAGIC && sum == 0).then_some(index as u64 * 4)
    })
}

/// Loads a multiboot kernel.
pub(crate) fn load(loader: &mut Loader<'_>) -> Result<EntryState, BootError> {
    let kernel = &loader.spec.kernel;
    let file = Fields::new(FileKind::Multiboot, kernel);
    let header =
        find_header(kernel.head()).ok_or(BootError::NotAKernel { found: "without multiboot header" })?;
    let flags = file.u32("flags", header + 4)?;
    if flags & 0xffff & !KNOWN_REQUIREMENTS != 0 {
        return Err(file.bad(
            "flags",
            header + 4,
            flags.into(),
            "which has requirements that no one defines",
        ));
    }
    let eip = if flags & HAS_ADDRESSES != 0 {
        load_by_addresses(loader, &file, header)?
    } else if kernel.head().starts_with(b"\x7fELF") {
        let elf = ElfFile::parse(kernel)?;
        let eip = u32::try_from(elf.entry).map_err(|_| {
            file.bad("e_entry", 24, elf.entry, "but multiboot enters below 4 GiB, in protected mode")
        })?;
        elf.load(loader)?;
        eip
    } else {
        return Err(BootError::Unsupported {
            file: FileKind::Multiboot,
            what: "the file isn't ELF and its multiboot header has no load addresses (flag bit 16)",
        });
    };
    let info = write_info(loader)?;
    let mut state = EntryState::protected32(loader.memory, eip)?;
    state.rax = LOADER_MAGIC.into();
    state.rbx = info;
    Ok(state)
}

/// Loads by the header's address fields (3.1.3) and returns the entry address.
fn load_by_addresses(loader: &mut Loader<'_>, file: &Fields<'_>, header: u64) -> Result<u32, BootError> {
    let field = |name, at| file.u32(name, header + at).map(u64::from);
    let header_addr = field("header_addr", 12)?;
    let load_addr = field("load_addr", 16)?;
    let load_end = field("load_end_addr", 20)?;
    let bss_end = field("bss_end_addr", 24)?;
    let before = header_addr
        .checked_sub(load_addr)
        .filter(|before| *before <= header)
        .ok_or_else(|| file.bad("load_addr", header + 16, load_addr, "which would start before the file"))?;
    let offset = header - before;
    let length = match load_end {
        0 => file.kernel.len() - offset,
        end => end.checked_sub(load_addr).ok_or_else(|| {
            file.bad("load_end_addr", header + 20, load_end, "expected an address after load_addr")
        })?,
    };
    file.check("text and data", offset, length)?;
    // An absent end of bss means no bss; one inside the data is taken for the same.
    let end = bss_end.max(load_addr + length);
    load_part(loader, file, "text and data", offset..offset + length, load_addr..end)?;
    file.u32("entry_addr", header + 28)
}

/// Writes the information structure and all that it points to (3.3); returns its address.
fn write_info(loader: &mut Loader<'_>) -> Result<u64, BootError> {
    let area = loader.take_near("the multiboot information", MULTIBOOT_INFO)?;
    let line = loader.take_near("the command line", COMMAND_LINE)?;
    let cmdline = loader.write_cmdline_in(&line, u64::MAX)?;
    let initrd = loader.write_initrd(&[1 << 32])?;
    let regions = loader.spec.memory.regions();
    let start = area.start;
    let module = start + INFO_SIZE;
    let name = module + MODULE_SIZE;
    let map = name + 8;
    let max = ((area.end - map) / REGION_SIZE) as usize;
    if regions.len() > max {
        return Err(BootError::TooManyRegions { count: regions.len(), max });
    }
    let kib_from = |address: u64| {
        let found = loader.spec.memory.ram().find(|range| range.contains(&address));
        u32::try_from(found.map_or(0, |range| range.end - address) >> 10).unwrap_or(u32::MAX)
    };
    let mut info = vec![0u8; (map - start) as usize];
    let mut put = |at: u64, value: u64| {
        info[at as usize..at as usize + 4].copy_from_slice(&(value as u32).to_le_bytes());
    };
    let modules = if initrd.is_some() { INFO_MODULES } else { 0 };
    let flags = INFO_MEMORY | INFO_CMDLINE | INFO_MEMORY_MAP | INFO_LOADER_NAME | modules;
    put(0, flags.into());
    put(4, kib_from(0).min(640).into());
    put(8, kib_from(1 << 20).into());
    put(16, cmdline);
    if let Some(initrd) = initrd {
        put(20, 1);
        put(24, module);
        put(INFO_SIZE, initrd.start);
        put(INFO_SIZE + 4, initrd.end);
    }
    put(44, regions.len() as u64 * REGION_SIZE);
    put(48, map);
    put(64, name);
    let name_at = (name - start) as usize;
    info[name_at..name_at + LOADER_NAME.len()].copy_from_slice(LOADER_NAME);
    for region in regions {
        // The size field doesn't count itself. Multiboot knows RAM and ACPI's kinds by E820's numbers.
        let kind: RegionKind = region.kind;
        info.extend_from_slice(&(REGION_SIZE as u32 - 4).to_le_bytes());
        info.extend_from_slice(&region.range.start.to_le_bytes());
        info.extend_from_slice(&(region.range.end - region.range.start).to_le_bytes());
        info.extend_from_slice(&(kind as u32).to_le_bytes());
    }
    loader.write(start, &info)?;
    Ok(start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Part, Ram, elf32, spec};
    use crate::{BootSpec, CpuMode, MemoryMap, Protocol, load};
    use proptest::prelude::*;

    fn header(flags: u32, rest: &[u32]) -> Vec<u8> {
        let checksum = 0u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(flags);
        [&[HEADER_MAGIC, flags, checksum], rest].concat().iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn an_elf_kernel_gets_its_information() {
        let map = MemoryMap::pc(0x800_0000, 0, &[]).unwrap();
        let body = [header(3, &[]), b"code".to_vec()].concat();
        let kernel = elf32(0x10_000c, &[Part::load(0x10_0000, &body, 0x2000)]);
        let mut ram = Ram::new(&map);
        let loaded = load(&BootSpec { initrd: Some(b"module"), ..spec(&kernel, &map) }, &mut ram).unwrap();
        assert_eq!(loaded.protocol, Protocol::Multiboot);
        let entry = loaded.entry;
        assert_eq!((entry.mode, entry.rip, entry.rax), (CpuMode::Protected32, 0x10_000c, 0x2bad_b002));
        let info = entry.rbx;
        assert_eq!(ram.u32(info), 0x24d);
        assert_eq!((ram.u32(info + 4), ram.u32(info + 8)), (639, 127 << 10));
        assert_eq!(ram.read(ram.u32(info + 16).into(), 14), b"console=ttyS0\0");
        let module = u64::from(ram.u32(info + 24));
        assert_eq!(ram.read(ram.u32(module).into(), 6), b"module");
        assert_eq!(ram.u32(module + 4) - ram.u32(module), 6);
        let regions = u64::from(ram.u32(info + 48));
        assert_eq!((ram.u32(regions), ram.u64(regions + 12), ram.u32(regions + 20)), (20, 0x9_fc00, 1));
        assert_eq!(ram.read(ram.u32(info + 64).into(), 6), LOADER_NAME);
    }

    #[test]
    fn address_fields_place_a_flat_binary() {
        let map = MemoryMap::pc(0x800_0000, 0, &[]).unwrap();
        // Eight bytes before the header, loaded at 2 MiB; bss to 2 MiB + 0x100.
        let words = [0x20_0008, 0x20_0000, 0x20_0030, 0x20_0100, 0x20_0028];
        let kernel = [vec![9; 8], header(1 << 16, &words), b"12345678trailing".to_vec()].concat();
        let mut ram = Ram::new(&map);
        ram.fill(0x20_0000, 0x200, 0xaa);
        let loaded = load(&spec(&kernel, &map), &mut ram).unwrap();
        assert_eq!(loaded.entry.rip, 0x20_0028);
        assert_eq!(ram.read(0x20_0000, 8), [9; 8]);
        assert_eq!(ram.read(0x20_0028, 10), b"12345678\0\0");
        assert_eq!(ram.read(0x20_00ff, 2), [0, 0xaa]);
    }

    #[test]
    fn a_kernel_in_low_memory_has_its_information_elsewhere() {
        let map = MemoryMap::pc(0x800_0000, 0, &[]).unwrap();
        let body = [header(3, &[]), b"code".to_vec()].concat();
        let kernel = elf32(0x800c, &[Part::load(0x8000, &body, 0x2_0000)]);
        let mut ram = Ram::new(&map);
        let entry = load(&spec(&kernel, &map), &mut ram).unwrap().entry;
        let (info, cmdline) = (entry.rbx, u64::from(ram.u32(entry.rbx + 16)));
        assert_eq!((entry.rip, ram.u32(0x800c)), (0x800c, u32::from_le_bytes(*b"code")));
        for at in [info, cmdline] {
            assert!(!(0x8000..0x2_8000).contains(&at), "{at:#x}");
        }
        assert_eq!(ram.read(cmdline, 14), b"console=ttyS0\0");
        let kernel = elf32(0x80c, &[Part::load(0x800, &body, 0x1000)]);
        assert!(load(&spec(&kernel, &map), &mut ram).is_err(), "over the descriptor table");
    }

    #[test]
    fn bad_headers_are_named() {
        let map = MemoryMap::pc(0x800_0000, 0, &[]).unwrap();
        let error = |flags, words: &[u32]| {
            let kernel = [header(flags, words), vec![0; 1024]].concat();
            load(&spec(&kernel, &map), &mut Ram::new(&map)).unwrap_err().to_string()
        };
        assert!(error(8, &[]).contains("flags at offset 0x4"));
        assert!(error(0, &[]).contains("no load addresses"));
        assert!(error(1 << 16, &[0x10_0100, 0x10_0000, 0, 0, 0]).contains("load_addr"));
        assert!(error(1 << 16, &[0x10_0000, 0x10_0000, 0x9_0000, 0, 0]).contains("load_end_addr"));
        assert!(
            error(1 << 16, &[0x10_0000, 0x10_0000, 0x90_0000, 0, 0]).contains("truncated: text and data")
        );
        assert!(error(1 << 16, &[0, 0, 0, 0, 0]).contains("aren't free RAM"));
        assert!(error(1 << 16, &[0x10_0000, 0x10_0000, 0, u32::MAX, 0]).contains("aren't free RAM"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn any_address_fields_are_survived(
            flags in prop_oneof![Just(1u32 << 16), any::<u32>()],
            words in proptest::collection::vec(any::<u32>(), 0..6),
        ) {
            let map = MemoryMap::pc(0x200_0000, 0, &[]).unwrap();
            let kernel = header(flags, &words);
            if let Ok(loaded) = load(&spec(&kernel, &map), &mut Ram::new(&map)) {
                prop_assert!(flags & HAS_ADDRESSES != 0 && loaded.entry.rbx != 0);
            }
        }
    }
}
