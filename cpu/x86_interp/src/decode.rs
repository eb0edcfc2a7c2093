//! Fetching and decoding, with a small cache of decoded instructions.

use crate::dispatch::{Handler, handler};
use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction, Register};
use std::cell::RefCell;
use x86_core::{Core, Flow, Trap};

/// How guest code is decoded. The processor is an AMD one: near branches with an operand-size prefix are
/// 16-bit in 64-bit mode too, and LOCK MOV CR0 is MOV CR8. What is decoded is for [`widen`] to amend.
pub const DECODER_OPTIONS: u32 = DecoderOptions::AMD;

/// Gives an instruction that was decoded from `bytes` with [`DECODER_OPTIONS`] its 64-bit operands back, if it takes a
/// far pointer from memory: the decoder drops REX.W there, as AMD's processors read no 64-bit offsets. Yet what a far
/// CALL pushes then has 64 bits.
#[inline]
pub fn widen(insn: &mut Instruction, bytes: &[u8]) {
    let wide = match insn.code() {
        Code::Call_m1632 => Code::Call_m1664,
        Code::Jmp_m1632 => Code::Jmp_m1664,
        Code::Lss_r32_m1632 => Code::Lss_r64_m1664,
        Code::Lfs_r32_m1632 => Code::Lfs_r64_m1664,
        Code::Lgs_r32_m1632 => Code::Lgs_r64_m1664,
        _ => return,
    };
    let prefix = |byte: &u8| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3);
    let rex = bytes.iter().find(|byte| !prefix(byte)).is_some_and(|byte| byte & 0xf8 == 0x48);
    if insn.code_size() != iced_x86::CodeSize::Code64 || !rex {
        return;
    }
    insn.set_code(wide);
    if insn.op0_register() != Register::None {
        insn.set_op0_register(insn.op0_register().full_register());
    }
}

const ENTRIES: usize = 1 << 12;

/// A decoded instruction. What [`Decoder`] makes of an instruction depends on its bytes, its address and the
/// mode alone; all three are compared on lookup, so an entry is never stale, whatever the guest writes where.
#[derive(Clone, Copy)]
struct Entry {
    bytes: u128,
    /// Those bits of `bytes` that belong to the instruction; 0 in an empty entry.
    mask: u128,
    bits: u32,
    instruction: Instruction,
    handler: Handler,
}

impl Entry {
    fn new(bytes: u128, mask: u128, bits: u32, instruction: Instruction, handler: Handler) -> Self {
        Self { bytes: bytes & mask, mask, bits, instruction, handler }
    }

    /// One that is never found.
    fn of(handler: Handler) -> Self {
        Self::new(0, 0, 0, Instruction::default(), handler)
    }
}

thread_local! {
    // A processor stays on its thread; nothing breaks if it moves.
    static CACHE: RefCell<Box<[Entry; ENTRIES]>> =
        RefCell::new(vec![Entry::of(again); ENTRIES].try_into().unwrap_or_else(|_| unreachable!("ENTRIES of them")));
}

/// Has `run` execute the instruction at CS:RIP with the function for it; `run` gives none if it put an
/// exception into its last argument. (The cache is borrowed meanwhile; should another processor be stepped
/// from within, it goes without.)
///
/// # Errors
/// The fault of the fetch, #GP for more than 15 bytes, #UD for what is no instruction; those of `run`.
#[inline(always)]
pub(crate) fn with_instruction(
    core: &mut Core<'_>,
    run: impl Fn(&mut Core<'_>, &Instruction, Handler, &mut Trap) -> Option<Flow>,
) -> Result<Flow, Trap> {
    let (bytes, available) = core.fetch_word()?;
    let ip = core.cpu.rip;
    let bits = core.code_size().bits();
    let slot = (ip ^ ip >> 12) as usize % ENTRIES;
    // Results pass through here for every instruction: a byte is quicker to hand on than all that a trap may
    // hold.
    let mut trap = Trap::UD;
    let flow = CACHE.with(|cache| {
        if let Ok(entries) = cache.try_borrow() {
            let entry = &entries[slot];
            if entry.mask != 0
                && entry.instruction.ip() == ip
                && entry.bits == bits
                && entry.bytes == bytes & entry.mask
                && entry.instruction.len() <= available
            {
                return run(core, &entry.instruction, entry.handler, &mut trap);
            }
        }
        let entry = match decode(core, bytes, available, bits) {
            Ok(entry) => entry,
            Err(fault) => {
                trap = fault;
                return None;
            }
        };
        if entry.mask != 0
            && let Ok(mut entries) = cache.try_borrow_mut()
        {
            entries[slot] = entry;
        }
        run(core, &entry.instruction, entry.handler, &mut trap)
    });
    match flow {
        Some(flow) => Ok(flow),
        None => Err(trap),
    }
}

/// Stands in for an instruction that could not be fetched whole, but can be now.
fn again(_: &mut Core<'_>, _: &Instruction) -> Result<Flow, Trap> {
    Ok(Flow::Again)
}

/// Decodes the first `available` bytes of `word`.
#[cold]
#[inline(never)]
fn decode(core: &mut Core<'_>, word: u128, available: usize, bits: u32) -> Result<Entry, Trap> {
    let buffer = word.to_le_bytes();
    let bytes = &buffer[..available.min(15)];
    let mut decoder = Decoder::with_ip(bits, bytes, core.cpu.rip, DECODER_OPTIONS);
    let mut instruction = decoder.decode();
    match decoder.last_error() {
        DecoderError::None => {
            widen(&mut instruction, bytes);
            let mask = u128::MAX >> (128 - 8 * instruction.len() as u32);
            let handler = handler(&instruction);
            Ok(Entry::new(word, mask, bits, instruction, handler))
        }
        // No fault: another processor has just mapped the next page, so the instruction is tried again.
        DecoderError::NoMoreBytes => match core.fetch_fault(bytes.len()) {
            Some(trap) => Err(trap),
            None => Ok(Entry::of(again)),
        },
        // The decoder does not tell those apart that are too long.
        _ if bytes.len() == 15 && runs_out(&bytes[..14], bits) => Err(Trap::gp(0)),
        _ => Err(Trap::UD),
    }
}

/// Whether `bytes` are the beginning of a longer instruction.
fn runs_out(bytes: &[u8], bits: u32) -> bool {
    let mut decoder = Decoder::new(bits, bytes, DECODER_OPTIONS);
    let _ = decoder.decode();
    decoder.last_error() == DecoderError::NoMoreBytes
}
