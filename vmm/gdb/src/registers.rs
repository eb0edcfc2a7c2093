//! gdb's registers in the neutral state of a processor, and their description for gdb (the GDB manual's "Target
//! Descriptions" and "i386 Features").

use accel::{FpuState, X86State};
use std::fmt::Write;

const KERNEL_GS_BASE: u32 = 0xc000_0102;
/// EFER.LMA, and L of a code segment's access rights.
const LONG_MODE: u64 = 1 << 10;
const LONG_CODE: u16 = 1 << 13;
/// CR0.PE, and RFLAGS.VM.
const PROTECTED: u64 = 1;
const VM86: u64 = 1 << 17;

/// What gdb takes the processor for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Architecture {
    /// 64-bit code.
    #[default]
    X86_64,
    /// 32-bit code.
    I386,
    /// 16-bit code, with the registers of 32-bit code.
    I8086,
}

impl Architecture {
    pub(crate) const NAMES: [(&'static str, Self); 3] =
        [("x86-64", Self::X86_64), ("i386", Self::I386), ("i8086", Self::I8086)];

    fn gdb_name(self) -> &'static str {
        match self {
            Self::X86_64 => "i386:x86-64",
            Self::I386 => "i386",
            Self::I8086 => "i8086",
        }
    }
}

/// One of gdb's registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Register {
    /// Of [`X86State::regs`].
    General(usize),
    /// The instruction pointer: as a linear address, so that gdb finds code and breakpoints in any mode.
    InstructionPointer,
    Flags,
    /// Of [`X86State::segments`]: the selector.
    Selector(usize),
    /// Of [`X86State::segments`]: the base.
    Base(usize),
    St(usize),
    Fpu(Fpu),
    /// The lower 128 bits of a vector register.
    Xmm(usize),
    /// The 128 bits above.
    YmmHigh(usize),
    Mxcsr,
    Control(u8),
    Efer,
    KernelGsBase,
}

/// x87 control registers, in gdb's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fpu {
    Control,
    Status,
    Tag,
    InstructionSegment,
    InstructionOffset,
    OperandSegment,
    OperandOffset,
    Opcode,
}

/// A register with its description.
#[derive(Debug, Clone)]
struct Entry {
    register: Register,
    name: String,
    bits: usize,
    kind: &'static str,
}

/// A feature of gdb's: registers that belong together.
struct Feature {
    name: &'static str,
    types: String,
    entries: Vec<Entry>,
}

/// The registers of a processor in gdb's order.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    entries: Vec<Entry>,
    description: String,
}

/// Why a register cannot be changed so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refused;

/// Bits of RFLAGS and of MXCSR, as gdb names them.
const EFLAGS: &[(&str, u32)] = &[
    ("CF", 0),
    ("", 1),
    ("PF", 2),
    ("AF", 4),
    ("ZF", 6),
    ("SF", 7),
    ("TF", 8),
    ("IF", 9),
    ("DF", 10),
    ("OF", 11),
    ("NT", 14),
    ("RF", 16),
    ("VM", 17),
    ("AC", 18),
    ("VIF", 19),
    ("VIP", 20),
    ("ID", 21),
];
const MXCSR: &[(&str, u32)] = &[
    ("IE", 0),
    ("DE", 1),
    ("ZE", 2),
    ("OE", 3),
    ("UE", 4),
    ("PE", 5),
    ("DAZ", 6),
    ("IM", 7),
    ("DM", 8),
    ("ZM", 9),
    ("OM", 10),
    ("UM", 11),
    ("PM", 12),
    ("FZ", 15),
];

const VECTORS: &str = "<vector id=\"v4f\" type=\"ieee_single\" count=\"4\"/>\
<vector id=\"v2d\" type=\"ieee_double\" count=\"2\"/><vector id=\"v16i8\" type=\"int8\" count=\"16\"/>\
<vector id=\"v8i16\" type=\"int16\" count=\"8\"/><vector id=\"v4i32\" type=\"int32\" count=\"4\"/>\
<vector id=\"v2i64\" type=\"int64\" count=\"2\"/><union id=\"vec128\"><field name=\"v4_float\" type=\"v4f\"/>\
<field name=\"v2_double\" type=\"v2d\"/><field name=\"v16_int8\" type=\"v16i8\"/>\
<field name=\"v8_int16\" type=\"v8i16\"/><field name=\"v4_int32\" type=\"v4i32\"/>\
<field name=\"v2_int64\" type=\"v2i64\"/><field name=\"uint128\" type=\"uint128\"/></union>";

/// The type of a 32-bit register that is made of single bits.
fn flags(id: &str, bits: &[(&str, u32)]) -> String {
    let field = |(name, bit): &(&str, u32)| format!("<field name=\"{name}\" start=\"{bit}\" end=\"{bit}\"/>");
    let fields: String = bits.iter().map(field).collect();
    format!("<flags id=\"{id}\" size=\"4\">{fields}</flags>")
}

fn entry(register: Register, name: impl Into<String>, bits: usize, kind: &'static str) -> Entry {
    Entry { register, name: name.into(), bits, kind }
}

/// General registers, segments and the x87 unit.
fn core(architecture: Architecture) -> Feature {
    // In the order of encodings, and gdb's order of these in 64-bit code; in 32-bit code it is the same.
    const NAMES: [&str; 8] = ["ax", "cx", "dx", "bx", "sp", "bp", "si", "di"];
    const LONG_ORDER: [usize; 8] = [0, 3, 1, 2, 6, 7, 5, 4];
    const SEGMENTS: [(&str, usize); 6] = [
        ("cs", X86State::CS),
        ("ss", X86State::SS),
        ("ds", X86State::DS),
        ("es", X86State::ES),
        ("fs", X86State::FS),
        ("gs", X86State::GS),
    ];
    const FPU: [(&str, Fpu); 8] = [
        ("fctrl", Fpu::Control),
        ("fstat", Fpu::Status),
        ("ftag", Fpu::Tag),
        ("fiseg", Fpu::InstructionSegment),
        ("fioff", Fpu::InstructionOffset),
        ("foseg", Fpu::OperandSegment),
        ("fooff", Fpu::OperandOffset),
        ("fop", Fpu::Opcode),
    ];
    let long = architecture == Architecture::X86_64;
    let (prefix, bits, integer) = if long { ("r", 64, "int64") } else { ("e", 32, "int32") };
    let mut entries = Vec::new();
    for index in if long { LONG_ORDER } else { [0, 1, 2, 3, 4, 5, 6, 7] } {
        let name = NAMES[index];
        let kind = if matches!(name, "bp" | "sp") { "data_ptr" } else { integer };
        entries.push(entry(Register::General(index), format!("{prefix}{name}"), bits, kind));
    }
    if long {
        entries
            .extend((8..16).map(|index| entry(Register::General(index), format!("r{index}"), 64, "int64")));
    }
    entries.push(entry(Register::InstructionPointer, format!("{prefix}ip"), bits, "code_ptr"));
    entries.push(entry(Register::Flags, "eflags", 32, "i386_eflags"));
    entries.extend(SEGMENTS.map(|(name, index)| entry(Register::Selector(index), name, 32, "int32")));
    entries.extend((0..8).map(|index| entry(Register::St(index), format!("st{index}"), 80, "i387_ext")));
    entries.extend(FPU.map(|(name, register)| entry(Register::Fpu(register), name, 32, "int")));
    Feature { name: "org.gnu.gdb.i386.core", types: flags("i386_eflags", EFLAGS), entries }
}

fn features(architecture: Architecture, avx: bool) -> Vec<Feature> {
    let long = architecture == Architecture::X86_64;
    let vectors = if long { 16 } else { 8 };
    let mut sse: Vec<_> =
        (0..vectors).map(|index| entry(Register::Xmm(index), format!("xmm{index}"), 128, "vec128")).collect();
    sse.push(entry(Register::Mxcsr, "mxcsr", 32, "i386_mxcsr"));
    let types = VECTORS.to_owned() + &flags("i386_mxcsr", MXCSR);
    let mut features =
        vec![core(architecture), Feature { name: "org.gnu.gdb.i386.sse", types, entries: sse }];
    if avx {
        let high = |index| entry(Register::YmmHigh(index), format!("ymm{index}h"), 128, "uint128");
        let entries = (0..vectors).map(high).collect();
        features.push(Feature { name: "org.gnu.gdb.i386.avx", types: String::new(), entries });
    }
    let bits = if long { 64 } else { 32 };
    let kind = if long { "int64" } else { "int32" };
    if long {
        let bases = [("fs_base", X86State::FS), ("gs_base", X86State::GS)];
        let entries = bases.map(|(name, index)| entry(Register::Base(index), name, 64, "int64")).into();
        features.push(Feature { name: "org.gnu.gdb.i386.segments", types: String::new(), entries });
    }
    let mut system: Vec<_> =
        [0, 2, 3, 4].map(|number| entry(Register::Control(number), format!("cr{number}"), bits, kind)).into();
    if long {
        system.push(entry(Register::Control(8), "cr8", 64, kind));
        system.push(entry(Register::KernelGsBase, "k_gs_base", 64, kind));
    }
    system.push(entry(Register::Efer, "efer", bits, kind));
    features.push(Feature { name: "org.vireo.x86.system", types: String::new(), entries: system });
    features
}

impl Layout {
    /// The registers that gdb is told of; with AVX's upper halves if `avx`.
    pub(crate) fn new(architecture: Architecture, avx: bool) -> Self {
        let mut description = format!(
            "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\"><target version=\"1.0\">\
             <architecture>{}</architecture>",
            architecture.gdb_name()
        );
        let mut entries = Vec::new();
        for feature in features(architecture, avx) {
            let _ = write!(description, "<feature name=\"{}\">{}", feature.name, feature.types); // into a string
            for Entry { name, bits, kind, .. } in &feature.entries {
                let _ = write!(description, "<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{kind}\"/>");
            }
            description.push_str("</feature>");
            entries.extend(feature.entries);
        }
        description.push_str("</target>");
        Self { entries, description }
    }

    /// The description in XML.
    pub(crate) fn description(&self) -> &str {
        &self.description
    }

    /// The bytes of register number `index` of gdb's, if there is one.
    pub(crate) fn read(&self, state: &X86State, index: usize) -> Option<Vec<u8>> {
        let entry = self.entries.get(index)?;
        let mut bytes = get(state, entry.register).to_le_bytes().to_vec();
        bytes.truncate(entry.bits / 8);
        Some(bytes)
    }

    /// Changes register number `index`.
    pub(crate) fn write(&self, state: &mut X86State, index: usize, bytes: &[u8]) -> Result<(), Refused> {
        let entry = self.entries.get(index).ok_or(Refused)?;
        if bytes.len() != entry.bits / 8 {
            return Err(Refused);
        }
        let value = bytes.iter().rev().fold(0, |value, byte| value << 8 | u128::from(*byte));
        // Registers are 64 bits wide even where gdb sees fewer: what it writes back as it was leaves the rest.
        let mask = if entry.bits == 128 { u128::MAX } else { (1 << entry.bits) - 1 };
        let old = get(state, entry.register);
        if old & mask == value {
            return Ok(());
        }
        set(state, entry.register, old & !mask | value)
    }

    /// All registers' bytes.
    pub(crate) fn read_all(&self, state: &X86State) -> Vec<u8> {
        (0..self.entries.len()).filter_map(|index| self.read(state, index)).flatten().collect()
    }

    /// Changes all registers; `bytes` may end earlier.
    pub(crate) fn write_all(&self, state: &mut X86State, bytes: &[u8]) -> Result<(), Refused> {
        let mut rest = bytes;
        for (index, entry) in self.entries.iter().enumerate() {
            let Some((here, after)) = rest.split_at_checked(entry.bits / 8) else { break };
            self.write(state, index, here)?;
            rest = after;
        }
        Ok(())
    }
}

/// Whether the processor executes 64-bit code.
pub(crate) fn is_long(state: &X86State) -> bool {
    state.efer & LONG_MODE != 0 && state.segments[X86State::CS].rights & LONG_CODE != 0
}

/// The linear address of the next instruction.
pub(crate) fn code_address(state: &X86State) -> u64 {
    if is_long(state) {
        return state.rip;
    }
    state.segments[X86State::CS].base.wrapping_add(state.rip & 0xffff_ffff) & 0xffff_ffff
}

fn get(state: &X86State, register: Register) -> u128 {
    let fpu = &state.fpu;
    let value = match register {
        Register::General(index) => state.regs[index],
        Register::InstructionPointer => code_address(state),
        Register::Flags => state.rflags,
        Register::Selector(index) => state.segments[index].selector.into(),
        Register::Base(index) => state.segments[index].base,
        Register::St(index) => {
            return fpu.st[index].iter().rev().fold(0, |value, byte| value << 8 | u128::from(*byte));
        }
        Register::Fpu(Fpu::Control) => fpu.control.into(),
        Register::Fpu(Fpu::Status) => fpu.status.into(),
        Register::Fpu(Fpu::Tag) => tag_word(fpu).into(),
        Register::Fpu(Fpu::InstructionSegment) => fpu.instruction_pointer >> 32 & 0xffff,
        Register::Fpu(Fpu::InstructionOffset) => fpu.instruction_pointer & 0xffff_ffff,
        Register::Fpu(Fpu::OperandSegment) => fpu.data_pointer >> 32 & 0xffff,
        Register::Fpu(Fpu::OperandOffset) => fpu.data_pointer & 0xffff_ffff,
        Register::Fpu(Fpu::Opcode) => fpu.opcode.into(),
        Register::Xmm(index) => return vector(fpu, index, 0),
        Register::YmmHigh(index) => return vector(fpu, index, 2),
        Register::Mxcsr => fpu.mxcsr.into(),
        Register::Control(0) => state.cr0,
        Register::Control(2) => state.cr2,
        Register::Control(3) => state.cr3,
        Register::Control(4) => state.cr4,
        Register::Control(_) => u64::from(state.lapic.tpr >> 4),
        Register::Efer => state.efer,
        Register::KernelGsBase => state.msr(KERNEL_GS_BASE).unwrap_or(0),
    };
    value.into()
}

fn set(state: &mut X86State, register: Register, value: u128) -> Result<(), Refused> {
    let word = value as u64;
    let long = is_long(state);
    let fpu = &mut state.fpu;
    match register {
        Register::General(index) => state.regs[index] = word,
        Register::InstructionPointer if long => state.rip = word,
        Register::InstructionPointer => {
            state.rip = word.wrapping_sub(state.segments[X86State::CS].base) & 0xffff_ffff;
        }
        Register::Flags => state.rflags = word,
        Register::Selector(index) => {
            // What a selector means in protected mode is in tables that only a load of it reads.
            if state.cr0 & PROTECTED != 0 && state.rflags & VM86 == 0 {
                return Err(Refused);
            }
            state.segments[index].selector = word as u16;
            state.segments[index].base = (word & 0xffff) << 4;
        }
        Register::Base(index) => state.segments[index].base = word,
        Register::St(index) => fpu.st[index].copy_from_slice(&value.to_le_bytes()[..10]),
        Register::Fpu(Fpu::Control) => fpu.control = word as u16,
        Register::Fpu(Fpu::Status) => fpu.status = word as u16,
        Register::Fpu(Fpu::Tag) => {
            fpu.tag = (0..8).filter(|at| word >> (2 * at) & 3 != 3).fold(0, |tag, at| tag | 1 << at);
        }
        Register::Fpu(Fpu::InstructionSegment) => put_segment(&mut fpu.instruction_pointer, word),
        Register::Fpu(Fpu::InstructionOffset) => put_offset(&mut fpu.instruction_pointer, word),
        Register::Fpu(Fpu::OperandSegment) => put_segment(&mut fpu.data_pointer, word),
        Register::Fpu(Fpu::OperandOffset) => put_offset(&mut fpu.data_pointer, word),
        Register::Fpu(Fpu::Opcode) => fpu.opcode = word as u16 & 0x7ff,
        Register::Xmm(index) => put_vector(fpu, index, 0, value)?,
        Register::YmmHigh(index) => put_vector(fpu, index, 2, value)?,
        Register::Mxcsr => fpu.mxcsr = word as u32,
        Register::Control(0) => state.cr0 = word,
        Register::Control(2) => state.cr2 = word,
        Register::Control(3) => state.cr3 = word,
        Register::Control(4) => state.cr4 = word,
        Register::Control(_) => state.lapic.tpr = (word as u8 & 0xf) << 4,
        Register::Efer => state.efer = word,
        Register::KernelGsBase => state.set_msr(KERNEL_GS_BASE, word),
    }
    Ok(())
}

fn put_segment(pointer: &mut u64, segment: u64) {
    *pointer = *pointer & 0xffff_ffff | (segment & 0xffff) << 32;
}

fn put_offset(pointer: &mut u64, offset: u64) {
    *pointer = *pointer & !0xffff_ffff | offset & 0xffff_ffff;
}

/// Two quadwords of a vector register, from number `at` on.
fn vector(fpu: &FpuState, index: usize, at: usize) -> u128 {
    fpu.vectors.get(index).map_or(0, |words| u128::from(words[at]) | u128::from(words[at + 1]) << 64)
}

fn put_vector(fpu: &mut FpuState, index: usize, at: usize, value: u128) -> Result<(), Refused> {
    let words = fpu.vectors.get_mut(index).ok_or(Refused)?;
    (words[at], words[at + 1]) = (value as u64, (value >> 64) as u64);
    Ok(())
}

/// The x87 tag word (Intel SDM volume 1, 8.1.7) from its abridged form and the registers.
fn tag_word(fpu: &FpuState) -> u16 {
    let top = usize::from(fpu.status >> 11 & 7);
    (0..8).fold(0, |word, physical: usize| {
        let st = &fpu.st[(physical + 8 - top) % 8];
        let exponent = u16::from_le_bytes([st[8], st[9]]) & 0x7fff;
        let significand = u64::from_le_bytes(std::array::from_fn(|byte| st[byte]));
        let tag = match (fpu.tag >> physical & 1, exponent, significand) {
            (0, ..) => 3,
            (_, 0, 0) => 1,
            (_, 0 | 0x7fff, _) => 2,
            (_, _, significand) if significand >> 63 == 0 => 2,
            _ => 0,
        };
        word | tag << (2 * physical)
    })
}
