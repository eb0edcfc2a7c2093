//! Control words, environments, and what else is done without a stub.

use crate::operand::{self, check_available, check_pending};
use crate::stub::Class;
use crate::{engine, environment, save, simd_exception, x87, xsave};
use iced_x86::{Code, Instruction};
use x86_core::{Core, Trap, cr0, reg};

/// Whether [`execute`] knows `code`.
pub(crate) fn handles(code: Code) -> bool {
    use Code::*;
    matches!(
        code,
        Wait | Fnstcw_m2byte
            | Fldcw_m2byte
            | Fnstsw_m2byte
            | Fnstsw_AX
            | Fnclex
            | Fninit
            | Fneni
            | Fndisi
            | Fnsetpm
            | Fnstenv_m14byte
            | Fnstenv_m28byte
            | Fldenv_m14byte
            | Fldenv_m28byte
            | Fnsave_m94byte
            | Fnsave_m108byte
            | Frstor_m94byte
            | Frstor_m108byte
            | Emms
            | Ldmxcsr_m32
            | Stmxcsr_m32
            | VEX_Vldmxcsr_m32
            | VEX_Vstmxcsr_m32
            | VEX_Vzeroupper
            | VEX_Vzeroall
            | Movnti_m32_r32
            | Movnti_m64_r64
            | Fxsave_m512byte
            | Fxsave64_m512byte
            | Fxrstor_m512byte
            | Fxrstor64_m512byte
    ) || xsave::handles(code)
}

/// Executes one of these.
pub(crate) fn execute(core: &mut Core, insn: &Instruction) -> Result<(), Trap> {
    use Code::*;
    let code = insn.code();
    if code != Wait {
        engine::require(core, insn)?;
    }
    match code {
        Wait => {
            let both = cr0::MP | cr0::TS;
            if core.cpu.cr0 & both == both {
                return Err(Trap::NM);
            }
            check_pending(core)?;
        }
        Emms => {
            check_available(core, Class::Mmx)?;
            check_pending(core)?;
            x87::leave_mmx(&mut core.cpu.x87);
        }
        Ldmxcsr_m32 | Stmxcsr_m32 | VEX_Vldmxcsr_m32 | VEX_Vstmxcsr_m32 => mxcsr(core, insn)?,
        VEX_Vzeroupper | VEX_Vzeroall => {
            check_available(core, Class::Avx)?;
            // In other modes there are 8 registers.
            let count = if operand::long_code(core) { 16 } else { 8 };
            let from = if code == VEX_Vzeroall { 0 } else { 16 };
            core.cpu.vectors[..count].iter_mut().for_each(|vector| vector.0[from..].fill(0));
        }
        // No bit of CR0 or CR4 bears on it.
        Movnti_m32_r32 | Movnti_m64_r64 => {
            let address = x86_core::effective_address(core.cpu, insn, 0);
            let register = insn.op1_register().full_register() as usize - iced_x86::Register::RAX as usize;
            let value = core.cpu.regs[register].to_le_bytes();
            operand::write(core, address, &value[..if code == Movnti_m32_r32 { 4 } else { 8 }])?;
        }
        Fxsave_m512byte | Fxsave64_m512byte => save::fxsave(core, insn)?,
        Fxrstor_m512byte | Fxrstor64_m512byte => save::fxrstor(core, insn)?,
        _ if xsave::handles(code) => xsave::execute(core, insn)?,
        _ => x87_control(core, insn)?,
    }
    Ok(())
}

/// LDMXCSR and STMXCSR.
fn mxcsr(core: &mut Core, insn: &Instruction) -> Result<(), Trap> {
    let vex = matches!(insn.code(), Code::VEX_Vldmxcsr_m32 | Code::VEX_Vstmxcsr_m32);
    check_available(core, if vex { Class::Avx } else { Class::Sse })?;
    let (seg, offset) = x86_core::effective_address(core.cpu, insn, 0);
    if matches!(insn.code(), Code::Stmxcsr_m32 | Code::VEX_Vstmxcsr_m32) {
        return core.write(seg, offset, core.cpu.mxcsr);
    }
    let value: u32 = core.read(seg, offset)?;
    if value & !simd_exception::MXCSR_MASK != 0 {
        return Err(Trap::gp(0));
    }
    core.cpu.mxcsr = value;
    Ok(())
}

/// x87 instructions that are no arithmetic.
fn x87_control(core: &mut Core, insn: &Instruction) -> Result<(), Trap> {
    use Code::*;
    check_available(core, Class::X87)?;
    let address = |core: &Core| x86_core::effective_address(core.cpu, insn, 0);
    match insn.code() {
        Fnstcw_m2byte => {
            let (seg, offset) = address(core);
            core.write(seg, offset, x87::control(&core.cpu.x87))?;
        }
        Fldcw_m2byte => {
            check_pending(core)?;
            let (seg, offset) = address(core);
            let value = core.read(seg, offset)?;
            x87::set_control(&mut core.cpu.x87, value);
            x87::summarize(&mut core.cpu.x87);
        }
        Fnstsw_m2byte => {
            let (seg, offset) = address(core);
            core.write(seg, offset, x87::status_word(&core.cpu.x87))?;
        }
        Fnstsw_AX => {
            let rax = &mut core.cpu.regs[reg::RAX];
            *rax = *rax & !0xffff | u64::from(x87::status_word(&core.cpu.x87));
        }
        Fnclex => {
            use x87::status::{B, ES, EXCEPTIONS, SF};
            let status = x87::status_word(&core.cpu.x87);
            x87::set_status(&mut core.cpu.x87, status & !(EXCEPTIONS | SF | ES | B));
        }
        Fninit => {
            // The registers keep their contents, and are named from physical 0 again.
            x87::enter_mmx(&mut core.cpu.x87);
            x87::init(&mut core.cpu.x87);
        }
        // Of the 8087 and 80287; no operations since the 80387.
        Fneni | Fndisi | Fnsetpm => {}
        Fnstenv_m14byte | Fnstenv_m28byte => environment::store(core, address(core), insn)?,
        Fldenv_m14byte | Fldenv_m28byte => {
            check_pending(core)?;
            environment::load(core, address(core), insn)?;
        }
        Fnsave_m94byte | Fnsave_m108byte => environment::save(core, address(core), insn)?,
        Frstor_m94byte | Frstor_m108byte => {
            check_pending(core)?;
            environment::restore(core, address(core), insn)?;
        }
        _ => return Err(Trap::UD),
    }
    Ok(())
}
