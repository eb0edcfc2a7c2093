//! Multiple APIC description table (ACPI 6.5, 5.2.12).

use crate::AcpiConfig;
use crate::table::with_body;

/// There are 8259s too.
const PCAT_COMPAT: u32 = 1;
const ENABLED: u32 = 1;
/// Active high, level-triggered (table 5.26).
const HIGH_LEVEL: u16 = 0b1101;
/// The first APIC id and processor UID that a local APIC structure can't hold: 255 means everyone.
const X2APIC_FROM: u32 = 255;

/// The table.
pub(crate) fn build(config: &AcpiConfig) -> Vec<u8> {
    let mut body = config.local_apic_address.to_le_bytes().to_vec();
    body.extend_from_slice(&PCAT_COMPAT.to_le_bytes());
    let mut any_x2apic = false;
    for (uid, apic_id) in config.apic_ids.iter().enumerate() {
        let uid = uid as u32;
        if uid < X2APIC_FROM && *apic_id < X2APIC_FROM {
            body.extend_from_slice(&[0, 8, uid as u8, *apic_id as u8]);
            body.extend_from_slice(&ENABLED.to_le_bytes());
        } else {
            any_x2apic = true;
            body.extend_from_slice(&[9, 16, 0, 0]);
            for value in [*apic_id, ENABLED, uid] {
                body.extend_from_slice(&value.to_le_bytes());
            }
        }
    }
    body.extend_from_slice(&[1, 12, config.io_apic.id, 0]);
    body.extend_from_slice(&config.io_apic.address.to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes());
    // The PIT drives input 2, as on every PC.
    let mut source_override = |irq: u8, gsi: u32, flags: u16| {
        body.extend_from_slice(&[2, 10, 0, irq]);
        body.extend_from_slice(&gsi.to_le_bytes());
        body.extend_from_slice(&flags.to_le_bytes());
    };
    source_override(0, 2, 0);
    source_override(config.power.sci_irq, config.power.sci_irq.into(), HIGH_LEVEL);
    // NMI at LINT1 of every processor.
    body.extend_from_slice(&[4, 6, 0xff, 0, 0, 1]);
    if any_x2apic {
        body.extend_from_slice(&[10, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    }
    with_body(b"APIC", 5, &body)
}
