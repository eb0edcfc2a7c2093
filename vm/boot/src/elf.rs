//! ELF executables for x86, 32 and 64 bits (System V ABI, chapters 4 and 5).

use std::ops::Range;

use crate::fields::Fields;
use crate::{BootError, FileKind, KernelFile, Loader};

const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// One program header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Segment {
    kind: u32,
    offset: u64,
    pub(crate) virtual_address: u64,
    pub(crate) physical_address: u64,
    file_size: u64,
    pub(crate) memory_size: u64,
    align: u64,
}

impl Segment {
    /// Where it begins in the file.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// How much of it is in the file.
    pub(crate) fn file_size(&self) -> u64 {
        self.file_size
    }
}

/// A parsed ELF file.
#[derive(Debug)]
pub(crate) struct ElfFile<'a> {
    file: Fields<'a>,
    pub(crate) is_64: bool,
    pub(crate) entry: u64,
    segments: Vec<Segment>,
}

impl<'a> ElfFile<'a> {
    /// Reads the file header and the program headers (at most 65,535, each within the file).
    pub(crate) fn parse(kernel: &'a KernelFile<'a>) -> Result<Self, BootError> {
        let file = Fields::new(FileKind::Elf, kernel);
        let class = file.u8("EI_CLASS", 4)?;
        let is_64 = match class {
            1 => false,
            2 => true,
            _ => return Err(file.bad("EI_CLASS", 4, class.into(), "expected 1 (32-bit) or 2 (64-bit)")),
        };
        let encoding = file.u8("EI_DATA", 5)?;
        if encoding != 1 {
            return Err(file.bad("EI_DATA", 5, encoding.into(), "expected 1 (little-endian)"));
        }
        let machine = file.u16("e_machine", 18)?;
        if !matches!(machine, EM_386 | EM_X86_64) {
            let found = match machine {
                183 => "arm64 (an ELF file)".to_owned(),
                243 => "RISC-V (an ELF file)".to_owned(),
                40 => "32-bit ARM (an ELF file)".to_owned(),
                other => format!("ELF machine number {other}"),
            };
            return Err(BootError::WrongArchitecture { found });
        }
        let kind = file.u16("e_type", 16)?;
        if !matches!(kind, ET_EXEC | ET_DYN) {
            return Err(file.bad("e_type", 16, kind.into(), "expected an executable (2 or 3)"));
        }
        let (entry, table, size_at) = if is_64 {
            (file.u64("e_entry", 24)?, file.u64("e_phoff", 32)?, 54)
        } else {
            (file.u32("e_entry", 24)?.into(), file.u32("e_phoff", 28)?.into(), 42)
        };
        let entry_size = u64::from(file.u16("e_phentsize", size_at)?);
        let count = u64::from(file.u16("e_phnum", size_at + 2)?);
        let expected_size = if is_64 { 56 } else { 32 };
        if count > 0 && entry_size != expected_size {
            return Err(file.bad("e_phentsize", size_at, entry_size, "expected 32 (ELF32) or 56 (ELF64)"));
        }
        // Read at once: there can be many, far into the file.
        let headers = file.bytes("program headers", table, count * entry_size)?;
        let headers = KernelFile::from(&*headers);
        let headers = Fields::new(FileKind::Elf, &headers);
        let segments = (0..count)
            .map(|index| Self::segment(&headers, table, is_64, index * entry_size))
            .collect::<Result<_, _>>()?;
        Ok(Self { file, is_64, entry, segments })
    }

    /// The program header at `at` in the headers, which are at `table` in the file.
    fn segment(file: &Fields<'_>, table: u64, is_64: bool, at: u64) -> Result<Segment, BootError> {
        let kind = file.u32("p_type", at)?;
        let segment = if is_64 {
            Segment {
                kind,
                offset: file.u64("p_offset", at + 8)?,
                virtual_address: file.u64("p_vaddr", at + 16)?,
                physical_address: file.u64("p_paddr", at + 24)?,
                file_size: file.u64("p_filesz", at + 32)?,
                memory_size: file.u64("p_memsz", at + 40)?,
                align: file.u64("p_align", at + 48)?,
            }
        } else {
            Segment {
                kind,
                offset: file.u32("p_offset", at + 4)?.into(),
                virtual_address: file.u32("p_vaddr", at + 8)?.into(),
                physical_address: file.u32("p_paddr", at + 12)?.into(),
                file_size: file.u32("p_filesz", at + 16)?.into(),
                memory_size: file.u32("p_memsz", at + 20)?.into(),
                align: file.u32("p_align", at + 28)?.into(),
            }
        };
        if kind == PT_LOAD && segment.file_size > segment.memory_size {
            let (offset, expected) = (table + at + if is_64 { 32 } else { 16 }, "expected at most p_memsz");
            return Err(file.bad("p_filesz", offset, segment.file_size, expected));
        }
        Ok(segment)
    }

    /// Where in the file the part ends that the headers describe: segments, sections and the headers
    /// themselves.
    pub(crate) fn end(&self) -> Result<u64, BootError> {
        /// A section without bytes in the file.
        const SHT_NOBITS: u32 = 8;
        let mut end = 0u64;
        for segment in &self.segments {
            end = end.max(segment.offset.saturating_add(segment.file_size));
        }
        if !self.is_64 {
            return Ok(end);
        }
        let table = self.file.u64("e_shoff", 40)?;
        let size = u64::from(self.file.u16("e_shentsize", 58)?);
        let count = u64::from(self.file.u16("e_shnum", 60)?);
        if count == 0 {
            return Ok(end);
        }
        if size != 64 {
            return Err(self.file.bad("e_shentsize", 58, size, "expected 64"));
        }
        self.file.check("section headers", table, count * size)?;
        for at in (0..count).map(|index| table + index * size) {
            if self.file.u32("sh_type", at + 4)? != SHT_NOBITS {
                let (offset, len) =
                    (self.file.u64("sh_offset", at + 24)?, self.file.u64("sh_size", at + 32)?);
                end = end.max(offset.saturating_add(len));
            }
        }
        Ok(end.max(table + count * size))
    }

    /// Writes what of `segment` is in the file to `gpa`.
    pub(crate) fn copy(&self, loader: &mut Loader<'_>, segment: &Segment, gpa: u64) -> Result<(), BootError> {
        loader.copy(&self.file, "segment", segment.offset, segment.file_size, gpa)
    }

    /// `e_entry` as a physical address in a loaded segment below 4 GiB. Linux gives the physical one; a
    /// file that gives the virtual one is understood through its segments.
    pub(crate) fn physical_entry(&self) -> Result<u64, BootError> {
        let inside = |start: u64, size: u64| self.entry.checked_sub(start).filter(|offset| *offset < size);
        let physical = self.loadable().find_map(|segment| {
            inside(segment.physical_address, segment.memory_size)
                .and_then(|offset| segment.physical_address.checked_add(offset))
        });
        let by_virtual = || {
            self.loadable().find_map(|segment| {
                inside(segment.virtual_address, segment.memory_size)
                    .and_then(|offset| segment.physical_address.checked_add(offset))
            })
        };
        physical.or_else(by_virtual).filter(|entry| *entry < 1 << 32).ok_or(BootError::Unsupported {
            file: FileKind::Elf,
            what: "the entry point isn't in a segment loaded below 4 GiB",
        })
    }

    /// The segments with memory.
    pub(crate) fn loadable(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(|segment| segment.kind == PT_LOAD && segment.memory_size > 0)
    }

    /// The descriptor of the note with `name` (without its zero) and `kind`, if there's one in the first MiB
    /// of notes.
    pub(crate) fn note(&self, name: &[u8], kind: u32) -> Result<Option<Vec<u8>>, BootError> {
        const MAX_NOTES: u64 = 1 << 20;
        let mut room = MAX_NOTES;
        for segment in self.segments.iter().filter(|segment| segment.kind == PT_NOTE) {
            self.file.check("note segment", segment.offset, segment.file_size)?;
            let len = segment.file_size.min(room);
            room -= len;
            let data = self.file.bytes("note segment", segment.offset, len)?;
            let align = if segment.align == 8 { 8 } else { 4 };
            if let Some(found) = find_note(&data, align, name, kind) {
                return Ok(Some(found.to_vec()));
            }
        }
        Ok(None)
    }

    /// Puts all segments at their physical addresses.
    pub(crate) fn load(&self, loader: &mut Loader<'_>) -> Result<(), BootError> {
        if self.loadable().next().is_none() {
            return Err(BootError::Unsupported { file: FileKind::Elf, what: "no segment to load" });
        }
        for segment in self.loadable() {
            let start = segment.physical_address;
            let range = start..start.saturating_add(segment.memory_size);
            let part = segment.offset..segment.offset.saturating_add(segment.file_size);
            load_part(loader, &self.file, "segment", part, range)?;
        }
        Ok(())
    }
}

/// Takes `range`, writes the `part` of the file at its start and zeroes the rest.
pub(crate) fn load_part(
    loader: &mut Loader<'_>,
    file: &Fields<'_>,
    name: &'static str,
    part: Range<u64>,
    range: Range<u64>,
) -> Result<(), BootError> {
    let len = part.end - part.start;
    file.check(name, part.start, len)?;
    if !loader.free.take(&range) {
        let what = "a segment of the kernel";
        return Err(BootError::OutsideRam { file: file.file, what, start: range.start, end: range.end });
    }
    loader.copy(file, name, part.start, len, range.start)?;
    loader.zero(range.start + len..range.end)?;
    loader.note("kernel", range);
    Ok(())
}

/// Walks the notes in `data`; a malformed one ends the walk.
fn find_note<'a>(data: &'a [u8], align: usize, name: &[u8], kind: u32) -> Option<&'a [u8]> {
    let mut rest = data;
    while rest.len() >= 12 {
        let word = |at: usize| rest[at..at + 4].try_into().map(u32::from_le_bytes).unwrap_or(0);
        let (name_size, desc_size, note_kind) = (word(0) as usize, word(4) as usize, word(8));
        let name_end = 12usize.checked_add(name_size)?;
        let desc_start = name_end.checked_next_multiple_of(align)?;
        let desc_end = desc_start.checked_add(desc_size)?;
        let note_name = rest.get(12..name_end)?;
        let desc = rest.get(desc_start..desc_end)?;
        if note_kind == kind && note_name.strip_suffix(&[0]).unwrap_or(note_name) == name {
            return Some(desc);
        }
        rest = rest.get(desc_end.checked_next_multiple_of(align)?..)?;
    }
    None
}
