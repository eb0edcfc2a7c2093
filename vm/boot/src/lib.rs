//! Loading kernels: bzImage, unpacked or not, PVH and multiboot ELF.
//!
//! [`load`] takes a kernel's file, perhaps an initrd and a command line, puts them into guest memory
//! as the kernel's boot protocol wants it and returns the [`EntryState`] in which the boot processor must
//! start. Files are untrusted: every field is checked, and every error names the file, the field and the
//! place.

mod boot_params;
mod bzimage;
mod elf;
mod entry;
mod error;
mod fields;
mod identify;
mod kernel_file;
pub mod layout;
mod linux_elf;
mod memory_map;
mod multiboot;
mod payload;
mod pvh;
mod setup_header;
#[cfg(test)]
mod testing;
mod vmlinux;

use std::ops::Range;

use boot_params::BootParams;
pub use entry::{
    CODE_SELECTOR, CR0_ET, CR0_NE, CR0_PE, CR0_PG, CR4_PAE, CpuMode, DATA_SELECTOR, EFER_LMA, EFER_LME,
    EntryState, RFLAGS_FIXED, Segment, TSS_SELECTOR, TableRegister,
};
pub use error::{BootError, FileKind, OutOfMemoryRange};
use fields::Fields;
pub use identify::{Protocol, identify};
pub use kernel_file::KernelFile;
use memory_map::Placement;
pub use memory_map::{EBDA_START, FIRMWARE_START, MemoryMap, MemoryMapError, MemoryRegion, RegionKind};

pub use payload::{Compression, Payload, UnpackError};
pub use setup_header::SetupHeader;
pub use vmlinux::{DirectEntry, MAX_UNPACKED, SlideError, Vmlinux};

/// Guest memory as far as loading needs it.
pub trait LoadMemory {
    /// Writes `bytes` at `gpa`.
    ///
    /// # Errors
    /// Some of the range isn't RAM.
    fn write(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), OutOfMemoryRange>;
}

/// What to boot.
#[derive(Debug, Clone)]
pub struct BootSpec<'a> {
    /// The kernel file.
    pub kernel: KernelFile<'a>,
    /// The initial RAM disk: an initrd, initramfs, or a multiboot or PVH module.
    pub initrd: Option<&'a [u8]>,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// The guest's memory as the kernel will be told of it. Nothing is placed outside its RAM.
    pub memory: &'a MemoryMap,
    /// The address of ACPI's root pointer, if there are ACPI tables.
    pub rsdp: Option<u64>,
    /// If the kernel is a bzImage: its payload, to be entered in place of the code that would unpack it.
    pub direct: Option<DirectEntry<'a>>,
    /// Random bytes for a Linux kernel's random number generator; at most [`MAX_RNG_SEED`].
    pub rng_seed: &'a [u8],
}

/// The most random bytes that [`BootSpec::rng_seed`] may have.
pub const MAX_RNG_SEED: usize = 1024;

/// Where something was put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// The guest physical addresses.
    pub range: Range<u64>,
    /// What's there.
    pub what: &'static str,
}

/// A kernel in guest memory, ready to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// How the boot processor must start.
    pub entry: EntryState,
    /// The protocol chosen.
    pub protocol: Protocol,
    /// Where the kernel, the initrd and the parameters are, for logs.
    pub placed: Vec<Placed>,
}

/// Loads a kernel by the protocol that [`identify`] names.
///
/// # Errors
/// Any [`BootError`]; guest memory may hold parts of the kernel then.
pub fn load(spec: &BootSpec<'_>, memory: &mut dyn LoadMemory) -> Result<Loaded, BootError> {
    if let Some(position) = spec.cmdline.bytes().position(|byte| byte == 0) {
        return Err(BootError::CommandLineNul { position });
    }
    let protocol = identify(&spec.kernel)?;
    let mut loader = Loader::new(spec, memory, protocol)?;
    let entry = match protocol {
        Protocol::BzImage => bzimage::load(&mut loader)?,
        Protocol::Pvh => pvh::load(&mut loader)?,
        Protocol::Multiboot => multiboot::load(&mut loader)?,
        Protocol::LinuxElf64 => linux_elf::load(&mut loader)?,
    };
    Ok(Loaded { entry, protocol, placed: loader.placed })
}

/// What the protocols share: free memory, writing and noting what went where.
struct Loader<'a> {
    spec: &'a BootSpec<'a>,
    memory: &'a mut dyn LoadMemory,
    free: Placement,
    placed: Vec<Placed>,
}

impl<'a> Loader<'a> {
    fn new(
        spec: &'a BootSpec<'a>,
        memory: &'a mut dyn LoadMemory,
        protocol: Protocol,
    ) -> Result<Self, BootError> {
        let mut free = spec.memory.placement();
        let area = match protocol {
            Protocol::Multiboot => layout::MULTIBOOT_AREA,
            Protocol::BzImage | Protocol::Pvh | Protocol::LinuxElf64 => layout::LOADER_AREA,
        };
        if !free.take(&area) {
            return Err(BootError::OutsideRam {
                file: FileKind::Kernel,
                what: "the loader's area in low memory",
                start: area.start,
                end: area.end,
            });
        }
        Ok(Self { spec, memory, free, placed: Vec::new() })
    }

    fn note(&mut self, what: &'static str, range: Range<u64>) {
        self.placed.push(Placed { range, what });
    }

    fn write(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), BootError> {
        Ok(self.memory.write(gpa, bytes)?)
    }

    /// Writes `len` bytes at `offset` of `file` to `gpa`. Of a file of the host, no more than a piece is in the
    /// loader's own memory at a time.
    fn copy(
        &mut self,
        file: &Fields<'_>,
        part: &'static str,
        offset: u64,
        len: u64,
        gpa: u64,
    ) -> Result<(), BootError> {
        const PIECE: u64 = 1 << 18;
        file.check(part, offset, len)?;
        if let Some(bytes) = file.kernel.in_memory(offset, len) {
            return self.write(gpa, bytes);
        }
        let mut buffer = vec![0; len.min(PIECE) as usize];
        let mut done = 0;
        while done < len {
            let piece = &mut buffer[..(len - done).min(PIECE) as usize];
            file.read(part, offset + done, piece)?;
            self.memory.write(gpa.saturating_add(done), piece)?;
            done += piece.len() as u64;
        }
        Ok(())
    }

    /// Zeroes a range that's known to be RAM, without allocating its size.
    fn zero(&mut self, range: Range<u64>) -> Result<(), BootError> {
        static CHUNK: [u8; 1 << 16] = [0; 1 << 16];
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(CHUNK.len() as u64);
            self.write(at, &CHUNK[..len as usize])?;
            at += len;
        }
        Ok(())
    }

    /// Takes `preferred`, or if a multiboot kernel is there as much room elsewhere below 4 GiB.
    fn take_near(&mut self, what: &'static str, preferred: Range<u64>) -> Result<Range<u64>, BootError> {
        if self.free.take(&preferred) {
            return Ok(preferred);
        }
        let size = preferred.end - preferred.start;
        self.free.take_lowest(size, 0x1000, &(0..1 << 32)).ok_or(BootError::OutsideRam {
            file: FileKind::Kernel,
            what,
            start: preferred.start,
            end: preferred.end,
        })
    }

    /// Writes the command line with its final zero and returns its address. `max` doesn't count the zero.
    fn write_cmdline(&mut self, max: u64) -> Result<u64, BootError> {
        self.write_cmdline_in(&layout::COMMAND_LINE, max)
    }

    /// The same to `area`.
    fn write_cmdline_in(&mut self, area: &Range<u64>, max: u64) -> Result<u64, BootError> {
        let max = max.min(area.end - area.start - 1);
        let line = self.spec.cmdline.as_bytes();
        if line.len() as u64 > max {
            return Err(BootError::CommandLineTooLong { len: line.len(), max: max as usize });
        }
        let mut bytes = line.to_vec();
        bytes.push(0);
        self.write(area.start, &bytes)?;
        self.note("command line", area.start..area.start + bytes.len() as u64);
        Ok(area.start)
    }

    /// Fills in the rest of Linux's `boot_params` and writes them, with what they point to.
    fn write_boot_params(
        &mut self,
        mut params: BootParams,
        cmdline: u64,
        initrd: Option<Range<u64>>,
    ) -> Result<(), BootError> {
        /// `struct setup_data` with `SETUP_RNG_SEED` (Linux's Documentation/arch/x86/boot.rst, `setup_data`):
        /// next, type, length.
        const RNG_SEED: u32 = 9;
        let seed = &self.spec.rng_seed[..self.spec.rng_seed.len().min(MAX_RNG_SEED)];
        if seed.is_empty() {
            params.set_setup_data(0);
        } else {
            let mut node = vec![0; 8];
            node.extend(RNG_SEED.to_le_bytes());
            node.extend((seed.len() as u32).to_le_bytes());
            node.extend_from_slice(seed);
            self.write(layout::SETUP_DATA.start, &node)?;
            params.set_setup_data(layout::SETUP_DATA.start);
        }
        params.set_loader(self.spec, cmdline, initrd)?;
        self.write(layout::BOOT_PARAMS_START, params.bytes())
    }

    /// Puts the initrd as high as possible below `limit`. Neither an absent nor an empty one is placed.
    fn write_initrd(&mut self, limits: &[u64]) -> Result<Option<Range<u64>>, BootError> {
        let Some(initrd) = self.spec.initrd.filter(|initrd| !initrd.is_empty()) else { return Ok(None) };
        let size = initrd.len() as u64;
        let free = &mut self.free;
        let Some(range) = limits.iter().find_map(|limit| free.take_highest(size, 0x1000, &(0..*limit)))
        else {
            let limit = limits.iter().copied().max().unwrap_or(0);
            return Err(BootError::InitrdTooBig { size, room: free.longest(&(0..limit)), limit });
        };
        self.write(range.start, initrd)?;
        self.note("initrd", range.clone());
        Ok(Some(range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use testing::{Ram, spec};

    #[test]
    fn a_zero_byte_or_too_long_a_command_line_is_refused() {
        let map = MemoryMap::pc(0x1000_0000, 0, &[]).unwrap();
        let kernel = bzimage::tests::image();
        let with = |cmdline: &str| load(&BootSpec { cmdline, ..spec(&kernel, &map) }, &mut Ram::new(&map));
        assert_eq!(with("a\0b").unwrap_err(), BootError::CommandLineNul { position: 1 });
        assert!(with(&"x".repeat(2047)).is_ok());
        assert_eq!(
            with(&"x".repeat(2048)).unwrap_err(),
            BootError::CommandLineTooLong { len: 2048, max: 2047 }
        );
    }

    #[test]
    fn low_memory_and_a_describable_map_are_required() {
        let kernel = bzimage::tests::image();
        let map = MemoryMap::new(&[0..0x1_0000, 0x10_0000..0x1000_0000], &[]).unwrap();
        let error = load(&spec(&kernel, &map), &mut Ram::new(&map)).unwrap_err();
        assert!(matches!(error, BootError::OutsideRam { start: 0, .. }), "{error}");
        let many: Vec<_> = (0..130u64)
            .map(|index| MemoryRegion {
                range: (index << 32)..(index << 32) + 0xf000_0000,
                kind: RegionKind::Reserved,
            })
            .skip(1)
            .collect();
        let map = MemoryMap::pc(0x1000_0000, 0, &many).unwrap();
        let error = load(&spec(&kernel, &map), &mut Ram::new(&map)).unwrap_err();
        assert!(matches!(error, BootError::TooManyRegions { count: 133, max: 128 }), "{error}");
    }
}
