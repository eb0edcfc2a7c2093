//! What a BIOS leaves behind for a program that a boot loader starts: interrupt vectors with handlers, interrupt
//! controllers that deliver to them, and a timer that ticks. Linux and PVH kernels are entered without it: they look at
//! none of this, and a tick that nobody wants costs the host.

use crate::MachineError;
use accel::{VcpuBus, X86State};
use guest_memory::GuestMemory;

/// The interrupt vectors of real mode: 256, each an offset and a segment.
const VECTORS: u64 = 0;
/// Where the handlers are: above the tables, below the reset vector.
pub(crate) const HANDLERS: u64 = 0xf_ff80;
const SEGMENT: u16 = 0xf000;

/// Of the timer. It counts ticks since midnight at 0x46c, and days that passed at 0x470, as the BIOS's data area has it.
#[rustfmt::skip]
const TICK: [u8; 44] = [
    0x50,                                                    // push ax
    0x1e,                                                    // push ds
    0x31, 0xc0,                                              // xor ax, ax
    0x8e, 0xd8,                                              // mov ds, ax
    0x66, 0xff, 0x06, 0x6c, 0x04,                            // inc dword [0x46c]
    0x66, 0x81, 0x3e, 0x6c, 0x04, 0xb0, 0x00, 0x18, 0x00,    // cmp dword [0x46c], 24 hours
    0x72, 0x0d,                                              // jb over the next two
    0x66, 0xc7, 0x06, 0x6c, 0x04, 0x00, 0x00, 0x00, 0x00,    // mov dword [0x46c], 0
    0xfe, 0x06, 0x70, 0x04,                                  // inc byte [0x470]
    0xb0, 0x20,                                              // mov al, 0x20
    0xe6, 0x20,                                              // out 0x20, al
    0x1f,                                                    // pop ds
    0x58,                                                    // pop ax
    0xcf,                                                    // iret
    0x90, 0x90,
];
/// Of the other interrupts of the first 8259: ends them.
const FIRST: [u8; 8] = [0x50, 0xb0, 0x20, 0xe6, 0x20, 0x58, 0xcf, 0x90];
/// Of those of the second, which come through the first.
const SECOND: [u8; 9] = [0x50, 0xb0, 0x20, 0xe6, 0xa0, 0xe6, 0x20, 0x58, 0xcf];
/// Of everything else: `iret`.
const NOTHING: [u8; 1] = [0xcf];

/// The first vectors of both 8259s.
const FIRST_VECTOR: u8 = 0x08;
const SECOND_VECTOR: u8 = 0x70;

/// Port and value of what programs the chipset: both 8259s (initialization words 1 to 4, then the mask: the timer and
/// the cascade get through), then the timer's channel 0, a square wave of 65,536 counts.
const PROGRAM: [(u16, u8); 13] = [
    (0x20, 0x11),
    (0x21, FIRST_VECTOR),
    (0x21, 0x04),
    (0x21, 0x01),
    (0x21, 0xfa),
    (0xa0, 0x11),
    (0xa1, SECOND_VECTOR),
    (0xa1, 0x02),
    (0xa1, 0x01),
    (0xa1, 0xff),
    (0x43, 0x36),
    (0x40, 0x00),
    (0x40, 0x00),
];

/// The spurious-interrupt vector register: enabled.
const APIC_ENABLED: u32 = 0x1ff;
/// LVT LINT0 and LINT1 of virtual wire mode (MultiProcessor Specification 1.4, 3.6.2.2): the 8259s, and NMI.
const EXT_INT: u32 = 0x700;
const NMI: u32 = 0x400;

/// Writes vectors and handlers.
///
/// # Errors
/// There is no memory there.
pub(crate) fn write_handlers(memory: &GuestMemory) -> Result<(), MachineError> {
    let mut code = Vec::new();
    let mut put = |handler: &[u8]| {
        let offset = (HANDLERS & 0xffff) as u16 + code.len() as u16;
        code.extend_from_slice(handler);
        u32::from(SEGMENT) << 16 | u32::from(offset)
    };
    let [tick, first, second, nothing] = [put(&TICK), put(&FIRST), put(&SECOND), put(&NOTHING)];
    memory.write(HANDLERS, &code)?;
    let vectors: Vec<u8> = (0..=u8::MAX)
        .flat_map(|vector| {
            let handler = match vector {
                FIRST_VECTOR => tick,
                0x09..=0x0f => first,
                SECOND_VECTOR..=0x77 => second,
                _ => nothing,
            };
            handler.to_le_bytes()
        })
        .collect();
    memory.write(VECTORS, &vectors)?;
    Ok(())
}

/// Programs the chipset on `bus`, which is as after reset.
pub(crate) fn program_chipset(bus: &dyn VcpuBus) {
    for (port, value) in PROGRAM {
        bus.pio_write(port, &[value]);
    }
}

/// Programs the boot processor's local APIC: virtual wire mode.
pub(crate) fn program_apic(state: &mut X86State) {
    state.lapic.svr = APIC_ENABLED;
    state.lapic.lvt.lint0 = EXT_INT;
    state.lapic.lvt.lint1 = NMI;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vector_has_a_handler_that_ends_with_iret() {
        let memory = GuestMemory::new(std::slice::from_ref(&(0..1 << 20))).unwrap();
        write_handlers(&memory).unwrap();
        let mut vectors = [0; 1024];
        memory.read(0, &mut vectors).unwrap();
        let addresses: Vec<u64> = vectors
            .chunks_exact(4)
            .map(|far| {
                let half = |at| u64::from(u16::from_le_bytes([far[at], far[at + 1]]));
                half(2) * 16 + half(0)
            })
            .collect();
        let mut distinct = addresses.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), 4);
        let end = 0xf_fff0;
        assert!(distinct.iter().all(|address| (HANDLERS..end).contains(address)));
        let mut code = vec![0; (end - HANDLERS) as usize];
        memory.read(HANDLERS, &mut code).unwrap();
        for (address, next) in distinct.iter().zip(distinct[1..].iter().chain([&end])) {
            let handler = &code[(address - HANDLERS) as usize..(next - HANDLERS) as usize];
            assert!(handler.contains(&0xcf), "{address:#x}");
        }
        assert_eq!(addresses[0x73], addresses[0x70]);
        assert_ne!(addresses[8], addresses[9]);
    }
}
