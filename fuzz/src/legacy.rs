//! Programs of 32- and 16-bit code, and machines for them.

use crate::{Input, WINDOW, WINDOW_PAGES, place};
use x86_core::testing::{CODE, DATA, GDT, HANDLERS, IDT, MMIO, Machine, STACK, descriptor, selector};
use x86_core::{Seg, Segment, TableRegister, cr0, cr4, flags};

/// Where the page directory is, and the table of the window.
const DIRECTORY: u64 = 0x7_0000;
const TABLE: u64 = 0x7_1000;
/// Registers that mostly hold addresses (EBX, EDI), and results.
const BASES: [u8; 4] = [3, 7, 3, 6];
const RESULTS: [u8; 6] = [0, 1, 2, 5, 0, 2];
/// Opcodes that only 16- and 32-bit code has, or that change what segments are, without operands.
const PLAIN: [&[u8]; 32] = [
    b"\x06",
    b"\x07",
    b"\x0e",
    b"\x16",
    b"\x17",
    b"\x1e",
    b"\x1f",
    b"\x27",
    b"\x2f",
    b"\x37",
    b"\x3f",
    b"\x60",
    b"\x61",
    b"\x98",
    b"\x99",
    b"\x9c",
    b"\x9d",
    b"\x9e",
    b"\x9f",
    b"\xc9",
    b"\xce",
    b"\xd6",
    b"\xd7",
    b"\xf8",
    b"\xf9",
    b"\xfa",
    b"\xfb",
    b"\xfc",
    b"\xfd",
    b"\xcd\x80",
    b"\xcb",
    b"\x0f\x31",
];
const STRINGS: [u8; 10] = [0xa4, 0xa5, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf, 0xa6, 0xa7];
const OPCODES_0F: [u8; 22] = [
    0xa3, 0xab, 0xb3, 0xbb, 0xa5, 0xad, 0xaf, 0xb0, 0xb1, 0xb6, 0xb7, 0xbc, 0xbd, 0xbe, 0xbf, 0xc0, 0xc1,
    0x10, 0x11, 0x28, 0x6f, 0x7f,
];

/// What a processor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Legacy {
    /// 32-bit user code under a 64-bit kernel.
    Compatibility,
    /// 32-bit protected mode with flat segments and paging.
    Paged,
    /// The same at CPL 3.
    User,
    /// 32-bit protected mode with bases and limits.
    Segmented,
    /// 16-bit code in protected mode.
    Protected16,
    /// Real mode.
    Real,
    /// Virtual-8086 mode.
    Virtual,
}

impl Legacy {
    /// One of them.
    pub fn pick(choice: u8) -> Self {
        use Legacy::*;
        [Compatibility, Paged, User, Segmented, Protected16, Real, Virtual, Compatibility]
            [usize::from(choice & 7)]
    }

    /// Whether code is of 16 bits.
    pub fn is_short(self) -> bool {
        matches!(self, Self::Protected16 | Self::Real | Self::Virtual)
    }

    /// A machine of that kind with code at [`CODE`]. Exceptions of protected mode go to handlers that go on some
    /// bytes ahead if `skip`.
    pub fn machine(self, skip: bool) -> Machine {
        let mut machine = match self {
            Self::Compatibility => Machine::user(),
            Self::Real => Machine::real(),
            _ => Machine::protected(),
        };
        let cpu = &mut *machine.cpu;
        cpu.cr4 |= cr4::OSFXSR | cr4::OSXMMEXCPT;
        let segment = |base, limit, attributes, selector| Segment { base, limit, attributes, selector };
        let whole = |attributes, selector| segment(0, u32::MAX, attributes, selector);
        match self {
            Self::Compatibility => cpu.segments[Seg::Cs as usize] = whole(0xc0fb, selector::USER_CODE32),
            Self::User => {
                cpu.segments = [whole(0xc0f3, selector::USER_DATA); 6];
                cpu.segments[Seg::Cs as usize] = whole(0xc0fb, selector::USER_CODE32);
                cpu.cpl = 3;
            }
            Self::Segmented => {
                cpu.segments[Seg::Ds as usize] = segment(WINDOW - 0x1000, 0x8fff, 0xc093, selector::DATA);
                cpu.segments[Seg::Es as usize] = segment(DATA - 0x1000, 0xf_ffff, 0xc093, selector::DATA);
                cpu.segments[Seg::Ss as usize] = segment(STACK - 0x8000, 0xbfff, 0xc093, selector::DATA);
                cpu.segments[Seg::Gs as usize] = segment(STACK - 0x8000, 0x3fff, 0xc097, selector::DATA);
                cpu.segments[Seg::Cs as usize].base = CODE - 0x2345;
            }
            Self::Protected16 | Self::Real | Self::Virtual => {
                let attributes = if self == Self::Virtual { 0xf3 } else { 0x93 };
                let code = if self == Self::Protected16 { 0x9b } else { attributes };
                for (index, at) in
                    [DATA - 0x1000, CODE - 0x2345, STACK - 0x8000, WINDOW - 0x1000, DATA, WINDOW]
                        .into_iter()
                        .enumerate()
                {
                    let attributes = if index == Seg::Cs as usize { code } else { attributes };
                    cpu.segments[index] = segment(at, 0xffff, attributes, selector::DATA16);
                }
            }
            Self::Paged => {}
        }
        if self == Self::Virtual {
            cpu.cpl = 3;
            cpu.rflags |= flags::VM;
        }
        cpu.rip = CODE - cpu.segments[Seg::Cs as usize].base;
        if matches!(self, Self::Paged | Self::User | Self::Virtual) {
            page(&mut machine);
        }
        if self == Self::Real {
            real_handlers(&mut machine);
        } else if self != Self::Compatibility {
            handlers(&machine, skip);
        }
        machine.core().mode_changed();
        machine
    }

    /// A value of a register that points to where `linear` says.
    pub fn pointer(self, linear: u32) -> u32 {
        match self {
            Self::Segmented | Self::Protected16 | Self::Real | Self::Virtual => {
                linear.wrapping_sub(WINDOW as u32 - 0x1000)
            }
            _ => linear,
        }
    }

    /// A stack pointer near the top of the stack.
    pub fn stack(self, below: u8) -> u64 {
        let base =
            if matches!(self, Self::Compatibility | Self::Paged | Self::User) { 0 } else { STACK - 0x8000 };
        STACK - base - u64::from(below)
    }
}

/// Paging of 32 bits with large pages, but for the window: see `map_window` in the target.
fn page(machine: &mut Machine) {
    let entry = |index: u32| index << 22 | 0xe7;
    let mut directory: Vec<u8> = (0..1024).flat_map(|index| entry(index).to_le_bytes()).collect();
    let at = (WINDOW >> 22) as usize;
    directory[4 * at..][..4].copy_from_slice(&(TABLE as u32 | 7).to_le_bytes());
    machine.memory.write(DIRECTORY, &directory).expect("RAM");
    let first = (WINDOW >> 12) as u32 & 1023;
    let table = (0..1024u32).flat_map(|index| {
        let own = (WINDOW as u32 & !0x3f_ffff) | index << 12 | 0x67;
        let entry = match index.wrapping_sub(first) {
            2 => own & !2,
            4 => 0,
            6 => own & !4,
            7 => MMIO as u32 | 7,
            9 => CODE as u32 | 0x67,
            10 => DATA as u32 | 0x67,
            11 | 12 => WINDOW as u32 | 0x67,
            13 => IDT as u32 & !0xfff | 5,
            14 => (CODE as u32 + 0x1000) | 0x67,
            other if u64::from(other) < WINDOW_PAGES && other & 1 != 0 => own & !0x60,
            _ => own,
        };
        entry.to_le_bytes()
    });
    machine.memory.write(TABLE, &table.collect::<Vec<_>>()).expect("RAM");
    let cpu = &mut *machine.cpu;
    cpu.cr4 |= cr4::PSE;
    cpu.cr3 = DIRECTORY;
    cpu.cr0 |= cr0::PG | cr0::WP;
    machine.core().flush_tlb(false);
}

/// Handlers of 32 bits. With and without an error code, they go on four bytes ahead, or halt.
fn handlers(machine: &Machine, skip: bool) {
    let mut code = [0xf4; 0x1000];
    for vector in 0..256usize {
        let bytes: &[u8] = match vector {
            3 | 4 | 32.. => b"\xcf",
            8 => b"\xf4",
            10..=14 | 17 | 21 | 29 | 30 if skip => b"\x83\xc4\x04\x83\x04\x24\x04\xcf",
            _ if skip => b"\x83\x04\x24\x04\xcf",
            _ => b"\xf4",
        };
        code[16 * vector..][..bytes.len()].copy_from_slice(bytes);
        let handler = HANDLERS + 16 * vector as u64;
        let dpl = if vector == 3 || vector == 4 || vector >= 32 { 0x60 } else { 0 };
        let low = handler & 0xffff | u64::from(selector::CODE32) << 16;
        machine.poke(IDT + 8 * vector as u64, low | (0x8e00 | dpl << 8) << 32 | (handler >> 16) << 48);
    }
    machine.memory.write(HANDLERS, &code).expect("RAM");
    // Selectors that code may load: short, based, expanding downwards.
    for (index, (base, limit, attributes)) in
        [(0, 0xf_ffff, 0xc0f3), (0x1000, 0xfff, 0x40f3), (WINDOW as u32, 0x1fff, 0x40f7), (0, 0x10, 0x80f1)]
            .into_iter()
            .enumerate()
    {
        machine.poke(GDT + u64::from(selector::FREE) + 8 * index as u64, descriptor(base, limit, attributes));
    }
}

fn real_handlers(machine: &mut Machine) {
    machine.cpu.idtr = TableRegister { base: IDT, limit: 0x3ff };
    for vector in 0..256 {
        let handler = HANDLERS + 16 * vector;
        machine.memory.write(IDT + 4 * vector, &(handler as u32).to_le_bytes()).expect("RAM");
        let code: &[u8] = if vector >= 32 { b"\xcf" } else { b"\xf4" };
        machine.memory.write(handler, code).expect("RAM");
    }
}

/// ModRM and what follows.
fn operand(input: &mut Input<'_>, reg: u8, memory: bool, short: bool, out: &mut Vec<u8>) {
    let field = (reg & 7) << 3;
    if !memory {
        return out.push(0xc0 | field | RESULTS[usize::from(input.u8()) % RESULTS.len()]);
    }
    let form = input.u8();
    let disp = input.u8();
    if short {
        // [bx+si], [di], [bx], [bp], a constant.
        return match form >> 4 {
            0..10 => out.extend([0x40 | field | [7, 5, 0, 7][usize::from(form & 3)], disp]),
            10..12 => out.extend([0x80 | field | 7, disp, form]),
            12 => out.extend([0x40 | field | 6, disp]),
            _ => out.extend([field | 6, disp, form & 0x7f]),
        };
    }
    let base = BASES[usize::from(form & 3)];
    match form >> 3 {
        0..18 => out.extend([0x40 | field | base, disp]),
        18..24 => {
            out.extend([0x44 | field, input.u8() & 0xc7 | [1, 4, 6, 2][usize::from(disp & 3)] << 3, disp])
        }
        24..28 => {
            out.push(field | 5);
            out.extend(place(input));
        }
        // Sums around the ends of the address space.
        28 => {
            out.push(0x80 | field | base);
            out.extend([disp, 0xff, 0xff, 0x7f | form << 7]);
        }
        _ => {
            out.push(0x80 | field | base);
            out.extend((i32::from(disp as i8) * 0x40).to_le_bytes());
        }
    }
}

fn instruction(input: &mut Input<'_>, short: bool, out: &mut Vec<u8>) {
    let kind = input.u8();
    let memory = kind & 0xc0 != 0;
    let choice = input.u8();
    match choice >> 4 {
        0 => out.push(0x66),
        1 if choice & 8 == 0 => {
            out.push([0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x64, 0x65][usize::from(choice & 7)])
        }
        2 if choice & 8 == 0 => out.push(0x67),
        _ => {}
    }
    // A prefix may have changed these.
    let short = short != (out.last() == Some(&0x67));
    let wide = short == (out.last() == Some(&0x66));
    let immediate = |out: &mut Vec<u8>, value: u8| {
        let len = if wide { 4 } else { 2 };
        out.extend(&[value, value ^ 0x80, 0xff, value][..len]);
    };
    let reg = RESULTS[usize::from(choice) % RESULTS.len()];
    match kind & 0x1f {
        0..4 => {
            out.push(input.u8() & 0x3b);
            operand(input, reg, memory, short, out);
        }
        4..6 => {
            out.push(
                [0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0xd1, 0xd3, 0x8d, 0x82]
                    [usize::from(choice) % 12],
            );
            let last = out.last().copied();
            operand(input, reg, memory || last == Some(0x8d), short, out);
            out.extend((last == Some(0x82)).then_some(choice));
        }
        6 => {
            out.extend([0x0f, OPCODES_0F[usize::from(input.u8()) % OPCODES_0F.len()]]);
            operand(input, reg, memory, short, out);
        }
        7 => {
            out.push(0x83);
            operand(input, choice & 7, memory, short, out);
            out.push(choice);
        }
        8 => {
            out.push([0xf6, 0xf7, 0xfe, 0xff][usize::from(choice & 3)]);
            let reg = choice >> 2 & if choice & 2 == 0 { 7 } else { 1 };
            operand(input, reg, memory, short, out);
            match (choice & 3, reg) {
                (0, 0 | 1) => out.push(choice),
                (1, 0 | 1) => immediate(out, choice),
                _ => {}
            }
        }
        9 | 10 => out.push(0x40 | choice & 0x0f),
        11..14 => match choice & 7 {
            0..3 => out.push(0x50 | RESULTS[usize::from(choice >> 3) % RESULTS.len()]),
            3..5 => out.push(0x58 | RESULTS[usize::from(choice >> 3) % RESULTS.len()]),
            5 => {
                out.push(0xff);
                operand(input, 6, memory, short, out);
            }
            6 => out.extend([0x6a, choice]),
            _ => out.extend([0xc8, choice >> 3, 0, choice & 1]),
        },
        14..17 => {
            let by = if choice & 0x80 == 0 { choice & 0x1f } else { choice };
            match kind >> 5 {
                0..4 => out.extend([0x70 | input.u8() & 15, by]),
                4 => out.extend([0xe0 | choice & 3, by]),
                5 => {
                    out.push(0xe8);
                    let distance = i32::from(by as i8).to_le_bytes();
                    out.extend(&distance[..if wide { 4 } else { 2 }]);
                }
                6 => out.push(0xc3),
                _ => {
                    out.push(0xff);
                    operand(input, 2 | choice & 4, memory, short, out);
                }
            }
        }
        17..19 => out.extend_from_slice(PLAIN[usize::from(input.u8()) % PLAIN.len()]),
        19 => {
            out.extend([None, Some(0xf3), Some(0xf3), Some(0xf2)][usize::from(choice & 3)]);
            out.push(STRINGS[usize::from(choice >> 2) % STRINGS.len()]);
        }
        20 => {
            // MOV of the accumulator and memory.
            out.push(0xa0 | choice & 3);
            let at = place(input);
            out.extend(&at[..if short { 2 } else { 4 }]);
        }
        21 | 22 => {
            let reg = input.u8() & 7;
            out.push(0xd8 | choice & 7);
            operand(input, reg, memory, short, out);
        }
        23 => {
            // A segment register anew: MOV of AX, which is one of those that exist.
            let sel = [
                selector::DATA,
                selector::USER_DATA,
                selector::FREE | 3,
                selector::FREE + 8 | 3,
                0,
                selector::FREE + 16 | 3,
                selector::FREE + 24 | 3,
                selector::DATA16,
            ][usize::from(choice & 7)];
            if wide {
                out.push(0x66);
            }
            out.push(0xb8);
            out.extend(sel.to_le_bytes());
            out.extend([0x8e, 0xc0 | [0, 3, 4, 5, 0, 3, 2, 5][usize::from(choice >> 3 & 7)] << 3]);
        }
        24 => {
            // A base anew.
            if !wide {
                out.push(0x66);
            }
            out.push(0xb8 | BASES[usize::from(choice & 3)]);
            out.extend(place(input));
        }
        25 => {
            // Stores to code close by.
            out.extend([0x2e, 0xc6]);
            out.extend(if short { vec![0x06, choice, 0x23] } else { vec![0x05, choice, 0, 0x20, 0] });
            out.push(input.u8());
        }
        _ => {
            let len = usize::from(input.u8() % 6);
            out.extend_from_slice(input.bytes(len));
        }
    }
}

/// A program of at most `longest` bytes, which HLT or UD2 may follow.
pub fn legacy_program(input: &mut Input<'_>, kind: Legacy, longest: usize) -> Vec<u8> {
    let mut out = Vec::new();
    while !input.is_empty() {
        let before = out.len();
        let mut one = Vec::new();
        instruction(input, kind.is_short(), &mut one);
        out.extend(one);
        if out.len() > longest {
            out.truncate(before);
            break;
        }
    }
    out
}
