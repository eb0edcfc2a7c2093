//! Multiple APIC description table (ACPI 6.5, 5.2.12).

use crate::AcpiConfig;
use crate::config::IoApic;
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
    let (mut body, any_x2apic) =
        controllers(&config.apic_ids, config.local_apic_address, &config.io_apic, PCAT_COMPAT);
    // The PIT drives input 2, as on every PC.
    let mut source_override = |irq: u8, gsi: u32, flags: u16| {
        body.extend_from_slice(&[2, 10, 0, irq]);
        body.extend_from_slice(&gsi.to_le_bytes());
        body.extend_from_slice(&flags.to_le_bytes());
    };
    source_override(0, 2, 0);
    source_override(config.power.sci_irq, config.power.sci_irq.into(), HIGH_LEVEL);
    finish(body, any_x2apic)
}

/// The table of a machine without 8259s, where ISA interrupts are what they are elsewhere but for the
/// timer's, which there isn't.
pub(crate) fn build_without_pics(apic_ids: &[u32], local_apic_address: u32, io_apic: &IoApic) -> Vec<u8> {
    let (body, any_x2apic) = controllers(apic_ids, local_apic_address, io_apic, 0);
    finish(body, any_x2apic)
}

/// All interrupt controllers, and whether one of them is described as an x2APIC.
fn controllers(apic_ids: &[u32], local_apic_address: u32, io_apic: &IoApic, flags: u32) -> (Vec<u8>, bool) {
    let mut body = local_apic_address.to_le_bytes().to_vec();
    body.extend_from_slice(&flags.to_le_bytes());
    let mut any_x2apic = false;
    for (uid, apic_id) in apic_ids.iter().enumerate() {
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
    body.extend_from_slice(&[1, 12, io_apic.id, 0]);
    body.extend_from_slice(&io_apic.address.to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes());
    (body, any_x2apic)
}

fn finish(mut body: Vec<u8>, any_x2apic: bool) -> Vec<u8> {
    // NMI at LINT1 of every processor.
    body.extend_from_slice(&[4, 6, 0xff, 0, 0, 1]);
    if any_x2apic {
        body.extend_from_slice(&[10, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    }
    with_body(b"APIC", 5, &body)
}
