use proptest::prelude::*;

use super::*;

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

impl Tables {
    fn at(&self, address: u64) -> &[u8] {
        &self.bytes[(address - self.base) as usize..]
    }

    /// The table at `address`, cut to its length, its checksum verified.
    fn table(&self, address: u64) -> &[u8] {
        let bytes = self.at(address);
        let table = &bytes[..u32_at(bytes, 4) as usize];
        assert_eq!(sum(table), 0, "checksum of {}", String::from_utf8_lossy(&table[..4]));
        table
    }

    /// All tables that the XSDT lists, and the DSDT.
    fn all(&self) -> Vec<&[u8]> {
        let rsdp = &self.at(self.root)[..36];
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(rsdp), rsdp[15]), (0, 0, 2));
        let rsdt = self.table(u32_at(rsdp, 16).into());
        let xsdt = self.table(u64_at(rsdp, 24));
        let listed: Vec<u64> = xsdt[36..].chunks(8).map(|chunk| u64_at(chunk, 0)).collect();
        let listed_low: Vec<u64> = rsdt[36..].chunks(4).map(|chunk| u32_at(chunk, 0).into()).collect();
        assert_eq!(listed, listed_low);
        let mut tables: Vec<&[u8]> = listed.iter().map(|address| self.table(*address)).collect();
        let fadt = tables[0];
        assert_eq!((&fadt[..4], fadt.len(), fadt[8]), (b"FACP".as_slice(), 276, 6));
        assert_eq!(u64::from(u32_at(fadt, 40)), u64_at(fadt, 140));
        let facs = u32_at(fadt, 36);
        assert_eq!((&self.at(facs.into())[..4], facs % 64), (b"FACS".as_slice(), 0));
        tables.push(self.table(u64_at(fadt, 140)));
        tables
    }

    fn named(&self, signature: &[u8; 4]) -> &[u8] {
        self.all().into_iter().find(|table| table.starts_with(signature)).unwrap()
    }
}

#[test]
fn pointers_lengths_and_checksums_add_up() {
    let tables = build(&AcpiConfig::pc(vec![0, 1]), ACPI_WINDOW).unwrap();
    assert_eq!((tables.root, tables.base), (0xe_0000, 0xe_0000));
    let names: Vec<_> = tables.all().iter().map(|table| table[..4].to_vec()).collect();
    assert_eq!(names, [b"FACP", b"APIC", b"MCFG", b"HPET", b"DSDT"]);
    let fadt = tables.named(b"FACP");
    assert_eq!(
        (u32_at(fadt, 56), u32_at(fadt, 64), u32_at(fadt, 76), u32_at(fadt, 80)),
        (0x600, 0x604, 0x608, 0x620)
    );
    assert_eq!(fadt[116..129], [1, 8, 0, 1, 0xf9, 0xc, 0, 0, 0, 0, 0, 0, 6]);
    assert_eq!(u32_at(fadt, 112), 0x425);
    assert_eq!(fadt[109], 0b1_0111);
    let facs = u64::from(u32_at(fadt, 36));
    assert_eq!((tables.waking_vector, u32_at(tables.at(facs), 12)), (Some(facs + 12), 0));
    let mcfg = tables.named(b"MCFG");
    assert_eq!((u64_at(mcfg, 44), mcfg[54], mcfg[55], mcfg.len()), (0xc000_0000, 0, 255, 60));
    let hpet = tables.named(b"HPET");
    assert_eq!((u64_at(hpet, 44), hpet.len()), (0xfed0_0000, 56));
}

/// The MADT's structures as (type, bytes).
fn structures(madt: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut found = Vec::new();
    let mut rest = &madt[44..];
    while !rest.is_empty() {
        let (one, more) = rest.split_at(rest[1].into());
        found.push((one[0], one.to_vec()));
        rest = more;
    }
    found
}

#[test]
fn every_vcpu_is_in_the_madt() {
    let tables = build(&AcpiConfig::pc(vec![0, 4, 254, 255, 300]), ACPI_WINDOW).unwrap();
    let madt = tables.named(b"APIC");
    assert_eq!((u32_at(madt, 36), u32_at(madt, 40)), (0xfee0_0000, 1));
    let found = structures(madt);
    let kinds: Vec<_> = found.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds, [0, 0, 0, 9, 9, 1, 2, 2, 4, 10]);
    assert_eq!(found[1].1, [0, 8, 1, 4, 1, 0, 0, 0]);
    assert_eq!(found[4].1, [9, 16, 0, 0, 0x2c, 1, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0]);
    assert_eq!(found[5].1, [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    assert_eq!(found[6].1, [2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    assert_eq!(found[7].1, [2, 10, 0, 9, 9, 0, 0, 0, 13, 0]);
}

fn two_nodes() -> AcpiConfig {
    let mut config = AcpiConfig::pc(vec![0, 4, 300]);
    let near = NumaNode { apic_ids: vec![0, 300], memory: std::iter::once(0..0x8000_0000).collect() };
    let far = NumaNode { apic_ids: vec![4], memory: std::iter::once(1 << 32..3 << 31).collect() };
    config.numa = Some(Numa { nodes: vec![near, far], distances: vec![vec![10, 21], vec![21, 10]] });
    config
}

#[test]
fn nodes_are_in_the_srat_and_their_distances_in_the_slit() {
    let tables = build(&two_nodes(), ACPI_WINDOW).unwrap();
    let srat = tables.named(b"SRAT");
    assert_eq!((srat[8], u32_at(srat, 36), srat.len()), (3, 1, 48 + 2 * 16 + 24 + 2 * 40));
    assert_eq!(srat[48..64], [0, 16, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let x2apic = &srat[64..88];
    assert_eq!((x2apic[0], u32_at(x2apic, 4), u32_at(x2apic, 8), u32_at(x2apic, 12)), (2, 0, 300, 1));
    let memory = &srat[88..128];
    assert_eq!((memory[0], memory[1], u32_at(memory, 2), u32_at(memory, 28)), (1, 40, 0, 1));
    assert_eq!((u64_at(memory, 8), u64_at(memory, 16)), (0, 0x8000_0000));
    assert_eq!(srat[128..136], [0, 16, 1, 4, 1, 0, 0, 0]);
    assert_eq!((u64_at(&srat[144..], 8), u64_at(&srat[144..], 16)), (1 << 32, 1 << 31));
    let slit = tables.named(b"SLIT");
    assert_eq!((u64_at(slit, 36), &slit[44..]), (2, &[10, 21, 21, 10][..]));
}

#[test]
fn impossible_nodes_are_refused() {
    let with = |change: &dyn Fn(&mut Numa)| {
        let mut config = two_nodes();
        change(config.numa.as_mut().unwrap());
        build(&config, ACPI_WINDOW).unwrap_err()
    };
    assert_eq!(with(&|numa| numa.nodes.clear()), AcpiError::NodeCount { count: 0, max: 128 });
    assert_eq!(with(&|numa| numa.nodes[0].apic_ids.push(4)), AcpiError::NodeCpus);
    assert_eq!(with(&|numa| numa.nodes[0].apic_ids.clear()), AcpiError::NodeCpus);
    assert!(matches!(with(&|numa| numa.nodes[0].memory.push(5..5)), AcpiError::Range { .. }));
    assert!(matches!(with(&|numa| numa.nodes[1].memory.push(4096..8192)), AcpiError::Range { .. }));
    assert_eq!(with(&|numa| numa.distances[1].clear()), AcpiError::NodeDistances { nodes: 2 });
    let wrong = |from, to, distance| AcpiError::NodeDistance { from, to, distance };
    assert_eq!(with(&|numa| numa.distances[1][0] = 10), wrong(1, 0, 10));
    assert_eq!(with(&|numa| numa.distances[0][0] = 20), wrong(0, 0, 20));
}

#[test]
fn nonsense_machines_are_refused() {
    let with = |change: &dyn Fn(&mut AcpiConfig)| {
        let mut config = AcpiConfig::pc(vec![0]);
        change(&mut config);
        build(&config, ACPI_WINDOW).unwrap_err()
    };
    assert_eq!(with(&|config| config.apic_ids.clear()), AcpiError::CpuCount { count: 0, max: 1024 });
    assert_eq!(with(&|config| config.apic_ids = vec![3, 3]), AcpiError::DuplicateApicId { id: 3 });
    let five = vec![SerialPort { port: 0x3f8, irq: 4 }; 5];
    assert_eq!(with(&|config| config.serials = five.clone()), AcpiError::SerialCount { count: 5, max: 4 });
    assert_eq!(with(&|config| config.pci.buses = 0), AcpiError::BusCount { buses: 0 });
    assert!(matches!(with(&|config| config.pci.ecam_base = u64::MAX), AcpiError::Range { .. }));
    assert!(matches!(with(&|config| config.pci.window64 = Some(5..9)), AcpiError::Range { .. }));
    let config = AcpiConfig::pc(vec![0]);
    assert!(matches!(build(&config, 0xe_0000..0xe_0100), Err(AcpiError::WindowTooSmall { .. })));
    assert!(matches!(build(&config, 1 << 33..1 << 34), Err(AcpiError::WindowTooHigh { .. })));
}

#[test]
fn lines_spread_over_eight_inputs() {
    assert_eq!((intx_gsi(0, 0), intx_gsi(3, 1), intx_gsi(31, 3)), (16, 20, 18));
}

#[test]
fn smbios_structures_end_where_they_should() {
    let mut config = smbios::SmbiosConfig::pc(2, vec![0..0x8000_0000, 1 << 32..5 << 32]);
    config.uuid = [0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 8, 9, 10, 11, 12, 13, 14, 15];
    let tables = smbios::build(&config, SMBIOS_WINDOW).unwrap();
    let entry = &tables.at(tables.root)[..24];
    assert_eq!((&entry[..5], sum(entry)), (b"_SM3_".as_slice(), 0));
    let mut rest = &tables.at(u64_at(entry, 16))[..u32_at(entry, 12) as usize];
    let mut kinds = Vec::new();
    while !rest.is_empty() {
        let (kind, length) = (rest[0], usize::from(rest[1]));
        kinds.push((kind, length));
        if kind == 1 {
            assert_eq!(rest[8..16], [0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66]);
        }
        let end = rest[length..].windows(2).position(|pair| pair == [0, 0]).unwrap();
        rest = &rest[length + end + 2..];
    }
    assert_eq!(
        kinds,
        [(0, 26), (1, 27), (3, 22), (4, 48), (16, 23), (17, 40), (19, 31), (19, 31), (32, 11), (127, 4)]
    );
    assert!(matches!(smbios::build(&config, 0xf_0000..0xf_0100), Err(AcpiError::WindowTooSmall { .. })));
}

/// ACPICA's compiler reads every table back, where it's installed.
#[test]
fn the_reference_disassembler_accepts_every_table() {
    use std::process::{Command, Stdio};
    let available =
        Command::new("iasl").arg("-v").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !available {
        println!("iasl (package acpica-tools) isn't installed: its check is left out");
    }
    let folder = tempfile::tempdir().unwrap();
    let mut full = AcpiConfig::pc((0..300).collect());
    full.pci.vga = true;
    full.serials.push(SerialPort { port: 0x2f8, irq: 3 });
    let node = |ids: Range<u32>, start: u64| NumaNode {
        apic_ids: ids.collect(),
        memory: std::iter::once(start..start + (1 << 30)).collect(),
    };
    full.numa = Some(Numa {
        nodes: vec![node(0..150, 0), node(150..300, 1 << 32)],
        distances: vec![vec![10, 20], vec![20, 10]],
    });
    let tables = build(&full, ACPI_WINDOW).unwrap();
    for table in tables.all() {
        let name = String::from_utf8_lossy(&table[..4]).into_owned();
        assert_eq!(u32_at(table, 4) as usize, table.len());
        if !available {
            continue;
        }
        std::fs::write(folder.path().join(format!("{name}.dat")), table).unwrap();
        let run = |arguments: &[&str]| {
            let output = Command::new("iasl").args(arguments).current_dir(folder.path()).output().unwrap();
            let said = [output.stdout, output.stderr].concat();
            (output.status.success(), String::from_utf8_lossy(&said).into_owned())
        };
        let (good, said) = run(&["-d", &format!("{name}.dat")]);
        assert!(good && !said.contains("rror"), "{name}: {said}");
        let (good, said) = run(&["-vw", "2015", &format!("{name}.dsl")]);
        assert!(good && said.contains("0 Errors"), "{name}: {said}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_description_gives_tables_or_an_error(
        ids in proptest::collection::vec(any::<u32>(), 0..40),
        ecam_base in any::<u64>(),
        buses in any::<u16>(),
        window in (any::<u64>(), any::<u64>()),
        port in any::<u16>(),
    ) {
        let mut config = AcpiConfig::pc(ids);
        config.pci.ecam_base = ecam_base;
        config.pci.buses = buses;
        config.pci.window64 = Some(window.0..window.1);
        config.power.gpe0 = port;
        config.serials[0].port = port;
        if let Ok(tables) = build(&config, ACPI_WINDOW) {
            prop_assert!(tables.all().len() >= 4);
        }
    }
}

#[test]
fn a_machine_without_chipset_is_described() {
    let node = |index: u64| VirtioNode {
        registers: 0xd000_0000 + index * 0x1000..0xd000_1000 + index * 0x1000,
        gsi: 10 + index as u32,
    };
    let config = MicroConfig {
        apic_ids: vec![0, 1],
        local_apic_address: 0xfee0_0000,
        io_apic: IoApic { id: 0, address: 0xfec0_0000 },
        sleep_control: 0x600,
        sleep_status: 0x601,
        s5_sleep_type: 5,
        reset_port: 0xcf9,
        reset_value: 6,
        serials: vec![SerialPort { port: 0x3f8, irq: 4 }],
        rtc: true,
        pvpanic: Some(0x505),
        numa: None,
        virtio: vec![node(0), node(1)],
    };
    let tables = build_micro(&config, ACPI_WINDOW).unwrap();
    let rsdp = &tables.at(tables.root)[..36];
    assert_eq!((sum(&rsdp[..20]), sum(rsdp)), (0, 0));
    let xsdt = tables.table(u64_at(rsdp, 24));
    let fadt = tables.table(u64_at(xsdt, 36));
    let madt = tables.table(u64_at(xsdt, 44));
    assert_eq!((&fadt[..4], &madt[..4], xsdt.len()), (&b"FACP"[..], &b"APIC"[..], 52));
    // Hardware-reduced, with a reset register and both sleep registers.
    assert_eq!(u32_at(fadt, 112) & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
    assert_eq!([u64_at(fadt, 120), u64_at(fadt, 248), u64_at(fadt, 260)], [0xcf9, 0x600, 0x601]);
    // No 8259s.
    assert_eq!(u32_at(madt, 40) & 1, 0);
    let dsdt = tables.table(u64_at(fadt, 140));
    let count = |name: &[u8]| dsdt.windows(name.len()).filter(|window| *window == name).count();
    assert_eq!((count(b"LNRO0005"), count(b"ACPI0007"), count(b"_S5_")), (2, 2, 1));
    assert_eq!(count(&0xd000_1000u32.to_le_bytes()), 1);
    let with = |change: &dyn Fn(&mut MicroConfig)| {
        let mut config = config.clone();
        change(&mut config);
        build_micro(&config, ACPI_WINDOW)
    };
    assert!(with(&|config| config.virtio = vec![node(0); 257]).is_err());
    assert!(with(&|config| config.virtio[0].registers = 5..5).is_err());
    assert!(with(&|config| config.virtio[0].registers.end = 1 << 33).is_err());
    assert!(with(&|config| config.apic_ids.clear()).is_err());
}
