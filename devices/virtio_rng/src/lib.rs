//! The virtio entropy device (5.4): fills the driver's buffers with random numbers, the host's as a rule.

use device::{SavedState, StateError, decode, encode};
use guest_memory::GuestMemory;
use rustix::rand::{GetRandomFlags, getrandom};
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use virtio::{ActivateError, Activation, Chain, DeviceType, QueueError, QueueThreads, VirtioDevice};

const KIND: &str = "virtio-rng";
const VERSION: u32 = 1;

/// The most bytes given for one buffer: a driver that wants more asks again (5.4.6 lets the device fill a
/// part).
const MAX_BYTES: usize = 1 << 16;

/// Bytes taken from the host at once.
const PIECE: usize = 4096;

/// Fills a buffer with random numbers, or says why it cannot.
pub type Source = Arc<dyn Fn(&mut [u8]) -> Result<(), String> + Send + Sync>;

/// A virtio entropy device.
pub struct VirtioRng {
    threads: QueueThreads,
    source: Source,
}

impl VirtioRng {
    /// An entropy device that gives the host's random numbers.
    pub fn new() -> Self {
        Self::with_source(Arc::new(random))
    }

    /// An entropy device that gives the numbers of `source`.
    pub fn with_source(source: Source) -> Self {
        Self { threads: QueueThreads::new(), source }
    }
}

impl Default for VirtioRng {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for VirtioRng {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioRng").field("threads", &self.threads).finish_non_exhaustive()
    }
}

/// Fills what the device may write of `chain`, and returns how much that was.
fn fill(source: &Source, memory: &GuestMemory, chain: &Chain) -> Result<u32, QueueError> {
    let len = MAX_BYTES.min(chain.writable_len() as usize);
    if len == 0 {
        // 5.4.6.1: all buffers are for the device to write.
        return Err(QueueError::BadRequest("a buffer for random numbers that cannot be written"));
    }
    let mut piece = [0; PIECE];
    let mut done = 0;
    while done < len {
        let part = &mut piece[..PIECE.min(len - done)];
        source(part).map_err(QueueError::Device)?;
        chain.write(memory, done as u32, part)?;
        done += part.len();
    }
    Ok(len as u32)
}

fn random(buffer: &mut [u8]) -> Result<(), String> {
    let mut done = 0;
    while done < buffer.len() {
        match getrandom(&mut buffer[done..], GetRandomFlags::empty()) {
            Ok(count) => done += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                return Err(format!("the host gives no random numbers: {error}"));
            }
        }
    }
    Ok(())
}

impl VirtioDevice for VirtioRng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn config_read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = activation.interrupt;
        for queue in activation.queues {
            let source = self.source.clone();
            self.threads.spawn(queue.index, "virtio-rng", interrupt.clone(), move |stop| {
                queue.serve(stop, |chain| fill(&source, &queue.memory, chain))
            })?;
        }
        Ok(())
    }

    fn notify(&self, queue: u16) {
        self.threads.notify(queue);
    }

    fn doorbell(&self, queue: u16) -> Option<Arc<OwnedFd>> {
        self.threads.doorbell(queue)
    }

    fn reset(&self) {
        self.threads.clear();
    }

    fn start(&self) {
        self.threads.start();
    }

    fn stop(&self) {
        self.threads.stop();
    }

    /// The device has no state beyond its queue.
    fn save(&self) -> SavedState {
        encode(KIND, VERSION, &())
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        decode(KIND, VERSION, state)
    }
}

#[cfg(test)]
mod tests;
