//! The algorithms a header or an option may name, by QEMU's names.

use crate::{Error, Result};
use std::fmt;

/// Makes an enum of names: `Display`, `ALL`, and `from_name`.
macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$variant_doc])* $variant,)* }

        impl $name {
            /// Every one, in QEMU's order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// Its name, as in options and in info.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }

            /// The one of this name.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|known| known.name() == name)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

named! {
    /// A block cipher with the size of its key.
    CipherAlgorithm {
        /// AES with keys of 16 bytes.
        Aes128 = "aes-128",
        /// AES with keys of 24 bytes.
        Aes192 = "aes-192",
        /// AES with keys of 32 bytes.
        Aes256 = "aes-256",
        /// CAST-128 (RFC 2144) with keys of 16 bytes and blocks of 8.
        Cast5 = "cast5-128",
        /// Serpent with keys of 16 bytes.
        Serpent128 = "serpent-128",
        /// Serpent with keys of 24 bytes.
        Serpent192 = "serpent-192",
        /// Serpent with keys of 32 bytes.
        Serpent256 = "serpent-256",
        /// Twofish with keys of 16 bytes.
        Twofish128 = "twofish-128",
        /// Twofish with keys of 24 bytes.
        Twofish192 = "twofish-192",
        /// Twofish with keys of 32 bytes.
        Twofish256 = "twofish-256",
    }
}

named! {
    /// How blocks of a sector are chained.
    CipherMode {
        /// Every block by itself.
        Ecb = "ecb",
        /// Cipher block chaining (NIST SP 800-38A).
        Cbc = "cbc",
        /// XEX with tweaks (IEEE 1619).
        Xts = "xts",
        /// Counter mode (NIST SP 800-38A).
        Ctr = "ctr",
    }
}

named! {
    /// How a sector's initialization vector is made of its number.
    IvAlgorithm {
        /// The number's low 32 bits, little-endian.
        Plain = "plain",
        /// The number's 64 bits, little-endian.
        Plain64 = "plain64",
        /// The number, encrypted with a hash of the key.
        Essiv = "essiv",
    }
}

named! {
    /// A hash.
    HashAlgorithm {
        /// MD5 (16 bytes).
        Md5 = "md5",
        /// SHA-1 (20 bytes).
        Sha1 = "sha1",
        /// SHA-224 (28 bytes).
        Sha224 = "sha224",
        /// SHA-256 (32 bytes).
        Sha256 = "sha256",
        /// SHA-384 (48 bytes).
        Sha384 = "sha384",
        /// SHA-512 (64 bytes).
        Sha512 = "sha512",
        /// RIPEMD-160 (20 bytes).
        Ripemd160 = "ripemd160",
    }
}

/// Families of ciphers that differ in the size of the key: header name, the name ESSIV's errors use, members.
const FAMILIES: &[(&str, Option<&str>, &[CipherAlgorithm])] = &[
    ("aes", Some("AES"), &[CipherAlgorithm::Aes128, CipherAlgorithm::Aes192, CipherAlgorithm::Aes256]),
    ("cast5", None, &[CipherAlgorithm::Cast5]),
    (
        "serpent",
        Some("Serpent"),
        &[CipherAlgorithm::Serpent128, CipherAlgorithm::Serpent192, CipherAlgorithm::Serpent256],
    ),
    (
        "twofish",
        Some("Twofish"),
        &[CipherAlgorithm::Twofish128, CipherAlgorithm::Twofish192, CipherAlgorithm::Twofish256],
    ),
];

impl CipherAlgorithm {
    /// The cipher of this name in a header, with a master key of `key_bytes` bytes (XTS has two keys in it).
    ///
    /// # Errors
    /// There is no such cipher, or not with such keys.
    pub fn from_header(name: &str, mode: CipherMode, key_bytes: u32) -> Result<Self> {
        let key_bytes = if mode == CipherMode::Xts { key_bytes / 2 } else { key_bytes };
        let members = FAMILIES.iter().find(|family| family.0 == name).map_or(&[][..], |family| family.2);
        let found = members.iter().copied().find(|member| member.key_bytes() as u32 == key_bytes);
        found.ok_or_else(|| Error::UnknownCipher { name: name.to_owned(), key_bytes })
    }

    /// The name of its family in a header: "aes".
    #[must_use]
    pub fn header_name(self) -> &'static str {
        self.family().0
    }

    fn family(self) -> &'static (&'static str, Option<&'static str>, &'static [Self]) {
        let found = FAMILIES.iter().find(|family| family.2.contains(&self));
        found.expect("every cipher is in a family")
    }

    /// The size of its key, in bytes. XTS takes two of them.
    #[must_use]
    pub fn key_bytes(self) -> usize {
        match self {
            Self::Aes128 | Self::Cast5 | Self::Serpent128 | Self::Twofish128 => 16,
            Self::Aes192 | Self::Serpent192 | Self::Twofish192 => 24,
            Self::Aes256 | Self::Serpent256 | Self::Twofish256 => 32,
        }
    }

    /// The size of the key for this mode, in bytes.
    #[must_use]
    pub fn mode_key_bytes(self, mode: CipherMode) -> usize {
        if mode == CipherMode::Xts { 2 * self.key_bytes() } else { self.key_bytes() }
    }

    /// The size of its blocks, in bytes.
    #[must_use]
    pub fn block_bytes(self) -> usize {
        if self == Self::Cast5 { 8 } else { 16 }
    }

    /// The cipher that ESSIV encrypts sector numbers with: of the same family, with a key as long as the digest of
    /// `hash`, as dm-crypt has it.
    ///
    /// # Errors
    /// The family has no keys of that size.
    pub fn essiv_cipher(self, hash: HashAlgorithm) -> Result<Self> {
        let digest_bytes = hash.digest_bytes();
        if self.key_bytes() == digest_bytes {
            return Ok(self);
        }
        let (_, Some(family), members) = *self.family() else { return Err(Error::EssivCipher(self)) };
        let found = members.iter().copied().find(|member| member.key_bytes() == digest_bytes);
        found.ok_or(Error::EssivKeySize { family, digest_bytes })
    }
}

impl HashAlgorithm {
    /// The length of its digest, in bytes.
    #[must_use]
    pub fn digest_bytes(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 | Self::Ripemd160 => 20,
            Self::Sha224 => 28,
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }
}
