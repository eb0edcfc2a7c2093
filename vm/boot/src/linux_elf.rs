//! An ELF `vmlinux` entered as the decompressor of a bzImage would enter it: Linux's 64-bit boot protocol
//! at `e_entry`.

use crate::boot_params::BootParams;
use crate::elf::ElfFile;
use crate::entry::EntryState;
use crate::layout::BOOT_PARAMS_START;
use crate::{BootError, Loader};

/// Linux's COMMAND_LINE_SIZE less the zero; the ELF file doesn't state its own limit.
const CMDLINE_MAX: u64 = 2047;

/// Loads the file.
pub(crate) fn load(loader: &mut Loader<'_>) -> Result<EntryState, BootError> {
    let elf = ElfFile::parse(&loader.spec.kernel)?;
    let rip = elf.physical_entry()?;
    elf.load(loader)?;
    let cmdline = loader.write_cmdline(CMDLINE_MAX)?;
    let initrd = loader.write_initrd(&[1 << 32, u64::MAX])?;
    let mut params = BootParams::new();
    params.set_made_up_header();
    loader.write_boot_params(params, cmdline, initrd)?;
    let mut state = EntryState::long64(loader.memory, rip)?;
    state.rsi = BOOT_PARAMS_START;
    Ok(state)
}

#[cfg(test)]
mod tests {
    use crate::testing::{Part, Ram, elf32, elf64, spec};
    use crate::{CpuMode, MemoryMap, Protocol, load};

    #[test]
    fn a_plain_vmlinux_gets_boot_params() {
        let map = MemoryMap::pc(0x800_0000, 0, &[]).unwrap();
        let part = Part { virtual_address: 0xffff_ffff_8100_0000, ..Part::load(0x100_0000, b"code", 0x1000) };
        for entry in [0x100_0002, 0xffff_ffff_8100_0002] {
            let kernel = elf64(entry, std::slice::from_ref(&part));
            let mut ram = Ram::new(&map);
            let loaded = load(&spec(&kernel, &map), &mut ram).unwrap();
            assert_eq!(loaded.protocol, Protocol::LinuxElf64);
            assert_eq!((loaded.entry.mode, loaded.entry.rip), (CpuMode::Long64, 0x100_0002));
            assert_eq!(ram.read(loaded.entry.rsi + 0x202, 4), b"HdrS");
            assert_eq!(ram.u32(loaded.entry.rsi + 0x218), 0);
        }
    }

    #[test]
    fn an_entry_elsewhere_and_a_plain_32_bit_file_are_refused() {
        let map = MemoryMap::pc(0x800_0000, 0, &[]).unwrap();
        let kernel = elf64(0x5000, &[Part::load(0x100_0000, b"code", 0x1000)]);
        assert!(load(&spec(&kernel, &map), &mut Ram::new(&map)).is_err());
        let kernel = elf32(0x10_0000, &[Part::load(0x10_0000, b"code", 0x1000)]);
        let error = load(&spec(&kernel, &map), &mut Ram::new(&map)).unwrap_err();
        assert!(error.to_string().contains("PVH note or a multiboot header"), "{error}");
    }
}
