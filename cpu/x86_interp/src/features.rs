//! Integer instructions that a processor may lack: what CPUID must announce for them.

use iced_x86::{Instruction, Mnemonic};
use x86_core::Core;

/// A bit of CPUID: leaf, register (EAX, EBX, ECX, EDX) and bit.
type Feature = (u32, usize, u32);

/// What the mnemonic needs, if it is optional.
fn feature(mnemonic: Mnemonic) -> Option<Feature> {
    Some(match mnemonic {
        Mnemonic::Movbe => (1, 2, 22),
        Mnemonic::Popcnt => (1, 2, 23),
        Mnemonic::Crc32 => (1, 2, 20),
        Mnemonic::Cmpxchg16b => (1, 2, 13),
        Mnemonic::Lzcnt => (0x8000_0001, 2, 5),
        Mnemonic::Tzcnt
        | Mnemonic::Andn
        | Mnemonic::Bextr
        | Mnemonic::Blsi
        | Mnemonic::Blsmsk
        | Mnemonic::Blsr => (7, 1, 3),
        Mnemonic::Bzhi
        | Mnemonic::Mulx
        | Mnemonic::Pdep
        | Mnemonic::Pext
        | Mnemonic::Rorx
        | Mnemonic::Sarx
        | Mnemonic::Shlx
        | Mnemonic::Shrx => (7, 1, 8),
        Mnemonic::Adcx | Mnemonic::Adox => (7, 1, 19),
        Mnemonic::Clflushopt => (7, 1, 23),
        Mnemonic::Clwb => (7, 1, 24),
        _ => return None,
    })
}

/// Whether the instruction is optional.
pub(crate) fn is_optional(mnemonic: Mnemonic) -> bool {
    feature(mnemonic).is_some()
}

/// Whether the processor has the integer instruction `insn`: it is not optional, or CPUID announces it.
/// (TZCNT and LZCNT execute as BSF and BSR where they are not announced.)
pub fn has(core: &Core<'_>, insn: &Instruction) -> bool {
    feature(insn.mnemonic()).is_none_or(|(leaf, register, bit)| core.cpuid(leaf, 0)[register] >> bit & 1 != 0)
}
