//! SMBIOS (DSP0134 3.7): what `dmidecode` and inventories show of the machine.

use std::ops::Range;

use crate::table::checksum;
use crate::{AcpiError, Tables};

/// What the tables tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SmbiosConfig {
    /// The machine's maker.
    pub manufacturer: String,
    /// The machine's name.
    pub product: String,
    /// Its version.
    pub version: String,
    /// Its serial number.
    pub serial: String,
    /// The machine's identity, in the order in which it's written as text.
    pub uuid: [u8; 16],
    /// The processor's maker, as CPUID names it.
    pub cpu_vendor: String,
    /// The processor's model name.
    pub cpu_name: String,
    /// CPUID leaf 1: EAX in the low half, EDX in the high one.
    pub cpu_id: u64,
    /// vCPUs, all in one socket.
    pub cpus: u16,
    /// The guest's RAM.
    pub ram: Vec<Range<u64>>,
}

impl SmbiosConfig {
    /// A Vireo `pc` with so many vCPUs and this RAM.
    pub fn pc(cpus: u16, ram: Vec<Range<u64>>) -> Self {
        Self {
            manufacturer: "Vireo".to_owned(),
            product: "Vireo PC".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            serial: String::new(),
            uuid: [0; 16],
            cpu_vendor: "Vireo".to_owned(),
            cpu_name: "vCPU".to_owned(),
            cpu_id: 0,
            cpus,
            ram,
        }
    }
}

const ENTRY_POINT_SIZE: usize = 24;
const BIOS: u16 = 0x0000;
const SYSTEM: u16 = 0x0100;
const CHASSIS: u16 = 0x0300;
const PROCESSOR: u16 = 0x0400;
const MEMORY_ARRAY: u16 = 0x1000;
const MEMORY_DEVICE: u16 = 0x1100;
const MAPPED_ADDRESS: u16 = 0x1300;
const BOOT: u16 = 0x2000;
const END: u16 = 0x7f00;
const NO_HANDLE: u16 = 0xffff;
/// The handle for "errors aren't reported".
const NO_ERROR_HANDLE: u16 = 0xfffe;

/// One structure: formatted part and strings.
struct Structure {
    bytes: Vec<u8>,
    strings: Vec<u8>,
    string_count: u8,
}

impl Structure {
    fn new(kind: u8, handle: u16) -> Self {
        let [low, high] = handle.to_le_bytes();
        Self { bytes: vec![kind, 0, low, high], strings: Vec::new(), string_count: 0 }
    }

    fn put(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    fn u16(self, value: u16) -> Self {
        self.put(&value.to_le_bytes())
    }

    fn u32(self, value: u32) -> Self {
        self.put(&value.to_le_bytes())
    }

    fn u64(self, value: u64) -> Self {
        self.put(&value.to_le_bytes())
    }

    /// A string's number; the string goes behind the structure. An empty one has number 0. Zero bytes
    /// would end the string early and are left out.
    fn string(mut self, text: &str) -> Self {
        let text: Vec<u8> = text.bytes().filter(|byte| *byte != 0).take(255).collect();
        if text.is_empty() {
            return self.put(&[0]);
        }
        self.strings.extend_from_slice(&text);
        self.strings.push(0);
        self.string_count += 1;
        let number = self.string_count;
        self.put(&[number])
    }

    fn finish(mut self, table: &mut Vec<u8>) {
        self.bytes[1] = self.bytes.len() as u8;
        table.extend_from_slice(&self.bytes);
        table.extend_from_slice(&self.strings);
        table.extend_from_slice(if self.strings.is_empty() { &[0, 0] } else { &[0] });
    }
}

/// Builds entry point and structures for the start of `window`.
///
/// # Errors
/// They don't fit.
pub fn build(config: &SmbiosConfig, window: Range<u64>) -> Result<Tables, AcpiError> {
    let mut table = Vec::new();
    bios(&mut table);
    system_and_chassis(config, &mut table);
    processor(config, &mut table);
    memory(config, &mut table);
    Structure::new(32, BOOT).put(&[0; 6]).put(&[0]).finish(&mut table);
    Structure::new(127, END).finish(&mut table);

    let root = window.start.next_multiple_of(16);
    let start = root + ENTRY_POINT_SIZE.next_multiple_of(16) as u64;
    let mut entry = b"_SM3_".to_vec();
    entry.extend_from_slice(&[0, ENTRY_POINT_SIZE as u8, 3, 7, 0, 1, 0]);
    entry.extend_from_slice(&(table.len() as u32).to_le_bytes());
    entry.extend_from_slice(&start.to_le_bytes());
    entry[5] = checksum(&entry);

    let mut bytes = entry;
    bytes.resize((start - root) as usize, 0);
    bytes.append(&mut table);
    if root + bytes.len() as u64 > window.end {
        return Err(AcpiError::WindowTooSmall { need: bytes.len() as u64, window });
    }
    Ok(Tables { base: root, bytes, root, waking_vector: None })
}

/// Type 0 (7.1).
fn bios(table: &mut Vec<u8>) {
    const CHARACTERISTICS_NOT_SUPPORTED: u64 = 1 << 3;
    const ACPI: u8 = 1;
    const VIRTUAL_MACHINE: u8 = 1 << 4;
    Structure::new(0, BIOS)
        .string("Vireo")
        .string(env!("CARGO_PKG_VERSION"))
        .u16(0xe800)
        .string("01/01/2026")
        .put(&[0])
        .u64(CHARACTERISTICS_NOT_SUPPORTED)
        .put(&[ACPI, VIRTUAL_MACHINE, 0, 0, 0xff, 0xff])
        .u16(0)
        .finish(table);
}

/// Types 1 and 3 (7.2, 7.4).
fn system_and_chassis(config: &SmbiosConfig, table: &mut Vec<u8>) {
    const WAKE_BY_POWER_SWITCH: u8 = 6;
    const CHASSIS_OTHER: u8 = 1;
    const STATE_SAFE: u8 = 3;
    const SECURITY_UNKNOWN: u8 = 2;
    let mut uuid = config.uuid;
    // The first three fields are little-endian (7.2.1).
    uuid[..4].reverse();
    uuid[4..6].reverse();
    uuid[6..8].reverse();
    Structure::new(1, SYSTEM)
        .string(&config.manufacturer)
        .string(&config.product)
        .string(&config.version)
        .string(&config.serial)
        .put(&uuid)
        .put(&[WAKE_BY_POWER_SWITCH])
        .string("")
        .string("Virtual Machine")
        .finish(table);
    Structure::new(3, CHASSIS)
        .string(&config.manufacturer)
        .put(&[CHASSIS_OTHER])
        .string(&config.version)
        .string("")
        .string("")
        .put(&[STATE_SAFE, STATE_SAFE, STATE_SAFE, SECURITY_UNKNOWN])
        .u32(0)
        .put(&[0, 0, 0, 0])
        .string("")
        .finish(table);
}

/// Type 4 (7.5): one socket with all vCPUs as cores.
fn processor(config: &SmbiosConfig, table: &mut Vec<u8>) {
    const CENTRAL_PROCESSOR: u8 = 3;
    const FAMILY_OTHER: u8 = 1;
    const POPULATED_ENABLED: u8 = 0x41;
    const UPGRADE_OTHER: u8 = 1;
    const CAPABLE_OF_64_BITS: u16 = 1 << 2;
    const MULTI_CORE: u16 = 1 << 3;
    let few = u8::try_from(config.cpus).unwrap_or(0xff);
    let multi = if config.cpus > 1 { MULTI_CORE } else { 0 };
    Structure::new(4, PROCESSOR)
        .string("CPU 0")
        .put(&[CENTRAL_PROCESSOR, FAMILY_OTHER])
        .string(&config.cpu_vendor)
        .u64(config.cpu_id)
        .string(&config.cpu_name)
        .put(&[0])
        .u16(0)
        .u16(0)
        .u16(0)
        .put(&[POPULATED_ENABLED, UPGRADE_OTHER])
        .u16(NO_HANDLE)
        .u16(NO_HANDLE)
        .u16(NO_HANDLE)
        .string("")
        .string("")
        .string("")
        .put(&[few, few, few])
        .u16(CAPABLE_OF_64_BITS | multi)
        .u16(FAMILY_OTHER.into())
        .u16(config.cpus)
        .u16(config.cpus)
        .u16(config.cpus)
        .finish(table);
}

/// Types 16, 17 and 19 (7.17, 7.18, 7.20): one array with one device, mapped to every range of RAM.
fn memory(config: &SmbiosConfig, table: &mut Vec<u8>) {
    const LOCATION_OTHER: u8 = 1;
    const USE_SYSTEM: u8 = 3;
    const ECC_NONE: u8 = 3;
    const SEE_EXTENDED: u32 = 0x8000_0000;
    const DIMM: u8 = 9;
    const TYPE_RAM: u8 = 7;
    const DETAIL_OTHER: u16 = 1 << 1;
    let bytes =
        config.ram.iter().fold(0u64, |sum, range| sum.saturating_add(range.end.saturating_sub(range.start)));
    Structure::new(16, MEMORY_ARRAY)
        .put(&[LOCATION_OTHER, USE_SYSTEM, ECC_NONE])
        .u32(SEE_EXTENDED)
        .u16(NO_ERROR_HANDLE)
        .u16(1)
        .u64(bytes)
        .finish(table);
    let mib = u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(0x7fff_ffff).min(0x7fff_ffff);
    let short = u16::try_from(mib).unwrap_or(0x7fff).min(0x7fff);
    Structure::new(17, MEMORY_DEVICE)
        .u16(MEMORY_ARRAY)
        .u16(NO_ERROR_HANDLE)
        .u16(64)
        .u16(64)
        .u16(short)
        .put(&[DIMM, 0])
        .string("DIMM 0")
        .string("")
        .put(&[TYPE_RAM])
        .u16(DETAIL_OTHER)
        .u16(0)
        .string(&config.manufacturer)
        .string("")
        .string("")
        .string("")
        .put(&[0])
        .u32(if short == 0x7fff { mib } else { 0 })
        .u16(0)
        .u16(0)
        .u16(0)
        .u16(0)
        .finish(table);
    for (index, range) in config.ram.iter().filter(|range| !range.is_empty()).take(64).enumerate() {
        // Addresses in KiB, inclusive; all ones mean that the extended fields count, in bytes.
        let (first, last) = (range.start >> 10, (range.end - 1) >> 10);
        let fits =
            last < u64::from(u32::MAX) && range.start.is_multiple_of(1024) && range.end.is_multiple_of(1024);
        let (first, last, start, end) = if fits {
            (first as u32, last as u32, 0, 0)
        } else {
            (u32::MAX, u32::MAX, range.start, range.end - 1)
        };
        Structure::new(19, MAPPED_ADDRESS + index as u16)
            .u32(first)
            .u32(last)
            .u16(MEMORY_ARRAY)
            .put(&[1])
            .u64(start)
            .u64(end)
            .finish(table);
    }
}
