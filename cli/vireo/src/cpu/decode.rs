//! What the leaves of CPUID say, in words.

use accel::{CpuSpec, CpuidLeaf};
use serde::Serialize;
use x86_cpuid::feature::Feature;

/// A processor as its guest sees it.
#[derive(Debug, Serialize)]
pub(crate) struct Processor {
    /// The version of this format.
    version: u32,
    accelerator: String,
    cpu: String,
    vendor: String,
    pub(crate) brand: String,
    family: u32,
    model: u32,
    stepping: u32,
    physical_address_bits: u32,
    linear_address_bits: u32,
    pub(crate) features: Vec<&'static str>,
    leaves: Vec<Leaf>,
}

#[derive(Debug, Serialize)]
struct Leaf {
    leaf: u32,
    sub: u32,
    eax: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
}

/// The characters of registers.
fn text(registers: &[u32]) -> String {
    let bytes: Vec<u8> = registers.iter().flat_map(|register| register.to_le_bytes()).collect();
    String::from_utf8_lossy(&bytes).trim_matches('\0').trim().to_owned()
}

impl Processor {
    pub(crate) fn new(accelerator: &str, cpu: &CpuSpec, leaves: &[CpuidLeaf]) -> Self {
        let find = |leaf: u32, sub: u32| {
            let found = leaves.iter().find(|answer| (answer.leaf, answer.sub) == (leaf, sub));
            found.map_or([0; 4], |answer| answer.registers)
        };
        let [_, ebx, ecx, edx] = find(0, 0);
        let signature = find(1, 0)[0];
        let (family, model) = (signature >> 8 & 15, signature >> 4 & 15);
        let brand: Vec<u32> = (0x8000_0002..=0x8000_0004).flat_map(|leaf| find(leaf, 0)).collect();
        let addresses = find(0x8000_0008, 0)[0];
        let has = |feature: &Feature| {
            let place = feature.place();
            find(place.leaf, place.sub)[place.register] >> place.bit & 1 != 0
        };
        let mut features: Vec<_> = Feature::all().filter(has).filter_map(Feature::name).collect();
        features.sort_unstable();
        Self {
            version: 1,
            accelerator: accelerator.to_owned(),
            cpu: cpu.to_string(),
            vendor: text(&[ebx, edx, ecx]),
            brand: text(&brand),
            family: if family == 15 { family + (signature >> 20 & 0xff) } else { family },
            model: if matches!(family, 6 | 15) { model | (signature >> 16 & 15) << 4 } else { model },
            stepping: signature & 15,
            physical_address_bits: addresses & 0xff,
            linear_address_bits: addresses >> 8 & 0xff,
            features,
            leaves: leaves
                .iter()
                .map(|&CpuidLeaf { leaf, sub, registers: [eax, ebx, ecx, edx] }| Leaf {
                    leaf,
                    sub,
                    eax,
                    ebx,
                    ecx,
                    edx,
                })
                .collect(),
        }
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        let mut text = format!(
            "{}: {} {}\nfamily {} model {} stepping {}; addresses of {} bits, {} physical\n\nfeatures\n",
            self.cpu,
            self.vendor,
            self.brand,
            self.family,
            self.model,
            self.stepping,
            self.linear_address_bits,
            self.physical_address_bits
        );
        let mut line = String::new();
        for feature in &self.features {
            if line.len() + feature.len() > 76 {
                text += &format!(" {line}\n");
                line.clear();
            }
            line += &format!(" {feature}");
        }
        text += &format!(" {line}\n\nleaves                eax      ebx      ecx      edx\n");
        for Leaf { leaf, sub, eax, ebx, ecx, edx } in &self.leaves {
            text += &format!("  {leaf:08x} {sub:<3}    {eax:08x} {ebx:08x} {ecx:08x} {edx:08x}\n");
        }
        text
    }
}
