//! Guest calls and returns by the host's own, so that the host's processor predicts them.
//!
//! A guest CALL is a host CALL; below the host's return address lies, on the host's stack, the guest's. A guest
//! RET compares the address that it found in guest memory with that, and if they are equal the host returns: to
//! code behind the call, which goes on to the block there. If they are not, all such frames are forgotten and the
//! target is looked up.
//!
//! A frame is as good as an entry in the table of indirect jump targets, and holds as long: whenever generated
//! code is left, which every change of a mapping does, the frames are gone. Kernel code does not see those of
//! user code: a frame that nothing returns through lies between, and they are back when user code is.

use super::jump::lookup;
use crate::abi::layout::{FrameSwitch, S0, at, gs};
use crate::abi::stubs::Stubs;
use crate::context::cold::{Cold, ColdKind};
use crate::context::translation::{FlagsAt, Translation};
use crate::guest::flags::ALL;
use dbt_code::{Alu, Cond, Emitter, Enc, Gpr, Mem, Rm, Width};

/// Bytes of frames at most; Rust's own frames lie below.
const MAX_BYTES: i32 = 64 << 10;

impl Translation<'_> {
    /// In a call, with the guest's return address pushed in guest memory: makes the frame's part for the guest.
    /// The host's call is to follow. `target` is where the call leads, if in the same page.
    pub(crate) fn push_frame(&mut self, next: i64, target: Option<i64>) {
        let live = target.map_or(ALL, |target| self.peek(target));
        if live != 0 {
            self.flags_to_memory();
            self.flags = FlagsAt::Memory;
        }
        self.e.alu(Alu::Cmp, Width::B64, Gpr::RSP, Rm::Mem(gs(at!(frames_limit))));
        let field = self.e.jcc(Cond::B);
        let resume = self.e.address();
        self.cold.push(Cold { field, instruction: self.current, kind: ColdKind::DropFrames(resume) });
        let constant = self.fixed_page().map(|page_va| self.tagged(page_va.wrapping_add(next as u64)));
        match constant.map(|va| (va, i32::try_from(va as i64))) {
            Some((_, Ok(va))) => {
                self.e.byte(0x68); // push imm32
                self.e.dword(va as u32);
            }
            Some((va, Err(_))) => {
                self.e.mov_imm(S0, va);
                self.e.push(S0);
            }
            None => {
                self.guest_va(next);
                self.e.push(S0);
            }
        }
    }

    /// What the host returns to, with the flags in memory and the guest's address in [`S0`].
    pub(crate) fn after_call(&mut self, next: i64) {
        self.e.lea(Gpr::RSP, Mem::base(Gpr::RSP, 8));
        if self.fixed_page().is_none() {
            self.lea_ip(S0, Mem::base(S0, -(next as i32)));
            self.e.store(Width::B64, gs(at!(page_va)), S0);
        }
        self.flags = FlagsAt::Memory;
        self.held = None;
        self.edge(next, false);
    }

    /// Returns to the guest address in [`S0`], with the flags in memory.
    pub(crate) fn return_to(&mut self) {
        self.held = None;
        self.poll(ColdKind::Indirect);
        self.tag_target();
        self.e.alu(Alu::Cmp, Width::B64, S0, Rm::Mem(Mem::base(Gpr::RSP, 8)));
        self.e.jcc_to(Cond::NE, self.stubs.return_missed[self.mode.table()]);
        self.e.ret();
    }
}

/// In shared code: a frame that nothing returns through.
fn push_end(e: &mut Emitter, end: u64) {
    e.mov_imm(Gpr::RAX, end);
    e.push(Gpr::RAX);
    e.push(Gpr::RAX);
}

/// In shared code, with RSP where frames may begin: there are none. Uses RAX.
pub(super) fn begin(e: &mut Emitter, stubs: &Stubs) {
    push_end(e, stubs.frames_end);
    for field in [at!(frames), at!(user_frames), at!(frames_bottom)] {
        e.store(Width::B64, gs(field), Gpr::RSP);
    }
    e.lea(Gpr::RAX, Mem::base(Gpr::RSP, -MAX_BYTES));
    e.store(Width::B64, gs(at!(frames_limit)), Gpr::RAX);
}

/// In shared code: puts user code's frames aside. Uses RAX.
pub(super) fn enter_kernel(e: &mut Emitter, stubs: &Stubs) {
    e.store(Width::B64, gs(at!(user_frames)), Gpr::RSP);
    push_end(e, stubs.frames_end);
    e.store(Width::B64, gs(at!(frames)), Gpr::RSP);
}

/// In shared code: has user code's frames back.
pub(super) fn enter_user(e: &mut Emitter) {
    e.load(Gpr::RSP, gs(at!(frames_bottom)));
    e.store(Width::B64, gs(at!(frames)), Gpr::RSP);
    e.load(Gpr::RSP, gs(at!(user_frames)));
}

/// In shared code, before generated code goes on: does what [`FrameSwitch`] says. Uses RAX and the flags.
pub(super) fn switch(e: &mut Emitter, stubs: &Stubs) {
    let place = Rm::Mem(gs(at!(frames_switch)));
    e.op(Enc::one(0x80), Alu::Cmp as u8, place);
    e.byte(FrameSwitch::ToKernel as u8);
    let stay = e.jcc(Cond::B);
    let user = e.jcc(Cond::A);
    enter_kernel(e, stubs);
    let kernel = e.jmp();
    let here = e.address();
    e.link(user, here);
    enter_user(e);
    let here = e.address();
    e.link(kernel, here);
    e.op(Enc::one(0xc6), 0, place);
    e.byte(FrameSwitch::Stay as u8);
    let here = e.address();
    e.link(stay, here);
}

/// Shared code that is jumped to by a return to the address in [`S0`] that has no frame.
pub(super) fn missed(e: &mut Emitter, table: usize, stubs: &Stubs) {
    e.load(Gpr::RSP, gs(at!(frames)));
    let field = lookup(e, table, false);
    e.link(field, stubs.frames_end);
}
