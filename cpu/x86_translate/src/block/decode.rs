//! Decoding of a block: what is in it, in which way each instruction is translated, which flags are live where.

use crate::context::input::Input;
use crate::context::insn::{GuestInsn, Plan};
use crate::context::translation::Translation;
use crate::emit::rewrite::registers_fit;
use crate::guest::class::Class;
use crate::guest::encoding::Raw;
use crate::guest::flags::{ALL, Effect, effect};
use crate::guest::fpu::{Unit, mmx_fits};
use crate::guest::info::{CodeInfo, code_info};
use crate::guest::mode::Mode;
use crate::guest::operand::has_memory;
use iced_x86::{Decoder, FlowControl, Instruction, Mnemonic, OpKind, Register};
use x86_interp::{DECODER_OPTIONS, widen};

/// Instructions in a block at most, whatever is asked for.
pub(crate) const MAX_INSTRUCTIONS: usize = 64;

impl Translation<'_> {
    /// Decodes the block; gives where it ends in the page.
    pub(super) fn decode(&mut self, input: &Input<'_>) -> Option<u16> {
        let offset = input.offset;
        let start = usize::from(offset);
        let bits = self.mode.bits();
        let ip = self.page_va.wrapping_add(u64::from(offset)) & self.mode.ip_mask();
        let limit = if input.next_page.is_some() { self.page.len() } else { usize::from(input.end) };
        let mut decoder = Decoder::with_ip(bits, &self.page[start..limit], ip, DECODER_OPTIONS);
        let mut at = start;
        let mut side_exits = 0;
        let most = if input.next_page.is_some() { 1 } else { self.settings.max_instructions };
        while self.guest.len() < most && at < usize::from(input.end) {
            if at != start && self.stops.binary_search(&(at as u16)).is_ok() {
                break;
            }
            let mut insn = decoder.decode();
            if decoder.last_error() == iced_x86::DecoderError::NoMoreBytes {
                break;
            }
            let len = insn.len();
            let bytes = &self.page[at..at + len];
            widen(&mut insn, bytes);
            let info = code_info(&insn);
            let raw = Raw::parse(bytes, info, bits);
            let mut class = info.class;
            if raw.is_none_or(|raw| !self.can_translate(&insn, info, &raw)) || !(input.has)(&insn) {
                class = Class::Interpret;
            }
            if class == Class::Generic
                && matches!(insn.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
                && has_memory(&insn)
                && insn.op1_kind() == OpKind::Register
            {
                class = Class::BitString;
            }
            let mut described = effect(&insn, info);
            if self.settings.strict && insn.rflags_undefined() != 0 {
                // The host may leave such flags as they are: they must be the guest's.
                described.reads = ALL;
            }
            if class == Class::Interpret {
                described = Effect { reads: ALL, conditional: true, ..described };
            }
            self.guest.push(GuestInsn {
                insn,
                info,
                class,
                raw,
                offset: at as u16,
                effect: described,
                live: ALL,
                live_after: ALL,
                plans: [Plan::Single; 2],
                fpu_last: None,
            });
            at += len;
            match insn.flow_control() {
                FlowControl::Next if insn.mnemonic() == Mnemonic::Hlt => break,
                FlowControl::Next => {}
                FlowControl::ConditionalBranch
                    if class == Class::Jcc && side_exits < self.settings.side_exits =>
                {
                    side_exits += 1;
                }
                _ => break,
            }
        }
        if let Some(last) = self.guest.last_mut()
            && last.class == Class::Sti
        {
            // Interrupts wait for the end of the next instruction, which is not here.
            last.class = Class::Interpret;
            last.effect = Effect { reads: ALL, conditional: true, ..last.effect };
        }
        self.depends.push((offset, at as u16));
        (!self.guest.is_empty()).then_some(at as u16)
    }

    /// Whether the instruction is translated at all, as far as that hangs on its operands.
    fn can_translate(&self, insn: &Instruction, info: &CodeInfo, raw: &Raw) -> bool {
        let memory = has_memory(insn);
        let bits = self.mode.bits();
        if info.vex && self.mode.has(Mode::REAL) || info.unit != Unit::None && self.linear_pointers() {
            return false;
        }
        if info.unit != Unit::None && self.mode.has(Mode::NO_X87) || info.unit == Unit::Mmx && !mmx_fits(insn)
        {
            return false;
        }
        let off = match info {
            CodeInfo { wide: true, .. } => Mode::NO_AVX512,
            CodeInfo { vex: true, .. } => Mode::NO_AVX,
            _ => Mode::NO_VECTOR,
        };
        if info.vector && (self.mode.has(off) || bits != 64 && !fits_short_code(insn, info)) {
            return false;
        }
        let intercepted = matches!(info.class, Class::Pushf | Class::Popf | Class::Iret | Class::Rdtsc);
        if intercepted && self.mode.has(Mode::INTERCEPTS) {
            return false;
        }
        match info.class {
            Class::Interpret => return false,
            Class::Nop | Class::Verbatim | Class::Cld | Class::Std | Class::IncDec | Class::Fninit => {
                return true;
            }
            Class::Jmp | Class::Jcc => return !raw.p66,
            Class::Leave => return !raw.p66 && bits != 16 && !self.mode.has(Mode::STACK16),
            Class::Moffs => return bits != 64 && !raw.p67 && self.address_of(insn).is_some(),
            Class::PushImm | Class::Ret | Class::Call => return !raw.p66,
            Class::Syscall => return bits == 64 && self.mode.has(Mode::USER),
            Class::Sysret => return bits == 64 && !self.mode.has(Mode::USER),
            Class::Cli | Class::Sti => return !self.mode.has(Mode::USER) && !raw.p66,
            Class::Popf => return !self.mode.has(Mode::USER) && !raw.p66 && bits != 16,
            Class::Iret | Class::Swapgs => {
                return bits == 64 && !self.mode.has(Mode::USER) && !raw.p66;
            }
            Class::Stac | Class::Clac => return !self.mode.has(Mode::USER) && self.mode.has(Mode::SMAP),
            Class::Pushf => return !raw.p66 && bits != 16,
            Class::MovSeg => return insn.op0_kind() == OpKind::Register,
            Class::Rdtsc => return true,
            Class::Movs | Class::Stos | Class::Lods | Class::Scas => {
                let once = matches!(info.class, Class::Lods | Class::Scas);
                let repeats = raw.rep == 0xf2 || once && raw.rep != 0;
                return !raw.p67 && !repeats && self.string_fits(insn, info.class);
            }
            _ => {}
        }
        if raw.p66
            && matches!(info.class, Class::Push | Class::Pop | Class::CallIndirect | Class::JmpIndirect)
        {
            return false;
        }
        if info.class == Class::CallIndirect
            && !memory
            && insn.op0_register().full_register() == Register::RSP
        {
            return false;
        }
        if info.class == Class::Pop && bits == 16 && insn.op0_register() == Register::SP {
            // The carry out of SP may count.
            return false;
        }
        let addressed = memory || info.class == Class::Lea;
        if addressed && (raw.p67 && bits != 16 || self.address_of(insn).is_none()) {
            return false;
        }
        if info.class == Class::Lea {
            return true;
        }
        if memory && !matches!(insn.memory_size().size(), 1..=64) {
            return false;
        }
        if matches!(insn.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
            && memory
            && insn.op1_kind() == OpKind::Register
        {
            // Handled in a way of its own, which needs a slot of the address.
            let free = self.address_of(insn).is_some_and(|ea| ea.slots[1].is_none() && ea.constant.is_none());
            return free && !insn.op1_register().is_gpr16();
        }
        registers_fit(insn, info, memory)
    }

    /// Whether FIP and FDP are not offsets, or instructions of 16-bit code.
    fn linear_pointers(&self) -> bool {
        self.mode.has(Mode::REAL) || self.mode.bits() == 16
    }

    /// Whether a string instruction is translated in this mode and with these segments.
    fn string_fits(&self, insn: &Instruction, class: Class) -> bool {
        if matches!(class, Class::Lods | Class::Scas) && self.mode.bits() != 64 {
            // Like any access.
            return true;
        }
        if self.mode.bits() == 64 {
            return !matches!(insn.segment_prefix(), Register::FS | Register::GS);
        }
        let source = class == Class::Stos
            || match insn.memory_segment() {
                Register::DS => self.mode.has(Mode::DS_FLAT),
                Register::SS => self.mode.has(Mode::SS_FLAT),
                Register::ES => self.mode.has(Mode::ES_FLAT),
                _ => false,
            };
        self.mode.bits() == 32 && source && self.mode.has(Mode::ES_FLAT)
    }

    /// Finds the flags live before and after each instruction of the block, which ends at `end`.
    pub(super) fn liveness(&mut self, end: u16) {
        let last = self.guest.len() - 1;
        let mut live = match self.guest[last].class {
            _ if self.settings.strict => ALL,
            Class::Jcc => self.peek(i64::from(end)),
            Class::Jmp => self.peek(self.target(last)),
            _ if self.guest[last].ends_block() => ALL,
            _ => self.peek(i64::from(end)),
        };
        for index in (0..=last).rev() {
            if self.guest[index].class == Class::Jcc {
                live |= self.peek(self.target(index));
            }
            let guest = &mut self.guest[index];
            guest.live_after = live;
            live = guest.effect.before(live);
            if self.settings.strict {
                live = ALL;
            }
            self.guest[index].live = live;
        }
    }
}

/// Whether an instruction with vector registers means the same when it is written again for 64-bit mode: in other modes
/// some bits of VEX and EVEX do not count (W of general registers, the high bit of a register in an immediate), and there
/// are fewer registers.
fn fits_short_code(insn: &Instruction, info: &CodeInfo) -> bool {
    use iced_x86::OpCodeOperandKind::{xmm_is4, ymm_is4};
    let kinds = insn.code().op_code().op_kinds();
    let plain = info.operands.iter().all(Option::is_none)
        && !kinds.is_empty()
        && !kinds.iter().any(|kind| matches!(kind, xmm_is4 | ymm_is4));
    !(info.vex || info.evex) || plain && !info.wide
}
