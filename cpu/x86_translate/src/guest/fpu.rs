//! What is known of x87 and MMX instructions.

use super::class::Class;
use super::operand::{has_memory, is_mmx};
use iced_x86::{Code, CpuidFeature, Instruction, OpKind};

/// Which state an instruction needs in the host's unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    None,
    /// An x87 instruction; whether it becomes the last instruction that FIP and the like tell of.
    X87 {
        recorded: bool,
    },
    Mmx,
}

fn is_x87(code: Code) -> bool {
    use CpuidFeature::{FPU, FPU287, FPU387};
    code.cpuid_features().iter().any(|feature| matches!(feature, FPU | FPU287 | FPU387))
}

/// The unit that instructions of `code` need.
pub(crate) fn unit_of(code: Code) -> Unit {
    if is_x87(code) {
        Unit::X87 { recorded: x86_fpu::is_recorded(code) }
    } else if code == Code::Emms || code.op_code().op_kinds().iter().any(|kind| is_mmx(*kind)) {
        Unit::Mmx
    } else {
        Unit::None
    }
}

/// How an x87 instruction is translated; `None` if it is no such instruction.
pub(crate) fn classify(insn: &Instruction) -> Option<Class> {
    use Code as C;
    let code = insn.code();
    if !is_x87(code) {
        return None;
    }
    Some(match code {
        // Nothing is ever pending.
        C::Wait | C::Fneni | C::Fndisi | C::Fnsetpm => Class::Nop,
        C::Fldcw_m2byte => Class::Fldcw,
        C::Fninit => Class::Fninit,
        C::Fnstenv_m14byte
        | C::Fnstenv_m28byte
        | C::Fldenv_m14byte
        | C::Fldenv_m28byte
        | C::Fnsave_m94byte
        | C::Fnsave_m108byte
        | C::Frstor_m94byte
        | C::Frstor_m108byte => Class::Interpret,
        _ if !code.op_code().is_instruction() => Class::Interpret,
        _ if has_memory(insn) => Class::Generic,
        _ => Class::Verbatim,
    })
}

/// Whether an instruction with MMX registers is translated.
pub(crate) fn mmx_fits(insn: &Instruction) -> bool {
    // CVTPI2PS of memory and its like say nothing of whether the unit goes to MMX mode.
    insn.code() == Code::Emms
        || (0..insn.op_count()).any(|op| insn.op_kind(op) == OpKind::Register && insn.op_register(op).is_mm())
}
