//! The CPU state in which a kernel is entered, told without knowledge of any kernel, and the descriptor
//! and page tables that belong to it.

use crate::layout::{GDT_START, PAGE_TABLES_START, STACK_TOP};
use crate::{BootError, LoadMemory};

/// Selector of the flat code segment (Linux's `__BOOT_CS`).
pub const CODE_SELECTOR: u16 = 0x10;
/// Selector of the flat data segment (Linux's `__BOOT_DS`).
pub const DATA_SELECTOR: u16 = 0x18;
/// Selector of the task state segment.
pub const TSS_SELECTOR: u16 = 0x20;

/// CR0: protected mode.
pub const CR0_PE: u64 = 1;
/// CR0: extension type, always one on today's CPUs.
pub const CR0_ET: u64 = 1 << 4;
/// CR0: x87 errors by exception.
pub const CR0_NE: u64 = 1 << 5;
/// CR0: paging.
pub const CR0_PG: u64 = 1 << 31;
/// CR4: physical address extension.
pub const CR4_PAE: u64 = 1 << 5;
/// EFER: long mode enabled.
pub const EFER_LME: u64 = 1 << 8;
/// EFER: long mode active.
pub const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that's always one. Interrupts are off in every boot protocol.
pub const RFLAGS_FIXED: u64 = 2;

/// How the CPU runs at the entry point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CpuMode {
    /// Protected mode with flat 32-bit segments, paging off.
    Protected32,
    /// 64-bit long mode, the first 4 GiB identity-mapped.
    Long64,
}

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, granularity already applied.
    pub limit: u32,
    /// Access rights as in bits 40 to 55 of a descriptor, with the four bits of the limit (8 to 11 here)
    /// zero: type 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14, G 15 (Intel SDM volume 3, 3.4.5). Zero
    /// means an unusable segment.
    pub rights: u16,
}

impl Segment {
    /// Flat, readable, executable, accessed; `long` for a 64-bit one.
    pub fn flat_code(long: bool) -> Self {
        let size = if long { 1 << 13 } else { 1 << 14 };
        Self { selector: CODE_SELECTOR, base: 0, limit: u32::MAX, rights: 0x809b | size }
    }

    /// Flat, writable, accessed.
    pub fn flat_data() -> Self {
        Self { selector: DATA_SELECTOR, base: 0, limit: u32::MAX, rights: 0xc093 }
    }

    /// A busy 32/64-bit TSS of the smallest size.
    pub fn boot_tss() -> Self {
        Self { selector: TSS_SELECTOR, base: 0, limit: 0x67, rights: 0x008b }
    }

    /// The eight-byte descriptor for this segment (Intel SDM volume 3, figure 3-8). The upper half of a
    /// long-mode system descriptor isn't part of it.
    pub fn descriptor(&self) -> u64 {
        let limit = u64::from(if self.rights & 0x8000 != 0 { self.limit >> 12 } else { self.limit });
        let rights = u64::from(self.rights & 0xf0ff);
        (limit & 0xffff)
            | ((self.base & 0xff_ffff) << 16)
            | (rights << 40)
            | ((limit & 0xf_0000) << 32)
            | ((self.base & 0xff00_0000) << 32)
    }
}

/// A descriptor table register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct TableRegister {
    /// Where the table is.
    pub base: u64,
    /// Its last byte's offset.
    pub limit: u16,
}

/// Everything about the boot processor that the boot protocol prescribes. What isn't named here is as
/// after reset; all general registers that aren't given are zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryState {
    /// The mode that the control registers and segments add up to.
    pub mode: CpuMode,
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// RAX (multiboot's magic).
    pub rax: u64,
    /// RBX (multiboot information, PVH start info).
    pub rbx: u64,
    /// RSP: a page of stack, for kernels that expect one.
    pub rsp: u64,
    /// RSI (Linux: `boot_params`).
    pub rsi: u64,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// The EFER register.
    pub efer: u64,
    /// Code segment.
    pub cs: Segment,
    /// The data segment for DS, ES, FS, GS and SS.
    pub data: Segment,
    /// Task register.
    pub tr: Segment,
    /// GDTR; the table is in guest memory.
    pub gdtr: TableRegister,
    /// IDTR: empty.
    pub idtr: TableRegister,
}

impl EntryState {
    /// The state for entry in 32-bit protected mode at `eip`; writes the GDT.
    pub(crate) fn protected32(memory: &mut dyn LoadMemory, eip: u32) -> Result<Self, BootError> {
        let cs = Segment::flat_code(false);
        let gdtr = write_gdt(memory, &cs)?;
        Ok(Self::flat32(gdtr, cs, u64::from(eip)))
    }

    /// The state for entry in long mode at `rip`; writes the GDT and page tables.
    pub(crate) fn long64(memory: &mut dyn LoadMemory, rip: u64) -> Result<Self, BootError> {
        let cs = Segment::flat_code(true);
        let gdtr = write_gdt(memory, &cs)?;
        write_page_tables(memory)?;
        Ok(Self {
            mode: CpuMode::Long64,
            cr0: CR0_PE | CR0_ET | CR0_NE | CR0_PG,
            cr3: PAGE_TABLES_START,
            cr4: CR4_PAE,
            efer: EFER_LME | EFER_LMA,
            ..Self::flat32(gdtr, cs, rip)
        })
    }

    fn flat32(gdtr: TableRegister, cs: Segment, rip: u64) -> Self {
        Self {
            mode: CpuMode::Protected32,
            rip,
            rflags: RFLAGS_FIXED,
            rax: 0,
            rbx: 0,
            rsp: STACK_TOP,
            rsi: 0,
            cr0: CR0_PE | CR0_ET | CR0_NE,
            cr3: 0,
            cr4: 0,
            efer: 0,
            cs,
            data: Segment::flat_data(),
            tr: Segment::boot_tss(),
            gdtr,
            idtr: TableRegister::default(),
        }
    }
}

fn write_gdt(memory: &mut dyn LoadMemory, cs: &Segment) -> Result<TableRegister, BootError> {
    // The TSS descriptor takes two slots in long mode; its upper half (base 63:32) is zero.
    let table =
        [0, 0, cs.descriptor(), Segment::flat_data().descriptor(), Segment::boot_tss().descriptor(), 0];
    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    memory.write(GDT_START, &bytes)?;
    Ok(TableRegister { base: GDT_START, limit: (bytes.len() - 1) as u16 })
}

/// Identity-maps the first 4 GiB in 2 MiB pages: one PML4, one PDPT and four page directories.
fn write_page_tables(memory: &mut dyn LoadMemory) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    const TABLE: u64 = 0x1000;
    let pdpt = PAGE_TABLES_START + TABLE;
    let directories = pdpt + TABLE;
    let mut entries = vec![0u64; 512 * 6];
    entries[0] = pdpt | PRESENT_WRITABLE;
    for index in 0..4u64 {
        entries[512 + index as usize] = (directories + index * TABLE) | PRESENT_WRITABLE;
    }
    for (index, entry) in entries[1024..].iter_mut().enumerate() {
        *entry = ((index as u64) << 21) | PRESENT_WRITABLE | LARGE;
    }
    let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    memory.write(PAGE_TABLES_START, &bytes)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_well_known_ones() {
        assert_eq!(Segment::flat_code(true).descriptor(), 0x00af_9b00_0000_ffff);
        assert_eq!(Segment::flat_code(false).descriptor(), 0x00cf_9b00_0000_ffff);
        assert_eq!(Segment::flat_data().descriptor(), 0x00cf_9300_0000_ffff);
        assert_eq!(Segment::boot_tss().descriptor(), 0x0000_8b00_0000_0067);
        let odd = Segment { selector: 0, base: 0x1234_5678, limit: 0xa_bcde, rights: 0x4093 };
        assert_eq!(odd.descriptor(), 0x124a_9334_5678_bcde);
    }
}
