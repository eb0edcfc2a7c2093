//! A bench that devices stand on, and what can happen to any device.

use crate::{Input, Outside};
use bus::{MmioBus, PioBus};
use chipset_x86::PortRegion;
use clock::{TimerService, VmClock};
use device::{Device, MmioDevice, PioDevice, SavedState};
use std::sync::Arc;

/// The latest moment that VM time reaches: 146 years.
const LAST_MOMENT: u64 = 1 << 62;

/// How many timers can be due at one moment before that is a finding: a timer that is due again at once.
const MOST_TIMERS: usize = 64;

/// Where a guest reaches something.
#[derive(Debug, Clone, Copy)]
enum Place {
    Ports { first: u16, count: u16 },
    Memory { first: u64, len: u64 },
}

/// Buses, time and devices.
pub struct Rig {
    /// The clock, which only [`Rig::pass`] moves.
    pub clock: VmClock,
    /// Its timers.
    pub timers: Arc<TimerService>,
    /// I/O ports.
    pub ports: Arc<PioBus>,
    /// Memory-mapped registers.
    pub memory: Arc<MmioBus>,
    /// Whatever the devices talk to.
    pub outside: Arc<Outside>,
    places: Vec<Place>,
    devices: Vec<Arc<dyn Device>>,
}

impl Default for Rig {
    fn default() -> Self {
        Self::new()
    }
}

impl Rig {
    /// An empty bench.
    pub fn new() -> Self {
        let clock = VmClock::new();
        Self {
            timers: TimerService::without_thread(clock.clone()),
            clock,
            ports: Arc::default(),
            memory: Arc::default(),
            outside: Arc::default(),
            places: Vec::new(),
            devices: Vec::new(),
        }
    }

    /// Adds a device's ports.
    pub fn add_ports(&mut self, regions: Vec<PortRegion>) {
        for region in regions {
            self.map_ports(region.first, region.count, region.device);
        }
    }

    /// Puts `device` at `count` ports from `first` on.
    pub fn map_ports(&mut self, first: u16, count: u16, device: Arc<dyn PioDevice>) {
        self.ports.map(first, count, device).expect("ports are free");
        self.places.push(Place::Ports { first, count });
    }

    /// Puts `device` at `len` bytes from `first` on.
    pub fn map_memory(&mut self, first: u64, len: u64, device: Arc<dyn MmioDevice>) {
        self.memory.map(first, len, device).expect("addresses are free");
        self.places.push(Place::Memory { first, len });
    }

    /// Lets the guest reach for addresses from `first` on, whatever is there.
    pub fn add_window(&mut self, first: u64, len: u64) {
        self.places.push(Place::Memory { first, len });
    }

    /// Adds a device that is saved and restored. The order counts.
    pub fn add_device(&mut self, device: Arc<dyn Device>) {
        self.devices.push(device);
    }

    /// Lets time pass. Timers fire.
    ///
    /// # Panics
    /// If timers do not stop firing although time stands still.
    pub fn pass(&self, nanos: u64) {
        self.clock.set(self.clock.now().saturating_add(nanos).min(LAST_MOMENT));
        let mut fired = 0;
        while self.timers.fire_next() {
            fired += 1;
            assert!(fired <= MOST_TIMERS, "timers are due again and again at one moment");
        }
    }

    fn pass_some(&self, input: &mut Input<'_>) {
        let nanos = match input.u8() % 4 {
            0 => u64::from(input.u16()),
            1 => u64::from(input.u32()),
            2 => u64::from(input.u16()) * 1_000_000,
            _ => input.u64() >> 4,
        };
        self.pass(nanos);
    }

    fn read(&self, input: &mut Input<'_>) {
        let mut data = [0xa5; 8];
        match self.places.get(input.below(self.places.len() as u64) as usize) {
            Some(&Place::Ports { first, count }) => {
                let offset = input.below(count.into()) as u16;
                let len = input.pick(&[1, 1, 2, 4]);
                self.ports.read(first.wrapping_add(offset), &mut data[..len]);
            }
            Some(&Place::Memory { first, len }) => {
                let offset = input.below(len);
                let len = input.pick(&[1, 2, 4, 4, 8]);
                self.memory.read(first.saturating_add(offset), &mut data[..len]);
            }
            None => {}
        }
    }

    fn write(&self, input: &mut Input<'_>) {
        match self.places.get(input.below(self.places.len() as u64) as usize) {
            Some(&Place::Ports { first, count }) => {
                let offset = input.below(count.into()) as u16;
                let len = input.pick(&[1, 1, 2, 4]);
                self.ports.write(first.wrapping_add(offset), &input.u32().to_le_bytes()[..len]);
            }
            Some(&Place::Memory { first, len }) => {
                let offset = input.below(len);
                let len = input.pick(&[1, 2, 4, 4, 8]);
                let data = if len > 4 { input.u64() } else { input.u32().into() };
                self.memory.write(first.saturating_add(offset), &data.to_le_bytes()[..len]);
            }
            None => {}
        }
    }

    fn save(&self) -> Vec<SavedState> {
        self.devices.iter().for_each(|device| device.stop());
        self.devices.iter().map(|device| device.save()).collect()
    }

    fn start(&self) {
        self.devices.iter().for_each(|device| device.start());
    }

    /// A device gets a state that nobody vouches for.
    fn restore_any(&self, input: &mut Input<'_>) {
        let Some(device) = self.devices.get(input.below(self.devices.len() as u64) as usize) else { return };
        device.stop();
        let mut state = device.save();
        if input.flag() {
            crate::patch(input, &mut state.bytes);
        } else {
            let len = input.u16().into();
            state.bytes = input.bytes(len).to_vec();
        }
        if device.restore(&state).is_err() {
            let refused = device.save();
            device.reset();
            assert_eq!(refused, device.save(), "a refused state leaves the device as after a reset");
        }
        device.start();
    }
}

impl Drop for Rig {
    /// Devices that know the buses they are on would keep everything alive.
    fn drop(&mut self) {
        for range in self.memory.ranges() {
            self.memory.unmap(range.start);
        }
        for range in self.ports.ranges() {
            self.ports.unmap(range.start as u16);
        }
    }
}

/// Devices under test.
pub trait Bench: Sized {
    /// The devices after power-on. Always the same.
    fn new() -> Self;

    /// The bench they stand on.
    fn rig(&self) -> &Rig;

    /// What mostly comes first, so that short inputs get somewhere.
    fn prepare(&self, input: &mut Input<'_>) {
        let _ = input;
    }

    /// Something that only these devices can do; if there is nothing, another store.
    fn special(&self, input: &mut Input<'_>) {
        self.rig().write(input);
    }

    /// What always holds.
    fn check(&self) {}

    /// Called on the fresh devices after they took over the state of `old`.
    fn take_over(&self, old: &Self) {
        let _ = old;
    }
}

/// Saves the devices, restores fresh ones from that, and goes on with these.
fn move_on<B: Bench>(old: B) -> B {
    let new = B::new();
    let states = old.rig().save();
    new.rig().clock.set(old.rig().clock.now());
    for (device, state) in new.rig().devices.iter().zip(&states) {
        if let Err(error) = device.restore(state) {
            panic!("a state that was just saved is refused: {error}");
        }
    }
    for (old, new) in states.iter().zip(new.rig().save()) {
        assert!(*old == new, "a restored {} saves {:?} and not {:?}", old.kind, new.bytes, old.bytes);
    }
    new.take_over(&old);
    new.check();
    new.rig().start();
    new
}

/// Does with devices what `data` says.
///
/// # Panics
/// If a device does, or if what was saved is refused or changes by being restored.
pub fn drive<B: Bench>(data: &[u8]) {
    let mut input = Input::new(data);
    let mut bench = B::new();
    bench.rig().start();
    bench.prepare(&mut input);
    // Saving and restoring takes longer than most else.
    let moves_at_end = input.one_in(4);
    let mut moves = 0;
    while !input.is_empty() {
        match input.u8() % 32 {
            0..5 => bench.rig().read(&mut input),
            5..14 => bench.rig().write(&mut input),
            14..25 => bench.special(&mut input),
            25..28 => bench.rig().pass_some(&mut input),
            28 if moves < 8 => {
                bench = move_on(bench);
                moves += 1;
            }
            29 => bench.rig().restore_any(&mut input),
            30 => bench.rig().devices.iter().for_each(|device| device.reset()),
            31 => {
                bench.rig().devices.iter().for_each(|device| device.stop());
                bench.rig().pass_some(&mut input);
                bench.rig().start();
            }
            _ => {}
        }
        bench.check();
        let outside = &bench.rig().outside;
        outside.take_messages();
        outside.take_events();
    }
    if moves_at_end {
        move_on(bench);
    }
}
