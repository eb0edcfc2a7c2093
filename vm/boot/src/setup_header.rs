//! The setup header of Linux's bzImage (Linux's Documentation/arch/x86/boot.rst, boot protocols 2.06 to 2.15).

use crate::fields::Fields;
use crate::memory_map::FOUR_GIB;
use crate::{BootError, FileKind, KernelFile, Loader};
use std::ops::Range;

/// `HdrS`.
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
const OLDEST_PROTOCOL: u16 = 0x0206;
/// `loadflags`: the kernel is loaded at 1 MiB and above.
const LOADED_HIGH: u8 = 1;
/// `xloadflags`: there's a 64-bit entry point 0x200 after the load address.
const XLF_KERNEL_64: u16 = 1;
/// `xloadflags`: everything may be loaded above 4 GiB.
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 2;
const SECTOR: u64 = 512;
/// Start of the setup header, in the file and in `boot_params`.
pub(crate) const HEADER_START: u64 = 0x1f1;
/// Where `boot_params` ends the room for the setup header.
const HEADER_ROOM_END: u64 = 0x290;
/// Where a kernel above 1 MiB begins unless its header says otherwise.
pub(crate) const HIGH_LOAD_ADDRESS: u64 = 0x10_0000;

/// The setup header: what a bzImage tells its loader. Names are those of the boot protocol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetupHeader {
    /// Boot protocol version, major in the high byte.
    pub version: u16,
    /// Flags.
    pub loadflags: u8,
    /// More flags.
    pub xloadflags: u16,
    /// Where in the file the protected-mode kernel starts.
    pub kernel_offset: u64,
    /// The length of the protected-mode kernel.
    pub kernel_size: u64,
    /// The highest address that the initrd may occupy.
    pub initrd_addr_max: u32,
    /// The alignment that the load address needs.
    pub kernel_alignment: u32,
    /// Whether the kernel may be loaded elsewhere than at `pref_address`.
    pub relocatable_kernel: bool,
    /// The longest command line, without its final zero.
    pub cmdline_size: u32,
    /// The address that the kernel would like to be loaded at.
    pub pref_address: u64,
    /// Contiguous memory from the load address on that the kernel needs until it reads the memory map.
    pub init_size: u32,
    /// Where in the file the compressed kernel is, with the size behind it; unchecked.
    pub payload: Option<Range<u64>>,
    /// The kernel's version text, if the header points to one.
    pub kernel_version: Option<String>,
    /// The range of the header in the file.
    pub(crate) header: Range<u64>,
}

impl SetupHeader {
    /// Reads the header of a bzImage.
    ///
    /// # Errors
    /// The file is truncated, older than protocol 2.06, or its fields contradict each other.
    pub fn parse(kernel: &KernelFile<'_>) -> Result<Self, BootError> {
        let file = Fields::new(FileKind::BzImage, kernel);
        let magic = file.u32("header", 0x202)?;
        if magic != HEADER_MAGIC {
            return Err(file.bad("header", 0x202, magic.into(), "expected \"HdrS\""));
        }
        let boot_flag = file.u16("boot_flag", 0x1fe)?;
        if boot_flag != BOOT_FLAG {
            return Err(file.bad("boot_flag", 0x1fe, boot_flag.into(), "expected 0xaa55"));
        }
        let version = file.u16("version", 0x206)?;
        if version < OLDEST_PROTOCOL {
            return Err(file.bad(
                "version",
                0x206,
                version.into(),
                "boot protocols before 2.06 (Linux 2.6.22) aren't supported",
            ));
        }
        let loadflags = file.u8("loadflags", 0x211)?;
        if loadflags & LOADED_HIGH == 0 {
            return Err(BootError::Unsupported {
                file: FileKind::BzImage,
                what: "a zImage, loaded below 1 MiB, isn't supported; build a bzImage",
            });
        }
        let header_end = 0x202 + u64::from(file.u8("jump", 0x201)?);
        let sectors = match file.u8("setup_sects", HEADER_START)? {
            0 => 4,
            count => u64::from(count),
        };
        let kernel_offset = (sectors + 1) * SECTOR;
        let kernel_size = Self::kernel_size(&file, kernel_offset)?;
        let at_least = |minimum| version >= minimum;
        let header = Self {
            version,
            loadflags,
            xloadflags: if at_least(0x020c) { file.u16("xloadflags", 0x236)? } else { 0 },
            kernel_offset,
            kernel_size,
            initrd_addr_max: file.u32("initrd_addr_max", 0x22c)?,
            kernel_alignment: file.u32("kernel_alignment", 0x230)?,
            relocatable_kernel: file.u8("relocatable_kernel", 0x234)? != 0,
            cmdline_size: file.u32("cmdline_size", 0x238)?,
            pref_address: if at_least(0x020a) { file.u64("pref_address", 0x258)? } else { HIGH_LOAD_ADDRESS },
            init_size: if at_least(0x020a) { file.u32("init_size", 0x260)? } else { 0 },
            payload: if at_least(0x0208) { Self::payload(&file, kernel_offset)? } else { None },
            kernel_version: Self::version_text(&file, kernel_offset)?,
            header: HEADER_START..header_end.clamp(0x240, HEADER_ROOM_END),
        };
        file.check("setup header", HEADER_START, header.header.end - HEADER_START)?;
        if header.relocatable_kernel && !header.kernel_alignment.is_power_of_two() {
            return Err(file.bad(
                "kernel_alignment",
                0x230,
                header.kernel_alignment.into(),
                "expected a power of two",
            ));
        }
        Ok(header)
    }

    /// `syssize`, in paragraphs, checked against the file. The last paragraph may be short: some kernels
    /// round up without padding. What follows it (a signature) isn't loaded.
    fn kernel_size(file: &Fields<'_>, offset: u64) -> Result<u64, BootError> {
        let size = u64::from(file.u32("syssize", 0x1f4)?) * 16;
        if size == 0 {
            return Err(file.bad("syssize", 0x1f4, 0, "expected the kernel's size"));
        }
        let available = file.kernel.len().saturating_sub(offset);
        if available + 15 < size {
            file.check("protected-mode kernel", offset, size)?;
        }
        Ok(size.min(available))
    }

    fn payload(file: &Fields<'_>, kernel_offset: u64) -> Result<Option<Range<u64>>, BootError> {
        let offset = file.u32("payload_offset", 0x248)?;
        let length = file.u32("payload_length", 0x24c)?;
        let start = kernel_offset + u64::from(offset);
        Ok((offset != 0 && length != 0).then(|| start..start + u64::from(length)))
    }

    fn version_text(file: &Fields<'_>, setup_end: u64) -> Result<Option<String>, BootError> {
        let pointer = u64::from(file.u16("kernel_version", 0x20e)?);
        if pointer == 0 || pointer + 0x200 >= setup_end {
            return Ok(None);
        }
        let start = pointer + 0x200;
        let text = file.bytes("kernel version text", start, (setup_end - start).min(256))?;
        let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
        Ok(Some(String::from_utf8_lossy(&text[..end]).into_owned()))
    }

    /// Whether the kernel has the 64-bit entry point.
    pub fn has_64_bit_entry(&self) -> bool {
        self.xloadflags & XLF_KERNEL_64 != 0
    }

    /// Memory that must be free from the load address on.
    pub(crate) fn run_size(&self) -> u64 {
        u64::from(self.init_size).max(self.kernel_size)
    }

    /// Below which addresses to look for room for the initrd, in turn.
    pub(crate) fn initrd_limits(&self) -> Vec<u64> {
        let stated = u64::from(self.initrd_addr_max) + 1;
        // The header's maximum is kept low for old loaders' sake; a kernel that can be above 4 GiB takes
        // its initrd anywhere.
        if self.has_64_bit_entry() && self.xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G != 0 {
            vec![stated, FOUR_GIB, u64::MAX]
        } else {
            vec![stated]
        }
    }
}

/// Takes memory for a kernel where it prefers it or, if it can be moved, at the lowest address possible.
pub(crate) fn place_relocatable(loader: &mut Loader<'_>, header: &SetupHeader) -> Result<u64, BootError> {
    let size = header.run_size();
    let align = u64::from(header.kernel_alignment);
    let bounds = HIGH_LOAD_ADDRESS..FOUR_GIB;
    let preferred = header.pref_address..header.pref_address.saturating_add(size);
    let suits = bounds.start <= preferred.start
        && preferred.end <= bounds.end
        && (!header.relocatable_kernel || preferred.start.is_multiple_of(align));
    if suits && loader.free.take(&preferred) {
        return Ok(preferred.start);
    }
    let found = loader.free.take_lowest(size, align, &bounds).filter(|_| header.relocatable_kernel);
    let (min, max) = (bounds.start, bounds.end);
    found.map(|range| range.start).ok_or(BootError::KernelTooBig { size, align, min, max })
}
