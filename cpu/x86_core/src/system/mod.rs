//! System instructions.

mod control_registers;
mod descriptors;
mod flags;
mod io;
mod misc;
mod msr;
mod operand;
mod protection_keys;
mod random;
mod transfers;

pub use random::host_random;

#[cfg(test)]
mod tests;

use crate::{Core, Flow, Trap};
use iced_x86::{Instruction, Mnemonic};

/// Executes a system instruction: whatever deals with privilege, segments, other state than general
/// registers and the arithmetic flags, or the outside. RIP is `insn.ip()`; it is the caller's to advance on
/// [`Flow::Next`].
///
/// # Errors
/// The fault of the instruction; #UD if it is none of these or does not exist on this processor.
pub fn execute(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    use Mnemonic as M;
    if core.cpu.svm.guest {
        crate::svm::check(core, insn)?;
    }
    match insn.mnemonic() {
        M::Mov => control_registers::mov(core, insn),
        M::Clts | M::Lmsw | M::Smsw => control_registers::status_word(core, insn),

        M::Push => descriptors::push(core, insn),
        M::Pop => descriptors::pop(core, insn),
        M::Lds | M::Les | M::Lss | M::Lfs | M::Lgs => descriptors::load_far_pointer(core, insn),
        M::Lgdt | M::Lidt => descriptors::load_table(core, insn),
        M::Sgdt | M::Sidt => descriptors::store_table(core, insn),
        M::Lldt | M::Ltr => descriptors::load_system_segment(core, insn),
        M::Sldt | M::Str => descriptors::store_system_segment(core, insn),
        M::Lar | M::Lsl | M::Verr | M::Verw => descriptors::inspect(core, insn),
        M::Arpl => descriptors::arpl(core, insn),

        M::Jmp | M::Call => transfers::far_branch(core, insn),
        M::Retf => transfers::far_return(core, insn),
        M::Iret | M::Iretd | M::Iretq => transfers::iret(core, insn),
        M::Int | M::Int1 | M::Int3 | M::Into => transfers::interrupt(core, insn),
        M::Syscall | M::Sysret | M::Sysretq | M::Sysenter | M::Sysexit | M::Sysexitq => {
            transfers::fast(core, insn)
        }

        M::Cli | M::Sti => flags::interrupt_flag(core, insn),
        M::Pushf | M::Pushfd | M::Pushfq => flags::push(core, insn),
        M::Popf | M::Popfd | M::Popfq => flags::pop(core, insn),
        M::Clac | M::Stac => flags::access_check(core, insn),

        M::In => io::input(core, insn),
        M::Out => io::output(core, insn),
        M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd => io::string(core, insn),

        M::Rdmsr | M::Wrmsr => misc::model_specific(core, insn),
        M::Rdtsc | M::Rdtscp => misc::time_stamp(core, insn),
        M::Rdpmc => misc::performance_counter(core),
        M::Cpuid => misc::cpuid(core),
        M::Hlt => misc::halt(core, insn),
        M::Swapgs => misc::swapgs(core),
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => misc::segment_base(core, insn),
        M::Rdpid => misc::processor_id(core, insn),
        M::Rdrand | M::Rdseed => random::execute(core, insn),
        M::Invlpg => misc::invalidate_page(core, insn),
        M::Invpcid => misc::invalidate_context(core, insn),
        M::Rdpkru | M::Wrpkru => protection_keys::execute(core, insn),
        // A guest's guest calls its own hypervisor.
        M::Vmmcall if core.cpu.svm.guest => crate::svm::execute(core, insn),
        M::Vmcall if core.cpu.svm.guest => Err(Trap::UD),
        M::Vmcall | M::Vmmcall => misc::hypercall(core),
        M::Invd | M::Wbinvd | M::Wbnoinvd => misc::flush_caches(core),
        M::Clflush | M::Clflushopt | M::Clwb => misc::flush_line(core, insn),
        M::Clzero => misc::clear_line(core, insn),
        M::Xgetbv | M::Xsetbv => misc::extended_control(core, insn),
        M::Vmrun | M::Vmload | M::Vmsave | M::Stgi | M::Clgi | M::Skinit | M::Invlpga => {
            crate::svm::execute(core, insn)
        }
        _ => Err(Trap::UD),
    }
}

/// #GP(0) outside privilege level 0.
fn require_supervisor(core: &Core) -> Result<(), Trap> {
    if core.cpu.cpl == 0 { Ok(()) } else { Err(Trap::gp(0)) }
}

/// #UD in real and virtual-8086 mode.
fn require_protected(core: &Core) -> Result<(), Trap> {
    if core.protected() { Ok(()) } else { Err(Trap::UD) }
}

/// #GP(0) for user code while CR4.UMIP is set.
fn require_unhidden(core: &Core) -> Result<(), Trap> {
    if core.cpu.cpl > 0 && core.cpu.cr4 & crate::cr4::UMIP != 0 { Err(Trap::gp(0)) } else { Ok(()) }
}
