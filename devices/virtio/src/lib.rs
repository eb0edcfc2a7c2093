//! Virtio 1.2: queues, the device trait and the PCI transport.
