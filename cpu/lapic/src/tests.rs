//! Local APICs with recording vCPUs.

use super::*;
use accel::LapicState;
use clock::{TimerService, VmClock};
use irq::{MsiMessage, MsiTarget};
use parking_lot::Mutex;
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

const TSC_HERTZ: u64 = 2_000_000_000;
const LIMIT: Duration = Duration::from_secs(20);

struct Recorder {
    id: u32,
    events: Mutex<Sender<(u32, Event)>>,
}
impl VcpuSink for Recorder {
    fn event(&self, event: Event) {
        let _ = self.events.lock().send((self.id, event));
    }
}

struct Rig {
    clock: VmClock,
    timers: Arc<TimerService>,
    bus: Arc<ApicBus>,
    events: Receiver<(u32, Event)>,
}

impl Rig {
    fn new(vcpus: u32) -> Self {
        let clock = VmClock::new();
        let timers = TimerService::new(clock.clone()).unwrap();
        let bus = ApicBus::new(ApicConfig { vcpus, physical_bits: 40, tsc_hertz: TSC_HERTZ }, &timers);
        let (sender, events) = channel();
        for id in 0..vcpus {
            let sink = Arc::new(Recorder { id, events: Mutex::new(sender.clone()) });
            assert!(bus.connect(id, sink.clone()).is_some());
            assert!(bus.connect(id, sink).is_none());
        }
        Self { clock, timers, bus, events }
    }

    /// All software-enabled, in x2APIC mode if asked.
    fn enabled(vcpus: u32, x2apic: bool) -> Self {
        let rig = Self::new(vcpus);
        for lapic in rig.bus.lapics() {
            if x2apic {
                let base = lapic.read_msr(MSR_APIC_BASE).unwrap();
                lapic.write_msr(MSR_APIC_BASE, base | 1 << 10, 0).unwrap();
            }
            write(lapic, 0xf0, 0x1ff);
        }
        rig
    }

    fn lapic(&self, id: u32) -> &Arc<Lapic> {
        self.bus.lapic(id).unwrap()
    }

    fn events(&self) -> Vec<(u32, Event)> {
        self.events.try_iter().collect()
    }

    fn pending(&self) -> Vec<Option<u8>> {
        self.bus.lapics().iter().map(|lapic| lapic.pending().vector).collect()
    }

    fn set_time(&self, now: u64) {
        self.clock.set(now);
        self.timers.clock_changed();
    }
}

/// Writes the register at an xAPIC offset in whichever mode the APIC is.
fn write(lapic: &Lapic, offset: u64, value: u32) {
    if lapic.mmio_base().is_some() {
        lapic.mmio_write(offset, &value.to_le_bytes());
    } else {
        lapic.write_msr(MSR_X2APIC + (offset >> 4) as u32, value.into(), 0).unwrap();
    }
}

fn read(lapic: &Lapic, offset: u64) -> u32 {
    if lapic.mmio_base().is_some() {
        let mut data = [0; 4];
        lapic.mmio_read(offset, &mut data);
        u32::from_le_bytes(data)
    } else {
        lapic.read_msr(MSR_X2APIC + (offset >> 4) as u32).unwrap() as u32
    }
}

fn send_xapic(lapic: &Lapic, destination: u32, command: u32) {
    write(lapic, 0x310, destination << 24);
    write(lapic, 0x300, command);
}

fn msi(destination: u32, address_bits: u64, data: u32) -> MsiMessage {
    MsiMessage { address: 0xfee0_0000 | u64::from(destination) << 12 | address_bits, data }
}

#[test]
fn interrupts_are_taken_by_priority_and_held_back_by_what_is_in_service() {
    let rig = Rig::enabled(1, false);
    let lapic = rig.lapic(0);
    for vector in [0x31, 0x52, 0x55] {
        rig.bus.signal(msi(0, 0, vector));
    }
    assert_eq!(rig.events(), [(0, Event::Interrupt); 3]);
    assert_eq!(lapic.acknowledge(), Some(0x55));
    assert_eq!(lapic.pending().vector, None, "0x52 is of the same class");
    assert_eq!(read(lapic, 0xa0), 0x50);
    write(lapic, 0xb0, 0);
    assert_eq!(rig.events(), [(0, Event::Interrupt)]);
    lapic.set_cr8(5);
    assert_eq!((lapic.pending().vector, read(lapic, 0x80)), (None, 0x50));
    lapic.set_cr8(4);
    assert_eq!(lapic.acknowledge(), Some(0x52));
    assert_eq!(lapic.cr8(), 4);
    write(lapic, 0xb0, 0);
    assert_eq!(lapic.acknowledge(), None);
    write(lapic, 0x80, 0x20);
    assert_eq!(lapic.acknowledge(), Some(0x31));
}

#[test]
fn only_ends_of_level_triggered_interrupts_are_broadcast() {
    let rig = Rig::enabled(1, false);
    let ends = Arc::new(Mutex::new(Vec::new()));
    let heard = ends.clone();
    rig.bus.set_eoi_listener(Arc::new(move |vector| heard.lock().push(vector)));
    let lapic = rig.lapic(0);
    rig.bus.signal(msi(0, 0, 1 << 15 | 1 << 14 | 0x40));
    rig.bus.signal(msi(0, 0, 0x61));
    for _ in 0..2 {
        lapic.acknowledge().unwrap();
        write(lapic, 0xb0, 0);
    }
    write(lapic, 0xb0, 0); // nothing in service
    assert_eq!(*ends.lock(), [0x40]);
}

#[test]
fn xapic_destinations_physical_flat_and_cluster() {
    let rig = Rig::enabled(4, false);
    send_xapic(rig.lapic(0), 2, 0x30);
    assert_eq!(rig.pending(), [None, None, Some(0x30), None]);
    for (id, lapic) in rig.bus.lapics().iter().enumerate() {
        write(lapic, 0xd0, 1 << (24 + id));
        assert_eq!(read(lapic, 0xe0), u32::MAX);
    }
    send_xapic(rig.lapic(0), 0b1001, 1 << 11 | 0x41);
    assert_eq!(rig.pending(), [Some(0x41), None, Some(0x30), Some(0x41)]);
    for (id, lapic) in (0u32..).zip(rig.bus.lapics()) {
        write(lapic, 0xe0, 0);
        write(lapic, 0xd0, (id / 2) << 28 | 1 << (24 + id % 2));
    }
    send_xapic(rig.lapic(3), 0x03, 1 << 11 | 0x52);
    assert_eq!(rig.pending(), [Some(0x52), Some(0x52), Some(0x30), Some(0x41)]);
    send_xapic(rig.lapic(3), 0x12, 1 << 11 | 0x63);
    assert_eq!(rig.pending(), [Some(0x52), Some(0x52), Some(0x30), Some(0x63)]);
    send_xapic(rig.lapic(1), 0xff, 0x70);
    assert_eq!(rig.pending(), [Some(0x70); 4]);
}

#[test]
fn x2apic_destinations() {
    let rig = Rig::enabled(20, true);
    let sender = rig.lapic(0);
    assert_eq!((read(rig.lapic(18), 0x20), read(rig.lapic(18), 0xd0)), (18, 1 << 16 | 1 << 2));
    let icr = MSR_X2APIC + 0x30;
    sender.write_msr(icr, 17 << 32 | 0x33, 0).unwrap();
    sender.write_msr(icr, (1 << 16 | 0b1100) << 32 | 1 << 11 | 0x34, 0).unwrap();
    let hit: Vec<_> = (0..20).filter_map(|id| Some((id, rig.lapic(id).pending().vector?))).collect();
    assert_eq!(hit, [(17, 0x33), (18, 0x34), (19, 0x34)]);
    assert_eq!(sender.read_msr(icr), Ok((1 << 16 | 0b1100) << 32 | 1 << 11 | 0x34));
    sender.write_msr(icr, 0xffff_ffff << 32 | 0x35, 0).unwrap();
    assert_eq!(rig.pending(), [Some(0x35); 20]);
    sender.write_msr(MSR_X2APIC + 0x3f, 0x90, 0).unwrap();
    assert_eq!(sender.pending().vector, Some(0x90));
}

#[test]
fn shorthands() {
    let rig = Rig::enabled(3, false);
    send_xapic(rig.lapic(1), 0, 1 << 18 | 0x30);
    assert_eq!(rig.pending(), [None, Some(0x30), None]);
    send_xapic(rig.lapic(1), 0, 3 << 18 | 0x41);
    assert_eq!(rig.pending(), [Some(0x41), Some(0x30), Some(0x41)]);
    send_xapic(rig.lapic(1), 0, 2 << 18 | 0x52);
    assert_eq!(rig.pending(), [Some(0x52); 3]);
}

#[test]
fn programs_change_the_id_that_messages_name() {
    let rig = Rig::enabled(3, false);
    write(rig.lapic(2), 0x20, 1 << 24);
    assert_eq!([0, 1, 2].map(|id| read(rig.lapic(id), 0x20) >> 24), [0, 1, 1]);
    send_xapic(rig.lapic(0), 1, 0x30);
    assert_eq!(rig.pending(), [None, Some(0x30), Some(0x30)], "both have it");
    send_xapic(rig.lapic(0), 2, 0x41);
    send_xapic(rig.lapic(2), 0, 1 << 18 | 0x52);
    assert_eq!(rig.pending(), [None, Some(0x30), Some(0x52)], "a message to itself arrives");
    // It is saved, and goes along with another rig's registers.
    let copy = Rig::enabled(3, false);
    copy.lapic(2).restore(&rig.lapic(2).save(), 0, 0).unwrap();
    send_xapic(copy.lapic(0), 1, 0x63);
    assert_eq!(copy.pending(), [None, Some(0x63), Some(0x63)]);
    // Switched off and on again it has its own.
    copy.lapic(2).write_msr(MSR_APIC_BASE, 0xfee0_0000, 0).unwrap();
    copy.lapic(2).write_msr(MSR_APIC_BASE, 0xfee0_0800, 0).unwrap();
    assert_eq!(read(copy.lapic(2), 0x20) >> 24, 2);
    // In x2APIC mode the id is the processor's own.
    rig.lapic(2).write_msr(MSR_APIC_BASE, 0xfee0_0c00, 0).unwrap();
    rig.lapic(2).mmio_write(0x20, &(1u32 << 24).to_le_bytes());
    assert_eq!(rig.lapic(2).read_msr(MSR_X2APIC + 2), Ok(2));
    send_xapic(rig.lapic(0), 2, 0x74);
    assert_eq!(rig.pending()[2], Some(0x74));
    assert!(copy.lapic(1).restore(&rig.lapic(2).save(), 0, 0).is_err());
}

#[test]
fn init_sipi_and_nmi_reach_processors_that_are_software_disabled() {
    let rig = Rig::new(2);
    rig.events();
    send_xapic(rig.lapic(0), 1, 0xc500); // INIT, level, assert
    send_xapic(rig.lapic(0), 1, 0x8500); // INIT, level, de-assert: nothing
    send_xapic(rig.lapic(0), 1, 0x0608);
    send_xapic(rig.lapic(0), 1, 0x0400);
    send_xapic(rig.lapic(0), 1, 0x0030); // fixed: dropped
    assert_eq!(rig.events(), [(1, Event::Init), (1, Event::Sipi(8)), (1, Event::Nmi)]);
    assert_eq!(rig.pending(), [None, None]);
}

#[test]
fn lowest_priority_prefers_the_idle_and_takes_turns() {
    let rig = Rig::enabled(3, false);
    for (id, lapic) in rig.bus.lapics().iter().enumerate() {
        write(lapic, 0xd0, 1 << (24 + id));
    }
    rig.lapic(0).set_cr8(3);
    let mut hits = [0; 3];
    for _ in 0..6 {
        rig.bus.signal(msi(0b111, 1 << 2, 0x100 | 0x80));
        for (id, hit) in hits.iter_mut().enumerate() {
            let lapic = rig.lapic(id as u32);
            if lapic.acknowledge().is_some() {
                write(lapic, 0xb0, 0);
                *hit += 1;
            }
        }
    }
    assert_eq!(hits, [0, 3, 3]);
}

#[test]
fn the_8259s_come_through_lint0_of_the_bootstrap_processor() {
    let rig = Rig::new(2);
    rig.bus.set_ext_int(true);
    assert_eq!(rig.events(), [(0, Event::Interrupt)]);
    assert!(rig.lapic(0).pending().ext_int && !rig.lapic(1).pending().any());
    rig.lapic(0).acknowledge_ext_int();
    assert!(rig.lapic(0).pending().ext_int, "the level decides");
    rig.bus.set_ext_int(false);
    assert!(!rig.lapic(0).pending().any());
    write(rig.lapic(0), 0xf0, 0x1ff);
    write(rig.lapic(0), 0x350, 0x1_0700);
    rig.bus.set_ext_int(true);
    assert!(!rig.lapic(0).pending().any(), "masked");
    rig.bus.set_ext_int(false);
    write(rig.lapic(0), 0x350, 0x31); // fixed: "virtual wire" through a vector of the APIC's own
    rig.bus.set_ext_int(true);
    assert_eq!(rig.lapic(0).pending(), Pending { ext_int: false, vector: Some(0x31) });
}

#[test]
fn lint1_is_the_nmi_input() {
    let rig = Rig::enabled(1, false);
    rig.lapic(0).pulse_lint1();
    assert_eq!(rig.events(), []);
    write(rig.lapic(0), 0x360, 0x400);
    rig.lapic(0).pulse_lint1();
    assert_eq!(rig.events(), [(0, Event::Nmi)]);
}

#[test]
fn errors_are_gathered_and_shown_on_a_write() {
    let rig = Rig::enabled(2, false);
    let lapic = rig.lapic(0);
    write(lapic, 0x370, 0xfe);
    send_xapic(lapic, 1, 0x05); // an illegal vector
    assert_eq!((read(lapic, 0x280), lapic.pending().vector), (0, Some(0xfe)));
    write(lapic, 0x280, 0);
    assert_eq!(read(lapic, 0x280), 1 << 5);
    read(lapic, 0x3d0);
    rig.bus.signal(msi(0, 0, 0x0f));
    write(lapic, 0x280, 0);
    assert_eq!(read(lapic, 0x280), 1 << 6 | 1 << 7);
    write(lapic, 0x280, 0);
    assert_eq!(read(lapic, 0x280), 0);
}

#[test]
fn apic_base_moves_only_between_legal_states() {
    let rig = Rig::new(2);
    let lapic = rig.lapic(1);
    let base = lapic.read_msr(MSR_APIC_BASE).unwrap();
    assert_eq!((base, rig.lapic(0).read_msr(MSR_APIC_BASE)), (0xfee0_0800, Ok(0xfee0_0900)));
    let set = |value| lapic.write_msr(MSR_APIC_BASE, value, 0);
    let (enabled, x2apic) = (1 << 11, 1 << 10);
    assert!(lapic.read_msr(MSR_X2APIC + 2).is_err());
    assert!(set(0xfee0_0000 | x2apic).is_err());
    assert!(set(0xfee0_0001 | enabled).is_err() && set(1 << 40 | enabled).is_err());
    set(0x1234_5000 | enabled).unwrap();
    assert_eq!(lapic.mmio_base(), Some(0x1234_5000));
    set(0xfee0_0000 | enabled | x2apic).unwrap();
    assert_eq!((lapic.mmio_base(), lapic.read_msr(MSR_X2APIC + 2)), (None, Ok(1)));
    assert!(set(0xfee0_0000 | enabled).is_err());
    set(0xfee0_0000).unwrap();
    assert!(set(0xfee0_0000 | enabled | x2apic).is_err());
    set(0xfee0_0000 | enabled).unwrap();
    assert_eq!(lapic.mmio_base(), Some(0xfee0_0000));
}

#[test]
fn x2apic_msrs_fault_where_the_manual_says() {
    let rig = Rig::enabled(1, true);
    let lapic = rig.lapic(0);
    let write = |number: u32, value: u64| lapic.write_msr(MSR_X2APIC + number, value, 0);
    for (number, value) in [(0x0b, 1), (0x28, 1), (0x08, 0x100), (0x0e, 0), (0x02, 0), (0x0d, 0), (0x31, 0)] {
        assert!(write(number, value).is_err(), "{number:#x}");
    }
    assert!(write(0x32, 1 << 19).is_err() && write(0x32, 1 << 32).is_err() && write(0x3e, 4).is_err());
    for number in [0x00, 0x09, 0x0e, 0x2f, 0x31, 0x3f, 0x40, 0xff] {
        assert!(lapic.read_msr(MSR_X2APIC + number).is_err(), "{number:#x}");
    }
    write(0x0b, 0).unwrap();
    assert_eq!(lapic.read_msr(MSR_X2APIC + 3), Ok(0x0005_0014));
}

#[test]
fn one_shot_and_periodic_timers_fire() {
    let rig = Rig::enabled(1, false);
    let lapic = rig.lapic(0);
    rig.clock.set(1_000_000);
    write(lapic, 0x3e0, 0xb); // by 1
    write(lapic, 0x320, 0x40);
    write(lapic, 0x380, 500_000);
    assert_eq!(read(lapic, 0x390), 500_000);
    rig.clock.set(1_400_000);
    assert_eq!(read(lapic, 0x390), 100_000);
    write(lapic, 0x3e0, 0); // by 2 from here on
    assert_eq!(read(lapic, 0x390), 100_000);
    rig.clock.set(1_500_000);
    assert_eq!((read(lapic, 0x390), lapic.pending().vector), (50_000, None));
    rig.set_time(1_600_000);
    assert_eq!(rig.events.recv_timeout(LIMIT), Ok((0, Event::Interrupt)));
    assert_eq!((lapic.acknowledge(), read(lapic, 0x390)), (Some(0x40), 0));
    write(lapic, 0xb0, 0);

    write(lapic, 0x320, 1 << 17 | 0x41);
    write(lapic, 0x380, 100_000);
    for period in 1..4 {
        rig.set_time(1_600_000 + period * 200_000);
        assert_eq!(rig.events.recv_timeout(LIMIT), Ok((0, Event::Interrupt)));
        assert_eq!((lapic.acknowledge(), read(lapic, 0x390)), (Some(0x41), 100_000));
        write(lapic, 0xb0, 0);
    }
    write(lapic, 0x380, 0);
    assert_eq!(read(lapic, 0x390), 0);
}

#[test]
fn a_periodic_timer_that_becomes_one_shot_ends_its_cycle() {
    let rig = Rig::enabled(1, false);
    let lapic = rig.lapic(0);
    write(lapic, 0x3e0, 0xb);
    write(lapic, 0x320, 1 << 17 | 0x41);
    write(lapic, 0x380, 100_000);
    rig.set_time(330_000);
    assert_eq!(rig.events.recv_timeout(LIMIT), Ok((0, Event::Interrupt)));
    lapic.acknowledge();
    write(lapic, 0xb0, 0);
    write(lapic, 0x320, 0x42);
    assert_eq!((read(lapic, 0x390), lapic.pending().vector), (70_000, None));
    let copy = Rig::new(1);
    copy.clock.set(330_000);
    copy.lapic(0).restore(&lapic.save(), 0, 330_000).unwrap();
    assert_eq!((read(copy.lapic(0), 0x390), copy.lapic(0).pending().vector), (70_000, None));
    rig.set_time(400_000);
    assert_eq!(rig.events.recv_timeout(LIMIT), Ok((0, Event::Interrupt)));
    assert_eq!((lapic.acknowledge(), read(lapic, 0x390)), (Some(0x42), 0));
    // The cycle ends together with the mode: its interrupt comes by the entry as it was.
    write(lapic, 0xb0, 0);
    write(lapic, 0x320, 1 << 17 | 0x41);
    write(lapic, 0x380, 100_000);
    rig.clock.set(500_000);
    write(lapic, 0x320, 0x42);
    assert_eq!((lapic.acknowledge(), read(lapic, 0x390)), (Some(0x41), 100_000));
}

#[test]
fn an_interrupt_that_is_due_when_the_divider_changes_is_not_lost() {
    let rig = Rig::enabled(1, false);
    let lapic = rig.lapic(0);
    write(lapic, 0x3e0, 0xb);
    write(lapic, 0x320, 0x42);
    write(lapic, 0x380, 100_000);
    rig.clock.set(100_000); // of which the timers' thread has not heard
    write(lapic, 0x3e0, 0);
    assert_eq!((lapic.acknowledge(), read(lapic, 0x390)), (Some(0x42), 0));
}

#[test]
fn tsc_deadlines_fire_and_disarm() {
    let rig = Rig::enabled(1, true);
    let lapic = rig.lapic(0);
    lapic.write_msr(MSR_TSC_DEADLINE, 5, 0).unwrap();
    assert_eq!(lapic.read_msr(MSR_TSC_DEADLINE), Ok(0), "not in this mode");
    write(lapic, 0x320, 2 << 17 | 0x50);
    lapic.write_msr(MSR_TSC_DEADLINE, 3_000_000, 1_000_000).unwrap(); // in a millisecond
    assert_eq!(lapic.read_msr(MSR_TSC_DEADLINE), Ok(3_000_000));
    rig.set_time(1_000_000);
    assert_eq!(rig.events.recv_timeout(LIMIT), Ok((0, Event::Interrupt)));
    assert_eq!((lapic.acknowledge(), lapic.read_msr(MSR_TSC_DEADLINE)), (Some(0x50), Ok(0)));
    write(lapic, 0xb0, 0);
    lapic.write_msr(MSR_TSC_DEADLINE, 7, 8).unwrap(); // past already
    assert_eq!(lapic.acknowledge(), Some(0x50));
    lapic.write_msr(MSR_TSC_DEADLINE, u64::MAX, 8).unwrap();
    lapic.write_msr(MSR_TSC_DEADLINE, 0, 8).unwrap();
    assert_eq!(lapic.read_msr(MSR_TSC_DEADLINE), Ok(0));
}

#[test]
fn init_keeps_id_and_mode_and_reset_does_not() {
    let rig = Rig::enabled(2, true);
    let lapic = rig.lapic(1);
    rig.bus.signal(msi(1, 0, 0x44));
    lapic.init();
    assert_eq!((lapic.pending().any(), read(lapic, 0x20), read(lapic, 0xf0)), (false, 1, 0xff));
    assert_eq!(read(lapic, 0x320), 1 << 16);
    lapic.reset();
    assert_eq!(lapic.mmio_base(), Some(DEFAULT_BASE));
}

#[test]
fn states_of_others_and_impossible_ones_are_refused() {
    let rig = Rig::new(2);
    let state = rig.lapic(1).save();
    let other = LapicState { id: 0x101, ..state.clone() };
    assert!(rig.lapic(1).restore(&other, 0, 0).is_err(), "more than eight bits, and not its own");
    for apic_base in [1 << 10, 1, u64::MAX] {
        assert!(rig.lapic(1).restore(&LapicState { apic_base, ..state.clone() }, 0, 0).is_err());
    }
    rig.lapic(1).restore(&state, 0, 0).unwrap();
}

/// A guest's or a device's doing.
#[derive(Debug, Clone)]
enum Action {
    Write(u32, u64, u32),
    Read(u32, u64),
    Msr(u32, u32, u64),
    Acknowledge(u32),
    Signal(MsiMessage),
    ExtInt(bool),
    Time(u64),
    Init(u32),
}

fn action() -> impl Strategy<Value = Action> {
    let register = (0u64..0x40).prop_map(|number| number << 4);
    let value = prop_oneof![any::<u32>(), 0u32..0x800, (0u32..8).prop_map(|mode| mode << 16 | 0x1e0)];
    let msr = prop_oneof![
        MSR_X2APIC..=MSR_X2APIC + 0x3f,
        Just(MSR_TSC_DEADLINE),
        Just(MSR_APIC_BASE),
        Just(MSR_APIC_BASE)
    ];
    let wide = prop_oneof![
        (0u64..0x1000),
        any::<u64>(),
        (0u64..4).prop_map(|mode| 0xfee0_0000 | mode << 10),
        (0u64..3, 0u64..0x10_0000).prop_map(|(destination, command)| destination << 32 | command),
    ];
    prop_oneof![
        4 => (0u32..2, register.clone(), value).prop_map(|(id, offset, value)| Action::Write(id, offset, value)),
        1 => (0u32..2, register).prop_map(|(id, offset)| Action::Read(id, offset)),
        3 => (0u32..2, msr, wide).prop_map(|(id, msr, value)| Action::Msr(id, msr, value)),
        2 => (0u32..2).prop_map(Action::Acknowledge),
        2 => (0u64..0x10_0000, any::<u16>())
            .prop_map(|(address, data)| Action::Signal(MsiMessage { address: 0xfee0_0000 | address, data: data.into() })),
        1 => any::<bool>().prop_map(Action::ExtInt),
        1 => (0u64..1 << 40).prop_map(Action::Time),
        1 => (0u32..2).prop_map(Action::Init),
    ]
}

/// Does it, and gives what the guest saw.
fn perform(rig: &Rig, action: &Action) -> u64 {
    match *action {
        Action::Write(id, offset, value) => rig.lapic(id).mmio_write(offset, &value.to_le_bytes()),
        Action::Read(id, offset) => {
            let mut data = [0; 4];
            rig.lapic(id).mmio_read(offset, &mut data);
            return u32::from_le_bytes(data).into();
        }
        Action::Msr(id, msr, value) => {
            let lapic = rig.lapic(id);
            let written = lapic.write_msr(msr, value, rig.clock.now().saturating_mul(2)).is_ok();
            return lapic.read_msr(msr).unwrap_or(written.into());
        }
        Action::Acknowledge(id) => {
            if rig.lapic(id).pending().ext_int {
                rig.lapic(id).acknowledge_ext_int();
            }
            return rig.lapic(id).acknowledge().map_or(0, u64::from);
        }
        Action::Signal(message) => rig.bus.signal(message),
        Action::ExtInt(level) => rig.bus.set_ext_int(level),
        Action::Time(now) => rig.clock.set(now.max(rig.clock.now())),
        Action::Init(id) => rig.lapic(id).init(),
    }
    0
}

fn states(rig: &Rig) -> Vec<(LapicState, Pending)> {
    rig.bus.lapics().iter().map(|lapic| (lapic.save(), lapic.pending())).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn restored_apics_go_on_as_saved_ones(
        before in prop::collection::vec(action(), 0..40),
        after in prop::collection::vec(action(), 0..20),
    ) {
        let rig = Rig::enabled(2, false);
        for action in &before {
            perform(&rig, action);
        }
        let restored = Rig::new(2);
        let now = rig.clock.now();
        restored.clock.set(now);
        for (state, lapic) in states(&rig).iter().zip(restored.bus.lapics()) {
            prop_assert!(lapic.restore(&state.0, now.saturating_mul(2), now).is_ok());
        }
        prop_assert_eq!(states(&rig), states(&restored));
        // The turns of lowest-priority delivery are not state: both take them from the same place.
        rig.bus.restart_turns();
        restored.bus.restart_turns();
        for action in &after {
            prop_assert_eq!(perform(&rig, action), perform(&restored, action), "{:?}", action);
            prop_assert_eq!(states(&rig), states(&restored), "{:?}", action);
        }
    }

    #[test]
    fn what_is_pending_is_above_the_processor_priority(actions in prop::collection::vec(action(), 0..60)) {
        let rig = Rig::enabled(2, false);
        for action in &actions {
            perform(&rig, action);
            for lapic in rig.bus.lapics() {
                let state = lapic.save();
                if let Some(vector) = lapic.pending().vector {
                    prop_assert!(vector >= 16 && vector >> 4 > state.tpr >> 4);
                    prop_assert!(state.irr[usize::from(vector >> 5)] >> (vector & 31) & 1 == 1);
                    let highest = (0..8).rev().find(|word| state.isr[*word] != 0);
                    let in_service = highest.map_or(0, |word| word as u32 * 32 + 31 - state.isr[word].leading_zeros());
                    prop_assert!(u32::from(vector) >> 4 > in_service >> 4);
                }
            }
        }
    }
}
