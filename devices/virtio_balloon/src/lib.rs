//! The traditional virtio memory balloon (5.5): takes memory from the guest and gives it back to the host,
//! asks the guest how it fares, and hears which of its pages are free.

mod discard;
mod stats;

pub use stats::BalloonStats;

use device::{SavedState, StateError, decode, encode};
use discard::Discard;
use guest_memory::{GuestMemory, PAGE_SIZE};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use stats::StatsQueue;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use virtio::{
    ActivateError, Activation, Chain, DeviceType, Interrupt, QueueError, QueueHandle, QueueThreads,
    VirtioDevice,
};

/// Feature bits of balloons (5.5.3).
pub mod feature {
    /// There is a statistics queue.
    pub const STATS_VQ: u64 = 1 << 1;
    /// The driver takes pages back by itself before it runs out of memory.
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    /// The driver says what it fills free pages with.
    pub const PAGE_POISON: u64 = 1 << 4;
    /// The driver reports free pages.
    pub const PAGE_REPORTING: u64 = 1 << 5;
}

/// Bytes in the balloon's pages, whatever pages the guest uses (5.5.6).
const BALLOON_PAGE: u64 = 4096;
const _: () = assert!(BALLOON_PAGE == PAGE_SIZE);

/// The most bytes of page numbers in one buffer: enough for 1 GiB of pages.
const MAX_PAGE_NUMBERS: u32 = 1 << 20;

/// Page numbers read at once.
const PIECE: usize = 4096;

/// Offsets of what the driver writes in the configuration space (5.5.4).
const CONFIG_ACTUAL: u64 = 4;
const CONFIG_POISON: u64 = 12;

const KIND: &str = "virtio-balloon";
const VERSION: u32 = 1;

/// The number under which the one thread is started.
const THREAD: u16 = 0;

/// What the configuration space holds.
#[derive(Debug, Default)]
struct Registers {
    /// How many pages the balloon is to have.
    target: AtomicU32,
    /// How many pages it has, by the driver's word.
    actual: AtomicU32,
    /// What the driver fills free pages with.
    poison: AtomicU32,
}

#[derive(Debug, Serialize, Deserialize)]
struct BalloonState {
    target: u32,
    actual: u32,
    poison: u32,
}

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Reporting,
}

/// The specification gives each queue a fixed number (5.5.2), of which the free page queue, 3, does not
/// exist here. Linux instead numbers the queues that exist in sequence. Both find what they look for: what
/// is not a queue by the specification is one by Linux's rule.
fn role(queue: u16, features: u64) -> Role {
    match queue {
        0 => Role::Inflate,
        1 => Role::Deflate,
        2 if features & feature::STATS_VQ != 0 => Role::Stats,
        _ => Role::Reporting,
    }
}

/// A virtio memory balloon.
pub struct VirtioBalloon {
    registers: Arc<Registers>,
    stats: Arc<StatsQueue>,
    threads: QueueThreads,
    active: Mutex<Option<Arc<dyn Interrupt>>>,
}

impl Default for VirtioBalloon {
    fn default() -> Self {
        Self::new()
    }
}

impl VirtioBalloon {
    /// A balloon that is to stay empty.
    pub fn new() -> Self {
        Self {
            registers: Arc::default(),
            stats: Arc::default(),
            threads: QueueThreads::new(),
            active: Mutex::new(None),
        }
    }

    /// Sets how many bytes the guest is to give up, to be rounded down to pages of 4 KiB.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / BALLOON_PAGE).unwrap_or(u32::MAX);
        if self.registers.target.swap(pages, Ordering::SeqCst) != pages {
            let interrupt = self.active.lock().clone();
            if let Some(interrupt) = interrupt {
                interrupt.config_changed();
            }
        }
    }

    /// How many bytes the guest is to give up.
    pub fn target(&self) -> u64 {
        u64::from(self.registers.target.load(Ordering::SeqCst)) * BALLOON_PAGE
    }

    /// How many bytes the guest has given up, by its own word.
    pub fn actual(&self) -> u64 {
        u64::from(self.registers.actual.load(Ordering::SeqCst)) * BALLOON_PAGE
    }

    /// Asks the driver for statistics, which come at its leisure.
    pub fn request_stats(&self) {
        self.stats.request();
        self.threads.notify(THREAD);
    }

    /// The newest statistics, if the driver ever sent some.
    pub fn stats(&self) -> Option<BalloonStats> {
        self.stats.newest()
    }
}

/// The pages in `chain` are the balloon's now.
fn inflate(memory: &GuestMemory, chain: &Chain) -> Result<u32, QueueError> {
    let len = chain.readable_len();
    if len > MAX_PAGE_NUMBERS {
        return Err(QueueError::BadRequest("too many page numbers in one buffer"));
    }
    let mut piece = [0; PIECE];
    let mut done = 0;
    let mut discard = Discard::new(memory);
    while done < len {
        let part = &mut piece[..PIECE.min((len - done) as usize)];
        chain.read(memory, done, part)?;
        done += part.len() as u32;
        for number in part.as_chunks::<4>().0 {
            discard.add(u64::from(u32::from_le_bytes(*number)) * BALLOON_PAGE, BALLOON_PAGE)?;
        }
    }
    discard.finish()?;
    Ok(0)
}

/// The ranges in `chain` are free. Their content may be lost only if the driver expects zeros at most.
fn report(memory: &GuestMemory, chain: &Chain, poison: u32) -> Result<u32, QueueError> {
    if poison == 0 {
        let mut discard = Discard::new(memory);
        for (address, len) in chain.writable_ranges() {
            let start = address.next_multiple_of(BALLOON_PAGE);
            let end = (address + u64::from(len)) & !(BALLOON_PAGE - 1);
            if start < end {
                discard.add(start, end - start)?;
            }
        }
        discard.finish()?;
    }
    Ok(0)
}

impl VirtioDevice for VirtioBalloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn features(&self) -> u64 {
        feature::STATS_VQ | feature::DEFLATE_ON_OOM | feature::PAGE_POISON | feature::PAGE_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &[128; 5]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let Registers { target, actual, poison } = &*self.registers;
        let values = [target, actual, &AtomicU32::new(0), poison];
        let mut registers = [0; 16];
        for (bytes, value) in registers.as_chunks_mut::<4>().0.iter_mut().zip(values) {
            *bytes = value.load(Ordering::SeqCst).to_le_bytes();
        }
        virtio::read_registers(&registers, offset, data);
    }

    fn config_write(&self, offset: u64, data: &[u8]) {
        let Ok(value) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(value);
        match offset {
            CONFIG_ACTUAL => self.registers.actual.store(value, Ordering::SeqCst),
            CONFIG_POISON => self.registers.poison.store(value, Ordering::SeqCst),
            _ => {}
        }
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { features, queues, interrupt, .. } = activation;
        *self.active.lock() = Some(interrupt.clone());
        let mut served: Vec<(Role, QueueHandle)> = Vec::new();
        for queue in queues {
            let role = role(queue.index, features);
            if role == Role::Stats {
                self.stats.attach(queue.clone());
            }
            let wanted = role != Role::Reporting || features & feature::PAGE_REPORTING != 0;
            if wanted && queue.queue.lock().enabled() {
                served.push((role, queue));
            }
        }
        let (registers, stats) = (self.registers.clone(), self.stats.clone());
        let poisoned = features & feature::PAGE_POISON != 0;
        self.threads.spawn(THREAD, "virtio-balloon", interrupt, move |stop| {
            for (role, queue) in &served {
                match role {
                    Role::Inflate => queue.serve(stop, |chain| inflate(&queue.memory, chain))?,
                    // What the guest takes back comes into being when it is touched.
                    Role::Deflate => queue.serve(stop, |_| Ok(0))?,
                    Role::Stats => stats.serve(queue, stop)?,
                    Role::Reporting => {
                        let poison = if poisoned { registers.poison.load(Ordering::SeqCst) } else { 0 };
                        queue.serve(stop, |chain| report(&queue.memory, chain, poison))?;
                    }
                }
            }
            Ok(())
        })?;
        Ok(())
    }

    fn notify(&self, _queue: u16) {
        self.threads.notify(THREAD);
    }

    fn doorbell(&self, _queue: u16) -> Option<Arc<OwnedFd>> {
        self.threads.doorbell(THREAD)
    }

    fn reset(&self) {
        self.threads.clear();
        *self.active.lock() = None;
        self.stats.reset();
        self.registers.actual.store(0, Ordering::SeqCst);
        self.registers.poison.store(0, Ordering::SeqCst);
    }

    fn start(&self) {
        self.threads.start();
    }

    fn stop(&self) {
        self.threads.stop();
        self.stats.stop();
    }

    fn save(&self) -> SavedState {
        let Registers { target, actual, poison } = &*self.registers;
        let state = BalloonState {
            target: target.load(Ordering::SeqCst),
            actual: actual.load(Ordering::SeqCst),
            poison: poison.load(Ordering::SeqCst),
        };
        encode(KIND, VERSION, &state)
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let BalloonState { target, actual, poison } = decode(KIND, VERSION, state)?;
        self.registers.target.store(target, Ordering::SeqCst);
        self.registers.actual.store(actual, Ordering::SeqCst);
        self.registers.poison.store(poison, Ordering::SeqCst);
        Ok(())
    }
}

impl fmt::Debug for VirtioBalloon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioBalloon").field("registers", &self.registers).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
