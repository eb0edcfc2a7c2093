//! Legacy modes.

use super::against_host;
use native_oracle::{CODE, SCRATCH, SCRATCH_LEN};
use x86_core::testing::{Machine, selector};
use x86_core::{Seg, Segment};

/// The machine for comparisons in code of 64, 32 or 16 bits, of which the latter two run in compatibility mode.
pub(super) fn machine_for(bits: u32) -> Machine {
    let mut machine = against_host::machine();
    let segments = &mut machine.cpu.segments;
    match bits {
        64 => {}
        32 => {
            segments[Seg::Cs as usize].selector = selector::USER_CODE32;
            segments[Seg::Cs as usize].attributes = 0x0c0fb;
        }
        _ => {
            let limit = SCRATCH_LEN as u32 - 1;
            *segments = [Segment { base: SCRATCH, limit, attributes: 0xf3, selector: 3 }; 6];
            segments[Seg::Cs as usize] =
                Segment { base: CODE & !0xfff, limit: 0xffff, attributes: 0xfb, selector: 3 };
        }
    }
    machine.core().mode_changed();
    machine
}
