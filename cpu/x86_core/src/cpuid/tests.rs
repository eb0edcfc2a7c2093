use super::*;
use crate::testing::Machine;
use std::sync::Arc;

fn cpuid(machine: &mut Machine, leaf: u32, sub: u32) -> [u32; 4] {
    machine.core().cpuid(leaf, sub)
}

fn text(words: &[u32]) -> String {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    String::from_utf8(bytes).unwrap().trim_end_matches('\0').to_owned()
}

#[test]
fn names_of_models() {
    for model in CpuModel::list(CpuModel::available) {
        match CpuModel::by_name(model.name) {
            Ok(found) => assert_eq!(found.name(), model.name),
            Err(error) => {
                let error = error.to_string();
                let missing = model.missing.iter().filter_map(|feature| feature.name());
                missing.for_each(|feature| assert!(error.contains(feature), "{error}"));
                assert!(!model.missing.is_empty(), "{error}");
            }
        }
    }
    let error = CpuModel::by_name("qemu63").unwrap_err();
    assert!(error.to_string().contains("did you mean qemu64?"), "{error}");
    assert_eq!(CpuModel::by_name("X86-64-V2").unwrap().name(), "x86-64-v2");
}

#[test]
fn vendor_family_and_names() {
    let mut machine = Machine::long();
    let [max, ebx, ecx, edx] = cpuid(&mut machine, 0, 0);
    assert_eq!(text(&[ebx, edx, ecx]), "AuthenticAMD");
    assert!(max >= 0xd);
    let signature = cpuid(&mut machine, 1, 0)[0];
    let family = (signature >> 8 & 0xf) + (signature >> 20 & 0xff);
    assert_eq!(family, 0x1a);
    let brand: Vec<u32> = (0x8000_0002..=0x8000_0004).flat_map(|leaf| cpuid(&mut machine, leaf, 0)).collect();
    assert_eq!(text(&brand), "Vireo");
    let hypervisor = cpuid(&mut machine, 0x4000_0000, 0);
    assert_eq!(text(&hypervisor[1..]), "VireoVireo");
    assert_eq!(cpuid(&mut machine, 0x4000_0010, 0)[0], 1_000_000, "the TSC in kHz");
    assert_eq!(cpuid(&mut machine, 0x8000_0008, 0)[0], 46 | 57 << 8);
    assert_eq!(cpuid(&mut machine, 0x1234, 0), [0; 4]);
}

#[test]
fn features_depend_on_the_model() {
    let mut machine = Machine::long();
    let features = |machine: &mut Machine, name: &str| {
        machine.cpu.model = Arc::new(CpuModel::by_name(name).unwrap());
        (cpuid(machine, 1, 0)[2], cpuid(machine, 7, 0)[1], cpuid(machine, 0x8000_0001, 0)[3])
    };
    let (ecx, ebx, ext) = features(&mut machine, "x86-64-v1");
    assert_eq!(ecx & 1 << 20, 0, "no SSE4.2");
    assert_ne!(ebx & 1 << 20, 0, "SMAP");
    assert_eq!(ext >> 29 & 1, 1, "long mode");
    let (ecx, ebx, _) = features(&mut machine, "x86-64-v2");
    assert_eq!((ecx >> 20 & 1, ecx >> 23 & 1, ebx >> 3 & 1), (1, 1, 0), "SSE4.2, POPCNT, no BMI1");
    let (ecx, ebx, _) = features(&mut machine, "max");
    assert_eq!((ecx >> 22 & 1, ebx >> 3 & 1, ecx >> 26 & 1), (1, 1, 1), "MOVBE, BMI1, XSAVE");
    assert_eq!(cpuid(&mut machine, 0x8000_0021, 0)[0] >> 8 & 1, 1, "AutoIBRS");
}

#[test]
fn the_xsave_area_is_described() {
    let mut machine = Machine::long();
    let mask = u64::from(cpuid(&mut machine, 0xd, 0)[0]);
    assert_eq!(mask, machine.cpu.model.xcr0_mask());
    let [_, now, most, _] = cpuid(&mut machine, 0xd, 0);
    assert_eq!((now, most), (576, xsave_area_size(mask, false)), "x87 alone after reset");
    machine.cpu.xcr0 = mask;
    assert_eq!(cpuid(&mut machine, 0xd, 0)[1], most);
    assert_eq!(cpuid(&mut machine, 0xd, 1)[1], xsave_area_size(mask, true));
    for component in &XSAVE_COMPONENTS {
        let [size, offset, ..] = cpuid(&mut machine, 0xd, component.bit);
        let there = mask & component.mask() != 0;
        assert_eq!((size, offset), if there { (component.size, component.offset) } else { (0, 0) });
    }
    machine.cpu.model = Arc::new(CpuModel::by_name("x86-64-v2").unwrap());
    assert_eq!(cpuid(&mut machine, 0xd, 0), [0; 4]);
}

#[test]
fn dynamic_bits() {
    let mut machine = Machine::long();
    machine.platform.apic.borrow_mut().insert(0x1b, 0xfee0_0900);
    assert_eq!(cpuid(&mut machine, 1, 0)[3] >> 9 & 1, 1);
    machine.platform.apic.borrow_mut().insert(0x1b, 0xfee0_0100);
    assert_eq!(cpuid(&mut machine, 1, 0)[3] >> 9 & 1, 0);
}

#[test]
fn topology() {
    let mut machine = Machine::long();
    machine.cpu.model = Arc::new(CpuModel::by_name("max").unwrap().with_vcpus(6));
    machine.cpu.apic_id = 5;
    let [_, ebx, _, edx] = cpuid(&mut machine, 1, 0);
    assert_eq!((ebx >> 24, ebx >> 16 & 0xff, edx >> 28 & 1), (5, 6, 1));
    assert_eq!(cpuid(&mut machine, 0xb, 0), [0, 1, 0x100, 5]);
    assert_eq!(cpuid(&mut machine, 0xb, 1), [3, 6, 0x201, 5]);
    assert_eq!(cpuid(&mut machine, 0xb, 2), [0, 0, 2, 5]);
    assert_eq!(cpuid(&mut machine, 0x8000_0008, 0)[2], 3 << 12 | 5);
    assert_eq!(cpuid(&mut machine, 0x8000_001e, 0), [5, 5, 0, 0]);
    let [eax, ebx, ecx, _] = cpuid(&mut machine, 0x8000_001d, 3);
    let size = (ebx >> 22) as u64 + 1;
    assert_eq!(size * 64 * (u64::from(ecx) + 1), 32 << 20);
    assert_eq!(eax >> 14 & 0xfff, 5, "shared by six");
    assert_eq!(CpuModel::by_name("max").unwrap().with_vcpus(0).vcpus(), 1);
}
