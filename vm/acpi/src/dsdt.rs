//! The DSDT: the machine's devices in AML.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If,
    Interrupt, Local, Memory32Fixed, Method, Name, NotEqual, Or, PackageBuilder, Path, ResourceTemplate,
    Return, Scope, Store, Uuid, ZERO,
};

use crate::AcpiConfig;
use crate::config::{INTX_GSI_BASE, intx_gsi};
use crate::table::with_body;

/// What `_OSC` leaves to the guest (PCI Firmware Specification 3.3, table 4-5): the PCI Express
/// capability structure. Hot-plug, power management events and error reporting don't exist here.
const OSC_CONTROL: u32 = 1 << 4;
const OSC_PCI_UUID: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
/// The LPC bridge's place, device 31 function 0.
const LPC_ADDRESS: u32 = 0x001f_0000;

/// AML that's already bytes.
pub(crate) struct Raw(pub(crate) Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn bytes_of(object: &dyn Aml) -> Raw {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    Raw(bytes)
}

/// The whole table.
pub(crate) fn build(config: &AcpiConfig) -> Vec<u8> {
    let mut aml = Vec::new();
    interrupt_model(&mut aml);
    sleep_state("\\_S3_", config.power.s3_sleep_type, &mut aml);
    sleep_state("\\_S5_", config.power.s5_sleep_type, &mut aml);
    let host = host_bridge(config);
    let lpc = lpc_bridge(config);
    let reserved = reservations(config);
    let mut children: Vec<u8> = Vec::new();
    Device::new(Path::new("PCI0"), vec![&host, &lpc, &reserved]).to_aml_bytes(&mut children);
    for uid in 0..config.apic_ids.len() {
        processor(uid as u32, &mut children);
    }
    Scope::new(Path::new("\\_SB_"), vec![&Raw(children)]).to_aml_bytes(&mut aml);
    with_body(b"DSDT", 2, &aml)
}

/// `\_PIC`, by which the guest says which interrupt controllers it uses (ACPI 6.5, 5.8.1).
fn interrupt_model(aml: &mut Vec<u8>) {
    Name::new(Path::new("PICF"), &ZERO).to_aml_bytes(aml);
    Method::new(Path::new("\\_PIC"), 1, false, vec![&Store::new(&Path::new("PICF"), &Arg(0))])
        .to_aml_bytes(aml);
}

/// A sleep state (ACPI 6.5, 7.4.2) that is entered by this SLP_TYPx.
fn sleep_state(name: &str, sleep_type: u8, aml: &mut Vec<u8>) {
    let mut package = PackageBuilder::new();
    package.add_element(&sleep_type);
    package.add_element(&sleep_type);
    package.add_element(&ZERO);
    package.add_element(&ZERO);
    Name::new(Path::new(name), &package).to_aml_bytes(aml);
}

pub(crate) fn processor(uid: u32, aml: &mut Vec<u8>) {
    Device::new(
        Path::new(&format!("C{uid:03X}")),
        vec![&Name::new(Path::new("_HID"), &"ACPI0007"), &Name::new(Path::new("_UID"), &uid)],
    )
    .to_aml_bytes(aml);
}

/// What's in the host bridge beside its children.
fn host_bridge(config: &AcpiConfig) -> Raw {
    let mut aml = Vec::new();
    for (name, value) in [("_HID", "PNP0A08"), ("_CID", "PNP0A03")] {
        Name::new(Path::new(name), &EISAName::new(value)).to_aml_bytes(&mut aml);
    }
    for name in ["_UID", "_SEG", "_BBN"] {
        Name::new(Path::new(name), &ZERO).to_aml_bytes(&mut aml);
    }
    Name::new(Path::new("_CRS"), &host_resources(config)).to_aml_bytes(&mut aml);
    routing(config, &mut aml);
    operating_system_capabilities(&mut aml);
    Raw(aml)
}

fn host_resources(config: &AcpiConfig) -> Raw {
    let pci = &config.pci;
    let uncached = AddressSpaceCacheable::NotCacheable;
    let mut list = vec![
        bytes_of(&AddressSpace::new_bus_number(0u16, pci.buses - 1)),
        bytes_of(&IO::new(0xcf8, 0xcf8, 1, 8)),
        bytes_of(&AddressSpace::new_io(0u16, 0xcf7, None)),
        bytes_of(&AddressSpace::new_io(0xd00u16, 0xffff, None)),
    ];
    if pci.vga {
        list.push(bytes_of(&AddressSpace::new_memory(uncached, true, 0xa_0000u32, 0xb_ffff, None)));
    }
    for window in &pci.windows32 {
        // Both ends are below 4 GiB, as `validate` has seen to.
        let (first, last) = (window.start as u32, (window.end - 1) as u32);
        list.push(bytes_of(&AddressSpace::new_memory(uncached, true, first, last, None)));
    }
    if let Some(window) = &pci.window64 {
        list.push(bytes_of(&AddressSpace::new_memory(uncached, true, window.start, window.end - 1, None)));
    }
    bytes_of(&ResourceTemplate::new(list.iter().map(|item| item as &dyn Aml).collect()))
}

/// `_PRT` (ACPI 6.5, 6.2.13): fixed routing, one table for each interrupt model.
fn routing(config: &AcpiConfig, aml: &mut Vec<u8>) {
    let table = |gsi_of: &dyn Fn(u8, u8) -> u32| {
        let mut package = PackageBuilder::new();
        for slot in 0..32u8 {
            for pin in 0..4u8 {
                let mut entry = PackageBuilder::new();
                entry.add_element(&(u32::from(slot) << 16 | 0xffff));
                entry.add_element(&pin);
                entry.add_element(&ZERO);
                entry.add_element(&gsi_of(slot, pin));
                package.add_element(&entry);
            }
        }
        package
    };
    let line = |slot, pin| (intx_gsi(slot, pin) - INTX_GSI_BASE) as usize;
    Name::new(Path::new("PRTA"), &table(&intx_gsi)).to_aml_bytes(aml);
    Name::new(Path::new("PRTP"), &table(&|slot, pin| config.pci.pic_irqs[line(slot, pin)].into()))
        .to_aml_bytes(aml);
    Method::new(
        Path::new("_PRT"),
        0,
        false,
        vec![
            &If::new(&Path::new("PICF"), vec![&Return::new(&Path::new("PRTA"))]),
            &Return::new(&Path::new("PRTP")),
        ],
    )
    .to_aml_bytes(aml);
}

/// `_OSC` (ACPI 6.5, 6.2.11; PCI Firmware Specification 3.3, 4.5).
fn operating_system_capabilities(aml: &mut Vec<u8>) {
    const UNKNOWN_UUID: u32 = 1 << 2;
    const UNKNOWN_REVISION: u32 = 1 << 3;
    const MASKED: u32 = 1 << 4;
    let status = || Path::new("CDW1");
    let control = || Path::new("CDW3");
    let set_status = |bit: u32| bytes_of(&Or::new(&status(), &status(), &bit));
    Method::new(
        Path::new("_OSC"),
        4,
        true,
        vec![
            &CreateDWordField::new(&status(), &Arg(3), &ZERO),
            &If::new(
                &Equal::new(&Arg(0), &Uuid::new(OSC_PCI_UUID)),
                vec![
                    &CreateDWordField::new(&control(), &Arg(3), &8u8),
                    &And::new(&Local(0), &control(), &OSC_CONTROL),
                    &If::new(&NotEqual::new(&Arg(1), &1u8), vec![&set_status(UNKNOWN_REVISION)]),
                    &If::new(&NotEqual::new(&control(), &Local(0)), vec![&set_status(MASKED)]),
                    &Store::new(&control(), &Local(0)),
                ],
            ),
            &Else::new(vec![&set_status(UNKNOWN_UUID)]),
            &Return::new(&Arg(3)),
        ],
    )
    .to_aml_bytes(aml);
}

/// A device with a plug-and-play id and fixed resources.
pub(crate) fn isa_device(name: &str, hid: &dyn Aml, uid: u32, resources: Vec<&dyn Aml>) -> Raw {
    bytes_of(&Device::new(
        Path::new(name),
        vec![
            &Name::new(Path::new("_HID"), hid),
            &Name::new(Path::new("_UID"), &uid),
            &Name::new(Path::new("_STA"), &0x0fu8),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources)),
        ],
    ))
}

/// An ISA interrupt: edge-triggered, active high.
pub(crate) fn isa_irq(irq: u8) -> Interrupt {
    Interrupt::new(true, true, false, false, irq.into())
}

pub(crate) fn port(first: u16, len: u8) -> IO {
    IO::new(first, first, 1, len)
}

/// The devices on the LPC bus.
fn lpc_bridge(config: &AcpiConfig) -> Raw {
    let mut devices = Vec::new();
    for (index, serial) in config.serials.iter().enumerate() {
        devices.push(isa_device(
            &format!("COM{:X}", index + 1),
            &EISAName::new("PNP0501"),
            index as u32,
            vec![&port(serial.port, 8), &isa_irq(serial.irq)],
        ));
    }
    if config.rtc {
        let hid = EISAName::new("PNP0B00");
        devices.push(isa_device("RTC0", &hid, 0, vec![&port(0x70, 2), &isa_irq(8)]));
    }
    if config.i8042 {
        let (data, command, irq) = (port(0x60, 1), port(0x64, 1), isa_irq(1));
        let resources: Vec<&dyn Aml> = vec![&data, &command, &irq];
        devices.push(isa_device("KBD0", &EISAName::new("PNP0303"), 0, resources));
        devices.push(isa_device("MOU0", &EISAName::new("PNP0F13"), 0, vec![&isa_irq(12)]));
    }
    devices.push(isa_device("TIM0", &EISAName::new("PNP0100"), 0, vec![&port(0x40, 4)]));
    if let Some(first) = config.pvpanic {
        devices.push(isa_device("PEVT", &"QEMU0001", 0, vec![&port(first, 1)]));
    }
    let address = Name::new(Path::new("_ADR"), &LPC_ADDRESS);
    let mut children: Vec<&dyn Aml> = vec![&address];
    children.extend(devices.iter().map(|device| device as &dyn Aml));
    bytes_of(&Device::new(Path::new("LPCB"), children))
}

/// Addresses that belong to the board: the configuration space, which guests require to be reserved
/// (PCI Firmware Specification 3.3, 4.1.2), the power management ports, the HPET.
fn reservations(config: &AcpiConfig) -> Raw {
    let power = &config.power;
    let ecam = config.ecam();
    let mut resources = vec![
        bytes_of(&Memory32Fixed::new(true, ecam.start as u32, (ecam.end - ecam.start) as u32)),
        bytes_of(&port(power.pm1a_event, 4)),
        bytes_of(&port(power.pm1a_control, 2)),
        bytes_of(&port(power.timer, 4)),
        bytes_of(&port(power.gpe0, power.gpe0_len)),
        bytes_of(&port(0x4d0, 2)),
    ];
    if power.smi_command != 0 {
        resources.push(bytes_of(&port(power.smi_command, 2)));
    }
    let list = resources.iter().map(|item| item as &dyn Aml).collect();
    let mut aml = isa_device("MBRD", &EISAName::new("PNP0C02"), 0, list).0;
    if let Some(address) = config.hpet {
        let registers = Memory32Fixed::new(true, address, 0x400);
        aml.extend(isa_device("HPET", &EISAName::new("PNP0103"), 0, vec![&registers]).0);
    }
    Raw(aml)
}
