//! The items that a guest can read.

use std::collections::BTreeMap;

/// The keys of items that are no files.
pub mod key {
    /// Four letters by which a guest knows the device.
    pub const SIGNATURE: u16 = 0x00;
    /// What the device can do: bit 0, the data register; bit 1, copies.
    pub const ID: u16 = 0x01;
    /// Bytes of memory, 64 bits.
    pub const RAM_SIZE: u16 = 0x03;
    /// Whether there is no display, 16 bits.
    pub const NOGRAPHIC: u16 = 0x04;
    /// How many processors there are, 16 bits.
    pub const NB_CPUS: u16 = 0x05;
    /// One more than the highest local APIC id that there may be, 16 bits.
    pub const MAX_CPUS: u16 = 0x0f;
    /// The list of files.
    pub const FILE_DIR: u16 = 0x19;
    /// The first file; the others follow.
    pub const FILE_FIRST: u16 = 0x20;
}

/// Bytes in a file's name, with the zero that ends it.
const NAME_LEN: usize = 56;
/// How many files there may be: keys from [`key::FILE_FIRST`] to the first that means something else.
const MOST_FILES: usize = 0x3fe0;
/// The data register, and copies.
const FEATURES: u32 = 0b11;

/// Why an item was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FwCfgError {
    /// A file's name is empty, too long, or has other than visible ASCII characters.
    #[error(
        "{0:?} is no name of a firmware configuration file; accepted are 1 to 55 ASCII characters other than spaces"
    )]
    Name(String),
    /// Two files of the same name.
    #[error("there are two firmware configuration files named {0:?}")]
    Twice(String),
    /// There are too many files, or one is 4 GiB or larger.
    #[error("the firmware configuration file {0:?} is too large, or one too many")]
    TooMuch(String),
}

/// Everything that a guest can read, by key.
#[derive(Debug, Clone)]
pub struct Items {
    by_key: BTreeMap<u16, Vec<u8>>,
    files: Vec<String>,
}

impl Default for Items {
    fn default() -> Self {
        Self::new()
    }
}

impl Items {
    /// The items that every device has, and no files.
    pub fn new() -> Self {
        let fixed = [(key::SIGNATURE, b"QEMU".to_vec()), (key::ID, FEATURES.to_le_bytes().to_vec())];
        let mut items = Self { by_key: BTreeMap::from(fixed), files: Vec::new() };
        items.write_directory();
        items
    }

    /// Adds a 16-bit number, little-endian.
    #[must_use]
    pub fn u16(mut self, key: u16, value: u16) -> Self {
        self.by_key.insert(key, value.to_le_bytes().to_vec());
        self
    }

    /// Adds a 64-bit number, little-endian.
    #[must_use]
    pub fn u64(mut self, key: u16, value: u64) -> Self {
        self.by_key.insert(key, value.to_le_bytes().to_vec());
        self
    }

    /// Adds a file.
    ///
    /// # Errors
    /// [`FwCfgError`] if there cannot be such a file.
    pub fn file(mut self, name: &str, bytes: Vec<u8>) -> Result<Self, FwCfgError> {
        if name.is_empty() || name.len() >= NAME_LEN || !name.bytes().all(|c| c.is_ascii_graphic()) {
            return Err(FwCfgError::Name(name.into()));
        }
        if self.files.iter().any(|known| known == name) {
            return Err(FwCfgError::Twice(name.into()));
        }
        if self.files.len() >= MOST_FILES || u32::try_from(bytes.len()).is_err() {
            return Err(FwCfgError::TooMuch(name.into()));
        }
        self.by_key.insert(key::FILE_FIRST + self.files.len() as u16, bytes);
        self.files.push(name.into());
        self.write_directory();
        Ok(self)
    }

    /// The bytes of an item; those of an absent one are none.
    pub(crate) fn get(&self, key: u16) -> &[u8] {
        self.by_key.get(&key).map_or(&[], Vec::as_slice)
    }

    /// Writes the list of files: their number, then size, key, two reserved bytes and name of each, all
    /// big-endian.
    fn write_directory(&mut self) {
        let mut directory = (self.files.len() as u32).to_be_bytes().to_vec();
        for (key, name) in (key::FILE_FIRST..).zip(&self.files) {
            directory.extend((self.get(key).len() as u32).to_be_bytes());
            directory.extend(key.to_be_bytes());
            directory.extend([0; 2]);
            let mut field = [0; NAME_LEN];
            field[..name.len()].copy_from_slice(name.as_bytes());
            directory.extend(field);
        }
        self.by_key.insert(key::FILE_DIR, directory);
    }
}
