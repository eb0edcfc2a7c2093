//! Memory operands of which a mask register says what is accessed: elements that are not selected cause no fault and
//! are not written (Intel SDM volume 2, 2.7.5 and 2.8).

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use x86_core::Core;

/// How the bits of a mask select elements in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Masking {
    /// The mask register.
    register: u8,
    /// Bits of it that count.
    bits: u8,
    /// Bytes of an element in memory.
    element: u8,
    /// Elements in memory. Where there are fewer than bits, bit `n` stands for element `n` modulo this number.
    count: u8,
    /// As many elements as bits are set lie one after the other.
    packed: bool,
    /// So many bytes must be writable, whatever is selected.
    pub(crate) checked: u8,
}

/// How the operand of an instruction (with its memory operand, if it has a mask) is selected; `None` if it is accessed
/// as a whole.
pub(crate) fn of(insn: &Instruction, write: bool) -> Option<Masking> {
    let whole = is_whole(insn);
    if insn.op_mask() == Register::None || !write && whole {
        return None;
    }
    let size = insn.memory_size();
    let total = size.size();
    let element = match insn.mnemonic() {
        // Several elements of memory make one of the result.
        Mnemonic::Vpdpbusd | Mnemonic::Vpdpbusds | Mnemonic::Vpdpwssd | Mnemonic::Vpdpwssds => 4,
        Mnemonic::Vpmuldq | Mnemonic::Vpmuludq => 8,
        _ => size.element_size(),
    };
    let count = total.checked_div(element)?;
    let packed = matches!(
        insn.mnemonic(),
        Mnemonic::Vcompressps
            | Mnemonic::Vcompresspd
            | Mnemonic::Vpcompressb
            | Mnemonic::Vpcompressw
            | Mnemonic::Vpcompressd
            | Mnemonic::Vpcompressq
            | Mnemonic::Vexpandps
            | Mnemonic::Vexpandpd
            | Mnemonic::Vpexpandb
            | Mnemonic::Vpexpandw
            | Mnemonic::Vpexpandd
            | Mnemonic::Vpexpandq
    );
    let bits = if insn.is_broadcast() {
        let vector = insn.code().op_code().memory_size();
        vector.size() / element
    } else if repeats(insn.mnemonic()) {
        insn.op0_register().size() / element
    } else {
        count
    };
    Some(Masking {
        register: insn.op_mask().number() as u8,
        bits: u8::try_from(bits).ok().filter(|bits| (1..=64).contains(bits))?,
        element: element as u8,
        count: count as u8,
        packed,
        checked: if write && whole { total as u8 } else { 0 },
    })
}

/// Whether elements in memory are loaded to several places.
fn repeats(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Vbroadcastss
            | Vbroadcastsd
            | Vbroadcastf32x2
            | Vbroadcastf32x4
            | Vbroadcastf32x8
            | Vbroadcastf64x2
            | Vbroadcastf64x4
            | Vbroadcasti32x2
            | Vbroadcasti32x4
            | Vbroadcasti32x8
            | Vbroadcasti64x2
            | Vbroadcasti64x4
            | Vpbroadcastb
            | Vpbroadcastw
            | Vpbroadcastd
            | Vpbroadcastq
    )
}

/// Whether the memory operand of an instruction is accessed as a whole whatever its mask: those of the exception types
/// NF, which move elements to other places.
fn is_whole(insn: &Instruction) -> bool {
    use Mnemonic::*;
    match insn.mnemonic() {
        Vpermd | Vpermps | Vpermq | Vpermpd | Vpermw | Vpermb | Vpermi2b | Vpermi2w | Vpermi2d | Vpermi2q
        | Vpermi2ps | Vpermi2pd | Vpermt2b | Vpermt2w | Vpermt2d | Vpermt2q | Vpermt2ps | Vpermt2pd
        | Vpermilps | Vpermilpd | Vpshufb | Vpshufd | Vpshufhw | Vpshuflw | Vshufps | Vshufpd
        | Vshuff32x4 | Vshuff64x2 | Vshufi32x4 | Vshufi64x2 | Vpunpcklbw | Vpunpcklwd | Vpunpckldq
        | Vpunpcklqdq | Vpunpckhbw | Vpunpckhwd | Vpunpckhdq | Vpunpckhqdq | Vunpcklps | Vunpcklpd
        | Vunpckhps | Vunpckhpd | Vpacksswb | Vpackssdw | Vpackuswb | Vpackusdw | Vpalignr | Valignd
        | Valignq | Vpmaddwd | Vpmaddubsw | Vdbpsadbw | Vpconflictd | Vpconflictq | Vmovddup | Vmovshdup
        | Vmovsldup | Vpmultishiftqb | Vinsertf32x4 | Vinsertf64x2 | Vinsertf32x8 | Vinsertf64x4
        | Vinserti32x4 | Vinserti64x2 | Vinserti32x8 | Vinserti64x4 | Vextractf32x4 | Vextractf64x2
        | Vextractf32x8 | Vextractf64x4 | Vextracti32x4 | Vextracti64x2 | Vextracti32x8 | Vextracti64x4
        | Vgf2p8affineqb | Vgf2p8affineinvqb | Vcvtne2ps2bf16 => true,
        // The number of bits to shift by.
        Vpsllw | Vpslld | Vpsllq | Vpsrlw | Vpsrld | Vpsrlq | Vpsraw | Vpsrad | Vpsraq => {
            insn.op2_kind() == OpKind::Memory
        }
        _ => false,
    }
}

impl Masking {
    /// The parts of the operand that are accessed: runs of bytes, each with its beginning and its length.
    pub(crate) fn runs(self, core: &Core) -> Runs {
        let mask = core.cpu.opmask[usize::from(self.register)] & (u64::MAX >> (64 - self.bits));
        let elements = if self.packed {
            let count = mask.count_ones();
            if count == 64 { u64::MAX } else { (1 << count) - 1 }
        } else if self.count < self.bits {
            let step = u32::from(self.count);
            (0..64 / step).fold(0, |all, part| all | mask >> (part * step)) & ((1 << step) - 1)
        } else {
            mask
        };
        Runs { elements, at: 0, element: u32::from(self.element) }
    }
}

/// Runs of elements that are accessed.
pub(crate) struct Runs {
    /// The elements, one bit for each.
    elements: u64,
    /// How many elements of it are done with.
    at: u32,
    element: u32,
}

impl Iterator for Runs {
    type Item = (usize, usize);

    fn next(&mut self) -> Option<(usize, usize)> {
        let left = self.elements.checked_shr(self.at).unwrap_or(0);
        if left == 0 {
            return None;
        }
        let start = self.at + left.trailing_zeros();
        let len = (self.elements >> start).trailing_ones();
        self.at = start + len;
        Some(((start * self.element) as usize, (len * self.element) as usize))
    }
}
