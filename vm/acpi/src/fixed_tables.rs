//! The tables of fixed shape: RSDP, RSDT, XSDT, FADT, FACS, MCFG and HPET.

use crate::AcpiConfig;
use crate::table::{OEM_ID, checksum, with_body};

/// Size of an RSDP of revision 2.
pub(crate) const RSDP_SIZE: usize = 36;

/// Root system description pointer (ACPI 6.5, 5.2.5.3).
pub(crate) fn rsdp(rsdt: u32, xsdt: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(RSDP_SIZE);
    bytes.extend_from_slice(b"RSD PTR ");
    bytes.push(0);
    bytes.extend_from_slice(&OEM_ID);
    bytes.push(2);
    bytes.extend_from_slice(&rsdt.to_le_bytes());
    bytes[8] = checksum(&bytes);
    bytes.extend_from_slice(&(RSDP_SIZE as u32).to_le_bytes());
    bytes.extend_from_slice(&xsdt.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes[32] = checksum(&bytes);
    bytes
}

/// Root table with 32-bit pointers, for guests from before ACPI 2.0.
pub(crate) fn rsdt(tables: &[u32]) -> Vec<u8> {
    let body: Vec<u8> = tables.iter().flat_map(|address| address.to_le_bytes()).collect();
    with_body(b"RSDT", 1, &body)
}

/// Root table with 64-bit pointers (ACPI 6.5, 5.2.8).
pub(crate) fn xsdt(tables: &[u64]) -> Vec<u8> {
    let body: Vec<u8> = tables.iter().flat_map(|address| address.to_le_bytes()).collect();
    with_body(b"XSDT", 1, &body)
}

/// Where a FACS has the address that the processor begins at when it wakes: 32 bits.
pub(crate) const WAKING_VECTOR: u64 = 12;

/// Firmware ACPI control structure (ACPI 6.5, 5.2.10): no header, no checksum. Its version is the first, which has the
/// waking vector for real mode only.
pub(crate) fn facs() -> Vec<u8> {
    let mut bytes = vec![0; 64];
    bytes[..4].copy_from_slice(b"FACS");
    bytes[4..8].copy_from_slice(&64u32.to_le_bytes());
    bytes
}

/// A generic address structure (ACPI 6.5, 5.2.3.2) for `len` bytes of ports; all zero for none.
pub(crate) fn port_address(address: u16, len: u8, access_size: u8) -> [u8; 12] {
    let mut gas = [0; 12];
    if len != 0 {
        gas[0] = 1;
        gas[1] = len.saturating_mul(8);
        gas[3] = access_size;
        gas[4..6].copy_from_slice(&address.to_le_bytes());
    }
    gas
}

const WBINVD: u32 = 1;
const PROC_C1: u32 = 1 << 2;
/// No sleep button in the fixed registers (nor elsewhere). The power button is there: bit 4 stays zero.
const SLP_BUTTON: u32 = 1 << 5;
/// The clock's alarm isn't in the fixed registers, so that there's none to wake the machine.
const FIX_RTC: u32 = 1 << 6;
const TMR_VAL_EXT: u32 = 1 << 8;
const RESET_REG_SUP: u32 = 1 << 10;

const BOOT_LEGACY_DEVICES: u16 = 1;
const BOOT_8042: u16 = 1 << 1;
const BOOT_NO_VGA: u16 = 1 << 2;
const BOOT_NO_ASPM: u16 = 1 << 4;
const BOOT_NO_CMOS_RTC: u16 = 1 << 5;

/// Fixed ACPI description table (ACPI 6.5, 5.2.9), revision 6.
pub(crate) fn fadt(config: &AcpiConfig, facs: u32, dsdt: u32) -> Vec<u8> {
    const SIZE: usize = 276;
    const HEADER: usize = 36;
    let power = &config.power;
    let mut body = vec![0u8; SIZE - HEADER];
    // Offsets are the specification's, which count the header.
    let mut put = |offset: usize, bytes: &[u8]| {
        body[offset - HEADER..offset - HEADER + bytes.len()].copy_from_slice(bytes);
    };
    put(36, &facs.to_le_bytes());
    put(40, &dsdt.to_le_bytes());
    put(45, &[0]); // Preferred profile: unspecified.
    put(46, &u16::from(power.sci_irq).to_le_bytes());
    put(48, &u32::from(power.smi_command).to_le_bytes());
    if power.smi_command != 0 {
        put(52, &[power.acpi_enable, power.acpi_disable]);
    }
    put(56, &u32::from(power.pm1a_event).to_le_bytes());
    put(64, &u32::from(power.pm1a_control).to_le_bytes());
    put(76, &u32::from(power.timer).to_le_bytes());
    put(80, &u32::from(power.gpe0).to_le_bytes());
    put(88, &[4, 2, 0, 4, power.gpe0_len]);
    put(96, &0x0fffu16.to_le_bytes()); // No C2,
    put(98, &0xffffu16.to_le_bytes()); // no C3.
    if config.rtc {
        put(108, &[0x32]); // Century in CMOS.
    }
    let when = |condition, flag| if condition { flag } else { 0 };
    let boot = BOOT_LEGACY_DEVICES
        | BOOT_NO_ASPM
        | when(config.i8042, BOOT_8042)
        | when(!config.pci.vga, BOOT_NO_VGA)
        | when(!config.rtc, BOOT_NO_CMOS_RTC);
    put(109, &boot.to_le_bytes());
    let timer = if power.timer_32_bit { TMR_VAL_EXT } else { 0 };
    let alarm = if config.rtc { 0 } else { FIX_RTC };
    let flags = WBINVD | PROC_C1 | SLP_BUTTON | RESET_REG_SUP | alarm | timer;
    put(112, &flags.to_le_bytes());
    put(116, &port_address(power.reset_port, 1, 1));
    put(128, &[power.reset_value]);
    put(131, &[5]); // ACPI 6.5.
    put(140, &u64::from(dsdt).to_le_bytes());
    put(148, &port_address(power.pm1a_event, 4, 2));
    put(172, &port_address(power.pm1a_control, 2, 2));
    put(208, &port_address(power.timer, 4, 3));
    put(220, &port_address(power.gpe0, power.gpe0_len, 1));
    put(268, b"VIREO\0\0\0");
    with_body(b"FACP", 6, &body)
}

/// PCI Express memory-mapped configuration (PCI Firmware Specification 3.3, 4.1.2).
pub(crate) fn mcfg(config: &AcpiConfig) -> Vec<u8> {
    let mut body = vec![0; 8];
    body.extend_from_slice(&config.pci.ecam_base.to_le_bytes());
    body.extend_from_slice(&[0, 0, 0, (config.pci.buses - 1) as u8]);
    body.extend_from_slice(&[0; 4]);
    with_body(b"MCFG", 1, &body)
}

/// HPET description table (IA-PC HPET Specification 1.0a, 3.2.4).
pub(crate) fn hpet(address: u32, block_id: u32) -> Vec<u8> {
    const MINIMUM_TICK: u16 = 0x80;
    let mut body = block_id.to_le_bytes().to_vec();
    body.extend_from_slice(&[0, 64, 0, 0]);
    body.extend_from_slice(&u64::from(address).to_le_bytes());
    body.push(0);
    body.extend_from_slice(&MINIMUM_TICK.to_le_bytes());
    body.push(0);
    with_body(b"HPET", 1, &body)
}
