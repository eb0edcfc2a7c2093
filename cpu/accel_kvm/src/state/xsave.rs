//! x87 and vector registers in the XSAVE area (Intel SDM volume 1, 13.4).

use accel::FpuState;
use kvm_bindings as kb;
use std::ops::Range;

const XSTATE_BV: usize = 512;
const X87: u64 = 1 << 0;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
const OPMASK: u64 = 1 << 5;
const ZMM_HIGH: u64 = 1 << 6;
const HIGH_ZMM: u64 = 1 << 7;
const PKRU: u64 = 1 << 9;
/// Bits of MXCSR that exist.
const MXCSR_VALID: u32 = 0xffff;
/// The x87 control word after FNINIT.
const CONTROL_INITIAL: u16 = 0x37f;
const AREA: usize = 4096;

/// Where the parts of the area are, and which there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layout {
    /// The parts that guests can have, as in XCR0.
    pub(crate) parts: u64,
    avx: usize,
    opmask: usize,
    zmm_high: usize,
    high_zmm: usize,
    pkru: usize,
}

impl Layout {
    /// The layout on a host where part `n` is at the offset `offset(n)`.
    pub(crate) fn new(parts: u64, offset: impl Fn(u32) -> usize) -> Self {
        let mut parts = parts | X87 | SSE;
        let mut place = |part: u64, len: usize| {
            let at = if parts & part != 0 { offset(part.trailing_zeros()) } else { 0 };
            if at < XSTATE_BV + 64 || at + len > AREA {
                parts &= !part;
                return 0;
            }
            at
        };
        let avx = place(AVX, 256);
        let opmask = place(OPMASK, 64);
        let zmm_high = place(ZMM_HIGH, 512);
        let high_zmm = place(HIGH_ZMM, 1024);
        let pkru = place(PKRU, 8);
        Self {
            parts: parts & (X87 | SSE | AVX | OPMASK | ZMM_HIGH | HIGH_ZMM | PKRU),
            avx,
            opmask,
            zmm_high,
            high_zmm,
            pkru,
        }
    }
}

/// The area's bytes.
struct Bytes([u8; AREA]);

impl Bytes {
    fn of(area: &kb::kvm_xsave) -> Self {
        let mut bytes = [0; AREA];
        for (to, word) in bytes.chunks_exact_mut(4).zip(area.region) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        Self(bytes)
    }

    fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|byte| self.0[at + byte])
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.get(at))
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn set_u64(&mut self, at: usize, value: u64) {
        self.set(at, &value.to_le_bytes());
    }
}

/// Where the parts of the vector registers are: the part, the registers, the quadwords of each, and the
/// address of the first.
fn vectors(layout: &Layout) -> [(u64, Range<usize>, Range<usize>, usize); 4] {
    [
        (SSE, 0..16, 0..2, 160),
        (AVX, 0..16, 2..4, layout.avx),
        (ZMM_HIGH, 0..16, 4..8, layout.zmm_high),
        (HIGH_ZMM, 16..32, 0..8, layout.high_zmm),
    ]
}

pub(super) fn save(area: &kb::kvm_xsave, layout: &Layout) -> FpuState {
    let bytes = Bytes::of(area);
    // A part that is not there is in its initial state.
    let present = bytes.u64(XSTATE_BV) & layout.parts;
    let mut state = FpuState { control: CONTROL_INITIAL, tag: 0, ..FpuState::default() };
    if present & X87 != 0 {
        state.control = u16::from_le_bytes(bytes.get(0));
        state.status = u16::from_le_bytes(bytes.get(2));
        state.tag = bytes.0[4];
        state.opcode = u16::from_le_bytes(bytes.get(6));
        state.instruction_pointer = bytes.u64(8);
        state.data_pointer = bytes.u64(16);
        state.st = std::array::from_fn(|n| bytes.get(32 + 16 * n));
    }
    if present & (SSE | AVX) != 0 {
        state.mxcsr = u32::from_le_bytes(bytes.get(24));
    }
    state.vectors = vec![[0; 8]; 32];
    for (part, registers, words, at) in vectors(layout) {
        if present & part != 0 {
            let len = words.len() * 8;
            for (index, register) in state.vectors[registers].iter_mut().enumerate() {
                for (word, value) in register[words.clone()].iter_mut().enumerate() {
                    *value = bytes.u64(at + index * len + word * 8);
                }
            }
        }
    }
    if state.vectors[16..].iter().flatten().all(|word| *word == 0) {
        state.vectors.truncate(16);
    }
    if present & OPMASK != 0 {
        state.opmask = std::array::from_fn(|n| bytes.u64(layout.opmask + 8 * n));
    }
    if present & PKRU != 0 {
        state.pkru = u32::from_le_bytes(bytes.get(layout.pkru));
    }
    state
}

/// The area of a state. Says what of it a guest here cannot have.
pub(super) fn load(state: &FpuState, layout: &Layout) -> Result<kb::kvm_xsave, String> {
    let mut bytes = Bytes([0; AREA]);
    bytes.set(0, &state.control.to_le_bytes());
    bytes.set(2, &state.status.to_le_bytes());
    bytes.0[4] = state.tag;
    bytes.set(6, &(state.opcode & 0x7ff).to_le_bytes());
    bytes.set_u64(8, state.instruction_pointer);
    bytes.set_u64(16, state.data_pointer);
    bytes.set(24, &(state.mxcsr & MXCSR_VALID).to_le_bytes());
    bytes.set(28, &MXCSR_VALID.to_le_bytes());
    for (n, register) in state.st.iter().enumerate() {
        bytes.set(32 + 16 * n, register);
    }
    for (part, registers, words, at) in vectors(layout) {
        let len = words.len() * 8;
        let there = state.vectors.get(registers).unwrap_or(&[]);
        for (index, register) in there.iter().enumerate() {
            for (word, value) in register[words.clone()].iter().enumerate() {
                if layout.parts & part != 0 {
                    bytes.set_u64(at + index * len + word * 8, *value);
                } else if *value != 0 {
                    return Err("of vector registers that are wider or more than the processor's".into());
                }
            }
        }
    }
    match layout.parts & OPMASK != 0 {
        true => {
            state.opmask.iter().enumerate().for_each(|(n, mask)| bytes.set_u64(layout.opmask + 8 * n, *mask))
        }
        false if state.opmask != [0; 8] => {
            return Err("with mask registers, which the processor lacks".into());
        }
        false => {}
    }
    match layout.parts & PKRU != 0 {
        true => bytes.set(layout.pkru, &state.pkru.to_le_bytes()),
        false if state.pkru != 0 => return Err("with protection keys, which the processor lacks".into()),
        false => {}
    }
    bytes.set_u64(XSTATE_BV, layout.parts);
    let mut area = kb::kvm_xsave { region: [0; 1024], ..kb::kvm_xsave::default() };
    for (word, from) in area.region.iter_mut().zip(bytes.0.chunks_exact(4)) {
        *word = u32::from_le_bytes([from[0], from[1], from[2], from[3]]);
    }
    Ok(area)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn everything() -> Layout {
        // As on AMD processors.
        let offset = |part| [0, 0, 576, 0, 0, 832, 896, 1408, 0, 2432][part as usize];
        Layout::new(u64::MAX, offset)
    }

    fn states() -> impl Strategy<Value = FpuState> {
        let vectors = prop_oneof![
            proptest::collection::vec(any::<[u64; 8]>(), 16),
            proptest::collection::vec(any::<[u64; 8]>().prop_map(|words| words.map(|word| word | 1)), 32)
        ];
        (any::<[u64; 4]>(), any::<[[u8; 10]; 8]>(), vectors, any::<[u64; 8]>(), any::<u32>()).prop_map(
            |([words, instruction_pointer, data_pointer, more], st, vectors, opmask, pkru)| FpuState {
                control: words as u16,
                status: (words >> 16) as u16,
                tag: (words >> 32) as u8,
                opcode: (words >> 40) as u16 & 0x7ff,
                instruction_pointer,
                data_pointer,
                st,
                mxcsr: more as u32 & MXCSR_VALID,
                vectors,
                opmask,
                pkru,
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn states_survive(state in states()) {
            let layout = everything();
            prop_assert_eq!(save(&load(&state, &layout).unwrap(), &layout), state);
        }
    }

    #[test]
    fn a_processor_without_vector_extensions_refuses_their_state() {
        let layout = Layout::new(3, |_| 0);
        let mut state = FpuState::default();
        state.vectors[3][1] = 7;
        assert_eq!(save(&load(&state, &layout).unwrap(), &layout), state);
        let spoiled: [fn(&mut FpuState); 4] = [
            |state| state.vectors[3][2] = 7,
            |state| state.vectors.resize(32, [1; 8]),
            |state| state.opmask[1] = 1,
            |state| state.pkru = 1,
        ];
        for spoil in spoiled {
            let mut state = state.clone();
            spoil(&mut state);
            assert!(load(&state, &layout).is_err());
        }
    }

    #[test]
    fn parts_that_are_not_there_are_in_their_initial_state() {
        let area = kb::kvm_xsave { region: [u32::MAX; 1024], ..kb::kvm_xsave::default() };
        let mut area = area;
        area.region[128..130].fill(0);
        let state = save(&area, &everything());
        assert_eq!(state, FpuState { control: CONTROL_INITIAL, tag: 0, ..FpuState::default() });
    }
}
