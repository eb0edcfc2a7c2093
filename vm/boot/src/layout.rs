//! Where the loader's own structures go: all in conventional memory, below any kernel.

use std::ops::Range;

/// The global descriptor table, past the interrupt vectors and the BIOS data area.
pub const GDT_START: u64 = 0x0500;
/// PVH's `hvm_start_info`, its modules and memory map.
pub const START_INFO: Range<u64> = 0x2000..0x7000;
/// Linux's `boot_params`, one page.
pub const BOOT_PARAMS_START: u64 = 0x7000;
/// The end of the page of stack.
pub const STACK_TOP: u64 = 0x8ff0;
/// Page tables for long mode: six pages.
pub const PAGE_TABLES_START: u64 = 0x9000;
/// What `boot_params` points to beside the command line: one page.
pub const SETUP_DATA: Range<u64> = 0xf000..0x1_0000;
/// Multiboot's information structure, modules and memory map, unless the kernel is there.
pub const MULTIBOOT_INFO: Range<u64> = 0x1_0000..0x1_8000;
/// The command line; multiboot's is elsewhere if the kernel is there.
pub const COMMAND_LINE: Range<u64> = 0x2_0000..0x3_0000;
/// All of the above: must be RAM, and no kernel may be loaded over it but by multiboot.
pub const LOADER_AREA: Range<u64> = 0..0x3_0000;
/// What multiboot needs of it at its place: the global descriptor table, past the interrupt vectors.
pub const MULTIBOOT_AREA: Range<u64> = 0..0x1000;
