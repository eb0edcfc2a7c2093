//! Fetching and decoding, with a small cache of decoded instructions.

use crate::dispatch::{Handler, handler};
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};
use std::cell::RefCell;
use x86_core::{Core, Flow, Trap};

/// How guest code is decoded. The processor is an AMD one: near branches with an operand-size prefix are
/// 16-bit in 64-bit mode too, and LOCK MOV CR0 is MOV CR8.
pub const DECODER_OPTIONS: u32 = DecoderOptions::AMD;

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

thread_local! {
    // A processor stays on its thread; nothing breaks if it moves.
    static CACHE: RefCell<Box<[Entry]>> = RefCell::new(
        vec![
            Entry {
                bytes: 0,
                mask: 0,
                bits: 0,
                instruction: Instruction::default(),
                handler: crate::misc::undefined,
            };
            ENTRIES
        ]
        .into(),
    );
}

/// The instruction at CS:RIP and what executes it.
///
/// # Errors
/// The fault of the fetch, #GP for more than 15 bytes, #UD for what is no instruction.
#[inline(always)]
pub(crate) fn fetch(core: &mut Core<'_>) -> Result<(Instruction, Handler), Trap> {
    let mut buffer = [0; 16];
    let window: &mut [u8; 15] = buffer.first_chunk_mut().expect("15 of 16 bytes");
    let available = core.fetch(window)?;
    let ip = core.cpu.rip;
    let bits = core.code_size().bits();
    let bytes = u128::from_le_bytes(buffer);
    let slot = (ip ^ ip >> 12) as usize % ENTRIES;
    CACHE.with_borrow_mut(|cache| {
        let entry = &mut cache[slot];
        if entry.mask != 0
            && entry.instruction.ip() == ip
            && entry.bits == bits
            && entry.bytes == bytes & entry.mask
            && entry.instruction.len() <= available
        {
            return Ok((entry.instruction, entry.handler));
        }
        let instruction = decode(core, &buffer, available, bits)?;
        if instruction.len() == 0 {
            return Ok((instruction, again));
        }
        let mask = u128::MAX >> (128 - 8 * instruction.len() as u32);
        let handler = handler(&instruction);
        *entry = Entry { bytes: u128::from_le_bytes(buffer) & mask, mask, bits, instruction, handler };
        Ok((instruction, handler))
    })
}

/// Stands in for an instruction that could not be fetched whole, but can be now.
fn again(_: &mut Core<'_>, _: &Instruction) -> Result<Flow, Trap> {
    Ok(Flow::Again)
}

/// Decodes the first `available` bytes of `buffer`.
#[cold]
fn decode(core: &mut Core<'_>, buffer: &[u8; 16], available: usize, bits: u32) -> Result<Instruction, Trap> {
    let bytes = &buffer[..available.min(15)];
    let mut decoder = Decoder::with_ip(bits, bytes, core.cpu.rip, DECODER_OPTIONS);
    let instruction = decoder.decode();
    match decoder.last_error() {
        DecoderError::None => Ok(instruction),
        // No fault: another processor has just mapped the next page, so the instruction is tried again.
        DecoderError::NoMoreBytes => match core.fetch_fault(bytes.len()) {
            Some(trap) => Err(trap),
            None => Ok(Instruction::default()),
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
