//! A snippet on QEMU's TCG: in a ROM that makes the same address space and the same state of the processor for it, and
//! tells the registers that it leaves on a debug console.

use super::process::{self, End};
use super::snippet::{self, Registers, Snippet, Stopped, Width};
use super::sources;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

/// A large page: the grain of what is mapped.
const PAGE: u64 = 2 << 20;
/// Programs' memory is above 4 GiB in the physical address space, so that nothing else is in between.
const FRAMES: u64 = 1 << 32;
/// The guest's memory below 4 GiB, which `-machine pc` places so, and the most that it may have.
const LOW_MEMORY: u64 = 3 << 30;
const MOST_MEMORY: u64 = 16 << 30;
/// The part of the ROM that the processor begins in.
const BOOT_LEN: u64 = 0x1_0000;
/// The end of the ROM.
const ROM_END: u64 = 1 << 32;
/// Offsets in the system's part of the address space: the code that all handlers go to, where it puts the state,
/// and where page tables begin.
const COMMON: u64 = 0x7000;
const SAVED: u64 = 0x8000;
const TABLES: u64 = 0x2_0000;
/// Bytes of the state: registers, then an XSAVE area with SSE and AVX.
const SAVED_LEN: usize = XSAVE + 832;
const XSAVE: usize = 256;
const CONSOLE: u16 = 0xe9;

/// Runs `snippet` on TCG; `folder` is for its files.
pub(super) fn run(snippet: &Snippet<'_>, folder: &Path) -> Result<Stopped> {
    let regions = snippet::regions(snippet)?;
    let mut space = Space::default();
    for region in &regions {
        let first = region.start / PAGE;
        let last = region.end.saturating_sub(1) / PAGE;
        for page in first..=last {
            space.map(page * PAGE);
        }
    }
    let memory = LOW_MEMORY + space.used();
    if memory > MOST_MEMORY {
        bail!("it wants {memory} bytes of memory");
    }
    let rom = rom(snippet, &space, folder)?;
    let path = folder.join("test.rom");
    fs::write(&path, rom).with_context(|| format!("writing {}", path.display()))?;
    let state = folder.join("test.state");
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-nodefaults", "-display", "none", "-machine", "pc,accel=tcg", "-cpu", "max"]);
    command.args(["-m", &format!("{}M", memory >> 20), "-bios"]).arg(&path);
    command.args(["-chardev", &format!("file,id=state,path={}", state.to_string_lossy().replace(',', ",,"))]);
    command.args(["-device", &format!("isa-debugcon,iobase={CONSOLE:#x},chardev=state")]);
    command.args(["-device", &format!("isa-debug-exit,iobase={:#x},iosize=1", snippet::STOP_PORT)]);
    // A triple fault ends it.
    command.arg("-no-reboot");
    let end = process::run(&mut command, &folder.join("qemu.txt"), snippet::LIMIT, || false)?;
    let bytes = fs::read(&state).unwrap_or_default();
    match end {
        End::Timeout => Ok(Stopped::Timeout),
        _ if bytes.len() == SAVED_LEN => Ok(read(&bytes)),
        _ => Ok(Stopped::Exception(8, 0)),
    }
}

/// An address space of large pages: virtual to physical.
#[derive(Default)]
struct Space(BTreeMap<u64, u64>);

impl Space {
    /// Gives the page at `address` a frame, if it has none; the system's are at 0, with room for all that is there.
    fn map(&mut self, address: u64) {
        let system = address == snippet::SYSTEM;
        let frame = FRAMES + self.used();
        self.0.entry(address).or_insert(if system { 0 } else { frame });
    }

    /// Bytes of frames.
    fn used(&self) -> u64 {
        self.0.values().filter(|frame| **frame >= FRAMES).count() as u64 * PAGE
    }

    /// Page tables that begin at the physical address `at`, where user code may do everything. The ROM's end is
    /// mapped too, as it is.
    fn tables(&self, at: u64) -> Vec<u8> {
        const TABLE: u64 = 0x1000;
        let mut tables = vec![[0u64; 512]; 1];
        let mut pages = self.0.clone();
        pages.insert(ROM_END - PAGE, ROM_END - PAGE);
        for (address, frame) in pages {
            let mut table = 0;
            for shift in [39, 30] {
                let index = (address >> shift & 511) as usize;
                if tables[table][index] == 0 {
                    tables[table][index] = (at + tables.len() as u64 * TABLE) | 7;
                    tables.push([0; 512]);
                }
                table = ((tables[table][index] & !0xfff) - at) as usize / TABLE as usize;
            }
            // Present, writable, for users, accessed, dirty, large.
            tables[table][(address >> 21 & 511) as usize] = frame | 0xe7;
        }
        tables.iter().flatten().flat_map(|entry| entry.to_le_bytes()).collect()
    }
}

/// Two assembled parts, and around them what they put in place.
fn rom(snippet: &Snippet<'_>, space: &Space, folder: &Path) -> Result<Vec<u8>> {
    let system = snippet::SYSTEM;
    let handler = assemble(
        folder,
        "handler",
        include_str!("tcg_handler.asm"),
        &[
            ("HANDLER", system + COMMON),
            ("SAVED", system + SAVED),
            ("SAVED_LEN", SAVED_LEN as u64),
            ("FRAME", snippet::HANDLER_STACK - 40),
            ("CONSOLE", CONSOLE.into()),
            ("EXIT", snippet::STOP_PORT.into()),
        ],
    )?;
    let mut image = snippet::tables(|vector, address| {
        // push vector; jmp to the common part
        let mut code = vec![0x68];
        code.extend((vector as u32).to_le_bytes());
        code.push(0xe9);
        let distance = (system + COMMON).wrapping_sub(address + 10);
        code.extend((distance as u32).to_le_bytes());
        code
    });
    image.resize(COMMON as usize, 0);
    image.extend(handler);
    image.resize(TABLES as usize, 0);
    image.extend(space.tables(TABLES));
    // Registers for LGDT and LIDT, then the list of pieces, then their bytes.
    let (stack, code) = match snippet.width {
        Width::Bits64 => (snippet::USER_STACK, snippet::USER_CODE),
        Width::Bits32 => (snippet::USER_STACK_32, snippet::USER_CODE_32),
    };
    let mut pieces = vec![(snippet.address, snippet.code)];
    pieces.extend(snippet.data.iter().map(|(address, bytes)| (*address, &bytes[..])));
    let list = 32;
    let mut bytes_at = list + 24 * pieces.len();
    let len = (bytes_at + pieces.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() + image.len()) as u64;
    let len = (len + BOOT_LEN).next_multiple_of(0x1_0000);
    let start = ROM_END - len;
    let mut rom = Vec::new();
    for (base, limit) in [(snippet::GDT, snippet::GDT_LIMIT), (snippet::IDT, snippet::IDT_LIMIT)] {
        rom.extend(limit.to_le_bytes());
        rom.extend(base.to_le_bytes());
        rom.resize(rom.len().next_multiple_of(16), 0);
    }
    for (address, bytes) in &pieces {
        for word in [*address, start + bytes_at as u64, bytes.len() as u64] {
            rom.extend(word.to_le_bytes());
        }
        bytes_at += bytes.len();
    }
    pieces.iter().for_each(|(_, bytes)| rom.extend(*bytes));
    let image_at = start + rom.len() as u64;
    rom.extend(&image);
    rom.resize((len - BOOT_LEN) as usize, 0);
    let boot = assemble(
        folder,
        "boot",
        include_str!("tcg.asm"),
        &[
            ("ROM_CODE", ROM_END - BOOT_LEN),
            ("IMAGE", image_at),
            ("IMAGE_LEN", image.len() as u64),
            ("TABLES", start),
            ("PIECES", start + list as u64),
            ("PIECE_COUNT", pieces.len() as u64),
            // FSGSBASE and OSXSAVE, too: TCG has them.
            ("CR4", snippet::CR4 | 1 << 16 | 1 << 18),
            ("PML4", TABLES),
            ("STACK", snippet::HANDLER_STACK),
            ("LDT_SELECTOR", snippet::LDT_SELECTOR.into()),
            ("TSS_SELECTOR", snippet::TSS_SELECTOR.into()),
            ("DATA_SELECTOR", snippet::USER_DATA.into()),
            ("CODE_SELECTOR", code.into()),
            ("USER_STACK", stack),
            ("USER_CODE", snippet.address),
        ],
    )?;
    rom.extend(boot);
    Ok(rom)
}

fn assemble(folder: &Path, name: &str, text: &str, values: &[(&str, u64)]) -> Result<Vec<u8>> {
    let (input, output) = (format!("{name}.asm"), format!("{name}.bin"));
    fs::write(folder.join(&input), text).with_context(|| format!("writing {input}"))?;
    let mut arguments =
        vec!["-w-all".to_owned(), "-f".into(), "bin".into(), input, "-o".into(), output.clone()];
    arguments.extend(values.iter().map(|(name, value)| format!("-D{name}={value:#x}")));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    sources::build(folder, "nasm", &arguments)?;
    fs::read(folder.join(&output)).with_context(|| format!("reading {output}"))
}

/// The state that the handler wrote.
fn read(bytes: &[u8]) -> Stopped {
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]));
    let mut left = Registers {
        general: std::array::from_fn(|register| word(8 * register)),
        rip: word(136),
        fs_base: word(144),
        gs_base: word(152),
        ..Registers::default()
    };
    let instruction = [bytes[160], bytes[161]];
    let area = &bytes[XSAVE..];
    left.fpu.status = u16::from_le_bytes([area[2], area[3]]);
    for (register, value) in left.fpu.st.iter_mut().enumerate() {
        value.copy_from_slice(&area[32 + 16 * register..][..10]);
    }
    for (register, vector) in left.fpu.vectors.iter_mut().take(16).enumerate() {
        for half in 0..2 {
            vector[half] = word(XSAVE + 160 + 16 * register + 8 * half);
            vector[2 + half] = word(XSAVE + 576 + 16 * register + 8 * half);
        }
    }
    // What is not in the area is as it was in the beginning: zero.
    let present = u64::from_le_bytes(std::array::from_fn(|byte| area[512 + byte]));
    for vector in &mut left.fpu.vectors {
        if present & 2 == 0 {
            vector[..2].fill(0);
        }
        if present & 4 == 0 {
            vector[2..4].fill(0);
        }
    }
    if present & 1 == 0 {
        left.fpu.status = 0;
        left.fpu.st = [[0; 10]; 8];
    }
    snippet::stopped(word(128), instruction, left)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_tables_map_what_is_wanted() {
        let mut space = Space::default();
        for address in [snippet::SYSTEM, 0, 0xe000_0000, 0xe000_0000] {
            space.map(address);
        }
        assert_eq!(space.used(), 2 * PAGE);
        let tables = space.tables(TABLES);
        let entry =
            |at: u64| u64::from_le_bytes(std::array::from_fn(|byte| tables[(at - TABLES) as usize + byte]));
        let walk = |address: u64| {
            let third = entry(TABLES + (address >> 39 & 511) * 8) & !0xfff;
            let second = entry(third + (address >> 30 & 511) * 8) & !0xfff;
            entry(second + (address >> 21 & 511) * 8)
        };
        assert_eq!(walk(snippet::SYSTEM), 0xe7);
        assert_eq!(walk(0), FRAMES | 0xe7);
        assert_eq!(walk(0xe000_0000), (FRAMES + PAGE) | 0xe7);
        assert_eq!(walk(ROM_END - PAGE), (ROM_END - PAGE) | 0xe7);
    }

    #[test]
    fn a_saved_state_is_read() {
        let mut bytes = vec![0; SAVED_LEN];
        bytes[8] = 7;
        bytes[128] = 13;
        bytes[136] = 0x40;
        bytes[160] = 0xf4;
        bytes[XSAVE + 512] = 6;
        bytes[XSAVE + 160 + 16] = 1;
        bytes[XSAVE + 576 + 16] = 2;
        let Stopped::Halted(left) = read(&bytes) else { panic!("it did not halt") };
        assert_eq!((left.general[1], left.rip), (7, 0x40));
        assert_eq!(left.fpu.vectors[1][..4], [1, 0, 2, 0]);
        bytes[160] = 0x90;
        assert!(matches!(read(&bytes), Stopped::Exception(13, 0x40)));
    }
}
