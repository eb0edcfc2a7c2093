//! What the fuzz targets share: reading operations from bytes, and benches that devices stand on.
//!
//! A target turns the fuzzer's bytes into a sequence of things that a guest, a file or a migration stream can
//! do, and does them. Any panic, failed assertion, overflow, endless loop or large allocation is a finding.
//! Everything runs on one thread and without the host's clock, so that an input does the same each time.

mod bench;
mod bytes;
mod driver;
mod echo;
mod input;
mod legacy;
mod outside;
mod packed;
mod program;
mod qcow2_image;
mod ram;

pub use bench::{Bench, Rig, drive};
pub use bytes::{Elf, patch};
pub use driver::{Driven, Request, drive_virtio, drive_virtio_mmio, test_memory};
pub use echo::Echoing;
pub use input::Input;
pub use legacy::{Legacy, legacy_program};
pub use outside::Outside;
pub use packed::{bzimage, pack};
pub use program::{WINDOW, WINDOW_PAGES, place, program};
pub use qcow2_image::damaged_image;
pub use ram::{boot, boot_directly};
