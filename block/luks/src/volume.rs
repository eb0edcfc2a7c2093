//! A volume's header with its meaning: making one, opening it with a password, adding and erasing keys.

use crate::algorithm::{CipherAlgorithm, CipherMode, HashAlgorithm, IvAlgorithm};
use crate::antiforensic;
use crate::header::{
    DIGEST_BYTES, Header, KEY_MATERIAL_OFFSET, KEY_SLOTS, KeySlot, SALT_BYTES, SECTOR, STRIPES,
    key_material_sectors, name_field, uuid_field,
};
use crate::sector_cipher::SectorCipher;
use crate::{Error, Result};
use std::borrow::Cow;
use std::fmt;
use std::time::Duration;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// The least iterations that a new key or digest gets.
const LEAST_ITERATIONS: u32 = 1000;
/// How often erased key material is overwritten.
const ERASE_PASSES: usize = 40;

fn random(bytes: &mut [u8]) -> Result<()> {
    getrandom::fill(bytes).map_err(|error| Error::Random(error.to_string()))
}

/// The key that sectors are encrypted with. Zeroed when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct MasterKey(Zeroizing<Vec<u8>>);

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MasterKey({} bytes)", self.0.len())
    }
}

/// The key material of slots, as read; `None` where none was read. Slots with keys need it.
pub type KeyMaterials = [Option<Vec<u8>>; KEY_SLOTS];

/// A write that a change of the header consists of.
#[derive(Debug, Clone)]
pub struct HeaderWrite {
    /// Where to write, in bytes from the header's start.
    pub offset: u64,
    content: Content,
}

#[derive(Debug, Clone)]
enum Content {
    Bytes(Vec<u8>),
    /// So many random bytes, other ones each time.
    Garbage(usize),
}

impl HeaderWrite {
    fn new(offset: u64, bytes: impl Into<Vec<u8>>) -> Self {
        Self { offset, content: Content::Bytes(bytes.into()) }
    }

    /// The bytes to write.
    ///
    /// # Errors
    /// They are to be random, and the system gives none.
    pub fn bytes(&self) -> Result<Cow<'_, [u8]>> {
        match &self.content {
            Content::Bytes(bytes) => Ok(Cow::Borrowed(bytes)),
            Content::Garbage(length) => {
                let mut garbage = vec![0; *length];
                random(&mut garbage)?;
                Ok(Cow::Owned(garbage))
            }
        }
    }
}

/// How a volume encrypts its sectors and derives its keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CipherSpec {
    /// The block cipher.
    pub algorithm: CipherAlgorithm,
    /// Its mode.
    pub mode: CipherMode,
    /// What makes initialization vectors.
    pub iv: IvAlgorithm,
    /// The hash of ESSIV (SHA-256 where none is said); other generators have no use for it, and headers may name one.
    pub iv_hash: Option<HashAlgorithm>,
    /// The hash of key derivation and of the splitter.
    pub hash: HashAlgorithm,
}

impl Default for CipherSpec {
    /// aes-256, xts, plain64, sha256.
    fn default() -> Self {
        Self {
            algorithm: CipherAlgorithm::Aes256,
            mode: CipherMode::Xts,
            iv: IvAlgorithm::Plain64,
            iv_hash: None,
            hash: HashAlgorithm::Sha256,
        }
    }
}

impl CipherSpec {
    /// The parts of a header's names (LUKS On-Disk Format, tables 4 and 5).
    fn of_header(header: &Header) -> Result<Self> {
        let cipher_mode = header.cipher_mode()?;
        let (mode, iv) =
            cipher_mode.split_once('-').ok_or_else(|| Error::CipherModeFormat(cipher_mode.to_owned()))?;
        let hash_of =
            |name: &str| HashAlgorithm::from_name(name).ok_or_else(|| Error::UnknownHash(name.to_owned()));
        let (iv, iv_hash) = match iv.split_once(':') {
            Some((iv, hash)) => (iv, Some(hash_of(hash)?)),
            None => (iv, None),
        };
        let mode = CipherMode::from_name(mode).ok_or_else(|| Error::UnknownMode(mode.to_owned()))?;
        let algorithm = CipherAlgorithm::from_header(header.cipher_name()?, mode, header.master_key_len)?;
        let hash = hash_of(header.hash_spec()?)?;
        let iv = IvAlgorithm::from_name(iv).ok_or_else(|| Error::UnknownIv(iv.to_owned()))?;
        let spec = Self { algorithm, mode, iv, iv_hash, hash };
        if iv == IvAlgorithm::Essiv {
            algorithm.essiv_cipher(iv_hash.ok_or(Error::NoIvHash)?)?;
        }
        // A length that halving made fit.
        if header.master_key_len as usize != spec.key_bytes() {
            return Err(Error::KeyLength {
                length: header.master_key_len as usize,
                expected: spec.key_bytes(),
            });
        }
        Ok(spec)
    }

    /// The mode as a header names it: "cbc-essiv:sha256".
    fn mode_name(&self) -> String {
        match self.iv_hash {
            Some(hash) => format!("{}-{}:{hash}", self.mode, self.iv),
            None => format!("{}-{}", self.mode, self.iv),
        }
    }

    fn key_bytes(&self) -> usize {
        self.algorithm.mode_key_bytes(self.mode)
    }

    fn sector_cipher(&self, key: &[u8]) -> Result<SectorCipher> {
        SectorCipher::new(self.algorithm, self.mode, self.iv, self.iv_hash, key)
    }

    /// Iterations of PBKDF2 that take `time` for so many bytes, divided by `share`.
    fn iterations(&self, time: Duration, bytes: usize, share: u128) -> Result<u32> {
        let iterations = self.hash.iterations_in(time, bytes)? / share;
        let iterations = u32::try_from(iterations).map_err(|_| Error::TooManyIterations { iterations })?;
        Ok(iterations.max(LEAST_ITERATIONS))
    }
}

/// How much a new volume's header and key material take, in bytes: where its payload begins if it is not detached.
#[must_use]
pub fn new_volume_header_bytes(spec: &CipherSpec) -> u64 {
    let material = key_material_sectors(spec.key_bytes() as u32, STRIPES) * SECTOR;
    KEY_MATERIAL_OFFSET + KEY_SLOTS as u64 * material
}

/// What a new volume is to be.
#[derive(Debug, Clone)]
pub struct NewVolume {
    /// Its ciphers.
    pub spec: CipherSpec,
    /// How much processor time unlocking it is to take on a machine like this.
    pub iter_time: Duration,
    /// Whether the header is stored apart from the payload.
    pub detached: bool,
}

impl Default for NewVolume {
    /// The default ciphers, two seconds, and the header before the payload.
    fn default() -> Self {
        Self { spec: CipherSpec::default(), iter_time: Duration::from_secs(2), detached: false }
    }
}

impl NewVolume {
    /// Makes a volume with a random master key that slot 0 opens with this password. Takes processor time.
    ///
    /// # Errors
    /// The ciphers do not go together, the time has too many iterations, or there are no random bytes.
    pub fn create(&self, password: &[u8]) -> Result<(Volume, MasterKey, Vec<HeaderWrite>)> {
        let mut spec = self.spec;
        if spec.iv == IvAlgorithm::Essiv {
            spec.iv_hash.get_or_insert(HashAlgorithm::Sha256);
        }
        let mut key = MasterKey(Zeroizing::new(vec![0; spec.key_bytes()]));
        random(&mut key.0)?;
        let key_len = key.0.len() as u32;
        // A combination that does not work is refused before time is spent.
        spec.sector_cipher(&key.0)?;
        let sectors = key_material_sectors(key_len, STRIPES) as u32;
        let first = (KEY_MATERIAL_OFFSET / SECTOR) as u32;
        let mut salt = [0; SALT_BYTES];
        random(&mut salt)?;
        // As cryptsetup and QEMU have it: an eighth, so that trying all slots does not take longer than one.
        let iterations = spec.iterations(self.iter_time, DIGEST_BYTES, 8)?;
        let digest = spec.hash.pbkdf2(&key.0, &salt, iterations, DIGEST_BYTES)?;
        let mut uuid = [0; 16];
        random(&mut uuid)?;
        let header = Header {
            version: 1,
            cipher_name: name_field("Cipher name", spec.algorithm.header_name())?,
            cipher_mode: name_field("Cipher mode", &spec.mode_name())?,
            hash_spec: name_field("Hash name", spec.hash.name())?,
            payload_offset_sector: if self.detached { 0 } else { first + KEY_SLOTS as u32 * sectors },
            master_key_len: key_len,
            master_key_digest: digest[..].try_into().expect("the digest has the length asked for"),
            master_key_salt: salt,
            master_key_iterations: iterations,
            uuid: uuid_field(uuid::Builder::from_random_bytes(uuid).into_uuid()),
            slots: std::array::from_fn(|index| KeySlot::disabled(first + index as u32 * sectors)),
        };
        let mut volume = Volume { header, spec };
        let writes = volume.add_key(0, &key, password, self.iter_time)?;
        Ok((volume, key, writes))
    }
}

/// A volume by its header.
#[derive(Debug, Clone)]
pub struct Volume {
    header: Header,
    spec: CipherSpec,
}

impl Volume {
    /// The volume whose first bytes these are. `detached`: its payload is elsewhere.
    ///
    /// # Errors
    /// The bytes are not a header, are corrupt, or name what is not known.
    pub fn open(bytes: &[u8], detached: bool) -> Result<Self> {
        let header = Header::decode(bytes)?;
        header.check(detached)?;
        let spec = CipherSpec::of_header(&header)?;
        Ok(Self { header, spec })
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Ciphers and hashes.
    #[must_use]
    pub fn spec(&self) -> &CipherSpec {
        &self.spec
    }

    /// Where the payload begins, in bytes from the header's start; 0 for a detached header.
    #[must_use]
    pub fn payload_offset(&self) -> u64 {
        u64::from(self.header.payload_offset_sector) * SECTOR
    }

    /// Where a slot's key material is: offset from the header's start and length, in bytes. Whole sectors.
    ///
    /// # Panics
    /// There is no such slot.
    #[must_use]
    pub fn key_material(&self, slot: usize) -> (u64, usize) {
        let sectors = self.split_key_bytes().div_ceil(SECTOR as usize);
        (u64::from(self.header.slots[slot].key_offset_sector) * SECTOR, sectors * SECTOR as usize)
    }

    fn split_key_bytes(&self) -> usize {
        self.spec.key_bytes() * STRIPES as usize
    }

    /// The slots that have keys.
    pub fn active_slots(&self) -> impl Iterator<Item = usize> {
        (0..KEY_SLOTS).filter(|&slot| self.header.slots[slot].is_active())
    }

    /// The master key, if this slot has one and opens with the password. `material` is what
    /// [`Self::key_material`] names. Takes as much processor time as the header asks for.
    ///
    /// # Errors
    /// The material has the wrong length, or the ciphers do not go together.
    ///
    /// # Panics
    /// There is no such slot.
    pub fn unlock_slot(&self, slot: usize, password: &[u8], material: Vec<u8>) -> Result<Option<MasterKey>> {
        let key_slot = &self.header.slots[slot];
        if !key_slot.is_active() {
            return Ok(None);
        }
        let mut material = Zeroizing::new(material);
        let (_, expected) = self.key_material(slot);
        if material.len() != expected {
            return Err(Error::KeyMaterial { slot, expected, length: material.len() });
        }
        let key_bytes = self.spec.key_bytes();
        let hash = self.spec.hash;
        let slot_key = hash.pbkdf2(password, &key_slot.salt, key_slot.iterations, key_bytes)?;
        self.spec.sector_cipher(&slot_key)?.decrypt(0, &mut material);
        let key = antiforensic::merge(hash, &material[..self.split_key_bytes()], key_bytes);
        let header = &self.header;
        let digest =
            hash.pbkdf2(&key, &header.master_key_salt, header.master_key_iterations, DIGEST_BYTES)?;
        let is_it: bool = digest[..].ct_eq(&header.master_key_digest).into();
        Ok(is_it.then_some(MasterKey(key)))
    }

    /// The master key by the first slot that opens with the password, and that slot.
    ///
    /// # Errors
    /// No slot opens with it, or as for [`Self::unlock_slot`].
    pub fn unlock(&self, password: &[u8], materials: &KeyMaterials) -> Result<(usize, MasterKey)> {
        for slot in self.active_slots() {
            if let Some(material) = &materials[slot]
                && let Some(key) = self.unlock_slot(slot, password, material.clone())?
            {
                return Ok((slot, key));
            }
        }
        Err(Error::InvalidPassword)
    }

    /// The cipher of the payload's sectors. Sectors are numbered from the payload's start.
    ///
    /// # Errors
    /// The ciphers do not go together.
    pub fn sector_cipher(&self, key: &MasterKey) -> Result<SectorCipher> {
        self.spec.sector_cipher(&key.0)
    }

    /// Stores the master key in a slot, to be opened with this password. Takes `iter_time` of processor time, and
    /// once more of it.
    ///
    /// # Errors
    /// The time has too many iterations, or there are no random bytes.
    ///
    /// # Panics
    /// There is no such slot.
    pub fn add_key(
        &mut self,
        slot: usize,
        key: &MasterKey,
        password: &[u8],
        iter_time: Duration,
    ) -> Result<Vec<HeaderWrite>> {
        let hash = self.spec.hash;
        let mut salt = [0; SALT_BYTES];
        random(&mut salt)?;
        let iterations = self.spec.iterations(iter_time, key.0.len(), 1)?;
        let slot_key = hash.pbkdf2(password, &salt, iterations, key.0.len())?;
        let mut material = antiforensic::split(hash, &key.0, STRIPES as usize)?;
        let (offset, length) = self.key_material(slot);
        material.resize(length, 0);
        self.spec.sector_cipher(&slot_key)?.encrypt(0, &mut material);
        let key_slot = &mut self.header.slots[slot];
        key_slot.salt = salt;
        key_slot.iterations = iterations;
        key_slot.enable();
        // The slot is valid once its material is there.
        Ok(vec![HeaderWrite::new(offset, &material[..]), HeaderWrite::new(0, self.header.encode())])
    }

    /// Takes the key out of a slot, and destroys its material.
    ///
    /// # Panics
    /// There is no such slot.
    pub fn erase_slot(&mut self, slot: usize) -> Vec<HeaderWrite> {
        self.header.slots[slot] = KeySlot::disabled(self.header.slots[slot].key_offset_sector);
        let (offset, length) = self.key_material(slot);
        let mut writes = vec![HeaderWrite::new(0, self.header.encode())];
        let garbage = HeaderWrite { offset, content: Content::Garbage(length) };
        writes.extend(std::iter::repeat_n(garbage, ERASE_PASSES));
        writes
    }
}
