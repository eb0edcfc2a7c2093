//! A bzImage's payload, unpacked: an ELF file, and behind it the table of the places that must change when
//! the kernel doesn't run at the virtual address that it was linked for.

use crate::elf::ElfFile;
use crate::entry::EntryState;
use crate::payload::{Compression, Payload, UnpackError};
use crate::setup_header::{self, SetupHeader};
use crate::{BootError, FileKind, KernelFile, Loader, memory_map::FOUR_GIB};

/// Where Linux's virtual addresses of its own code and data begin (Documentation/arch/x86/x86_64/mm.rst).
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// How much of them a kernel and its slide may take.
const KERNEL_MAP_SIZE: u64 = 1 << 30;
/// The largest payload that is unpacked: room for a kernel that fills its map, and its table.
pub const MAX_UNPACKED: u64 = KERNEL_MAP_SIZE + (64 << 20);

/// Linux has five segments.
const MAX_PIECES: usize = 16;

/// A kernel as its bzImage would unpack it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vmlinux {
    bytes: Vec<u8>,
    /// How far the virtual addresses were moved.
    slide: u64,
}

/// Why a kernel can't be moved to other virtual addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SlideError {
    /// The file itself is wrong.
    #[error(transparent)]
    File(#[from] BootError),
    /// It has no table, because it was built without support for this.
    #[error("the kernel has no relocation table")]
    NoTable,
    /// It has more segments than any kernel, each of which every entry of the table might be in.
    #[error("the kernel has {count} segments to load; up to {max} can be moved")]
    TooManySegments {
        /// How many it has.
        count: usize,
        /// The most.
        max: usize,
    },
    /// The table isn't one.
    #[error("the kernel's relocation table of {len} bytes has {lists} lists; expected are 2 or 3")]
    BadTable {
        /// Its length.
        len: u64,
        /// How many lists it seems to have.
        lists: usize,
    },
    /// An entry points nowhere.
    #[error("the kernel's relocation table names {address:#x}, which isn't in the file")]
    BadEntry {
        /// The virtual address.
        address: u64,
    },
}

/// Part of the file that lies in memory as it is.
struct Piece {
    physical: std::ops::Range<u64>,
    offset: u64,
}

impl Vmlinux {
    /// Unpacks the payload of `kernel`, a bzImage, to at most `limit` bytes.
    ///
    /// # Errors
    /// [`UnpackError`], with which the kernel may still be able to unpack itself.
    pub fn unpack(kernel: &[u8], limit: u64) -> Result<(Self, Compression), UnpackError> {
        let payload = Payload::find(kernel)?;
        let bytes = payload.unpack(limit.min(MAX_UNPACKED))?;
        Ok((Self::from_bytes(bytes), payload.compression))
    }

    /// What was unpacked before.
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self { bytes, slide: 0 }
    }

    /// The unpacked bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How far the kernel's virtual addresses were moved.
    pub fn slide_distance(&self) -> u64 {
        self.slide
    }

    /// Moves the kernel to one of the virtual addresses that `header`, its bzImage's, allows, the one that
    /// `random` picks: what the bzImage's own code does for kernel address space layout randomization. To
    /// be called once.
    ///
    /// # Errors
    /// [`SlideError`]; the bytes may then have changed in part, and are of no use.
    pub fn slide(&mut self, header: &SetupHeader, random: u64) -> Result<(), SlideError> {
        let align = u64::from(header.kernel_alignment).max(0x20_0000);
        let room = KERNEL_MAP_SIZE.saturating_sub(header.pref_address).saturating_sub(header.run_size());
        let distance = random % (room / align + 1) * align;
        self.slide_by(distance)
    }

    fn slide_by(&mut self, distance: u64) -> Result<(), SlideError> {
        let bytes = KernelFile::from(&self.bytes);
        let elf = ElfFile::parse(&bytes)?;
        let pieces: Vec<Piece> = elf
            .loadable()
            .map(|segment| Piece {
                physical: segment.physical_address
                    ..segment.physical_address.saturating_add(segment.file_size()),
                offset: segment.offset(),
            })
            .collect();
        if pieces.len() > MAX_PIECES {
            return Err(SlideError::TooManySegments { count: pieces.len(), max: MAX_PIECES });
        }
        let end = elf.end()?;
        let end = usize::try_from(end).map_or(self.bytes.len(), |end| end.min(self.bytes.len()));
        let (file, table) = self.bytes.split_at_mut(end);
        let [wide, inverse, narrow] = lists(table)?;
        let mut patch = Patch { file, pieces: &pieces, last: 0 };
        for entry in words(wide) {
            let at = patch.find(entry, 8)?;
            let field: &mut [u8; 8] = patch.field(at);
            *field = u64::from_le_bytes(*field).wrapping_add(distance).to_le_bytes();
        }
        for entry in words(inverse) {
            let at = patch.find(entry, 4)?;
            let field: &mut [u8; 4] = patch.field(at);
            *field = u32::from_le_bytes(*field).wrapping_sub(distance as u32).to_le_bytes();
        }
        for entry in words(narrow) {
            let at = patch.find(entry, 4)?;
            let field: &mut [u8; 4] = patch.field(at);
            *field = u32::from_le_bytes(*field).wrapping_add(distance as u32).to_le_bytes();
        }
        self.slide = self.slide.wrapping_add(distance);
        Ok(())
    }
}

fn words(list: &[u8]) -> impl Iterator<Item = u32> {
    list.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word))
}

/// The three lists of the table: 64-bit fields, 32-bit fields that are to shrink (which kernels from 6.15
/// on don't have), 32-bit fields. A zero precedes each.
fn lists(table: &[u8]) -> Result<[&[u8]; 3], SlideError> {
    if table.is_empty() {
        return Err(SlideError::NoTable);
    }
    let len = table.len() as u64;
    let zeros: Vec<usize> =
        words(table).enumerate().filter(|(_, word)| *word == 0).map(|(index, _)| index * 4).take(8).collect();
    match zeros[..] {
        _ if !len.is_multiple_of(4) => Err(SlideError::BadTable { len, lists: zeros.len() }),
        [0, second] => Ok([&table[4..second], &[], &table[second + 4..]]),
        [0, second, third] => Ok([&table[4..second], &table[second + 4..third], &table[third + 4..]]),
        _ => Err(SlideError::BadTable { len, lists: zeros.len() }),
    }
}

/// The file while its fields are being changed.
struct Patch<'a> {
    file: &'a mut [u8],
    pieces: &'a [Piece],
    /// The piece that the last entry was in: the next one mostly is, too.
    last: usize,
}

impl Patch<'_> {
    /// Where in the file the field of `len` bytes is that `entry`, the low half of a virtual address of the
    /// link, names.
    fn find(&mut self, entry: u32, len: u64) -> Result<usize, SlideError> {
        let address = i64::from(entry as i32) as u64;
        let bad = SlideError::BadEntry { address };
        let physical = address.wrapping_sub(KERNEL_MAP);
        let holds =
            |piece: &Piece| piece.physical.contains(&physical) && piece.physical.end - physical >= len;
        if !self.pieces.get(self.last).is_some_and(holds) {
            self.last = self.pieces.iter().position(holds).ok_or_else(|| bad.clone())?;
        }
        let piece = &self.pieces[self.last];
        let at = piece.offset.saturating_add(physical - piece.physical.start);
        let fits = at.checked_add(len).is_some_and(|end| end <= self.file.len() as u64);
        if fits { Ok(at as usize) } else { Err(bad) }
    }

    /// The field at `at`, which [`Self::find`] gave for as many bytes.
    fn field<const N: usize>(&mut self, at: usize) -> &mut [u8; N] {
        self.file[at..].first_chunk_mut().expect("the field was found in the file")
    }
}

/// Where a bzImage's unpacked kernel goes.
#[derive(Debug, Clone, Copy)]
pub struct DirectEntry<'a> {
    /// The kernel, slid or not.
    pub vmlinux: &'a Vmlinux,
    /// Picks its physical address at random; without it, the one that the kernel prefers is taken.
    pub place: Option<u64>,
}

/// Puts the segments into memory from `start` on, where the link had `header.pref_address`, and returns the
/// state for Linux's 64-bit boot protocol, but for RSI.
pub(crate) fn load(
    loader: &mut Loader<'_>,
    direct: DirectEntry<'_>,
    header: &SetupHeader,
) -> Result<EntryState, BootError> {
    let bytes = KernelFile::from(&direct.vmlinux.bytes);
    let elf = ElfFile::parse(&bytes)?;
    if !elf.is_64 {
        let what = "the bzImage's payload is a 32-bit kernel";
        return Err(BootError::Unsupported { file: FileKind::Elf, what });
    }
    let outside = |start: u64, end: u64| BootError::OutsideRam {
        file: FileKind::Elf,
        what: "a segment of the unpacked kernel",
        start,
        end,
    };
    let base = header.pref_address;
    let size = header.run_size();
    let mut total = 0u64;
    for segment in elf.loadable() {
        let start = segment.physical_address;
        let end = start.saturating_add(segment.memory_size);
        total = total.saturating_add(segment.memory_size);
        if start < base || end > base.saturating_add(size) {
            return Err(outside(start, end));
        }
    }
    // With more, some would lie over others, any number of times.
    if total > size {
        return Err(outside(base, base.saturating_add(total)));
    }
    let entry = elf.physical_entry()?;
    let start = place(loader, header, direct.place)?;
    let moved = |address: u64| address.wrapping_sub(base).wrapping_add(start);
    for segment in elf.loadable() {
        let at = moved(segment.physical_address);
        elf.copy(loader, segment, at)?;
        loader.zero(at + segment.file_size()..at + segment.memory_size)?;
    }
    loader.note("kernel", start..start + size);
    EntryState::long64(loader.memory, moved(entry))
}

/// Takes memory for the kernel, at random if `random` says so.
fn place(loader: &mut Loader<'_>, header: &SetupHeader, random: Option<u64>) -> Result<u64, BootError> {
    let align = u64::from(header.kernel_alignment);
    if let Some(random) = random.filter(|_| header.relocatable_kernel) {
        // As the kernel's own code does: not below the address that it prefers.
        let bounds = header.pref_address..FOUR_GIB;
        if let Some(range) = loader.free.take_any(header.run_size(), align, &bounds, random) {
            return Ok(range.start);
        }
    }
    setup_header::place_relocatable(loader, header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Part, Ram, elf64, spec};
    use crate::{BootSpec, CpuMode, MemoryMap, load};
    use proptest::prelude::*;

    const BASE: u64 = 0x100_0000;

    fn table(lists: &[&[u64]]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for list in lists {
            bytes.extend([0; 4]);
            bytes.extend(list.iter().flat_map(|address| (*address as u32).to_le_bytes()));
        }
        bytes
    }

    /// A kernel of two segments with fields of each sort.
    fn kernel(table: &[u8]) -> Vec<u8> {
        let mut text = vec![0x90; 0x40];
        text[8..16].copy_from_slice(&(KERNEL_MAP + BASE + 0x20).to_le_bytes());
        text[16..20].copy_from_slice(&0x8100_0030u32.to_le_bytes());
        let mut percpu = vec![0; 0x10];
        percpu[4..8].copy_from_slice(&0x7f00_0000u32.to_le_bytes());
        let parts = [
            Part { virtual_address: KERNEL_MAP + BASE, ..Part::load(BASE, &text, 0x1000) },
            Part { virtual_address: 0, ..Part::load(BASE + 0x20_0000, &percpu, 0x10) },
        ];
        let mut file = elf64(BASE + 2, &parts);
        file.extend(table);
        file
    }

    fn full_table() -> Vec<u8> {
        let at = KERNEL_MAP + BASE;
        table(&[&[at + 8], &[at + 0x20_0004], &[at + 16]])
    }

    #[test]
    fn every_sort_of_field_slides() {
        let mut vmlinux = Vmlinux::from_bytes(kernel(&full_table()));
        vmlinux.slide_by(0x60_0000).unwrap();
        let bytes = KernelFile::from(&vmlinux.bytes);
        let elf = ElfFile::parse(&bytes).unwrap();
        let data: Vec<&[u8]> =
            elf.loadable().map(|segment| &vmlinux.bytes[segment.offset() as usize..]).collect();
        assert_eq!(data[0][8..16], (KERNEL_MAP + BASE + 0x60_0020).to_le_bytes());
        assert_eq!(data[0][16..20], 0x8160_0030u32.to_le_bytes());
        assert_eq!(data[1][4..8], (0x7f00_0000u32 - 0x60_0000).to_le_bytes());
        // Newer kernels have no list of fields that shrink.
        let at = KERNEL_MAP + BASE;
        let mut vmlinux = Vmlinux::from_bytes(kernel(&table(&[&[at + 8], &[at + 16]])));
        vmlinux.slide_by(0x20_0000).unwrap();
        assert_eq!(vmlinux.slide_distance(), 0x20_0000);
    }

    #[test]
    fn wrong_tables_are_named() {
        let slide = |table: &[u8]| Vmlinux::from_bytes(kernel(table)).slide_by(0x20_0000).unwrap_err();
        assert_eq!(slide(&[]), SlideError::NoTable);
        assert_eq!(slide(&[0; 5]), SlideError::BadTable { len: 5, lists: 1 });
        assert_eq!(slide(&[1; 8]), SlideError::BadTable { len: 8, lists: 0 });
        assert_eq!(slide(&[0; 16]), SlideError::BadTable { len: 16, lists: 4 });
        for address in [0x1000, KERNEL_MAP, KERNEL_MAP + BASE + 0x39, KERNEL_MAP + BASE + 0x800] {
            let error = slide(&table(&[&[address], &[]]));
            assert!(matches!(error, SlideError::BadEntry { .. }), "{address:#x}: {error}");
        }
    }

    #[test]
    fn the_unpacked_kernel_is_entered() {
        let map = MemoryMap::pc(0x1000_0000, 0, &[]).unwrap();
        let bz = crate::bzimage::tests::image();
        let header = SetupHeader::parse(&KernelFile::from(&bz)).unwrap();
        for (random, place) in [(None, BASE), (Some(0), BASE), (Some(3), BASE + 0x60_0000)] {
            let mut vmlinux = Vmlinux::from_bytes(kernel(&full_table()));
            if let Some(random) = random {
                vmlinux.slide(&header, random).unwrap();
                assert_eq!(vmlinux.slide_distance(), random * 0x20_0000);
            }
            let mut ram = Ram::new(&map);
            let direct = DirectEntry { vmlinux: &vmlinux, place: random };
            let loaded = load(&BootSpec { direct: Some(direct), ..spec(&bz, &map) }, &mut ram).unwrap();
            assert_eq!((loaded.entry.mode, loaded.entry.rip), (CpuMode::Long64, place + 2));
            assert_eq!(ram.read(place, 4), [0x90; 4]);
            let moved = random.unwrap_or(0) as u32 * 0x20_0000;
            assert_eq!(ram.u32(place + 0x20_0004), 0x7f00_0000 - moved);
            let flags = ram.read(loaded.entry.rsi + 0x211, 1)[0];
            assert_eq!(flags & 2 != 0, moved != 0, "the flag of a randomized kernel");
        }
    }

    #[test]
    fn a_payload_outside_its_room_is_refused() {
        let map = MemoryMap::pc(0x1000_0000, 0, &[]).unwrap();
        let bz = crate::bzimage::tests::image();
        for part in [
            Part::load(BASE - 0x1000, b"code", 0x1000),
            Part::load(BASE, b"code", 0x800_0000),
            Part::load(BASE, b"code", u64::MAX),
        ] {
            let vmlinux = Vmlinux::from_bytes(elf64(BASE, &[part]));
            let direct = Some(DirectEntry { vmlinux: &vmlinux, place: None });
            assert!(load(&BootSpec { direct, ..spec(&bz, &map) }, &mut Ram::new(&map)).is_err());
        }
    }

    #[test]
    fn segments_over_one_another_without_end_are_refused() {
        let map = MemoryMap::pc(0x1000_0000, 0, &[]).unwrap();
        let bz = crate::bzimage::tests::image();
        let parts = vec![Part::load(BASE, b"code", 0x100_0000); 17];
        let mut vmlinux = Vmlinux::from_bytes(elf64(BASE, &parts));
        let direct = Some(DirectEntry { vmlinux: &vmlinux, place: None });
        assert!(load(&BootSpec { direct, ..spec(&bz, &map) }, &mut Ram::new(&map)).is_err());
        let error = vmlinux.slide_by(0x20_0000).unwrap_err();
        assert_eq!(error, SlideError::TooManySegments { count: 17, max: 16 });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn hostile_payloads_do_no_harm(
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..10),
            random in any::<u64>(),
        ) {
            let map = MemoryMap::pc(0x1000_0000, 0, &[]).unwrap();
            let bz = crate::bzimage::tests::image();
            let header = SetupHeader::parse(&KernelFile::from(&bz)).unwrap();
            let mut bytes = kernel(&full_table());
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            let mut vmlinux = Vmlinux::from_bytes(bytes);
            if vmlinux.slide(&header, random).is_ok() {
                let direct = Some(DirectEntry { vmlinux: &vmlinux, place: Some(random) });
                let _ = load(&BootSpec { direct, ..spec(&bz, &map) }, &mut Ram::new(&map));
            }
        }
    }
}
