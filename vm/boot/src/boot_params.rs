//! Linux's `boot_params`, the "zero page" (Linux's Documentation/arch/x86/zero-page.rst).

use std::ops::Range;

use crate::setup_header::HEADER_START;
use crate::{BootError, BootSpec};

const ACPI_RSDP_ADDR: usize = 0x070;
const EXT_RAMDISK_IMAGE: usize = 0x0c0;
const EXT_RAMDISK_SIZE: usize = 0x0c4;
const EXT_CMD_LINE_PTR: usize = 0x0c8;
const E820_ENTRIES: usize = 0x1e8;
const BOOT_FLAG: usize = 0x1fe;
const HEADER: usize = 0x202;
const VERSION: usize = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const CODE32_START: usize = 0x214;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const KERNEL_ALIGNMENT: usize = 0x230;
const SETUP_DATA: usize = 0x250;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY_SIZE: usize = 20;
const E820_MAX: usize = 128;
/// "Undefined loader": the number for loaders without one of their own.
const LOADER_UNDEFINED: u8 = 0xff;

/// The page being filled in.
pub(crate) struct BootParams {
    page: Vec<u8>,
}

impl BootParams {
    pub(crate) fn new() -> Self {
        Self { page: vec![0; 0x1000] }
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.page[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn put32(&mut self, at: usize, value: u32) {
        self.put(at, &value.to_le_bytes());
    }

    /// Copies a bzImage's setup header, which starts at the same offset in both.
    pub(crate) fn set_header(&mut self, header: &[u8]) {
        self.put(HEADER_START as usize, header);
    }

    /// Makes the setup header that an ELF `vmlinux` lacks.
    pub(crate) fn set_made_up_header(&mut self) {
        self.put(BOOT_FLAG, &[0x55, 0xaa]);
        self.put(HEADER, b"HdrS");
        self.put(VERSION, &0x020fu16.to_le_bytes());
        self.put(LOADFLAGS, &[1]);
        self.put32(KERNEL_ALIGNMENT, 0x100_0000);
    }

    pub(crate) fn set_code32_start(&mut self, address: u32) {
        self.put32(CODE32_START, address);
    }

    /// Says whether the kernel's virtual addresses are random, upon which it randomizes others.
    pub(crate) fn set_randomized(&mut self, randomized: bool) {
        const KASLR_FLAG: u8 = 1 << 1;
        self.page[LOADFLAGS] = self.page[LOADFLAGS] & !KASLR_FLAG | if randomized { KASLR_FLAG } else { 0 };
    }

    /// Where the list of further data begins; 0 for none.
    pub(crate) fn set_setup_data(&mut self, address: u64) {
        self.put(SETUP_DATA, &address.to_le_bytes());
    }

    /// Everything that the loader tells the kernel.
    pub(crate) fn set_loader(
        &mut self,
        spec: &BootSpec<'_>,
        cmdline: u64,
        initrd: Option<Range<u64>>,
    ) -> Result<(), BootError> {
        self.put(TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
        self.put32(CMD_LINE_PTR, cmdline as u32);
        self.put32(EXT_CMD_LINE_PTR, (cmdline >> 32) as u32);
        let initrd = initrd.unwrap_or(0..0);
        let size = initrd.end - initrd.start;
        self.put32(RAMDISK_IMAGE, initrd.start as u32);
        self.put32(EXT_RAMDISK_IMAGE, (initrd.start >> 32) as u32);
        self.put32(RAMDISK_SIZE, size as u32);
        self.put32(EXT_RAMDISK_SIZE, (size >> 32) as u32);
        if let Some(rsdp) = spec.rsdp {
            self.put(ACPI_RSDP_ADDR, &rsdp.to_le_bytes());
        }
        let regions = spec.memory.regions();
        if regions.len() > E820_MAX {
            return Err(BootError::TooManyRegions { count: regions.len(), max: E820_MAX });
        }
        self.put(E820_ENTRIES, &[regions.len() as u8]);
        for (index, region) in regions.iter().enumerate() {
            let at = E820_TABLE + index * E820_ENTRY_SIZE;
            self.put(at, &region.range.start.to_le_bytes());
            self.put(at + 8, &(region.range.end - region.range.start).to_le_bytes());
            self.put32(at + 16, region.kind as u32);
        }
        Ok(())
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.page
    }
}
