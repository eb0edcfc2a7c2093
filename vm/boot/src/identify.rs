//! Telling kernels from other files, and from each other, by content.

use crate::elf::ElfFile;
use crate::{BootError, FileKind, KernelFile, bzimage, multiboot, pvh};

/// The boot protocol that a file is loaded by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Linux's x86 boot protocol for a bzImage, 64-bit entry if the kernel has one.
    BzImage,
    /// An ELF file with Xen's PVH note, entered in protected mode.
    Pvh,
    /// Multiboot 1.
    Multiboot,
    /// An ELF `vmlinux` entered by Linux's 64-bit boot protocol.
    LinuxElf64,
}

/// Finds how to boot `kernel`.
///
/// # Errors
/// The file isn't a kernel for x86, or its headers are damaged; the error says what it is.
pub fn identify(kernel: &KernelFile<'_>) -> Result<Protocol, BootError> {
    let head = kernel.head();
    if bzimage::is_bzimage(head) {
        return Ok(Protocol::BzImage);
    }
    if head.starts_with(b"\x7fELF") {
        let elf = ElfFile::parse(kernel)?;
        if pvh::entry_point(&elf)?.is_some() {
            return Ok(Protocol::Pvh);
        }
        if multiboot::find_header(head).is_some() {
            return Ok(Protocol::Multiboot);
        }
        if elf.is_64 {
            return Ok(Protocol::LinuxElf64);
        }
        return Err(BootError::Unsupported {
            file: FileKind::Elf,
            what: "a 32-bit ELF file needs a PVH note or a multiboot header, this one has neither",
        });
    }
    if multiboot::find_header(head).is_some() {
        return Ok(Protocol::Multiboot);
    }
    Err(something_else(head))
}

/// The error for a file that can't be booted and begins with `head`.
fn something_else(head: &[u8]) -> BootError {
    let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(magic));
    if at(0x38, b"ARM\x64") {
        return BootError::WrongArchitecture { found: "arm64 (a Linux Image)".into() };
    }
    if at(0x38, b"RSC\x05") || at(0x30, b"RISCV\0") {
        return BootError::WrongArchitecture { found: "RISC-V (a Linux Image)".into() };
    }
    if at(0x24, &[0x18, 0x28, 0x6f, 0x01]) {
        return BootError::WrongArchitecture { found: "32-bit ARM (a zImage)".into() };
    }
    let magics: &[(usize, &[u8], &str)] = &[
        (4, b"zimg", "an EFI zboot image (decompress it first)"),
        (0, b"MZ", "an EFI or DOS program, not a bzImage"),
        (0, &[0x1f, 0x8b], "compressed with gzip (decompress it first)"),
        (0, &[0xfd, b'7', b'z', b'X', b'Z'], "compressed with xz (decompress it first)"),
        (0, &[0x28, 0xb5, 0x2f, 0xfd], "compressed with zstd (decompress it first)"),
        (0, b"BZh", "compressed with bzip2 (decompress it first)"),
        (0, b"070701", "a cpio archive, perhaps an initrd given as kernel"),
        (0, b"070702", "a cpio archive, perhaps an initrd given as kernel"),
        (0, b"QFI\xfb", "a qcow2 disk image"),
        (0x8001, b"CD001", "an ISO 9660 image"),
        (0, b"!<arch>\n", "an archive, such as a Debian package"),
        (0, &[0x27, 0x05, 0x19, 0x56], "a U-Boot image"),
        (0, &[0xd0, 0x0d, 0xfe, 0xed], "a device tree or FIT image"),
        (0, b"#!", "a script"),
        (510, &[0x55, 0xaa], "a disk image or an old boot sector, without a Linux header"),
    ];
    let found = match head.len() {
        0 => "empty",
        1..512 => "too short to be one",
        _ => "nothing known",
    };
    let known = magics.iter().find(|(offset, magic, _)| at(*offset, magic));
    BootError::NotAKernel { found: known.map_or(found, |(_, _, name)| name) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_files_are_named() {
        let with = |offset: usize, magic: &[u8]| {
            let mut file = vec![0u8; 0x9000];
            file[offset..offset + magic.len()].copy_from_slice(magic);
            identify(&KernelFile::from(&file)).unwrap_err().to_string()
        };
        assert!(with(0x38, b"ARM\x64").contains("arm64"));
        assert!(with(0x30, b"RISCV\0\0\0").contains("RISC-V"));
        assert!(with(0, b"MZ\0\0zimg").contains("EFI zboot"));
        assert!(with(0, b"MZ").contains("EFI or DOS"));
        assert!(with(0, &[0x1f, 0x8b]).contains("gzip"));
        assert!(with(0, b"QFI\xfb").contains("qcow2"));
        assert!(with(0, b"07070100").contains("cpio"));
        assert!(with(510, &[0x55, 0xaa]).contains("boot sector"));
        assert!(with(0, &[1]).contains("nothing known"));
        let short = |bytes: &[u8]| identify(&bytes.into()).unwrap_err().to_string();
        assert!(short(b"").contains("empty"));
        assert!(short(b"hello").contains("too short"));
        let mut arm = vec![0u8; 64];
        arm[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        arm[18] = 183;
        assert_eq!(
            identify(&KernelFile::from(&arm)),
            Err(BootError::WrongArchitecture { found: "arm64 (an ELF file)".to_owned() })
        );
        assert!(matches!(identify(&arm[..17].into()), Err(BootError::Truncated { field: "e_machine", .. })));
    }
}
