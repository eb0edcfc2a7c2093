//! The maps of MSRs and ports that are intercepted (AMD APM volume 2, 15.10 and 15.11). They are read where the
//! host has put them; what is no RAM reads as all ones, which intercepts. (VMRUN looks where they end, but a restored
//! state may have them anywhere.)

use crate::{Core, Scalar};

/// Where the two bits of an MSR are in its map, as a number of bits; nothing for registers that are always
/// intercepted.
fn msr_bits(msr: u32) -> Option<u64> {
    let (base, at) = match msr {
        0..=0x1fff => (0, 0),
        0xc000_0000..=0xc000_1fff => (0xc000_0000, 0x800),
        0xc001_0000..=0xc001_1fff => (0xc001_0000, 0x1000),
        _ => return None,
    };
    Some(at * 8 + u64::from(msr - base) * 2)
}

impl Core<'_> {
    fn map_byte(&self, gpa: u64) -> u8 {
        match self.memory.host_page(gpa) {
            // SAFETY: inside a page of guest memory.
            Some(page) => unsafe { u8::load(page.ptr.wrapping_add((gpa & 0xfff) as usize)) },
            None => 0xff,
        }
    }

    /// Whether the map has the guest's access to `msr` intercepted.
    pub(super) fn msr_is_mapped(&self, msr: u32, write: bool) -> bool {
        let Some(bit) = msr_bits(msr) else { return true };
        let bit = bit + u64::from(write);
        self.map_byte(self.cpu.svm.control.msrpm.wrapping_add(bit / 8)) >> (bit % 8) & 1 != 0
    }

    /// Whether the map has the guest's access to one of the `size` ports from `port` on intercepted.
    pub(super) fn port_is_mapped(&self, port: u16, size: u16) -> bool {
        let map = self.cpu.svm.control.iopm;
        // The map goes three bits beyond the last port.
        (u64::from(port)..u64::from(port) + u64::from(size))
            .any(|port| self.map_byte(map.wrapping_add(port / 8)) >> (port % 8) & 1 != 0)
    }
}
