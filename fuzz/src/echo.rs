//! A virtio device that gives back what it is given.

use crate::{Driven, Input};
use device::{SavedState, StateError, decode, encode};
use parking_lot::Mutex;
use std::sync::Arc;
use virtio::{
    ActivateError, Activation, Chain, DeviceType, Interrupt, QueueError, QueueHandle, QueueThreads,
    VirtioDevice,
};

#[derive(Default)]
struct Echo {
    config: Mutex<[u8; 8]>,
    threads: QueueThreads,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

fn echo(queue: &QueueHandle, chain: &Chain) -> Result<u32, QueueError> {
    let mut data = [0; 0x400];
    let len = chain.readable_len().min(chain.writable_len()).min(data.len() as u32);
    let data = &mut data[..len as usize];
    chain.read(&queue.memory, 0, data)?;
    chain.write(&queue.memory, 0, data)?;
    if data.starts_with(b"bad") { Err(QueueError::BadRequest("it says so itself")) } else { Ok(len) }
}

impl VirtioDevice for Echo {
    fn device_type(&self) -> DeviceType {
        DeviceType::Input
    }

    fn features(&self) -> u64 {
        0b101
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16, 64, 1, 300]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        virtio::read_registers(&*self.config.lock(), offset, data);
    }

    fn config_write(&self, offset: u64, data: &[u8]) {
        let mut config = self.config.lock();
        for (at, value) in (offset..8).zip(data) {
            config[at as usize] = *value;
        }
    }

    fn set_features(&self, features: u64) {
        assert_eq!(features & !(self.features() | virtio::feature::TRANSPORT), 0);
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        let mut interrupt = self.interrupt.lock();
        assert!(interrupt.is_none(), "a device is activated once until it is reset");
        *interrupt = Some(activation.interrupt.clone());
        if activation.features & 1 != 0 {
            return Err(ActivateError::Features("the first feature is a trap"));
        }
        for queue in activation.queues {
            let interrupt = activation.interrupt.clone();
            self.threads.spawn(queue.index, "echo", interrupt, move |stop| {
                queue.serve(stop, |chain| echo(&queue, chain))
            })?;
        }
        Ok(())
    }

    fn notify(&self, queue: u16) {
        assert!(self.interrupt.lock().is_some() && queue < 4);
        self.threads.notify(queue);
    }

    fn reset(&self) {
        self.threads.clear();
        *self.interrupt.lock() = None;
        *self.config.lock() = [0; 8];
    }

    fn start(&self) {
        self.threads.start();
    }

    fn stop(&self) {
        self.threads.stop();
    }

    fn save(&self) -> SavedState {
        encode("echo", 1, &*self.config.lock())
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        *self.config.lock() = decode("echo", 1, state)?;
        Ok(())
    }
}

/// The device with a host that changes its configuration.
pub struct Echoing(Arc<Echo>);

impl Driven for Echoing {
    fn new() -> Self {
        Self(Arc::default())
    }

    fn device(&self) -> Arc<dyn VirtioDevice> {
        self.0.clone()
    }

    fn host(&self, _input: &mut Input<'_>) {
        let interrupt = self.0.interrupt.lock().clone();
        if let Some(interrupt) = interrupt {
            interrupt.config_changed();
        }
    }
}
