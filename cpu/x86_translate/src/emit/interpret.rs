//! Instructions that are left to the interpreter.

use crate::abi::calls::InterpretInfo;
use crate::context::translation::{FlagsAt, Translation};
use crate::guest::mode::Mode;
use dbt_code::Emitter;
use iced_x86::Instruction;

impl Translation<'_> {
    /// Leaves the instruction to the interpreter.
    pub(crate) fn interpret(&mut self, index: usize, last: bool) {
        if self.guest[index].live != 0 {
            self.flags_to_memory();
        }
        self.e.call_to(self.stubs.interpret);
        let resume = !(last && self.guest[index].ends_block());
        let delta = if resume { size_of::<InterpretInfo>() as i32 } else { 0 };
        let insn = self.guest[index].insn;
        let left = self.left(index);
        write_interpret_info(self.e, &mut self.kept, insn, delta, self.mode, left);
        self.flags = FlagsAt::Both;
        self.held = None;
    }
}

/// Writes what follows a call to have `insn` interpreted; `resume` is where to go on, from there, and `left` how many
/// instructions of the block there are from this one on.
pub(crate) fn write_interpret_info(
    e: &mut Emitter,
    kept: &mut Vec<Box<Instruction>>,
    insn: Instruction,
    resume: i32,
    mode: Mode,
    left: u8,
) {
    let insn = Box::new(insn);
    let relative = u16::from(mode.is_relative());
    let info = InterpretInfo { insn: &raw const *insn, resume, relative, left: left.into() };
    kept.push(insn);
    info.write(e);
}
