//! Which arithmetic flags instructions need and make: the liveness that says when the host's flags may be
//! clobbered.

use super::class::Class;
use super::info::{CodeInfo, code_info};
use iced_x86::{Decoder, FlowControl, Instruction, Mnemonic, OpKind, Register, RflagsBits};
use x86_interp::DECODER_OPTIONS;

/// Instructions that are looked at behind a jump, to see which flags are live there.
const MAX_PEEK: usize = 6;

/// A set of arithmetic flags, in iced-x86's bits.
pub(crate) type Flags = u8;

/// All six.
pub(crate) const ALL: Flags =
    (RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF)
        as Flags;

/// The flags that an instruction reads and those that it certainly overwrites.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Effect {
    pub(crate) reads: Flags,
    pub(crate) writes: Flags,
    /// It may leave as they were some flags that it is said to write.
    pub(crate) conditional: bool,
}

/// What `insn` does to the flags.
pub(crate) fn effect(insn: &Instruction, info: &CodeInfo) -> Effect {
    let reads = insn.rflags_read() as Flags & ALL;
    let writes = insn.rflags_modified() as Flags & ALL;
    match info.class {
        // What the interpreter does may be seen by others, with all flags: an interrupt, a debugger.
        Class::Interpret | Class::Syscall | Class::Sysret => {
            return Effect { reads: ALL, writes, conditional: true };
        }
        Class::Nop => return Effect::default(),
        _ => {}
    }
    if turns_fully(insn) {
        return Effect { reads: ALL, writes: (RflagsBits::OF | RflagsBits::CF) as Flags, conditional: true };
    }
    let by_cl = insn.op_count() > 0
        && insn.op_kind(insn.op_count() - 1) == OpKind::Register
        && insn.op_register(insn.op_count() - 1) == Register::CL
        && is_shift(insn.mnemonic());
    let conditional = writes != 0 && (by_cl || matches!(insn.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr));
    Effect { reads, writes, conditional }
}

/// Whether the instruction is RCL or RCR of 8 or 16 bits by an immediate count that turns them all the way round:
/// iced-x86 has it leave the flags alone, but processors write OF from CF and the result.
fn turns_fully(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr)
        && insn.op_kind(1) == OpKind::Immediate8
        && insn.immediate8() & 0x1f != 0
        && insn.rflags_modified() == RflagsBits::NONE
}

fn is_shift(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    )
}

impl Effect {
    /// The flags live before the instruction, given those after.
    pub(crate) fn before(self, after: Flags) -> Flags {
        if self.conditional { after | self.reads } else { after & !self.writes | self.reads }
    }

    /// Whether the host's flags must be the guest's when the instruction executes: it reads some, or leaves
    /// some as they are that are needed later while it writes others.
    pub(crate) fn needs_host(self, after: Flags) -> bool {
        let kept = if self.conditional { after } else { after & !self.writes };
        self.reads != 0 || (self.writes != 0 && kept != 0)
    }
}

/// The flags that may be live where `code` of `bits` bits is entered, and how many bytes of it say so.
pub(crate) fn live_at(bits: u32, code: &[u8], ip: u64) -> (Flags, usize) {
    let mut live = ALL;
    let mut killed: Flags = 0;
    let mut decoder = Decoder::with_ip(bits, code, ip, DECODER_OPTIONS);
    let mut needed: Flags = 0;
    for _ in 0..MAX_PEEK {
        let insn = decoder.decode();
        if insn.is_invalid() {
            break;
        }
        let info = code_info(&insn);
        let effect = effect(&insn, info);
        needed |= effect.reads & !killed;
        if !effect.conditional {
            killed |= effect.writes;
        }
        live = (ALL & !killed) | needed;
        if killed | needed == ALL || insn.flow_control() != FlowControl::Next {
            break;
        }
    }
    (live, decoder.position())
}
