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

use crate::layout::{IBTC_ENTRIES, S0, S1, at, gs};
use crate::stubs::Stubs;
use crate::translate::{Cold, ColdKind, FlagsAt, Translation};
use dbt_code::{Alu, Cond, Emitter, Enc, Gpr, Mem, Rm, Width};

/// Bytes of frames at most; Rust's own frames lie below.
const MOST: i32 = 64 << 10;

/// What is to be done with the frames before generated code goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Switch {
    /// Nothing.
    Stay = 0,
    /// User code is left for the kernel's.
    ToKernel = 1,
    /// The kernel's code is left for a user's.
    ToUser = 2,
}

impl Translation<'_> {
    /// In a call, with the guest's return address pushed in guest memory: makes the frame's part for the guest.
    /// The host's call is to follow. `target` is where the call leads, if in the same page.
    pub(crate) fn push_frame(&mut self, next: i64, target: Option<i64>) {
        let live = target.map_or(crate::flags::ALL, |target| self.peek(target));
        if live != 0 {
            self.flags_to_memory();
            self.flags = FlagsAt::Memory;
        }
        self.e.alu(Alu::Cmp, Width::B64, Gpr::RSP, Rm::Mem(gs(at!(frames_limit))));
        let field = self.e.jcc(Cond::B);
        let resume = self.e.address();
        self.cold.push(Cold { field, instruction: self.current, kind: ColdKind::DropFrames(resume) });
        match self.fixed_page().map(|page_va| i32::try_from(page_va.wrapping_add(next as u64) as i64)) {
            Some(Ok(va)) => {
                self.e.byte(0x68); // push imm32
                self.e.dword(va as u32);
            }
            _ => {
                self.guest_va(next);
                self.e.push(S0);
            }
        }
    }

    /// What the host returns to, with the flags in memory and the guest's address in [`S0`].
    pub(crate) fn after_call(&mut self, next: i64) {
        self.e.lea(Gpr::RSP, Mem::base(Gpr::RSP, 8));
        if self.fixed_page().is_none() {
            self.e.lea(S0, Mem::base(S0, -(next as i32)));
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
        self.e.alu(Alu::Cmp, Width::B64, S0, Rm::Mem(Mem::base(Gpr::RSP, 8)));
        let user = usize::from(self.mode.has(crate::translate::Mode::USER));
        self.e.jcc_to(Cond::NE, self.stubs.return_missed[user]);
        self.e.ret();
    }
}

/// The inline lookup of an indirect jump's target, which is in [`S0`]: leads to the block, or to the address that
/// is to be filled in at the field given.
pub(crate) fn lookup(e: &mut Emitter, user: bool, call: bool) -> u64 {
    if user {
        e.mov(S1, S0);
        e.alu_imm(Alu::And, Width::B64, Rm::Reg(S1.0), -4096);
        e.store(Width::B64, gs(at!(page_va)), S1);
    }
    let table = at!(ibtc) + i32::from(user) * (IBTC_ENTRIES * 16) as i32;
    e.op(Enc::m0f(0xb7), S1.0, Rm::Reg(S0.0)); // movzx r10d, r9w
    e.alu(Alu::Add, Width::B32, S1, Rm::Reg(S1.0));
    e.alu(Alu::Cmp, Width::B64, S0, Rm::Mem(Mem::gs_indexed(S1, 3, table)));
    let field = e.jcc(Cond::NE);
    let target = Rm::Mem(Mem::gs_indexed(S1, 3, table + 8));
    if call {
        e.call_rm(target);
    } else {
        e.jmp_rm(target);
    }
    field
}

/// In shared code: a frame that nothing returns through.
fn push_end(e: &mut Emitter, end: u64) {
    e.mov_imm(Gpr::RAX, end);
    e.push(Gpr::RAX);
    e.push(Gpr::RAX);
}

/// In shared code, with RSP where frames may begin: there are none. Uses RAX.
pub(crate) fn begin(e: &mut Emitter, stubs: &Stubs) {
    push_end(e, stubs.frames_end);
    for field in [at!(frames), at!(user_frames), at!(frames_bottom)] {
        e.store(Width::B64, gs(field), Gpr::RSP);
    }
    e.lea(Gpr::RAX, Mem::base(Gpr::RSP, -MOST));
    e.store(Width::B64, gs(at!(frames_limit)), Gpr::RAX);
}

/// In shared code: puts user code's frames aside. Uses RAX.
pub(crate) fn enter_kernel(e: &mut Emitter, stubs: &Stubs) {
    e.store(Width::B64, gs(at!(user_frames)), Gpr::RSP);
    push_end(e, stubs.frames_end);
    e.store(Width::B64, gs(at!(frames)), Gpr::RSP);
}

/// In shared code: has user code's frames back.
pub(crate) fn enter_user(e: &mut Emitter) {
    e.load(Gpr::RSP, gs(at!(frames_bottom)));
    e.store(Width::B64, gs(at!(frames)), Gpr::RSP);
    e.load(Gpr::RSP, gs(at!(user_frames)));
}

/// In shared code, before generated code goes on: does what [`Switch`] says. Uses RAX and the flags.
pub(crate) fn switch(e: &mut Emitter, stubs: &Stubs) {
    let place = Rm::Mem(gs(at!(frames_switch)));
    e.op(Enc::one(0x80), Alu::Cmp as u8, place);
    e.byte(Switch::ToKernel as u8);
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
    e.byte(Switch::Stay as u8);
    let here = e.address();
    e.link(stay, here);
}

/// Shared code that is jumped to by a return to the address in [`S0`] that has no frame.
pub(crate) fn missed(e: &mut Emitter, user: bool, stubs: &Stubs) {
    e.load(Gpr::RSP, gs(at!(frames)));
    let field = lookup(e, user, false);
    e.link(field, stubs.frames_end);
}
