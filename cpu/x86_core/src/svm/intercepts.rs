//! Which instructions of a guest are intercepted (AMD APM volume 2, 15.9): those of the processor's system
//! instructions, before they are executed. Exceptions that come before the intercept are found here too.

use super::{Exit, code};
use crate::cpuid::feature;
use crate::transfers::TaskSwitch;
use crate::{Core, Trap, cr0, cr4, effective_address, flags, reg, vector};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// EXITINFO1 of an access to a control or debug register: the general register's number is there.
const IS_MOV: u64 = 1 << 63;

/// A #VMEXIT if instructions of that code are intercepted.
pub(super) fn instruction(core: &mut Core<'_>, insn: &Instruction, code: u64) -> Result<(), Trap> {
    instruction_with(core, insn, Exit::plain(code))
}

/// The same with information about it.
pub(super) fn instruction_with(core: &mut Core<'_>, insn: &Instruction, exit: Exit) -> Result<(), Trap> {
    if core.cpu.svm.intercepts(exit.code) {
        return Err(leave(core, insn, exit));
    }
    Ok(())
}

fn leave(core: &mut Core<'_>, insn: &Instruction, exit: Exit) -> Trap {
    core.cpu.svm.exit = Exit { next_rip: insn.next_ip(), ..exit };
    Trap::Intercepted
}

/// Looks whether a system instruction of a guest is intercepted. To be called in guest mode.
#[cold]
pub(crate) fn check(core: &mut Core<'_>, insn: &Instruction) -> Result<(), Trap> {
    use Mnemonic as M;
    let cpu = &*core.cpu;
    let supervisor = cpu.cpl == 0;
    let unhidden = supervisor || cpu.cr4 & cr4::UMIP == 0;
    let protected = core.protected();
    let code = match insn.mnemonic() {
        M::Mov if supervisor => return moves(core, insn),
        M::Lmsw | M::Clts if supervisor => return status_word(core, insn),
        M::Smsw if unhidden => code::CR_READ,
        M::Sidt if unhidden => code::IDTR_READ,
        M::Sgdt if unhidden => code::GDTR_READ,
        M::Sldt if unhidden && protected => code::LDTR_READ,
        M::Str if unhidden && protected => code::TR_READ,
        M::Lidt if supervisor => code::IDTR_WRITE,
        M::Lgdt if supervisor => code::GDTR_WRITE,
        M::Lldt if supervisor && protected => code::LDTR_WRITE,
        M::Ltr if supervisor && protected => code::TR_WRITE,
        M::Rdtsc if supervisor || cpu.cr4 & cr4::TSD == 0 => code::RDTSC,
        M::Rdtscp if (supervisor || cpu.cr4 & cr4::TSD == 0) && cpu.model.has(feature::RDTSCP) => {
            code::RDTSCP
        }
        M::Rdpmc if supervisor || cpu.cr4 & cr4::PCE != 0 => code::RDPMC,
        M::Pushf | M::Pushfd | M::Pushfq => code::PUSHF,
        M::Popf | M::Popfd | M::Popfq => code::POPF,
        M::Iret | M::Iretd | M::Iretq => code::IRET,
        M::Cpuid => code::CPUID,
        M::Int => {
            let exit = Exit { info1: u64::from(insn.immediate8()), ..Exit::plain(code::SWINT) };
            return instruction_with(core, insn, exit);
        }
        M::Int1 => {
            instruction(core, insn, code::ICEBP)?;
            code::EXCEPTION + u64::from(vector::DB)
        }
        M::Int3 => code::EXCEPTION + u64::from(vector::BP),
        M::Into if cpu.rflags & flags::OF != 0 && !cpu.long64 => code::EXCEPTION + u64::from(vector::OF),
        M::Hlt if supervisor => code::HLT,
        // The intercept comes before the #UD outside system management mode.
        M::Rsm => code::RSM,
        M::Invd if supervisor => code::INVD,
        M::Wbinvd | M::Wbnoinvd if supervisor => code::WBINVD,
        M::Invlpg if supervisor => {
            let (_, info1) = effective_address(core.cpu, insn, 0);
            return instruction_with(core, insn, Exit { info1, ..Exit::plain(code::INVLPG) });
        }
        M::Invpcid if supervisor && cpu.model.has(feature::INVPCID) => return context(core, insn),
        M::Xsetbv if supervisor && cpu.cr4 & cr4::OSXSAVE != 0 => code::XSETBV,
        M::Rdmsr | M::Wrmsr if supervisor => return registers(core, insn),
        _ => return Ok(()),
    };
    instruction(core, insn, code)
}

/// INVPCID at CPL 0: the exit tells where the descriptor is, and the type.
fn context(core: &mut Core<'_>, insn: &Instruction) -> Result<(), Trap> {
    if insn.op1_kind() != OpKind::Memory || !core.cpu.svm.intercepts(code::INVPCID) {
        return Ok(());
    }
    let (seg, offset) = effective_address(core.cpu, insn, 1);
    let info1 = core.linear(seg, offset, 16, false)?;
    let mask = if core.cpu.long64 { u64::MAX } else { 0xffff_ffff };
    let info2 = core.cpu.regs[insn.op0_register().number()] & mask;
    Err(leave(core, insn, Exit { info1, info2, ..Exit::plain(code::INVPCID) }))
}

/// MOV to and from control and debug registers at CPL 0.
fn moves(core: &mut Core<'_>, insn: &Instruction) -> Result<(), Trap> {
    let (to, from) = (insn.op0_register(), insn.op1_register());
    if insn.op0_kind() != OpKind::Register || insn.op1_kind() != OpKind::Register {
        return Ok(());
    }
    let (special, general, write) = if to.is_cr() || to.is_dr() {
        (to, from, true)
    } else if from.is_cr() || from.is_dr() {
        (from, to, false)
    } else {
        return Ok(());
    };
    let number = special.number() as u64;
    let info1 = IS_MOV | general.number() as u64;
    if special.is_dr() {
        if number > 7 || (matches!(number, 4 | 5) && core.cpu.cr4 & cr4::DE != 0) {
            return Ok(());
        }
        let code = if write { code::DR_WRITE } else { code::DR_READ } + number;
        return instruction_with(core, insn, Exit { info1, ..Exit::plain(code) });
    }
    if !matches!(number, 0 | 2 | 3 | 4 | 8) {
        return Ok(());
    }
    if special == Register::CR0 && write {
        let value = core.cpu.regs[general.number()] & if core.cpu.long64 { u64::MAX } else { 0xffff_ffff };
        let changed = (core.cpu.cr0 ^ value) & !(cr0::TS | cr0::MP);
        return write_cr0(core, insn, changed, info1);
    }
    let code = if write { code::CR_WRITE } else { code::CR_READ } + number;
    instruction_with(core, insn, Exit { info1, ..Exit::plain(code) })
}

/// LMSW and CLTS at CPL 0.
fn status_word(core: &mut Core<'_>, insn: &Instruction) -> Result<(), Trap> {
    if insn.mnemonic() == Mnemonic::Clts {
        return instruction(core, insn, code::CR_WRITE);
    }
    if core.cpu.svm.intercepts(code::CR0_SEL_WRITE) || core.cpu.svm.intercepts(code::CR_WRITE) {
        let low = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
        let word = if insn.op0_kind() == OpKind::Register {
            core.cpu.regs[insn.op0_register().number()]
        } else {
            let (seg, offset) = effective_address(core.cpu, insn, 0);
            u64::from(core.read::<u16>(seg, offset)?)
        };
        let value = core.cpu.cr0 & !low | word & low | core.cpu.cr0 & cr0::PE;
        return write_cr0(core, insn, core.cpu.cr0 ^ value, 0);
    }
    Ok(())
}

/// A write of CR0. There is an intercept of its own for those that change something; what `changed` has of TS and MP
/// counts for LMSW alone, and is taken away by who calls this for MOV. That of all writes comes first.
fn write_cr0(core: &mut Core<'_>, insn: &Instruction, changed: u64, info1: u64) -> Result<(), Trap> {
    instruction_with(core, insn, Exit { info1, ..Exit::plain(code::CR_WRITE) })?;
    if changed != 0 {
        instruction_with(core, insn, Exit { info1, ..Exit::plain(code::CR0_SEL_WRITE) })?;
    }
    Ok(())
}

/// RDMSR and WRMSR at CPL 0.
fn registers(core: &mut Core<'_>, insn: &Instruction) -> Result<(), Trap> {
    let write = insn.mnemonic() == Mnemonic::Wrmsr;
    let msr = core.cpu.regs[reg::RCX] as u32;
    if core.cpu.svm.intercepts(code::MSR) && core.msr_is_mapped(msr, write) {
        return Err(leave(core, insn, Exit { info1: u64::from(write), ..Exit::plain(code::MSR) }));
    }
    Ok(())
}

/// An access to ports.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PortAccess {
    pub(crate) port: u16,
    /// In bytes.
    pub(crate) size: u16,
    pub(crate) input: bool,
    /// Whether this is INS or OUTS.
    pub(crate) string: bool,
}

impl Core<'_> {
    /// A #VMEXIT if the guest's access to ports is intercepted. The processor's own checks come before.
    pub(crate) fn check_port_intercept(
        &mut self,
        insn: &Instruction,
        access: PortAccess,
    ) -> Result<(), Trap> {
        if !self.cpu.svm.intercepts(code::IOIO) || !self.port_is_mapped(access.port, access.size) {
            return Ok(());
        }
        let mut info1 = u64::from(access.port) << 16
            | u64::from(access.input)
            | u64::from(access.string) << 2
            | u64::from(access.size) << 4;
        if access.string {
            let repeated = insn.has_rep_prefix() || insn.has_repne_prefix();
            let operand = u32::from(!access.input);
            let (seg, _) = effective_address(self.cpu, insn, operand);
            let address = match insn.op_kind(operand) {
                OpKind::MemoryESDI | OpKind::MemorySegSI => 1,
                OpKind::MemoryESEDI | OpKind::MemorySegESI => 2,
                _ => 4,
            };
            info1 |= u64::from(repeated) << 3 | address << 7 | (seg as u64) << 10;
        }
        let info2 = insn.next_ip();
        Err(leave(self, insn, Exit { info1, info2, ..Exit::plain(code::IOIO) }))
    }

    /// A #VMEXIT if the guest's task switches are intercepted (AMD APM volume 2, 15.14.1).
    pub(crate) fn check_task_switch_intercept(&mut self, tss: u16, source: TaskSwitch) -> Result<(), Trap> {
        if !self.cpu.svm.intercepts(code::TASK_SWITCH) {
            return Ok(());
        }
        let cause = match source {
            TaskSwitch::Return => 1 << 36,
            TaskSwitch::Jump => 1 << 38,
            TaskSwitch::Interrupt { error: Some(error) } => 1 << 44 | u64::from(error),
            TaskSwitch::Interrupt { error: None } | TaskSwitch::Call => 0,
        };
        let resume = (self.cpu.rflags & flags::RF) << (48 - 16);
        let exit = Exit { info1: u64::from(tss), info2: cause | resume, ..Exit::plain(code::TASK_SWITCH) };
        self.cpu.svm.exit = exit;
        Err(Trap::Intercepted)
    }

    /// PAUSE: a #VMEXIT if it is intercepted, unless the filter lets it pass (AMD APM volume 2, 15.14.4).
    ///
    /// # Errors
    /// The #VMEXIT.
    pub fn check_pause_intercept(&mut self, insn: &Instruction) -> Result<(), Trap> {
        if !self.cpu.svm.intercepts(code::PAUSE) {
            return Ok(());
        }
        let now = self.platform.tsc();
        let control = &mut self.cpu.svm.control;
        if control.pause_filter != 0 {
            let since = now.wrapping_sub(control.last_pause);
            control.last_pause = now;
            if control.pause_threshold != 0 && since > u64::from(control.pause_threshold) {
                control.pauses_left = control.pause_filter;
            }
            if control.pauses_left > 0 {
                control.pauses_left -= 1;
                return Ok(());
            }
        }
        Err(leave(self, insn, Exit::plain(code::PAUSE)))
    }
}
