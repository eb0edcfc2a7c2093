//! What can be wrong with a LUKS volume, its options or its password, in QEMU's words.

use crate::algorithm::{CipherAlgorithm, CipherMode, HashAlgorithm};

/// What is wrong with a LUKS volume, or with what is to be done to it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The magic bytes are not there.
    #[error("Volume is not in LUKS format")]
    NotLuks,
    /// The header is shorter than [`HEADER_BYTES`](crate::HEADER_BYTES).
    #[error("LUKS header has {0} bytes, it needs {expected}", expected = crate::HEADER_BYTES)]
    ShortHeader(usize),
    /// A version other than 1.
    #[error("LUKS version {0} is not supported")]
    Version(u16),
    /// A text field fills its bytes to the end.
    #[error("LUKS header {0} is not NUL terminated")]
    NotTerminated(&'static str),
    /// A text field is not UTF-8, so that it names nothing known.
    #[error("LUKS header {0} is not text")]
    NotText(&'static str),
    /// The payload begins inside the header.
    #[error("LUKS payload is overlapping with the header")]
    PayloadOverlapsHeader,
    /// The master key's digest has no iterations.
    #[error("LUKS key iteration count is zero")]
    NoIterations,
    /// A slot's number of anti-forensic stripes is not the only one in use.
    #[error("Keyslot {slot} is corrupted (stripes {stripes} != {expected})", expected = crate::header::STRIPES)]
    Stripes {
        /// The slot.
        slot: usize,
        /// Its stripes.
        stripes: u32,
    },
    /// A slot is neither active nor disabled.
    #[error("Keyslot {0} state (active/disable) is corrupted")]
    SlotState(usize),
    /// An active slot has no iterations.
    #[error("Keyslot {0} iteration count is zero")]
    SlotIterations(usize),
    /// A slot's key material begins inside the header.
    #[error("Keyslot {0} is overlapping with the LUKS header")]
    SlotOverlapsHeader(usize),
    /// A slot's key material reaches into the payload.
    #[error("Keyslot {0} is overlapping with the encrypted payload")]
    SlotOverlapsPayload(usize),
    /// Two slots' key materials overlap.
    #[error("Keyslots {0} and {1} are overlapping in the header")]
    SlotsOverlap(usize, usize),
    /// The cipher mode has no IV generator.
    #[error("Unexpected cipher mode string format '{0}'")]
    CipherModeFormat(String),
    /// ESSIV without the hash that it needs.
    #[error("Missing IV generator hash specification")]
    NoIvHash,
    /// A hash that is not known.
    #[error("Hash algorithm '{0}' not supported")]
    UnknownHash(String),
    /// A mode that is not known.
    #[error("Cipher mode '{0}' not supported")]
    UnknownMode(String),
    /// An IV generator that is not known.
    #[error("IV generator '{0}' not supported")]
    UnknownIv(String),
    /// A cipher that is not known, or not with keys of this size (for XTS: of half the master key).
    #[error("Algorithm '{name}' with key size {key_bytes} bytes not supported")]
    UnknownCipher {
        /// The cipher's name in the header.
        name: String,
        /// The size of its key.
        key_bytes: u32,
    },
    /// A mode that needs blocks of 16 bytes, of a cipher that has others.
    #[error("Unsupported cipher mode {0}")]
    ModeUnsupported(CipherMode),
    /// A key whose length is not the cipher's.
    #[error("Cipher key length {length} should be {expected}")]
    KeyLength {
        /// The length that was given.
        length: usize,
        /// The length that it should have.
        expected: usize,
    },
    /// ESSIV with a hash whose digest is no key of the cipher's family.
    #[error("No {family} cipher with key size {digest_bytes} available")]
    EssivKeySize {
        /// "AES", "Serpent" or "Twofish".
        family: &'static str,
        /// The length of the digest.
        digest_bytes: usize,
    },
    /// ESSIV of a cipher that has keys of one size only.
    #[error("Cipher {0} not supported with essiv")]
    EssivCipher(CipherAlgorithm),
    /// The names of cipher, mode or hash do not fit in the header.
    #[error("{what} '{name}' is too long for LUKS header")]
    NameTooLong {
        /// "Cipher name", "Cipher mode" or "Hash name".
        what: &'static str,
        /// The name.
        name: String,
    },
    /// More iterations than the header can say.
    #[error("PBKDF iterations {iterations} larger than {most}", most = u32::MAX)]
    TooManyIterations {
        /// The iterations.
        iterations: u128,
    },
    /// The processor's time cannot be measured.
    #[error("Unable to get accurate CPU usage")]
    CpuTime,
    /// A hash that HMAC cannot be made of; does not occur with those that are known.
    #[error("PBKDF does not support hash algorithm {0}")]
    Pbkdf(HashAlgorithm),
    /// The system gives no random bytes.
    #[error("Unable to get random bytes: {0}")]
    Random(String),
    /// Key material that was read has the wrong length.
    #[error("Keyslot {slot} needs {expected} bytes of key material, {length} were read")]
    KeyMaterial {
        /// The slot.
        slot: usize,
        /// The bytes that it has.
        expected: usize,
        /// The bytes that were given.
        length: usize,
    },
    /// No slot opens with the password.
    #[error("Invalid password, cannot unlock any keyslot")]
    InvalidPassword,
    /// There is no such slot.
    #[error("Invalid keyslot {0} specified, must be between 0 and {last}", last = crate::KEY_SLOTS - 1)]
    NoSuchSlot(i64),
    /// A key is to be added, and all slots are in use.
    #[error("Can't add a keyslot - all keyslots are in use")]
    NoFreeSlot,
    /// A key is to be added to a slot that is in use.
    #[error("Refusing to overwrite active keyslot {0} - please erase it first")]
    SlotInUse(usize),
    /// The slot to be erased does not open with the old password.
    #[error("Given keyslot {0} doesn't contain the given old password for erase operation")]
    SlotHasOtherPassword(usize),
    /// The slot to be erased has no key. The text's trailing blank is QEMU's.
    #[error("Given keyslot {0} is already erased (inactive) ")]
    SlotInactive(usize),
    /// The only key would be lost.
    #[error(
        "Attempt to erase the only active keyslot {0} which will erase all the data in the image \
         irreversibly - refusing operation"
    )]
    LastSlot(usize),
    /// No slot opens with the old password.
    #[error("No keyslots match given (old) password for erase operation")]
    NoSlotMatches,
    /// Every key would be lost.
    #[error(
        "All the active keyslots match the (old) password that was given and erasing them will erase all \
         the data in the image irreversibly - refusing operation"
    )]
    AllSlotsMatch,
    /// A key is to be added, and there is no new password.
    #[error("'new-secret' is required to activate a keyslot")]
    NewSecretRequired,
    /// An option that does not go with adding a key.
    #[error("'{0}' must not be given when activating keyslots")]
    NotWhenActivating(&'static str),
    /// An option that does not go with erasing keys.
    #[error("'{0}' must not be given when erasing keyslots")]
    NotWhenErasing(&'static str),
    /// Neither a slot nor a password says what to erase.
    #[error(
        "To erase keyslot(s), either explicit keyslot index or the password currently contained in them \
         must be given"
    )]
    NothingToErase,
}
