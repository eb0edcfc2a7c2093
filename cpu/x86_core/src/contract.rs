//! Signatures that are fixed; the bodies move to their modules one by one.
#![allow(unused_variables, missing_docs, clippy::needless_pass_by_ref_mut)]

use crate::*;

#[rustfmt::skip]
impl Core<'_> {
    pub fn set_cr0(&mut self, value: u64) -> Result<(), Trap> { Err(Trap::UD) }
    pub fn set_cr3(&mut self, value: u64) -> Result<(), Trap> { Err(Trap::UD) }
    pub fn set_cr4(&mut self, value: u64) -> Result<(), Trap> { Err(Trap::UD) }
    pub fn set_efer(&mut self, value: u64) -> Result<(), Trap> { Err(Trap::UD) }
    pub fn read_msr(&mut self, msr: u32) -> Result<u64, Trap> { Err(Trap::UD) }
    pub fn write_msr(&mut self, msr: u32, value: u64) -> Result<(), Trap> { Err(Trap::UD) }
    pub fn cpuid(&self, leaf: u32, sub: u32) -> [u32; 4] { [0; 4] }
    pub fn tsc(&self) -> u64 { 0 }
    pub fn load_segment(&mut self, seg: Seg, selector: u16) -> Result<(), Trap> { Err(Trap::UD) }
    pub fn far_jump(&mut self, selector: u16, offset: u64, size: u8) -> Result<(), Trap> { Err(Trap::UD) }
    pub fn far_call(&mut self, selector: u16, offset: u64, size: u8, next_rip: u64) -> Result<(), Trap> { Err(Trap::UD) }
    pub fn far_return(&mut self, size: u8, pop_bytes: u16) -> Result<(), Trap> { Err(Trap::UD) }
    pub fn iret(&mut self, size: u8) -> Result<(), Trap> { Err(Trap::UD) }
    pub fn software_interrupt(&mut self, vector: u8, next_rip: u64) -> Result<(), Trap> { Err(Trap::UD) }
    pub fn syscall(&mut self, next_rip: u64) -> Result<(), Trap> { Err(Trap::UD) }
    pub fn sysret(&mut self, size: u8) -> Result<(), Trap> { Err(Trap::UD) }
    pub fn sysenter(&mut self) -> Result<(), Trap> { Err(Trap::UD) }
    pub fn sysexit(&mut self, size: u8) -> Result<(), Trap> { Err(Trap::UD) }
    pub fn deliver(&mut self, exception: Exception) -> Result<(), Trap> { Err(Trap::UD) }
    pub fn interrupt(&mut self, vector: u8) -> Result<(), Trap> { Err(Trap::UD) }
    pub fn nmi(&mut self) -> Result<(), Trap> { Err(Trap::UD) }
}

/// System instructions.
pub mod system {
    use crate::*;
    /// Executes a system instruction; unknown ones are #UD.
    pub fn execute(core: &mut Core, insn: &iced_x86::Instruction) -> Result<Flow, Trap> {
        Err(Trap::UD)
    }
}
