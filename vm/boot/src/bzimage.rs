//! Linux's bzImage (Linux's Documentation/arch/x86/boot.rst, boot protocols 2.06 to 2.15).

use crate::boot_params::BootParams;
use crate::entry::EntryState;
use crate::fields::Fields;
use crate::layout::BOOT_PARAMS_START;
use crate::setup_header::{HIGH_LOAD_ADDRESS, SetupHeader, place_relocatable};
use crate::{BootError, FileKind, Loader, vmlinux};

const ENTRY_64_OFFSET: u64 = 0x200;

/// Whether a file that begins with `head` has the signature of a bzImage's setup header.
pub(crate) fn is_bzimage(head: &[u8]) -> bool {
    head.get(0x202..0x206) == Some(b"HdrS".as_slice())
}

/// Finds the load address and takes its memory.
fn place_kernel(loader: &mut Loader<'_>, header: &SetupHeader) -> Result<u64, BootError> {
    let size = header.run_size();
    if header.relocatable_kernel {
        return place_relocatable(loader, header);
    }
    // It moves itself to `pref_address` and unpacks there: both places must be free. They may overlap.
    let load = HIGH_LOAD_ADDRESS..HIGH_LOAD_ADDRESS + header.kernel_size;
    let run = header.pref_address..header.pref_address.saturating_add(size);
    let both = load.start.min(run.start)..load.end.max(run.end);
    if loader.free.take(&both) {
        Ok(load.start)
    } else {
        Err(BootError::OutsideRam {
            file: FileKind::BzImage,
            what: "a kernel that can't be relocated",
            start: both.start,
            end: both.end,
        })
    }
}

/// Loads a bzImage.
pub(crate) fn load(loader: &mut Loader<'_>) -> Result<EntryState, BootError> {
    let kernel = &loader.spec.kernel;
    let header = SetupHeader::parse(kernel)?;
    let file = Fields::new(FileKind::BzImage, kernel);
    let mut params = BootParams::new();
    let header_bytes =
        file.bytes("setup header", header.header.start, header.header.end - header.header.start)?;
    params.set_header(&header_bytes);
    let mut entry = match loader.spec.direct {
        Some(direct) => {
            params.set_randomized(direct.vmlinux.slide_distance() != 0);
            vmlinux::load(loader, direct, &header)?
        }
        None => load_packed(loader, &file, &header, &mut params)?,
    };

    let cmdline = loader.write_cmdline(header.cmdline_size.into())?;
    let initrd = loader.write_initrd(&header.initrd_limits())?;
    loader.write_boot_params(params, cmdline, initrd)?;
    entry.rsi = BOOT_PARAMS_START;
    Ok(entry)
}

/// Loads the protected-mode kernel as it is in the file; it unpacks itself.
fn load_packed(
    loader: &mut Loader<'_>,
    file: &Fields<'_>,
    header: &SetupHeader,
    params: &mut BootParams,
) -> Result<EntryState, BootError> {
    let start = place_kernel(loader, header)?;
    loader.copy(file, "protected-mode kernel", header.kernel_offset, header.kernel_size, start)?;
    loader.note("kernel", start..start + header.run_size());
    params.set_code32_start(start as u32);
    if header.has_64_bit_entry() {
        EntryState::long64(loader.memory, start + ENTRY_64_OFFSET)
    } else {
        EntryState::protected32(loader.memory, start as u32)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::testing::{Ram, spec};
    use crate::{CpuMode, KernelFile, MemoryMap, Protocol, load};
    use proptest::prelude::*;

    pub(crate) const CODE: &[u8] = &[0x90; 0x1230];

    /// A bzImage of protocol 2.15 with two setup sectors.
    pub(crate) fn image() -> Vec<u8> {
        let mut file = vec![0u8; 3 * 512];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x1f1, &[2]);
        put(0x1f4, &(CODE.len() as u32 / 16).to_le_bytes());
        put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
        put(0x202, b"HdrS");
        put(0x206, &0x020fu16.to_le_bytes());
        put(0x20e, &0x0100u16.to_le_bytes());
        put(0x300, b"6.1.0-test (someone)\0");
        put(0x211, &[1]);
        put(0x22c, &0x7fff_ffffu32.to_le_bytes());
        put(0x230, &0x20_0000u32.to_le_bytes());
        put(0x234, &[1, 21]);
        put(0x236, &0x7fu16.to_le_bytes());
        put(0x238, &2047u32.to_le_bytes());
        put(0x258, &0x100_0000u64.to_le_bytes());
        put(0x260, &0x300_0000u32.to_le_bytes());
        file.extend_from_slice(CODE);
        file
    }

    /// The same with a payload.
    pub(crate) fn image_with(payload: &[u8]) -> Vec<u8> {
        let mut file = image();
        let at = file.len();
        file.extend_from_slice(payload);
        file.resize(file.len().next_multiple_of(16), 0);
        let size = (file.len() - 3 * 512) as u32 / 16;
        set(&mut file, 0x1f4, &size.to_le_bytes());
        set(&mut file, 0x248, &((at - 3 * 512) as u32).to_le_bytes());
        set(&mut file, 0x24c, &(payload.len() as u32).to_le_bytes());
        file
    }

    fn set(file: &mut [u8], at: usize, bytes: &[u8]) {
        file[at..at + bytes.len()].copy_from_slice(bytes);
    }

    #[test]
    fn a_64_bit_kernel_is_entered_in_long_mode() {
        let map = MemoryMap::pc(0x1000_0000, 0, &[]).unwrap();
        let mut ram = Ram::new(&map);
        let kernel = image();
        let loaded = load(
            &crate::BootSpec { initrd: Some(b"initrd"), rsdp: Some(0xf_5000), ..spec(&kernel, &map) },
            &mut ram,
        )
        .unwrap();
        assert_eq!(loaded.protocol, Protocol::BzImage);
        let entry = loaded.entry;
        assert_eq!((entry.mode, entry.rip, entry.rsi), (CpuMode::Long64, 0x100_0200, BOOT_PARAMS_START));
        assert_eq!(entry.cs.selector, 0x10);
        assert_eq!(entry.data.selector, 0x18);
        assert_eq!(ram.read(0x100_0000, CODE.len()), CODE);
        // Page tables: the last 2 MiB below 4 GiB map to themselves.
        let pml4 = ram.u64(entry.cr3) & !0xfff;
        let pdpt = ram.u64(pml4 + 3 * 8) & !0xfff;
        assert_eq!(ram.u64(pdpt + 511 * 8), 0xffe0_0083);
        // GDT.
        assert_eq!(ram.u64(entry.gdtr.base + 0x10), entry.cs.descriptor());
        // boot_params.
        let params = entry.rsi;
        assert_eq!(ram.u64(params + 0x70), 0xf_5000);
        assert_eq!(ram.u32(params + 0x202), u32::from_le_bytes(*b"HdrS"));
        assert_eq!(ram.read(params + 0x210, 1), [0xff]);
        assert_eq!(ram.u32(params + 0x214), 0x100_0000);
        assert_eq!(ram.u32(params + 0x218), 0x0fff_f000);
        assert_eq!(ram.u32(params + 0x21c), 6);
        assert_eq!(ram.read(0x0fff_f000, 6), b"initrd");
        assert_eq!(ram.read(params + 0x1e8, 1), [4]);
        assert_eq!(ram.u64(params + 0x2d0 + 8), 0x9_fc00);
        let line = u64::from(ram.u32(params + 0x228));
        assert_eq!(ram.read(line, 14), b"console=ttyS0\0");
        assert_eq!(ram.read(params + 0x1ef, 1), [0]);
    }

    #[test]
    fn an_old_kernel_is_entered_in_protected_mode() {
        let map = MemoryMap::pc(0x800_0000, 0, &[]).unwrap();
        let mut kernel = image();
        set(&mut kernel, 0x206, &0x0206u16.to_le_bytes());
        set(&mut kernel, 0x234, &[0]);
        set(&mut kernel, 0x201, &[0x3a]);
        let loaded = load(&spec(&kernel, &map), &mut Ram::new(&map)).unwrap();
        assert_eq!(loaded.entry.mode, CpuMode::Protected32);
        assert_eq!((loaded.entry.rip, loaded.entry.rsi), (0x10_0000, BOOT_PARAMS_START));
        assert_eq!((loaded.entry.cr0, loaded.entry.cr4, loaded.entry.efer), (0x31, 0, 0));
    }

    #[test]
    fn a_small_guest_moves_the_kernel_down() {
        // 64 MiB: 16 MiB + 48 MiB fits exactly; 60 MiB doesn't, and the kernel goes to 2 MiB.
        for (end, rip) in [(64 << 20, 0x100_0200u64), (60 << 20, 0x20_0200)] {
            let map = MemoryMap::pc(end, 0, &[]).unwrap();
            let kernel = image();
            let loaded = load(&spec(&kernel, &map), &mut Ram::new(&map)).unwrap();
            assert_eq!(loaded.entry.rip, rip);
        }
        let map = MemoryMap::pc(40 << 20, 0, &[]).unwrap();
        let kernel = image();
        let error = load(&spec(&kernel, &map), &mut Ram::new(&map)).unwrap_err();
        assert!(matches!(error, BootError::KernelTooBig { size: 0x300_0000, .. }), "{error}");
    }

    #[test]
    fn a_big_initrd_goes_above_4_gib_or_fails() {
        let map = MemoryMap::pc(0x500_0000, 0x400_0000, &[]).unwrap();
        let mut kernel = image();
        let initrd = vec![7u8; 0x280_0000];
        let with = |kernel: &[u8], ram: &mut Ram| {
            load(&crate::BootSpec { initrd: Some(&initrd), ..spec(kernel, &map) }, ram)
        };
        let mut ram = Ram::new(&map);
        let loaded = with(&kernel, &mut ram).unwrap();
        assert_eq!(ram.u32(loaded.entry.rsi + 0xc0), 1);
        assert_eq!(ram.u32(loaded.entry.rsi + 0x218), 0x180_0000);
        set(&mut kernel, 0x236, &1u16.to_le_bytes());
        let error = with(&kernel, &mut Ram::new(&map)).unwrap_err();
        assert!(
            matches!(error, BootError::InitrdTooBig { size: 0x280_0000, limit: 0x8000_0000, .. }),
            "{error}"
        );
    }

    #[test]
    fn wrong_headers_are_named() {
        let map = MemoryMap::pc(0x1000_0000, 0, &[]).unwrap();
        let error = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut kernel = image();
            change(&mut kernel);
            load(&spec(&kernel, &map), &mut Ram::new(&map)).unwrap_err().to_string()
        };
        assert_eq!(
            error(&|kernel| kernel.truncate(0x700)),
            "bzImage is truncated: protected-mode kernel needs bytes 0x600..0x1830, the file has 0x700"
        );
        assert_eq!(
            error(&|kernel| kernel.truncate(0x220)),
            "bzImage is truncated: protected-mode kernel needs bytes 0x600..0x1830, the file has 0x220"
        );
        assert_eq!(
            error(&|kernel| kernel.truncate(0x208)),
            "bzImage is truncated: loadflags needs bytes 0x211..0x212, the file has 0x208"
        );
        assert!(error(&|kernel| set(kernel, 0x206, &[3, 2])).contains("version at offset 0x206 is 0x203"));
        assert!(error(&|kernel| set(kernel, 0x211, &[0])).contains("zImage"));
        assert!(error(&|kernel| set(kernel, 0x230, &[1])).contains("kernel_alignment"));
        assert!(error(&|kernel| set(kernel, 0x1fe, &[0])).contains("boot_flag"));
        assert!(error(&|kernel| set(kernel, 0x238, &5u32.to_le_bytes())).contains("at most 5"));
    }

    #[test]
    fn the_version_text_is_read() {
        assert_eq!(
            SetupHeader::parse(&KernelFile::from(&image())).unwrap().kernel_version.unwrap(),
            "6.1.0-test (someone)"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        #[test]
        fn damaged_headers_never_panic(
            changes in proptest::collection::vec((0x1f1usize..0x270, any::<u8>()), 0..12),
            length in proptest::option::of(0usize..0x1900),
            low_end in 2u64..512,
        ) {
            let map = MemoryMap::pc(low_end << 20, 1 << 20, &[]).unwrap();
            let mut kernel = image();
            for (at, byte) in changes {
                kernel[at] = byte;
            }
            kernel.truncate(length.unwrap_or(usize::MAX));
            let mut ram = Ram::new(&map);
            let initrd = [1u8; 5000];
            if let Ok(loaded) = load(&crate::BootSpec { initrd: Some(&initrd), ..spec(&kernel, &map) }, &mut ram) {
                prop_assert!(loaded.entry.rip >= 0x10_0000);
            }
        }
    }
}
