//! What a machine begins with: a kernel that is put into memory, or a firmware image.

use crate::deterministic::Entropy;
use crate::kernel::{KernelEntry, KernelImage};
use crate::{BootSpec, MachineError, MachineSpec};
use boot::MemoryMap;
use guest_memory::{GuestMemory, PAGE_SIZE};
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

/// The end of the firmware's place: processors begin sixteen bytes below it.
const ROM_END: u64 = 1 << 32;
/// The most bytes that a firmware image may have.
const MAX_ROM: u64 = 8 << 20;
/// The end of low memory, where the last part of the image is as well.
const SHADOW_END: u64 = 1 << 20;
/// The most of it that is.
const MAX_SHADOW: u64 = 128 << 10;

/// A kernel, or a firmware image.
#[derive(Debug)]
pub(crate) enum BootSource {
    /// A kernel that the boot processor enters.
    Kernel(Box<KernelImage>),
    /// The bytes of an image that processors begin in as after a reset.
    Firmware(Vec<u8>),
}

impl BootSource {
    /// Opens what `spec` names. Kernels' addresses are picked by `entropy`.
    pub(crate) fn open(spec: &MachineSpec, entropy: Entropy) -> Result<Self, MachineError> {
        match &spec.boot {
            BootSpec::Kernel(kernel) => {
                Ok(Self::Kernel(Box::new(KernelImage::open(kernel, spec.memory, entropy)?)))
            }
            BootSpec::Firmware(path) => Ok(Self::Firmware(read(path)?)),
        }
    }

    /// Whether processors begin as after a reset.
    pub(crate) fn is_firmware(&self) -> bool {
        matches!(self, Self::Firmware(_))
    }

    /// Has a word stand on Linux's command line: see [`KernelImage::add_word`].
    pub(crate) fn add_word(&mut self, name: &'static str, word: &str) {
        if let Self::Kernel(kernel) = self {
            kernel.add_word(name, word);
        }
    }

    /// The memory that it takes besides the guest's own.
    pub(crate) fn rom(&self) -> Option<Range<u64>> {
        match self {
            Self::Kernel(_) => None,
            Self::Firmware(image) => Some(ROM_END - image.len() as u64..ROM_END),
        }
    }

    /// Puts it into memory; returns how the boot processor begins, if not as after a reset.
    pub(crate) fn load(
        &self,
        memory: &GuestMemory,
        map: &MemoryMap,
        tables: &crate::firmware::Firmware,
        fresh: bool,
    ) -> Result<Option<KernelEntry>, MachineError> {
        match self {
            Self::Kernel(kernel) => {
                let rsdp = tables.write(memory)?;
                kernel.load(memory, map, rsdp, fresh).map(Some)
            }
            Self::Firmware(image) => {
                let rom = ROM_END - image.len() as u64;
                memory.write(rom, image)?;
                memory.set_read_only(rom, true)?;
                let shadow = &image[image.len() - image.len().min(MAX_SHADOW as usize)..];
                memory.write(SHADOW_END - shadow.len() as u64, shadow)?;
                Ok(None)
            }
        }
    }
}

/// Reads an image and checks that it can be one.
fn read(path: &Path) -> Result<Vec<u8>, MachineError> {
    let failed = |source| MachineError::File { what: "firmware image", path: path.into(), source };
    let mut image = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_ROM + 1).read_to_end(&mut image).map_err(failed)?;
    let len = image.len() as u64;
    if len == 0 || len > MAX_ROM || !len.is_multiple_of(PAGE_SIZE) {
        return Err(MachineError::FirmwareSize { path: path.into(), most: MAX_ROM });
    }
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn images_of_whole_pages_are_taken() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(read(file.path()), Err(MachineError::FirmwareSize { .. })));
        file.write_all(&[7; 8192]).unwrap();
        let source = BootSource::Firmware(read(file.path()).unwrap());
        assert_eq!(source.rom(), Some(0xffff_e000..1 << 32));
        file.write_all(&[7]).unwrap();
        assert!(matches!(read(file.path()), Err(MachineError::FirmwareSize { .. })));
        assert!(matches!(read(Path::new("/dev/zero")), Err(MachineError::FirmwareSize { .. })));
        assert!(matches!(read(Path::new("/nowhere")), Err(MachineError::File { .. })));
    }

    #[test]
    fn an_image_ends_at_4_gib_and_its_end_is_below_1_mib() {
        let mut image = vec![1; 0x2_0000];
        image.extend([2; 0x1_0000]);
        let source = BootSource::Firmware(image);
        let rom = source.rom().unwrap();
        let memory = GuestMemory::new(&[0..2 << 20, rom.clone()]).unwrap();
        let map = MemoryMap::pc(2 << 20, 0, &[]).unwrap();
        let tables = crate::firmware::Firmware::new(
            &acpi::AcpiConfig::pc(vec![0]),
            1,
            std::iter::once(0..1 << 20).collect(),
        )
        .unwrap();
        assert!(source.load(&memory, &map, &tables, true).unwrap().is_none());
        let byte = |gpa| {
            let mut data = [0];
            memory.read(gpa, &mut data).unwrap();
            data[0]
        };
        assert_eq!([rom.start, rom.end - 1, 0xf_ffff, 0xe_0000, 0xd_ffff].map(byte), [1, 2, 2, 1, 0]);
        assert!(memory.is_read_only(rom.start) && !memory.is_read_only(0xf_0000));
    }
}
