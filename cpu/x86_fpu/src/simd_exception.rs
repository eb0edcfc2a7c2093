//! SIMD floating-point exceptions (Intel SDM volume 1, 11.5).

use x86_core::{Core, Trap, cr4, vector};

/// The six exception flags of MXCSR.
pub(crate) const FLAGS: u32 = 0x3f;
/// The masks, in MXCSR's place.
const MASKS: u32 = FLAGS << 7;
/// Invalid, denormal, divide-by-zero: found before the operation.
const BEFORE: u32 = 7;
/// Bits of MXCSR that may be set.
pub(crate) const MXCSR_MASK: u32 = 0xffff;

/// The flag of underflow.
pub(crate) const UNDERFLOW: u32 = 1 << 4;
/// Flush to zero.
const FTZ: u32 = 1 << 15;
/// The MXCSR of Rust code, and after reset.
pub(crate) const DEFAULT: u32 = MASKS;

/// The MXCSR that an instruction runs under: the guest's modes, everything masked, no flag set. Results are
/// flushed to zero only where underflow is masked.
pub(crate) fn to_run(guest: u32) -> u32 {
    let run = guest & MXCSR_MASK & !FLAGS | MASKS;
    if underflow_unmasked(guest) { run & !FTZ } else { run }
}

/// The same for an instruction that raises no exception whatever the masks: it flushes even so.
pub(crate) fn to_run_quietly(guest: u32) -> u32 {
    guest & MXCSR_MASK & !FLAGS | MASKS
}

fn underflow_unmasked(guest: u32) -> bool {
    guest & UNDERFLOW << 7 == 0
}

/// Underflow that is not masked is signalled for exact results, too. Masked, it is not; but if results are
/// flushed to zero, it is for all that are tiny: an MXCSR to find these with, if the guest wants them.
/// (VCVTPS2PH never flushes: its exact tiny results are not found.)
pub(crate) fn to_probe_underflow(guest: u32) -> Option<u32> {
    underflow_unmasked(guest).then_some(to_run(guest) | FTZ)
}

/// Whether an exception could be delivered.
pub(crate) fn any_unmasked(guest: u32) -> bool {
    guest & MASKS != MASKS
}

/// Adds the flags that an instruction raised to the guest's. If one of them is not masked, it is an
/// exception, and the instruction's results must not be stored.
///
/// The flags are those of a masked execution. With overflow or underflow delivered, hardware sets the
/// precision flag by a rounding to an exponent of any size, which may be exact where the masked one is not:
/// then there is a precision flag too many. Dot products, which are several operations, may have more.
pub(crate) fn raise(core: &mut Core, raised: u32) -> Result<(), Trap> {
    let raised = raised & FLAGS;
    let unmasked = raised & !(core.cpu.mxcsr >> 7);
    if unmasked == 0 {
        core.cpu.mxcsr |= raised;
        return Ok(());
    }
    // An exception found before the operation keeps it from finding others.
    core.cpu.mxcsr |= if unmasked & BEFORE != 0 { raised & BEFORE } else { raised };
    Err(if core.cpu.cr4 & cr4::OSXMMEXCPT != 0 { Trap::plain(vector::XM) } else { Trap::UD })
}
