//! Local APICs and the bus between them.
#![no_main]

use accel::LapicState;
use clock::{TimerService, VmClock};
use device::{SavedState, decode, encode};
use irq::{MsiMessage, MsiTarget};
use lapic::{ApicBus, ApicConfig, Event, Lapic, MSR_APIC_BASE, MSR_TSC_DEADLINE, MSR_X2APIC};
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use vireo_fuzz::{Input, Outside};

const VCPUS: u32 = 3;
const CONFIG: ApicConfig = ApicConfig { vcpus: VCPUS, physical_bits: 46, tsc_hertz: 2_000_000_000 };
/// How many timers can be due at one moment.
const MOST_TIMERS: usize = 64;

struct Target {
    clock: VmClock,
    timers: Arc<TimerService>,
    bus: Arc<ApicBus>,
    outside: Vec<Arc<Outside>>,
}

impl Target {
    fn new() -> Self {
        let clock = VmClock::new();
        let timers = TimerService::without_thread(clock.clone());
        let bus = ApicBus::new(CONFIG, &timers);
        let connect = |id| {
            let outside = Arc::new(Outside::default());
            bus.connect(id, outside.clone()).expect("nobody is connected");
            outside
        };
        let outside = (0..VCPUS).map(connect).collect();
        Self { clock, timers, bus, outside }
    }

    fn tsc(&self) -> u64 {
        self.clock.now().wrapping_mul(2)
    }

    fn pass(&self, nanos: u64) {
        self.clock.set(self.clock.now().saturating_add(nanos).min(1 << 61));
        let mut fired = 0;
        while self.timers.fire_next() {
            fired += 1;
            assert!(fired <= MOST_TIMERS, "timers are due again and again at one moment");
        }
    }

    fn step(&self, input: &mut Input<'_>) {
        let lapic = &self.bus.lapics()[input.below(VCPUS.into()) as usize];
        match input.u8() % 24 {
            0 | 1 => {
                let len = input.pick(&[4, 1, 2, 8]);
                lapic.mmio_read(input.u16().into(), &mut [0; 8][..len]);
            }
            2..=6 => {
                let len = input.pick(&[4, 4, 4, 1, 8]);
                let offset = u64::from(input.u8()) << 4;
                lapic.mmio_write(offset, &input.number().to_le_bytes()[..len]);
            }
            7 => drop(lapic.read_msr(self.msr(input))),
            8..=12 => {
                let msr = self.msr(input);
                let before = lapic.save();
                if lapic.write_msr(msr, input.number(), self.tsc()).is_err() {
                    assert_eq!(before, lapic.save(), "a write that faults changes nothing");
                }
            }
            13 => {
                let address = 0xfee0_0000 | u64::from(input.u32() & 0xf_ffff);
                self.bus.signal(MsiMessage { address, data: input.u16().into() });
            }
            14 => self.bus.set_ext_int(input.flag()),
            15 | 16 => {
                let pending = lapic.pending();
                let taken = lapic.acknowledge();
                assert_eq!(pending.vector, taken, "what is pending can be taken");
                if pending.ext_int {
                    lapic.acknowledge_ext_int();
                }
            }
            17 => lapic.set_cr8(input.u8() & 0xf),
            18 => lapic.pulse_lint1(),
            19 => self.pass(input.u32().into()),
            20 => self.pass(input.number() >> 3),
            21 => self.restore_any(lapic, input),
            22 => lapic.reset(),
            _ => self.round_trip(),
        }
        for (lapic, outside) in self.bus.lapics().iter().zip(&self.outside) {
            if outside.take_processor_events().contains(&Event::Init) {
                lapic.init();
            }
        }
    }

    fn msr(&self, input: &mut Input<'_>) -> u32 {
        match input.u8() {
            0..40 => MSR_APIC_BASE,
            40..60 => MSR_TSC_DEADLINE,
            _ => MSR_X2APIC + u32::from(input.u8()),
        }
    }

    /// A state that nobody vouches for.
    fn restore_any(&self, lapic: &Lapic, input: &mut Input<'_>) {
        let mut saved = encode("lapic", 1, &lapic.save());
        vireo_fuzz::patch(input, &mut saved.bytes);
        let state = decode::<LapicState>("lapic", 1, &SavedState { kind: "lapic".into(), ..saved });
        if let Ok(state) = state {
            let before = lapic.save();
            if lapic.restore(&state, self.tsc(), self.clock.now()).is_err() {
                assert_eq!(before, lapic.save(), "a state that is refused changes nothing");
            }
        }
    }

    /// Saved and restored, everything is as it was.
    fn round_trip(&self) {
        let fresh = Self::new();
        fresh.clock.set(self.clock.now());
        for (old, new) in self.bus.lapics().iter().zip(fresh.bus.lapics()) {
            let state = old.save();
            new.restore(&state, self.tsc(), self.clock.now()).expect("a state that was just saved");
            assert_eq!(state, new.save(), "a restored APIC saves what it was restored from");
            assert_eq!(old.pending(), new.pending());
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let target = Target::new();
    let mut input = Input::new(data);
    while !input.is_empty() {
        target.step(&mut input);
    }
    target.round_trip();
});
