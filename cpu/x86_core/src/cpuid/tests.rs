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
    for name in CpuModel::names() {
        assert_eq!(CpuModel::by_name(name).unwrap().name(), *name);
    }
    let error = CpuModel::by_name("486").unwrap_err();
    assert_eq!(error.to_string(), "unknown CPU model \"486\"; known are max, x86-64-v2, x86-64-v1, qemu64");
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
    assert_eq!(cpuid(&mut machine, 0x8000_0008, 0)[0], 46 | 48 << 8);
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
    assert_eq!((ecx >> 22 & 1, ebx >> 3 & 1, ecx >> 26 & 1), (1, 1, 0), "MOVBE, BMI1, no XSAVE yet");
    assert_eq!(cpuid(&mut machine, 0x8000_0021, 0)[0] >> 8 & 1, 1, "AutoIBRS");
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
