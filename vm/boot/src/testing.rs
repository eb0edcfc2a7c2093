//! Guest memory and hand-made files for this crate's tests.

use std::collections::BTreeMap;

use crate::{BootSpec, LoadMemory, MemoryMap, OutOfMemoryRange};

const PAGE: u64 = 0x1000;

/// Sparse guest RAM that refuses writes outside the map's RAM.
pub(crate) struct Ram<'a> {
    map: &'a MemoryMap,
    pages: BTreeMap<u64, Vec<u8>>,
}

impl<'a> Ram<'a> {
    pub(crate) fn new(map: &'a MemoryMap) -> Self {
        Self { map, pages: BTreeMap::new() }
    }

    pub(crate) fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let byte = |at: u64| self.pages.get(&(at / PAGE)).map_or(0, |page| page[(at % PAGE) as usize]);
        (gpa..gpa + len as u64).map(byte).collect()
    }

    pub(crate) fn u32(&self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.read(gpa, 4).try_into().unwrap())
    }

    pub(crate) fn u64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.read(gpa, 8).try_into().unwrap())
    }

    pub(crate) fn fill(&mut self, gpa: u64, len: usize, byte: u8) {
        self.write(gpa, &vec![byte; len]).unwrap();
    }
}

impl LoadMemory for Ram<'_> {
    fn write(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), OutOfMemoryRange> {
        let error = OutOfMemoryRange { gpa, len: bytes.len() as u64 };
        let end = gpa.checked_add(bytes.len() as u64).ok_or(error)?;
        if !self.map.ram().any(|range| range.start <= gpa && end <= range.end) {
            return Err(error);
        }
        // Zeroes into pages that aren't there change nothing; skipping them keeps big guests cheap.
        let mut at = gpa;
        while at < end {
            let stop = end.min((at / PAGE + 1) * PAGE);
            let part = &bytes[(at - gpa) as usize..(stop - gpa) as usize];
            if self.pages.contains_key(&(at / PAGE)) || part.iter().any(|byte| *byte != 0) {
                let page = self.pages.entry(at / PAGE).or_insert_with(|| vec![0; PAGE as usize]);
                page[(at % PAGE) as usize..][..part.len()].copy_from_slice(part);
            }
            at = stop;
        }
        Ok(())
    }
}

pub(crate) fn spec<'a>(kernel: &'a [u8], memory: &'a MemoryMap) -> BootSpec<'a> {
    BootSpec {
        kernel: kernel.into(),
        initrd: None,
        cmdline: "console=ttyS0",
        memory,
        rsdp: None,
        direct: None,
        rng_seed: &[],
    }
}

/// One segment of a hand-made ELF file.
#[derive(Clone)]
pub(crate) struct Part {
    pub(crate) kind: u32,
    pub(crate) virtual_address: u64,
    pub(crate) physical_address: u64,
    pub(crate) data: Vec<u8>,
    pub(crate) memory_size: u64,
}

impl Part {
    pub(crate) fn load(address: u64, data: &[u8], memory_size: u64) -> Self {
        Self {
            kind: 1,
            virtual_address: address,
            physical_address: address,
            data: data.to_vec(),
            memory_size,
        }
    }

    pub(crate) fn note(data: &[u8]) -> Self {
        Self { kind: 4, virtual_address: 0, physical_address: 0, data: data.to_vec(), memory_size: 0 }
    }
}

pub(crate) fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut bytes: Vec<u8> =
        [name.len() as u32, desc.len() as u32, kind].iter().flat_map(|word| word.to_le_bytes()).collect();
    for part in [name, desc] {
        bytes.extend_from_slice(part);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

fn elf(is_64: bool, entry: u64, parts: &[Part]) -> Vec<u8> {
    let (header_size, ph_size) = if is_64 { (64u64, 56u64) } else { (52, 32) };
    let mut file = vec![0x7f, b'E', b'L', b'F', if is_64 { 2 } else { 1 }, 1, 1];
    file.resize(16, 0);
    let put = |file: &mut Vec<u8>, size: usize, value: u64| {
        file.extend_from_slice(&value.to_le_bytes()[..size]);
    };
    let word = if is_64 { 8 } else { 4 };
    put(&mut file, 2, 2);
    put(&mut file, 2, if is_64 { 62 } else { 3 });
    put(&mut file, 4, 1);
    for value in [entry, header_size, 0] {
        put(&mut file, word, value);
    }
    put(&mut file, 4, 0);
    for value in [header_size, ph_size, parts.len() as u64, 0, 0, 0] {
        put(&mut file, 2, value);
    }
    let mut offset = header_size + ph_size * parts.len() as u64;
    for part in parts {
        let size = part.data.len() as u64;
        put(&mut file, 4, part.kind.into());
        if is_64 {
            put(&mut file, 4, 7);
        }
        for value in [offset, part.virtual_address, part.physical_address, size, part.memory_size] {
            put(&mut file, word, value);
        }
        if !is_64 {
            put(&mut file, 4, 7);
        }
        put(&mut file, word, 4);
        offset += size;
    }
    for part in parts {
        file.extend_from_slice(&part.data);
    }
    file
}

pub(crate) fn elf64(entry: u64, parts: &[Part]) -> Vec<u8> {
    elf(true, entry, parts)
}

pub(crate) fn elf32(entry: u64, parts: &[Part]) -> Vec<u8> {
    elf(false, entry, parts)
}
