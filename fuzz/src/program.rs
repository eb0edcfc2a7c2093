//! Programs for processors: instructions that are mostly valid, in 64-bit mode.

use crate::Input;

/// Registers that mostly hold addresses and are seldom written: some with a host register of their own in the
/// translator, some without.
const BASES: [u8; 8] = [3, 5, 6, 7, 9, 12, 13, 15];
/// Registers that mostly hold small numbers.
const INDICES: [u8; 2] = [10, 14];
/// Registers for results.
const RESULTS: [u8; 6] = [0, 1, 2, 8, 11, 14];
/// Opcodes of integer instructions with ModRM and no immediate, in the first map.
const INTEGER: [u8; 14] =
    [0x63, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0xd0, 0xd1, 0xd2, 0xd3, 0x8d];
/// The same with 0F before them.
const INTEGER_0F: [u8; 20] = [
    0xa3, 0xab, 0xb3, 0xbb, 0xa5, 0xad, 0xaf, 0xb0, 0xb1, 0xb6, 0xb7, 0xb8, 0xbc, 0xbd, 0xbe, 0xbf, 0xc0,
    0xc1, 0xc3, 0xc7,
];
/// 0F 38 and 0F 3A with integers: MOVBE, CRC32, ADCX, and what VEX makes of them.
const VEX_INTEGER: [(u8, u8); 7] =
    [(2, 0xf2), (2, 0xf3), (2, 0xf5), (2, 0xf6), (2, 0xf7), (3, 0xf0), (2, 0xf6)];
const STRINGS: [u8; 10] = [0xa4, 0xa5, 0xaa, 0xab, 0xa4, 0xa5, 0xa6, 0xac, 0xae, 0xa7];
/// Instructions without operands that do something to the processor.
const PLAIN: [&[u8]; 24] = [
    &[0xfa],
    &[0xfb],
    &[0xfc],
    &[0xfd],
    &[0x9c],
    &[0x9d],
    &[0xc9],
    &[0xf8],
    &[0xf9],
    &[0x98],
    &[0x48, 0x99],
    &[0x9e],
    &[0x9f],
    &[0x0f, 0x77],
    &[0x0f, 0x01, 0xca],
    &[0x0f, 0x01, 0xcb],
    &[0x0f, 0x01, 0xf8],
    &[0x0f, 0x31],
    &[0x0f, 0x05],
    &[0x48, 0xcf],
    &[0xcc],
    &[0x9b],
    &[0xdb, 0xe3],
    &[0x0f, 0xae, 0xf0],
];
/// 0F AE with a memory operand, x87 environments and control words, segment registers: opcode and ModRM.reg.
const STATE: [(&[u8], u8); 14] = [
    (&[0x0f, 0xae], 0),
    (&[0x0f, 0xae], 1),
    (&[0x0f, 0xae], 2),
    (&[0x0f, 0xae], 3),
    (&[0xd9], 4),
    (&[0xd9], 5),
    (&[0xd9], 5),
    (&[0xd9], 6),
    (&[0xd9], 7),
    (&[0xdd], 4),
    (&[0xdd], 6),
    (&[0xdd], 7),
    (&[0x8c], 3),
    (&[0x0f, 0x01], 7),
];

/// Where the window of small pages begins: what [`crate::program`]'s addresses are about.
pub const WINDOW: u64 = 0x60_0000;
/// Its pages.
pub const WINDOW_PAGES: u64 = 16;

/// An address: at an edge of a page of the window, or of any kind.
pub fn place(input: &mut Input<'_>) -> [u8; 4] {
    let choice = input.u8();
    let page = WINDOW + 0x1000 * (u64::from(choice & 0x1f) % WINDOW_PAGES);
    let offset = match choice >> 5 {
        0..4 => 0x1000 - u64::from(input.u8() & 0x1f),
        4 | 5 => 0x800 + u64::from(input.u8()),
        _ => u64::from(input.u8()),
    };
    ((page + offset) as u32).to_le_bytes()
}

/// An instruction that is being put together.
#[derive(Default)]
struct Encoding {
    prefixes: Vec<u8>,
    rex: u8,
    opcode: Vec<u8>,
    tail: Vec<u8>,
}

impl Encoding {
    /// With an operand in a register or in memory; `reg` is ModRM.reg.
    fn new(input: &mut Input<'_>, opcode: &[u8], reg: u8, memory: bool) -> Self {
        let mut out = Self { opcode: opcode.to_vec(), ..Self::default() };
        if memory {
            out.memory(input, reg);
        } else {
            let rm = input.u8();
            let rm = if rm < 0xe0 { RESULTS[usize::from(rm) % RESULTS.len()] } else { rm & 15 };
            out.rex = (reg & 8) >> 1 | rm >> 3;
            out.tail = vec![0xc0 | (reg & 7) << 3 | rm & 7];
        }
        out
    }

    fn memory(&mut self, input: &mut Input<'_>, reg: u8) {
        let form = input.u8();
        let base = BASES[usize::from(form & 7)];
        let disp = input.u8();
        let field = (reg & 7) << 3;
        self.rex = (reg & 8) >> 1 | base >> 3;
        match form >> 3 {
            0..14 if base & 7 != 4 => self.tail = vec![0x40 | field | base & 7, disp],
            0..24 => {
                let sib = input.u8();
                let index = if sib & 4 == 0 { INDICES[usize::from(sib & 1)] } else { 4 };
                self.rex |= (index >> 3) << 1;
                self.tail = vec![0x44 | field, sib & 0xc0 | (index & 7) << 3 | base & 7, disp];
            }
            24..26 => {
                self.rex &= 4;
                self.tail = vec![field | 5];
                self.tail.extend((i32::from(input.u16() as i16) / 8).to_le_bytes());
            }
            26 => {
                self.rex &= 4;
                self.tail = vec![field | 4, 0x25];
                self.tail.extend(place(input));
            }
            form @ 27..30 => {
                self.prefixes.push(if form == 27 { 0x64 } else { 0x65 });
                self.tail = vec![0x40 | field | base & 7];
                if base & 7 == 4 {
                    self.tail.push(0x24);
                }
                self.tail.push(disp);
                if form == 29 {
                    self.rex &= 4;
                    self.tail = vec![field | 4, 0x25, disp, 0, 0, 0];
                }
            }
            _ => {
                self.tail = vec![0x80 | field | base & 7];
                if base & 7 == 4 {
                    self.tail.push(0x24);
                }
                self.tail.extend((i32::from(disp as i8) * 0x40).to_le_bytes());
            }
        }
    }

    /// Any size of operand.
    fn sized(mut self, input: &mut Input<'_>) -> Self {
        match input.u8() % 8 {
            0..3 => self.rex |= 8,
            3 => self.prefixes.push(0x66),
            4 => self.rex |= 0x40,
            _ => {}
        }
        self
    }

    fn prefix(mut self, prefix: u8) -> Self {
        self.prefixes.extend((prefix != 0).then_some(prefix));
        self
    }

    fn immediate(mut self, bytes: &[u8]) -> Self {
        self.tail.extend_from_slice(bytes);
        self
    }

    fn put(&self, out: &mut Vec<u8>) {
        out.extend(&self.prefixes);
        if self.rex != 0 {
            out.push(self.rex | 0x40);
        }
        out.extend(&self.opcode);
        out.extend(&self.tail);
    }
}

fn result(input: &mut Input<'_>) -> u8 {
    let number = input.u8();
    if number < 0xf0 { RESULTS[usize::from(number) % RESULTS.len()] } else { number & 15 }
}

/// Appends an instruction, or a few that belong together.
fn instruction(input: &mut Input<'_>, out: &mut Vec<u8>) {
    let kind = input.u8();
    let memory = kind & 0xc0 != 0;
    match kind & 0x1f {
        0..3 => {
            let op = input.u8();
            let reg = result(input);
            let lock = if memory && op & 0xc0 == 0xc0 && op & 2 == 0 { 0xf0 } else { 0 };
            let code = [op & 0x3b];
            Encoding::new(input, &code, reg, memory).sized(input).prefix(lock).put(out);
        }
        3 | 4 => {
            let opcode = INTEGER[usize::from(input.u8()) % INTEGER.len()];
            let reg = result(input);
            Encoding::new(input, &[opcode], reg, memory || opcode == 0x8d).sized(input).put(out);
        }
        5 | 6 => {
            let choice = input.u8();
            let opcode = match choice {
                0..0x60 => 0x40 | choice & 15,
                0x60..0x80 => 0x90 | choice & 15,
                _ => INTEGER_0F[usize::from(choice) % INTEGER_0F.len()],
            };
            let reg = if opcode == 0xc7 { 1 } else { result(input) };
            let prefix = match opcode {
                0xb8 | 0xbc | 0xbd => 0xf3,
                0xb0 | 0xb1 | 0xc0 | 0xc1 | 0xab if choice & 1 == 0 => 0xf0,
                _ => 0,
            };
            Encoding::new(input, &[0x0f, opcode], reg, memory).sized(input).prefix(prefix).put(out);
        }
        7 => with_immediate(input, out, memory),
        8 => {
            let group = input.u8();
            let opcode = if group & 0x80 == 0 { 0xf6 } else { 0xfe } | group & 1;
            let reg = group >> 1 & if group & 0x80 == 0 { 7 } else { 1 };
            let tail: &[u8] = if opcode == 0xf6 && reg < 2 { &[0x55] } else { &[] };
            Encoding::new(input, &[opcode], reg, memory).sized(input).immediate(tail).put(out);
        }
        9 | 10 => stack(input, out, memory),
        11 | 12 => jump(input, out),
        13..16 => x87(input, out, memory),
        16 | 17 => {
            let opcode = match input.u8() {
                small @ 0..0x60 => 0x60 | small & 15,
                shift @ 0x60..0x80 => 0x70 | shift & 7,
                store @ 0x80..0x98 => {
                    if store & 1 == 0 {
                        0x7e
                    } else {
                        0x7f
                    }
                }
                other => 0xc0 | other,
            };
            let tail: &[u8] = if matches!(opcode, 0x70..0x74 | 0xc4..0xc7) { &[3] } else { &[] };
            let reg = result(input) & 7;
            let memory = memory && !matches!(opcode, 0x71..0x74);
            Encoding::new(input, &[0x0f, opcode], reg, memory).immediate(tail).put(out);
        }
        18..22 => sse(input, out, memory),
        22 | 23 => strings(input, out),
        24 => {
            let (map, opcode) = VEX_INTEGER[usize::from(input.u8()) % VEX_INTEGER.len()];
            vex(input, out, map, opcode, memory);
        }
        25 => {
            let plain = PLAIN[usize::from(input.u8()) % PLAIN.len()];
            out.extend_from_slice(plain);
        }
        26 => {
            let (opcode, reg) = STATE[usize::from(input.u8()) % STATE.len()];
            Encoding::new(input, opcode, reg, true).put(out);
        }
        27 => {
            // Stores to code close by.
            let opcode = if input.flag() { 0xc6 } else { 0xc7 };
            out.extend([opcode, 0x05]);
            out.extend((i32::from(input.u8() as i8) / 2).to_le_bytes());
            let len = if opcode == 0xc6 { 1 } else { 4 };
            let value = input.u32().to_le_bytes();
            out.extend(&value[..len]);
        }
        28 | 29 => {
            // A base anew.
            let base = BASES[usize::from(input.u8()) % BASES.len()];
            out.extend([0x48 | base >> 3, 0xc7, 0xc0 | base & 7]);
            out.extend(place(input));
        }
        30 => {
            let to = INDICES[usize::from(input.u8() & 1)];
            out.extend([0x41, 0xb8 | to & 7, input.u8(), 0, 0, 0]);
        }
        _ => {
            let len = usize::from(input.u8() % 8);
            out.extend_from_slice(input.bytes(len));
        }
    }
}

fn with_immediate(input: &mut Input<'_>, out: &mut Vec<u8>, memory: bool) {
    let choice = input.u8();
    let value = input.u8();
    match choice % 8 {
        0..3 => {
            let reg = choice >> 3 & 7;
            Encoding::new(input, &[0x83], reg, memory).sized(input).immediate(&[value]).put(out);
        }
        3 => Encoding::new(input, &[0x80], choice >> 3 & 7, memory).immediate(&[value]).put(out),
        4 => {
            let opcode = 0xc0 | choice >> 7;
            let encoding = Encoding::new(input, &[opcode], choice >> 3 & 7, memory);
            encoding.sized(input).immediate(&[value]).put(out);
        }
        5 => {
            let reg = 4 | choice >> 3 & 3;
            Encoding::new(input, &[0x0f, 0xba], reg, memory).sized(input).immediate(&[value]).put(out);
        }
        6 => {
            let opcode = if choice & 8 == 0 { 0xa4 } else { 0xac };
            let reg = result(input);
            Encoding::new(input, &[0x0f, opcode], reg, memory).sized(input).immediate(&[value]).put(out);
        }
        _ => {
            let mut encoding = Encoding::new(input, &[0xc7], 0, memory);
            encoding.rex |= choice & 8;
            encoding.immediate(&[value, 0xff, choice, choice]).put(out);
        }
    }
}

fn stack(input: &mut Input<'_>, out: &mut Vec<u8>, memory: bool) {
    let choice = input.u8();
    let register = if choice & 0x80 == 0 { result(input) } else { input.u8() & 15 };
    match choice % 8 {
        0..3 => push_pop(out, 0x50, register),
        3 | 4 => push_pop(out, 0x58, register),
        5 => Encoding::new(input, &[0xff], 6, memory).put(out),
        6 => Encoding::new(input, &[0x8f], 0, memory).put(out),
        // Adding to RSP, saving it, or coming back from RBP.
        _ => match register & 3 {
            0 => out.extend([0x48, 0x83, 0xec, choice & 0x78]),
            1 => out.extend([0x48, 0x83, 0xc4, choice & 0x78]),
            2 => out.extend([0x48, 0x89, 0xe5]),
            _ => out.extend([0xc8, choice, 0, 0]),
        },
    }
}

fn push_pop(out: &mut Vec<u8>, opcode: u8, register: u8) {
    out.extend((register >= 8).then_some(0x41));
    out.push(opcode | register & 7);
}

/// Jumps, calls and returns, mostly ahead.
fn jump(input: &mut Input<'_>, out: &mut Vec<u8>) {
    let choice = input.u8();
    let by = input.u8();
    let by = if by & 0x80 == 0 { by & 0x1f } else { by };
    match choice % 16 {
        0..8 => out.extend([0x70 | choice >> 4, by]),
        8 => out.extend([0xeb, by]),
        9 => {
            out.push(0xe8);
            out.extend(i32::from(by as i8).to_le_bytes());
        }
        10 => out.push(0xc3),
        11 => out.extend([0xe0 | choice >> 4 & 3, by]),
        12 => {
            out.extend([0x0f, 0x80 | choice >> 4]);
            out.extend(i32::from(by as i8).to_le_bytes());
        }
        // LEA RAX, [RIP + by]; JMP or CALL RAX.
        13 | 14 => {
            out.extend([0x48, 0x8d, 0x05]);
            out.extend((2 + i32::from(by as i8)).to_le_bytes());
            out.extend([0xff, if choice & 16 == 0 { 0xe0 } else { 0xd0 }]);
        }
        _ => Encoding::new(input, &[0xff], 2 | choice >> 3 & 4, true).put(out),
    }
}

fn x87(input: &mut Input<'_>, out: &mut Vec<u8>, memory: bool) {
    let opcode = 0xd8 | input.u8() & 7;
    if memory {
        let reg = input.u8() & 7;
        Encoding::new(input, &[opcode], reg, true).put(out);
    } else {
        out.extend([opcode, 0xc0 | input.u8()]);
    }
}

fn sse(input: &mut Input<'_>, out: &mut Vec<u8>, memory: bool) {
    let prefix = input.pick(&[0, 0x66, 0x66, 0xf3, 0xf2]);
    let choice = input.u8();
    let reg = input.u8() & 15;
    let imm = [choice];
    let (opcode, immediate): (Vec<u8>, &[u8]) = match choice {
        0..0x18 => (vec![0x0f, 0x10 | choice & 7], &[]),
        0x18..0x28 => (vec![0x0f, 0x28 | choice & 7], &[]),
        0x28..0x60 => (vec![0x0f, 0x50 | choice & 0x1f], if choice & 0x1f == 0x10 { &[0x1b] } else { &[] }),
        0x60..0x80 => {
            (vec![0x0f, [0x6f, 0x7f, 0x7e, 0xd6, 0x6e, 0xe7, 0xf0, 0x2b][usize::from(choice & 7)]], &[])
        }
        0x80..0x88 => (vec![0x0f, [0xc2, 0xc4, 0xc5, 0xc6][usize::from(choice & 3)]], &imm),
        0x88..0xb0 => (vec![0x0f, 0x38, choice & 0x3f], &[]),
        0xb0..0xc0 => (vec![0x0f, 0x3a, input.u8() & 0x6f], &imm),
        0xc0.. => (vec![0x0f, choice | 0xd0], &[]),
    };
    let mut encoding = Encoding::new(input, &opcode, reg, memory).prefix(prefix);
    if input.one_in(4) {
        encoding.rex |= 8;
    }
    encoding.immediate(immediate).put(out);
}

fn strings(input: &mut Input<'_>, out: &mut Vec<u8>) {
    let choice = input.u8();
    let opcode = STRINGS[usize::from(choice) % STRINGS.len()];
    let count = input.u8();
    if choice & 0x80 == 0 {
        out.extend([0xb9, count, u8::from(count & 0x40 != 0), 0, 0]);
    }
    match count % 8 {
        0..3 => out.push(0xf3),
        3 => out.push(0xf2),
        4 => out.extend([0x67, 0xf3]),
        5 => out.extend([0x66, 0xf3]),
        _ => {}
    }
    if choice & 0x40 != 0 {
        out.push(0x48);
    }
    out.push(opcode);
}

fn vex(input: &mut Input<'_>, out: &mut Vec<u8>, map: u8, opcode: u8, memory: bool) {
    let reg = result(input);
    let choice = input.u8();
    let encoding = Encoding::new(input, &[opcode], reg, memory);
    let immediate = (map == 3).then_some(choice);
    if choice & 0x80 != 0 && map == 2 && opcode != 0xf7 {
        // MOVBE, CRC32, ADCX.
        let prefix = input.pick(&[0, 0x66, 0xf2, 0xf3]);
        let opcode = if opcode == 0xf2 {
            0xf0
        } else if opcode == 0xf3 {
            0xf1
        } else {
            0xf6
        };
        return Encoding { opcode: vec![0x0f, 0x38, opcode], ..encoding }
            .prefix(prefix)
            .sized(input)
            .put(out);
    }
    out.extend(&encoding.prefixes);
    let register = if map == 3 { 15 } else { !result(input) & 15 };
    out.push(0xc4);
    out.push((!encoding.rex & 7) << 5 | map);
    out.push((choice & 1) << 7 | register << 3 | if map == 3 { 3 } else { choice >> 1 & 3 });
    out.push(opcode);
    out.extend(&encoding.tail);
    out.extend(immediate);
}

/// A program of at most about `len` bytes.
pub fn program(input: &mut Input<'_>, len: usize) -> Vec<u8> {
    let mut out = Vec::new();
    while out.len() < len && !input.is_empty() {
        instruction(input, &mut out);
    }
    out
}
