//! What a difference is reported as.

use iced_x86::{Decoder, Instruction};
use std::fmt;

/// One instruction that T0 executed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Trace {
    pub(crate) rip: u64,
    /// The bytes at RIP, the first in the lowest bits.
    pub(crate) bytes: u128,
    pub(crate) bits: u32,
    /// The vector of the exception that it ended with.
    pub(crate) exception: Option<u8>,
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.bytes.to_le_bytes();
        let mut decoder = Decoder::with_ip(self.bits, &bytes[..15], self.rip, x86_interp::DECODER_OPTIONS);
        let insn = decoder.decode();
        let code: String =
            bytes[..insn.len().clamp(1, 15)].iter().map(|byte| format!("{byte:02x}")).collect();
        write!(f, "{:#x}: {code}  {}", self.rip, text(&insn))?;
        match self.exception {
            Some(vector) => write!(f, "  -> exception {vector}"),
            None => Ok(()),
        }
    }
}

#[cfg(feature = "disassembly")]
fn text(insn: &Instruction) -> String {
    use iced_x86::Formatter as _;
    let mut text = String::new();
    iced_x86::IntelFormatter::new().format(insn, &mut text);
    text
}

#[cfg(not(feature = "disassembly"))]
fn text(insn: &Instruction) -> String {
    format!("{:?}", insn.code())
}

/// The translator and the interpreter came to different results.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Mismatch {
    /// What differs, in words.
    pub differences: Vec<String>,
    /// What T0 executed of the block, in words.
    pub executed: Vec<String>,
    /// Where T1 began and ended in this round and those before, in words, the last last.
    pub history: Vec<String>,
    /// Blocks that were compared before.
    pub blocks: u64,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "translator and interpreter differ after {} blocks:", self.blocks)?;
        for line in &self.differences {
            writeln!(f, "  {line}")?;
        }
        writeln!(f, "the interpreter executed:")?;
        for line in &self.executed {
            writeln!(f, "  {line}")?;
        }
        write!(f, "the last rounds of the translator:")?;
        for line in &self.history {
            write!(f, "\n  {line}")?;
        }
        Ok(())
    }
}
