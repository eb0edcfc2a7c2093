//! Signatures that are fixed; the bodies move to their modules one by one.
#![allow(unused_variables, clippy::needless_pass_by_ref_mut)]

use crate::*;

impl Core<'_> {
    /// Reads `seg:offset`, with all checks.
    pub fn read<T: Scalar>(&mut self, seg: Seg, offset: u64) -> Result<T, Trap> {
        Err(Trap::UD)
    }
    /// Writes `seg:offset`, with all checks.
    pub fn write<T: Scalar>(&mut self, seg: Seg, offset: u64, value: T) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// Reads up to 4096 bytes, all or nothing.
    pub fn read_bytes(&mut self, seg: Seg, offset: u64, data: &mut [u8]) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// Writes up to 4096 bytes, all or nothing.
    pub fn write_bytes(&mut self, seg: Seg, offset: u64, data: &[u8]) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// Faults as a write would, without writing.
    pub fn check_write(&mut self, seg: Seg, offset: u64, len: u64) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// Read-modify-write; returns the old value.
    pub fn update<T: Scalar>(
        &mut self,
        seg: Seg,
        offset: u64,
        locked: bool,
        f: impl FnMut(T) -> Option<T>,
    ) -> Result<T, Trap> {
        Err(Trap::UD)
    }
    /// A host pointer to what is contiguous.
    pub fn host_span(
        &mut self,
        seg: Seg,
        offset: u64,
        len: u64,
        write: bool,
    ) -> Result<Option<(*mut u8, usize)>, Trap> {
        Err(Trap::UD)
    }
    /// Bytes at CS:RIP.
    pub fn fetch(&mut self, buffer: &mut [u8; 15]) -> Result<usize, Trap> {
        Err(Trap::UD)
    }
    /// Translation of CS.base+RIP; `host` is null if the page is no RAM.
    pub fn fetch_physical(&mut self) -> Result<FetchEntry, Trap> {
        Err(Trap::UD)
    }
    /// Walks and installs a TLB entry for a linear address at the current privilege.
    pub fn fill(&mut self, va: u64, write: bool) -> Result<Fill, Trap> {
        Err(Trap::UD)
    }
    /// Pushes 2, 4 or 8 bytes.
    pub fn push(&mut self, size: u8, value: u64) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// Pops 2, 4 or 8 bytes.
    pub fn pop(&mut self, size: u8) -> Result<u64, Trap> {
        Err(Trap::UD)
    }
    /// How code is decoded now.
    pub fn code_size(&self) -> CodeSize {
        CodeSize::Bits64
    }
    /// The bits of RSP that address the stack.
    pub fn stack_mask(&self) -> u64 {
        u64::MAX
    }
    /// Writes all of RFLAGS.
    pub fn set_rflags(&mut self, value: u64) {}
    /// Recomputes what depends on CPL, CR0, CR4, EFER, CS and RFLAGS.
    pub fn mode_changed(&mut self) {}
    /// MOV to CR0.
    pub fn set_cr0(&mut self, value: u64) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// MOV to CR3.
    pub fn set_cr3(&mut self, value: u64) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// MOV to CR4.
    pub fn set_cr4(&mut self, value: u64) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// Writes EFER.
    pub fn set_efer(&mut self, value: u64) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// RDMSR.
    pub fn read_msr(&mut self, msr: u32) -> Result<u64, Trap> {
        Err(Trap::UD)
    }
    /// WRMSR.
    pub fn write_msr(&mut self, msr: u32, value: u64) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// CPUID: EAX, EBX, ECX, EDX.
    pub fn cpuid(&self, leaf: u32, sub: u32) -> [u32; 4] {
        [0; 4]
    }
    /// The guest's time-stamp counter.
    pub fn tsc(&self) -> u64 {
        0
    }
    /// Flushes the TLB.
    pub fn flush_tlb(&mut self, keep_global: bool) {}
    /// INVLPG.
    pub fn invlpg(&mut self, va: u64) {}
    /// Loads a segment register as MOV does (CS is not loaded so).
    pub fn load_segment(&mut self, seg: Seg, selector: u16) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// Far JMP. `size` is the operand size in bytes.
    pub fn far_jump(&mut self, selector: u16, offset: u64, size: u8) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// Far CALL; `next_rip` is the return address.
    pub fn far_call(&mut self, selector: u16, offset: u64, size: u8, next_rip: u64) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// Far RET.
    pub fn far_return(&mut self, size: u8, pop_bytes: u16) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// IRET.
    pub fn iret(&mut self, size: u8) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// INT n.
    pub fn software_interrupt(&mut self, vector: u8, next_rip: u64) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// SYSCALL.
    pub fn syscall(&mut self, next_rip: u64) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// SYSRET.
    pub fn sysret(&mut self, size: u8) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// SYSENTER.
    pub fn sysenter(&mut self) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// SYSEXIT.
    pub fn sysexit(&mut self, size: u8) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// Delivers an exception, through double fault if need be; the only error is [`Trap::TripleFault`].
    pub fn deliver(&mut self, exception: Exception) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// Delivers an external interrupt.
    pub fn interrupt(&mut self, vector: u8) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// Delivers an NMI.
    pub fn nmi(&mut self) -> Result<(), Trap> {
        Err(Trap::UD)
    }
    /// INIT.
    pub fn init(&mut self) {}
    /// SIPI.
    pub fn startup(&mut self, vector: u8) {}
}

/// Segment and offset of the memory operand `operand` of `insn`.
pub fn effective_address(cpu: &Cpu, insn: &iced_x86::Instruction, operand: u32) -> (Seg, u64) {
    (Seg::Ds, 0)
}

/// What [`Core::fill`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// RAM: the entry is there, the access will hit.
    Direct,
    /// MMIO, or a write that must be tracked: interpret the instruction.
    Interpret,
}

/// System instructions.
pub mod system {
    use crate::*;
    /// Executes a system instruction; unknown ones are #UD.
    pub fn execute(core: &mut Core, insn: &iced_x86::Instruction) -> Result<Flow, Trap> {
        Err(Trap::UD)
    }
}
