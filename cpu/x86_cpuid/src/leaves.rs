//! What CPUID says, leaf by leaf.

use crate::feature::{self, Word};
use crate::models::Vendor;
use crate::{APIC_BUS_HERTZ, CpuModel};

impl CpuModel {
    /// The leaves that say something, each with how many subleaves do.
    pub const LEAVES: &[(u32, u32)] = &[
        (0, 1),
        (1, 1),
        (2, 1),
        (4, 4),
        (6, 1),
        (7, 2),
        (0xb, 3),
        (0xd, 10),
        (0x4000_0000, 1),
        (0x4000_0010, 1),
        (0x8000_0000, 1),
        (0x8000_0001, 1),
        (0x8000_0002, 1),
        (0x8000_0003, 1),
        (0x8000_0004, 1),
        (0x8000_0005, 1),
        (0x8000_0006, 1),
        (0x8000_0007, 1),
        (0x8000_0008, 1),
        (0x8000_000a, 1),
        (0x8000_001d, 4),
        (0x8000_001e, 1),
        (0x8000_0021, 1),
    ];

    /// EAX, EBX, ECX and EDX of a leaf, for the processor with APIC id `id` and a time-stamp counter of
    /// `tsc_hertz`, but for what depends on its state: OSXSAVE, the size of the XSAVE area, and whether its APIC is
    /// on.
    pub fn leaf(&self, leaf: u32, sub: u32, id: u32, tsc_hertz: u64) -> [u32; 4] {
        let hypervisor = 0x4000_0000..0x5000_0000;
        if leaf < hypervisor.start && leaf > self.level || leaf > 0x8000_0000 && leaf > self.extended_level()
        {
            return [0; 4];
        }
        let amd = self.vendor == Vendor::Amd;
        match leaf {
            0 => self.vendor_leaf(self.level),
            1 => [
                self.signature,
                (id & 0xff) << 24 | self.vcpus.min(255) << 16 | 8 << 8,
                self.word(Word::Leaf1Ecx),
                self.word(Word::Leaf1Edx),
            ],
            // Leaf 4 describes the caches.
            2 if !amd => [0x00ff_ff01, 0, 0, 0],
            4 if !amd => self.cache(sub, true),
            6 => [self.word(Word::Leaf6Eax), 0, 0, 0],
            7 if sub == 0 => {
                [1, self.word(Word::Leaf7Ebx), self.word(Word::Leaf7Ecx), self.word(Word::Leaf7Edx)]
            }
            7 if sub == 1 => [self.word(Word::Leaf7Sub1Eax), 0, 0, 0],
            0xb => self.topology_level(sub, id),
            0xd => self.xsave_leaf(sub),
            0x4000_0000 => text4(0x4000_0010, b"VireoVireo\0\0"),
            0x4000_0010 => [kilohertz(tsc_hertz), kilohertz(APIC_BUS_HERTZ), 0, 0],
            0x8000_0000 if amd => self.vendor_leaf(self.extended_level()),
            0x8000_0000 => [self.extended_level(), 0, 0, 0],
            0x8000_0001 => {
                // AMD processors repeat leaf 1 here, except for what has other meanings.
                let repeated = if amd { self.word(Word::Leaf1Edx) & 0x0183_f3ff } else { 0 };
                let signature = if amd { self.signature } else { 0 };
                [signature, 0, self.word(Word::Ext1Ecx), self.word(Word::Ext1Edx) | repeated]
            }
            0x8000_0002..=0x8000_0004 => self.brand_part(leaf - 0x8000_0002),
            // Caches as leaf 0x8000001D has them: L1 data and code, then L2 and L3.
            0x8000_0005 if amd => {
                [0xff40_ff40, 0xff40_ff40, 48 << 24 | 12 << 16 | 0x140, 32 << 24 | 8 << 16 | 0x140]
            }
            0x8000_0006 if amd => [0, 0x4200_4200, 1024 << 16 | 8 << 12 | 0x140, 64 << 18 | 9 << 12 | 0x140],
            0x8000_0006 => [0, 0, 1024 << 16 | 8 << 12 | 64, 0],
            0x8000_0007 => [0, 0, 0, self.word(Word::Ext7Edx)],
            0x8000_0008 => [
                self.physical_bits | if self.has(feature::LA57) { 57 } else { 48 } << 8,
                self.word(Word::Ext8Ebx),
                if amd { self.core_bits() << 12 | (self.vcpus - 1).min(255) } else { 0 },
                0,
            ],
            // Revision 1, and how many address space identifiers there are.
            0x8000_000a if self.has(feature::SVM) => [1, 0x8000, 0, self.word(Word::Ext10Edx)],
            0x8000_001d if self.has(feature::TOPOEXT) => self.cache(sub, false),
            0x8000_001e if self.has(feature::TOPOEXT) => [id, id & 0xff, 0, 0],
            0x8000_0021 => [self.word(Word::Ext21Eax), 0, self.word(Word::Ext21Ecx), 0],
            _ => [0; 4],
        }
    }

    /// The highest extended leaf.
    fn extended_level(&self) -> u32 {
        if self.vendor == Vendor::Amd { 0x8000_0021 } else { 0x8000_0008 }
    }

    /// Leaf 0xB: threads of a core, then cores of the socket.
    fn topology_level(&self, sub: u32, id: u32) -> [u32; 4] {
        match sub {
            0 => [0, 1, 1 << 8, id],
            1 => [self.core_bits(), self.vcpus, 2 << 8 | 1, id],
            _ => [0, 0, sub & 0xff, id],
        }
    }

    /// Leaves 4 (with how many cores there are) and 0x8000001D: 48 KiB of L1 data, 32 KiB of L1 code, 1 MiB of L2, and
    /// 32 MiB of L3 for all.
    fn cache(&self, sub: u32, cores: bool) -> [u32; 4] {
        let ids = ((1u32 << self.core_bits()) - 1).min(0x3f);
        let cores = if cores { ids << 26 } else { 0 };
        let describe = |kind: u32, level: u32, sharing: u32, ways: u32, sets: u32| {
            let sharing = (sharing - 1).min(0xfff);
            [cores | kind | level << 5 | 1 << 8 | sharing << 14, (ways - 1) << 22 | 63, sets - 1, 0]
        };
        match sub {
            0 => describe(1, 1, 1, 12, 64),
            1 => describe(2, 1, 1, 8, 64),
            2 => describe(3, 2, 1, 16, 1024),
            3 => describe(3, 3, self.vcpus, 16, 32768),
            _ => [0; 4],
        }
    }

    fn brand_part(&self, part: u32) -> [u32; 4] {
        let mut text = [0; 48];
        let len = self.brand.len().min(47);
        text[..len].copy_from_slice(&self.brand.as_bytes()[..len]);
        let at = part as usize * 16;
        std::array::from_fn(|index| little(&text[at + index * 4..]))
    }

    /// The vendor's name goes EBX, EDX, ECX.
    fn vendor_leaf(&self, eax: u32) -> [u32; 4] {
        let name = match self.vendor {
            Vendor::Amd => b"AuthenticAMD",
            Vendor::Intel => b"GenuineIntel",
        };
        let [eax, ebx, edx, ecx] = text4(eax, name);
        [eax, ebx, ecx, edx]
    }
}

fn kilohertz(hertz: u64) -> u32 {
    u32::try_from(hertz / 1000).unwrap_or(u32::MAX)
}

fn little(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn text4(eax: u32, text: &[u8; 12]) -> [u32; 4] {
    [eax, little(text), little(&text[4..]), little(&text[8..])]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_parts_of_the_xsave_area_are_listed() {
        let model = CpuModel::named("Icelake-Server", |_| true).expect("a model");
        let (_, listed) = CpuModel::LEAVES.iter().find(|(leaf, _)| *leaf == 0xd).expect("the leaf");
        for sub in (0..64).filter(|sub| model.leaf(0xd, *sub, 0, 0) != [0; 4]) {
            assert!(sub < *listed, "subleaf {sub}");
        }
        assert_ne!(model.leaf(0xd, listed - 1, 0, 0), [0; 4], "there is one less");
    }
}
