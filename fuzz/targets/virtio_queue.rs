//! A split queue over memory that a driver fills with anything.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vireo_fuzz::{Input, test_memory};
use virtio::{Chain, Queue, QueueState, RingFeatures};

const SIZES: [u16; 4] = [16, 256, 8, 1];
const DESCRIPTORS: u64 = 0x0000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;

struct Target {
    queue: Queue,
    chains: Vec<Chain>,
}

impl Target {
    fn step(&mut self, input: &mut Input<'_>) {
        let memory = test_memory();
        match input.u8() % 16 {
            0..=2 => {
                // A descriptor, in the table or in an indirect one.
                let address = input.pick(&[DESCRIPTORS, 0xc000]) + 16 * u64::from(input.u8() % 20);
                let place = if input.flag() { 0xc000 + u64::from(input.u16()) } else { input.number() };
                let len = if input.flag() { u32::from(input.u8()) * 16 } else { input.number() as u32 };
                let mut bytes = place.to_le_bytes().to_vec();
                bytes.extend(len.to_le_bytes());
                bytes.extend((u16::from(input.u8()) & 7).to_le_bytes());
                bytes.extend((u16::from(input.u8()) % 20).to_le_bytes());
                memory.write(address, &bytes).expect("tables are in memory");
            }
            3 => {
                let slot = u64::from(input.u8() % 18);
                let head = u16::from(input.u8()) % 20;
                memory.write(AVAILABLE + 4 + 2 * slot, &head.to_le_bytes()).expect("the ring is in memory");
            }
            4 => {
                let index = self.queue.state().next_available.wrapping_add(input.u8().into());
                memory.write(AVAILABLE + 2, &index.to_le_bytes()).expect("the ring is in memory");
            }
            5 => {
                let at = u64::from(input.u16()) * 2;
                let len = input.below(0x40) as usize;
                // What does not fit is lost.
                let _ = memory.write(at, input.bytes(len));
            }
            6..=8 => {
                if let Ok(Some(chain)) = self.queue.pop(&memory) {
                    check(&chain, input);
                    self.chains.push(chain);
                }
            }
            9 => {
                if let Some(chain) = self.chains.pop() {
                    let _ = self.queue.push(&memory, chain.head(), input.number() as u32);
                    let _ = self.queue.needs_interrupt(&memory);
                }
            }
            10 => self.queue.put_back(),
            11 => drop(self.queue.enable_doorbell(&memory)),
            12 => drop(self.queue.disable_doorbell(&memory)),
            13 => drop((self.queue.has_available(&memory), self.queue.needs_interrupt(&memory))),
            14 => self.configure(input),
            _ => self.restore(input),
        }
    }

    fn configure(&mut self, input: &mut Input<'_>) {
        if input.flag() {
            self.queue.reset();
        }
        let features = RingFeatures { indirect: input.flag(), event_idx: input.flag() };
        self.queue.set_features(features);
        let usual = !input.one_in(8);
        self.queue.configure(|state| {
            state.size = if usual { input.pick(&SIZES) } else { input.u16() };
            state.descriptors = if usual { DESCRIPTORS } else { input.number() };
            state.available = if usual { AVAILABLE } else { input.number() };
            state.used = if usual { USED } else { input.number() };
        });
        let _ = self.queue.enable(&test_memory());
    }

    fn restore(&mut self, input: &mut Input<'_>) {
        let mut state: QueueState = self.queue.state().clone();
        match input.u8() % 8 {
            0 => state.size = input.u16(),
            1 => state.descriptors = input.number(),
            2 => state.available = input.number(),
            3 => state.used = input.number(),
            4 => state.enabled = input.flag(),
            5 => state.next_used = input.u16(),
            _ => state.next_available = input.u16(),
        }
        if self.queue.restore(&test_memory(), &state).is_ok() {
            assert_eq!(*self.queue.state(), state);
        }
    }
}

/// What holds of every chain.
fn check(chain: &Chain, input: &mut Input<'_>) {
    let memory = test_memory();
    let sum = |lens: &mut dyn Iterator<Item = (u64, u32)>| -> u64 {
        lens.map(|(address, len)| {
            assert!(memory.contains(address, len.into()), "{len:#x} bytes at {address:#x} are no memory");
            u64::from(len)
        })
        .sum()
    };
    assert_eq!(sum(&mut chain.readable_ranges()), u64::from(chain.readable_len()));
    assert_eq!(sum(&mut chain.writable_ranges()), u64::from(chain.writable_len()));
    let (offset, len) = (input.number() as u32, input.below(0x200) as u32);
    let mut data = vec![0; len as usize];
    let fits = |all: u32| u64::from(offset) + u64::from(len) <= all.into() || len == 0;
    assert_eq!(chain.read(&memory, offset, &mut data).is_ok(), fits(chain.readable_len()));
    assert_eq!(chain.write(&memory, offset, &data).is_ok(), fits(chain.writable_len()));
    for (slices, all) in [
        (chain.readable_slices(&memory, offset, len), chain.readable_len()),
        (chain.writable_slices(&memory, offset, len), chain.writable_len()),
    ] {
        let total = slices.map(|slices| slices.iter().map(|slice| slice.len()).sum::<usize>());
        assert_eq!(total.ok(), fits(all).then_some(len as usize));
    }
}

fuzz_target!(|data: &[u8]| {
    let memory = test_memory();
    memory.write(0, &[0; 0x2_0000]).expect("low memory is memory");
    let mut input = Input::new(data);
    let mut target = Target { queue: Queue::new(input.pick(&SIZES)), chains: Vec::new() };
    target.configure(&mut input);
    while !input.is_empty() {
        target.step(&mut input);
    }
});
