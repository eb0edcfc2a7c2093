//! The header and checksum that system description tables share (ACPI 6.5, 5.2.6).

use acpi_tables::sdt::Sdt;

const HEADER_SIZE: u32 = 36;
/// Who made the machine that the tables describe.
pub(crate) const OEM_ID: [u8; 6] = *b"VIREO ";
const OEM_TABLE: [u8; 8] = *b"VIREOPC ";

/// An empty table.
pub(crate) fn table(signature: &[u8; 4], revision: u8) -> Sdt {
    Sdt::new(*signature, HEADER_SIZE, revision, OEM_ID, OEM_TABLE, 1)
}

/// A table with `body`.
pub(crate) fn with_body(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut sdt = table(signature, revision);
    sdt.append_slice(body);
    sdt.as_slice().to_vec()
}

/// The byte that makes all bytes add up to zero.
pub(crate) fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}
