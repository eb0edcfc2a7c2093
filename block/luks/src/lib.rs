//! Disk encryption with the LUKS1 header, and the cipher of disk sectors that it names.
//!
//! The format itself does no I/O. A caller reads the first [`HEADER_BYTES`] bytes of a volume and gives them to
//! [`Volume::open`]; reads the key material that [`Volume::key_material`] names; gets the master key from
//! [`Volume::unlock_slot`]; and has sectors encrypted and decrypted in place by the [`SectorCipher`] that
//! [`Volume::sector_cipher`] makes of it. What changes a header ([`NewVolume`], [`Volume::add_key`],
//! [`Volume::erase_slot`], [`Amendment`]) returns the writes to do, in the order in which they are to be done.
//!
//! The format is that of the LUKS On-Disk Format Specification 1.2.3 where cryptsetup follows it, and cryptsetup's
//! layout where it does not. Algorithms are those QEMU knows, by its names. [`SectorCipher::legacy_qcow`] is the
//! cipher of old encrypted qcow images, which have no header.
//!
//! [`HeaderPlace`] does the reading, writing and waiting for a header that is in a node, and [`LuksKind`] is the driver
//! `luks`: encrypted disks as nodes.
//!
//! Key derivation takes seconds of processor time by design, and a header says how much: run it where it blocks
//! nobody. Keys, passwords' digests and split key material are zeroed when dropped.
#![forbid(unsafe_code)]

mod algorithm;
mod amend;
mod antiforensic;
mod block_cipher;
mod buffer;
mod driver;
mod error;
mod hash;
mod header;
mod iv;
mod kind;
mod modes;
mod place;
mod sector_cipher;
mod volume;

pub use algorithm::{CipherAlgorithm, CipherMode, HashAlgorithm, IvAlgorithm};
pub use amend::Amendment;
pub use buffer::{PART, PARTS_AT_ONCE};
pub use driver::LuksDisk;
pub use error::Error;
pub use header::{HEADER_BYTES, Header, KEY_SLOTS, KeySlot, has_luks_magic};
pub use kind::{LuksKind, take_new_volume};
pub use modes::SECTOR_BYTES;
pub use place::HeaderPlace;
pub use sector_cipher::SectorCipher;
pub use volume::{
    CipherSpec, HeaderWrite, KeyMaterials, MasterKey, NewVolume, Volume, new_volume_header_bytes,
};

/// A result whose error is this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
