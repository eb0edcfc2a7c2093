//! The x87 unit's state.

use x86_core::X87Area;

/// Bits of the status word (Intel SDM volume 1, 8.1.3).
pub(crate) mod status {
    /// The six exception flags.
    pub(crate) const EXCEPTIONS: u16 = 0x3f;
    /// Stack fault.
    pub(crate) const SF: u16 = 1 << 6;
    /// Error summary.
    pub(crate) const ES: u16 = 1 << 7;
    /// Top of the stack.
    pub(crate) const TOP: u16 = 7 << 11;
    /// Busy: the same as ES.
    pub(crate) const B: u16 = 1 << 15;
    /// Exceptions that, unmasked, keep a store from writing memory: all but precision.
    pub(crate) const NO_STORE: u16 = 0x1f;
}

/// The control word that FNINIT sets.
pub(crate) const INIT_CONTROL: u16 = 0x37f;

fn word(area: &X87Area, at: usize) -> u16 {
    u16::from_le_bytes([area.0[at], area.0[at + 1]])
}

/// Sets the word at `at`.
pub(crate) fn set_word(area: &mut X87Area, at: usize, value: u16) {
    area.0[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

/// The control word.
pub(crate) fn control(area: &X87Area) -> u16 {
    word(area, 0)
}

/// Sets the control word, as hardware stores it; [`summarize`] is to follow.
pub(crate) fn set_control(area: &mut X87Area, value: u16) {
    set_word(area, 0, value & 0x1f7f | 0x40);
}

/// The status word.
pub(crate) fn status_word(area: &X87Area) -> u16 {
    word(area, 2)
}

/// Sets the status word.
pub(crate) fn set_status(area: &mut X87Area, value: u16) {
    set_word(area, 2, value);
}

/// The number of the physical register that is ST(0).
pub(crate) fn top(area: &X87Area) -> usize {
    usize::from((status_word(area) & status::TOP) >> 11)
}

/// Whether an exception is raised that is not masked.
pub(crate) fn pending(area: &X87Area) -> bool {
    status_word(area) & !control(area) & status::EXCEPTIONS != 0
}

/// Brings ES and B in line with the exceptions raised and masked.
pub(crate) fn summarize(area: &mut X87Area) {
    let rest = status_word(area) & !(status::ES | status::B);
    set_status(area, if pending(area) { rest | status::ES | status::B } else { rest });
}

/// FNINIT.
pub(crate) fn init(area: &mut X87Area) {
    area.0[..24].fill(0);
    set_word(area, 0, INIT_CONTROL);
}

/// Arranges the registers as MMX instructions see them: the first is physical register 0.
pub(crate) fn enter_mmx(area: &mut X87Area) {
    let top = top(area);
    area.0[32..160].rotate_right(16 * top);
}

/// Stores what an MMX instruction left: the stack is full with TOP 0, and each register written has all
/// ones for sign and exponent (Intel SDM volume 1, 9.5).
pub(crate) fn commit_mmx(area: &mut X87Area, registers: &[u8; 128], written: u8) {
    area.0[32..160].copy_from_slice(registers);
    for register in 0..8 {
        if written >> register & 1 != 0 {
            area.0[40 + 16 * register..][..2].fill(0xff);
        }
    }
    set_status(area, status_word(area) & !status::TOP);
    area.0[4] = 0xff;
}

/// What an MMX instruction does to the x87 unit, registers written aside.
pub(crate) fn switch_to_mmx(area: &mut X87Area) {
    enter_mmx(area);
    set_status(area, status_word(area) & !status::TOP);
    area.0[4] = 0xff;
}

/// EMMS.
pub(crate) fn leave_mmx(area: &mut X87Area) {
    switch_to_mmx(area);
    area.0[4] = 0;
}

/// The full tag word (Intel SDM volume 1, 8.1.7) from the abridged one and the registers.
pub(crate) fn full_tags(area: &X87Area) -> u16 {
    let top = top(area);
    (0..8).fold(0, |tags, physical: usize| {
        let register = &area.0[32 + 16 * (physical.wrapping_sub(top) & 7)..];
        let exponent = u16::from_le_bytes([register[8], register[9]]) & 0x7fff;
        let tag = if area.0[4] >> physical & 1 == 0 {
            3
        } else if exponent == 0 && register[..8].iter().all(|byte| *byte == 0) {
            1
        } else if exponent == 0 || exponent == 0x7fff || register[7] & 0x80 == 0 {
            2
        } else {
            0
        };
        tags | tag << (2 * physical)
    })
}

/// The abridged tag word from the full one.
pub(crate) fn abridged_tags(full: u16) -> u8 {
    (0..8).fold(0, |tags, register| tags | u8::from(full >> (2 * register) & 3 != 3) << register)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags() {
        let mut area = X87Area::default();
        assert_eq!(full_tags(&area), 0xffff);
        area.0[4] = 0xff;
        set_status(&mut area, 3 << 11);
        // ST(0) = physical 3: valid; ST(1) = 4: zero; ST(2) = 5: infinity; ST(3) = 6: denormal; the rest 0.
        area.0[39] = 0x80;
        area.0[40] = 1;
        area.0[32 + 32 + 8..][..2].copy_from_slice(&0x7fffu16.to_le_bytes());
        area.0[32 + 48] = 1;
        assert_eq!(full_tags(&area), 0b01_10_10_01_00_01_01_01);
        assert_eq!(abridged_tags(full_tags(&area)), 0xff);
        assert_eq!(abridged_tags(0xfffc), 1);
    }

    #[test]
    fn mmx_numbers_are_physical() {
        let mut area = X87Area::default();
        for register in 0..8 {
            area.0[32 + 16 * register] = register as u8;
        }
        set_status(&mut area, 3 << 11);
        let mut image = area;
        enter_mmx(&mut image);
        // ST(0) is physical 3.
        assert_eq!(image.0[32 + 16 * 3], 0);
        assert_eq!(image.0[32 + 16 * 4], 1);
        assert_eq!(image.0[32], 5);
        commit_mmx(&mut area, image.0[32..160].try_into().unwrap(), 2);
        assert_eq!(area.0[4], 0xff);
        assert_eq!(top(&area), 0);
        assert_eq!(area.0[32 + 16 + 8..][..2], [0xff, 0xff]);
        assert_eq!(area.0[32 + 8..][..2], [0, 0]);
    }
}
