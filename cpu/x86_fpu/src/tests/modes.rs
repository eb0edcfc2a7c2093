//! Legacy modes.

use super::against_host;
use x86_core::Seg;
use x86_core::testing::{Machine, selector};

/// As the machine for 64-bit comparisons, but running 32-bit code in compatibility mode.
pub(super) fn compatibility_machine() -> Machine {
    let mut machine = against_host::machine();
    let code = &mut machine.cpu.segments[Seg::Cs as usize];
    code.selector = selector::USER_CODE32;
    code.attributes = 0x0c0fb;
    machine.core().mode_changed();
    machine
}
