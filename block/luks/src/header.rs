//! The header at the start of a volume (LUKS On-Disk Format, figure 1): its codec and what must hold of it.

use crate::{Error, Result};

/// The size of the header on disk, in bytes. Key material follows at [`KEY_MATERIAL_OFFSET`] or later.
pub const HEADER_BYTES: usize = 592;
/// How many key slots there are.
pub const KEY_SLOTS: usize = 8;
/// How many stripes the splitter makes; no other number is in use.
pub(crate) const STRIPES: u32 = 4000;
/// Where the first slot's key material may begin, in bytes.
pub(crate) const KEY_MATERIAL_OFFSET: u64 = 4096;
/// The unit of offsets in the header, in bytes.
pub(crate) const SECTOR: u64 = 512;
/// Length of the master key's digest, in bytes.
pub(crate) const DIGEST_BYTES: usize = 20;
/// Length of salts, in bytes.
pub(crate) const SALT_BYTES: usize = 32;
/// Length of the fields of names, in bytes, the terminating NUL included.
pub(crate) const NAME_BYTES: usize = 32;

const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
const VERSION: u16 = 1;
const UUID_BYTES: usize = 40;
const SLOTS_OFFSET: usize = 208;
const SLOT_BYTES: usize = 48;
const SLOT_ENABLED: u32 = 0x00ac_71f3;
const SLOT_DISABLED: u32 = 0x0000_dead;

/// Whether a volume that begins with these bytes says that it is LUKS version 1.
#[must_use]
pub fn has_luks_magic(head: &[u8]) -> bool {
    head.starts_with(&MAGIC) && head.get(6..8) == Some(&VERSION.to_be_bytes())
}

/// One of the eight key slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeySlot {
    /// The state word: one for active, one for disabled, all others are corrupt.
    state: u32,
    /// PBKDF2 iterations of the password.
    pub iterations: u32,
    /// PBKDF2 salt of the password.
    pub salt: [u8; SALT_BYTES],
    /// Where its key material begins, in sectors of 512 bytes from the header's start.
    pub key_offset_sector: u32,
    /// Anti-forensic stripes.
    pub stripes: u32,
}

impl KeySlot {
    /// A slot without a key, whose key material would be there.
    pub(crate) fn disabled(key_offset_sector: u32) -> Self {
        Self {
            state: SLOT_DISABLED,
            iterations: 0,
            salt: [0; SALT_BYTES],
            key_offset_sector,
            stripes: STRIPES,
        }
    }

    /// Whether it has a key.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.state == SLOT_ENABLED
    }

    pub(crate) fn enable(&mut self) {
        self.state = SLOT_ENABLED;
    }
}

/// A header, as it is on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Format version: 1.
    pub version: u16,
    /// Cipher's family, terminated by NUL: "aes".
    pub cipher_name: [u8; NAME_BYTES],
    /// Mode and IV generator, terminated by NUL: "xts-plain64", "cbc-essiv:sha256".
    pub cipher_mode: [u8; NAME_BYTES],
    /// Hash of PBKDF2 and of the splitter, terminated by NUL: "sha256".
    pub hash_spec: [u8; NAME_BYTES],
    /// Where the encrypted payload begins, in sectors of 512 bytes; 0 where the header is detached from it.
    pub payload_offset_sector: u32,
    /// Length of the master key, in bytes.
    pub master_key_len: u32,
    /// PBKDF2 digest of the master key.
    pub master_key_digest: [u8; DIGEST_BYTES],
    /// Salt of that digest.
    pub master_key_salt: [u8; SALT_BYTES],
    /// Iterations of that digest.
    pub master_key_iterations: u32,
    /// UUID as text, terminated by NUL.
    pub uuid: [u8; UUID_BYTES],
    /// The key slots.
    pub slots: [KeySlot; KEY_SLOTS],
}

/// Takes fields off the front of a buffer whose length was checked.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk().expect("the header's length was checked");
        self.0 = rest;
        *field
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.bytes())
    }
}

/// The text of a field that is terminated by NUL.
fn text<'a>(what: &'static str, field: &'a [u8]) -> Result<&'a str> {
    let end = field.iter().position(|&byte| byte == 0).ok_or(Error::NotTerminated(what))?;
    std::str::from_utf8(&field[..end]).map_err(|_| Error::NotText(what))
}

/// A name as a field of the header.
pub(crate) fn name_field(what: &'static str, name: &str) -> Result<[u8; NAME_BYTES]> {
    if name.len() >= NAME_BYTES {
        return Err(Error::NameTooLong { what, name: name.to_owned() });
    }
    let mut field = [0; NAME_BYTES];
    field[..name.len()].copy_from_slice(name.as_bytes());
    Ok(field)
}

/// Sectors that one slot's key material takes: its bytes, aligned as cryptsetup aligns them.
pub(crate) fn key_material_sectors(master_key_len: u32, stripes: u32) -> u64 {
    let bytes = u64::from(master_key_len) * u64::from(stripes);
    bytes.div_ceil(SECTOR).next_multiple_of(KEY_MATERIAL_OFFSET / SECTOR)
}

impl Header {
    /// Decodes a header; what it says is not checked but for magic and version.
    ///
    /// # Errors
    /// The bytes are too few, or not LUKS version 1.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        if !bytes.starts_with(&MAGIC) {
            return Err(Error::NotLuks);
        }
        if bytes.len() < HEADER_BYTES {
            return Err(Error::ShortHeader(bytes.len()));
        }
        let mut fields = Fields(&bytes[MAGIC.len()..]);
        let version = u16::from_be_bytes(fields.bytes());
        if version != VERSION {
            return Err(Error::Version(version));
        }
        Ok(Self {
            version,
            cipher_name: fields.bytes(),
            cipher_mode: fields.bytes(),
            hash_spec: fields.bytes(),
            payload_offset_sector: fields.u32(),
            master_key_len: fields.u32(),
            master_key_digest: fields.bytes(),
            master_key_salt: fields.bytes(),
            master_key_iterations: fields.u32(),
            uuid: fields.bytes(),
            slots: std::array::from_fn(|_| KeySlot {
                state: fields.u32(),
                iterations: fields.u32(),
                salt: fields.bytes(),
                key_offset_sector: fields.u32(),
                stripes: fields.u32(),
            }),
        })
    }

    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(self.version.to_be_bytes());
        bytes.extend(self.cipher_name);
        bytes.extend(self.cipher_mode);
        bytes.extend(self.hash_spec);
        bytes.extend(self.payload_offset_sector.to_be_bytes());
        bytes.extend(self.master_key_len.to_be_bytes());
        bytes.extend(self.master_key_digest);
        bytes.extend(self.master_key_salt);
        bytes.extend(self.master_key_iterations.to_be_bytes());
        bytes.extend(self.uuid);
        for slot in &self.slots {
            bytes.extend(slot.state.to_be_bytes());
            bytes.extend(slot.iterations.to_be_bytes());
            bytes.extend(slot.salt);
            bytes.extend(slot.key_offset_sector.to_be_bytes());
            bytes.extend(slot.stripes.to_be_bytes());
        }
        bytes.try_into().expect("the fields are as long as the header")
    }

    /// Checks what must hold before anything of it is used, as QEMU does. `detached`: the payload is elsewhere.
    ///
    /// # Errors
    /// The first thing that does not hold.
    pub fn check(&self, detached: bool) -> Result<()> {
        text("cipher name", &self.cipher_name)?;
        text("cipher mode", &self.cipher_mode)?;
        text("hash spec", &self.hash_spec)?;
        let first_material = KEY_MATERIAL_OFFSET / SECTOR;
        let payload = u64::from(self.payload_offset_sector);
        if !detached && payload < first_material {
            return Err(Error::PayloadOverlapsHeader);
        }
        if self.master_key_iterations == 0 {
            return Err(Error::NoIterations);
        }
        for (index, slot) in self.slots.iter().enumerate() {
            if slot.stripes != STRIPES {
                return Err(Error::Stripes { slot: index, stripes: slot.stripes });
            }
            if slot.state != SLOT_ENABLED && slot.state != SLOT_DISABLED {
                return Err(Error::SlotState(index));
            }
            if slot.is_active() && slot.iterations == 0 {
                return Err(Error::SlotIterations(index));
            }
            let (start, end) = self.material_sectors(slot);
            if start < first_material {
                return Err(Error::SlotOverlapsHeader(index));
            }
            if !detached && end > payload {
                return Err(Error::SlotOverlapsPayload(index));
            }
            for (other, later) in self.slots.iter().enumerate().skip(index + 1) {
                let (other_start, other_end) = self.material_sectors(later);
                if start < other_end && other_start < end {
                    return Err(Error::SlotsOverlap(index, other));
                }
            }
        }
        Ok(())
    }

    /// First sector of a slot's key material, and the one after its last, alignment included.
    fn material_sectors(&self, slot: &KeySlot) -> (u64, u64) {
        let start = u64::from(slot.key_offset_sector);
        (start, start + key_material_sectors(self.master_key_len, slot.stripes))
    }

    /// Cipher's family.
    pub(crate) fn cipher_name(&self) -> Result<&str> {
        text("cipher name", &self.cipher_name)
    }

    /// Mode and IV generator.
    pub(crate) fn cipher_mode(&self) -> Result<&str> {
        text("cipher mode", &self.cipher_mode)
    }

    /// Hash.
    pub(crate) fn hash_spec(&self) -> Result<&str> {
        text("hash spec", &self.hash_spec)
    }

    /// The UUID; what is not text in it is replaced.
    #[must_use]
    pub fn uuid(&self) -> String {
        let end = self.uuid.iter().position(|&byte| byte == 0).unwrap_or(UUID_BYTES);
        String::from_utf8_lossy(&self.uuid[..end]).into_owned()
    }
}

/// A UUID as a field of the header.
pub(crate) fn uuid_field(uuid: uuid::Uuid) -> [u8; UUID_BYTES] {
    let mut field = [0; UUID_BYTES];
    uuid.hyphenated().encode_lower(&mut field);
    field
}

const _: () = assert!(SLOTS_OFFSET + KEY_SLOTS * SLOT_BYTES == HEADER_BYTES);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plausible() -> Header {
        let sectors = key_material_sectors(64, STRIPES) as u32;
        Header {
            version: VERSION,
            cipher_name: name_field("", "aes").unwrap(),
            cipher_mode: name_field("", "xts-plain64").unwrap(),
            hash_spec: name_field("", "sha256").unwrap(),
            payload_offset_sector: 8 + 8 * sectors,
            master_key_len: 64,
            master_key_digest: [1; DIGEST_BYTES],
            master_key_salt: [2; SALT_BYTES],
            master_key_iterations: 1000,
            uuid: uuid_field(uuid::Uuid::from_bytes([3; 16])),
            slots: std::array::from_fn(|index| KeySlot::disabled(8 + index as u32 * sectors)),
        }
    }

    #[test]
    fn layout_is_that_of_the_specification() {
        let mut header = plausible();
        header.slots[7].stripes = 0x0102_0304;
        let bytes = header.encode();
        assert_eq!(bytes[..8], *b"LUKS\xba\xbe\x00\x01");
        assert_eq!(bytes[8..12], *b"aes\0");
        assert_eq!(bytes[104..108], (8 + 8 * 504_u32).to_be_bytes());
        assert_eq!(bytes[168..172], *b"0303");
        assert_eq!(bytes[SLOTS_OFFSET..SLOTS_OFFSET + 4], SLOT_DISABLED.to_be_bytes());
        assert_eq!(bytes[588..], [1, 2, 3, 4]);
        assert!(has_luks_magic(&bytes) && !has_luks_magic(&bytes[..7]));
    }

    #[test]
    fn what_breaks_a_header_is_named() {
        let broken = |change: &dyn Fn(&mut Header)| {
            let mut header = plausible();
            change(&mut header);
            header.check(false).unwrap_err().to_string()
        };
        assert_eq!(plausible().check(false), Ok(()));
        assert_eq!(
            broken(&|header| header.cipher_name = [b'a'; 32]),
            "LUKS header cipher name is not NUL terminated"
        );
        assert_eq!(
            broken(&|header| header.cipher_mode = [b'a'; 32]),
            "LUKS header cipher mode is not NUL terminated"
        );
        assert_eq!(
            broken(&|header| header.hash_spec = [b'a'; 32]),
            "LUKS header hash spec is not NUL terminated"
        );
        assert_eq!(
            broken(&|header| header.payload_offset_sector = 7),
            "LUKS payload is overlapping with the header"
        );
        assert_eq!(broken(&|header| header.master_key_iterations = 0), "LUKS key iteration count is zero");
        assert_eq!(
            broken(&|header| header.slots[2].stripes = 1),
            "Keyslot 2 is corrupted (stripes 1 != 4000)"
        );
        assert_eq!(
            broken(&|header| header.slots[3].state = 1),
            "Keyslot 3 state (active/disable) is corrupted"
        );
        assert_eq!(broken(&|header| header.slots[4].enable()), "Keyslot 4 iteration count is zero");
        assert_eq!(
            broken(&|header| header.slots[0].key_offset_sector = 7),
            "Keyslot 0 is overlapping with the LUKS header"
        );
        assert_eq!(
            broken(&|header| header.slots[7].key_offset_sector += 1),
            "Keyslot 7 is overlapping with the encrypted payload"
        );
        assert_eq!(
            broken(&|header| header.slots[1].key_offset_sector -= 1),
            "Keyslots 0 and 1 are overlapping in the header"
        );
        // Sizes whose sums leave 32 bits.
        assert_eq!(
            broken(&|header| header.master_key_len = u32::MAX),
            "Keyslot 0 is overlapping with the encrypted payload"
        );
        assert_eq!(
            broken(&|header| header.slots[0].key_offset_sector = u32::MAX),
            "Keyslot 0 is overlapping with the encrypted payload"
        );
        let mut detached = plausible();
        detached.payload_offset_sector = 0;
        assert_eq!(detached.check(true), Ok(()));
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_come_out_again(mut bytes in proptest::collection::vec(any::<u8>(), 592..700),
                                                   luks in any::<bool>()) {
            if luks {
                bytes[..8].copy_from_slice(b"LUKS\xba\xbe\x00\x01");
            }
            if let Ok(header) = Header::decode(&bytes) {
                prop_assert_eq!(&header.encode()[..], &bytes[..HEADER_BYTES]);
                let _ = header.check(false);
                let _ = header.check(true);
            } else {
                prop_assert!(!luks);
            }
        }
    }
}
