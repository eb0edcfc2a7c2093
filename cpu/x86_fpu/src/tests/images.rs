//! Instructions that load and store images of the whole state, against the host.

use super::against_host::{compare_with, mode};
use super::generate::{self, Form, Masks, Random};
use super::modes::machine_for;
use iced_x86::{Code, Decoder};
use native_oracle::{NativeState, SCRATCH, Tally};

/// Where the memory operand is: the base register, without displacement.
fn image(state: &mut NativeState) -> &mut [u8] {
    let at = (state.regs[generate::BASE] - SCRATCH) as usize;
    &mut state.scratch[at..]
}

fn set(image: &mut [u8], at: usize, value: u64, len: usize) {
    image[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
}

/// Makes what the host saved what we are to save: MXCSR's mask differs between processors, and only some
/// save zeros in place of the last instruction's opcode and pointers unless an exception is pending.
fn adapt(code: Code, native: &mut NativeState, before: &NativeState) {
    let old = before.scratch;
    let at = (before.regs[generate::BASE] - SCRATCH) as usize;
    let image = &mut native.scratch[at..];
    if matches!(code, Code::Ldmxcsr_m32 | Code::VEX_Vldmxcsr_m32) {
        return;
    }
    if image[28..32] != old[at + 28..at + 32] {
        set(image, 28, 0xffff, 4);
    }
    if !native_oracle::host_is_amd() && image[..24] != old[at..at + 24] && image[2] & 0x80 == 0 {
        image[6..24].fill(0);
    }
}

/// Compares `codes` in states that `prepare` makes fit.
fn compare_images(
    codes: &[Code],
    bits: u32,
    rounds: usize,
    mut prepare: impl FnMut(Code, &mut NativeState, &mut Random),
) {
    let mut machine = machine_for(bits);
    let mut random = Random::new(77);
    let mut tally = Tally::new(mode(bits));
    let rounds = rounds * native_oracle::rounds() as usize;
    for &code in codes {
        for _ in 0..rounds {
            let form = Form { memory: true, low_registers: bits != 64, bitness: bits };
            let mut state = generate::state(&mut random, Masks::All, 0);
            let Some(mut bytes) = generate::instruction(code, form, &mut random) else { continue };
            // Without a displacement.
            if Decoder::new(bits, &bytes, 0).decode().memory_displ_size() != 0 {
                bytes.pop();
                *bytes.last_mut().unwrap() &= !0x40;
            }
            prepare(code, &mut state, &mut random);
            let adapt = |native: &mut NativeState| adapt(code, native, &state);
            // An interrupt in between can make the host take a component for used that is initial: what can
            // be right is tried again.
            let failure = (0..5)
                .map(|_| compare_with(&mut machine, &bytes, &state, bits, adapt))
                .take_while(Option::is_some)
                .enumerate()
                .last();
            if let Some((4, Some(text))) = failure {
                tally.fail(code, text);
            }
        }
        tally.add(code, rounds);
    }
    tally.finish();
}

/// A valid legacy region, mostly.
fn legacy_region(state: &mut NativeState, random: &mut Random) {
    let mxcsr = random.next() & 0xffff | if random.one_in(8) { 1 << (18 + random.below(14)) } else { 0 };
    let image = image(state);
    set(image, 24, mxcsr, 4);
    // Canonical pointers.
    set(image, 14, 0, 2);
    set(image, 22, 0, 2);
    // The tag byte's neighbour and the reserved parts of registers may be anything; so may the rest.
}

#[test]
fn mxcsr() {
    let codes = [Code::Ldmxcsr_m32, Code::VEX_Vldmxcsr_m32];
    for bits in [64, 32] {
        compare_images(&codes, bits, 50, |_, state, random| {
            let value =
                random.next() & 0xffff | if random.one_in(4) { 1 << (18 + random.below(14)) } else { 0 };
            set(image(state), 0, value, 4);
        });
    }
}

#[test]
fn fxsave_and_fxrstor() {
    let codes =
        [Code::Fxsave_m512byte, Code::Fxsave64_m512byte, Code::Fxrstor_m512byte, Code::Fxrstor64_m512byte];
    compare_images(&codes, 64, 100, |_, state, random| legacy_region(state, random));
    compare_images(&[codes[0], codes[2]], 32, 100, |_, state, random| legacy_region(state, random));
}

/// Asks for some of x87, SSE and AVX, and makes some of them initial.
fn components(state: &mut NativeState, random: &mut Random) {
    state.regs[0] = random.next() & 0xe7;
    state.regs[2] = 0;
    if random.one_in(4) {
        let fresh = NativeState::default();
        state.x87 = fresh.x87;
    }
    if random.one_in(4) {
        state.vectors[..16].iter_mut().for_each(|vector| vector[16..32].fill(0));
    }
    if random.one_in(3) {
        state.vectors[..16].iter_mut().for_each(|vector| vector[32..].fill(0));
    }
    if random.one_in(3) {
        state.vectors[16..].iter_mut().for_each(|vector| vector.fill(0));
    }
    if random.one_in(3) {
        state.opmask = [0; 8];
    }
    if random.one_in(4) {
        // Only registers that 32-bit code does not have.
        state.vectors[..8].iter_mut().for_each(|vector| vector.fill(0));
    }
    if random.one_in(4) {
        state.vectors[..16].iter_mut().for_each(|vector| vector[..16].fill(0));
        state.mxcsr = 0x1f80;
    }
}

#[test]
fn xsave() {
    let codes = [
        Code::Xsave_mem,
        Code::Xsave64_mem,
        Code::Xsaveopt_mem,
        Code::Xsaveopt64_mem,
        Code::Xsavec_mem,
        Code::Xsavec64_mem,
    ];
    compare_images(&codes, 64, 200, |_, state, random| components(state, random));
    compare_images(&[codes[0], codes[2], codes[4]], 32, 100, |_, state, random| components(state, random));
}

#[test]
fn xrstor() {
    let prepare = |_, state: &mut NativeState, random: &mut Random| {
        components(state, random);
        legacy_region(state, random);
        let image = image(state);
        image[512..576].fill(0);
        let all = if native_oracle::has_avx512() { 0xe7 } else { 7 };
        let present = random.next() & all;
        set(image, 512, present, 8);
        if random.one_in(2) {
            set(image, 520, 1 << 63 | present | random.next() & all, 8);
        }
        // Faults: bits without a component, a header that is not zero.
        match random.below(12) {
            0 => set(image, 512, present | 1 << 62, 8),
            1 => image[528 + random.below(48) as usize] = 1,
            2 => image[520] ^= 1,
            3 => image[519] |= 0x80,
            _ => {}
        }
    };
    compare_images(&[Code::Xrstor_mem, Code::Xrstor64_mem], 64, 400, prepare);
    compare_images(&[Code::Xrstor_mem], 32, 200, prepare);
}
