//! The options of a new image, and which go together.

use crate::format::header::Compression;
use crate::format::{Geometry, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS};
use block_graph::{Error, OptionKind, OptionSpec, Options, Preallocation, Result};

/// The size of a cluster where nobody says anything, as a base-2 logarithm.
const DEFAULT_CLUSTER_BITS: u32 = 16;
/// The refcount's bits where nobody says anything.
const DEFAULT_REFCOUNT_BITS: u64 = 16;
/// The least clusters' size with extended L2 entries: subclusters of 512 bytes.
const MIN_EXTENDED_CLUSTER: u64 = 16384;

const fn option(
    name: &'static str,
    kind: OptionKind,
    help: &'static str,
    default: Option<&'static str>,
    amendable: bool,
) -> OptionSpec {
    OptionSpec { name, kind, help, default, amendable }
}

/// The options of [`CreateSpec::take`], with the texts that the image tools show.
pub const CREATE_OPTIONS: &[OptionSpec] = {
    use OptionKind::{Number, Size, Switch, Text};
    &[
        option(
            "encryption",
            Switch,
            "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
            None,
            false,
        ),
        option("encrypt.format", Text, "Encrypt the image, format choices: 'aes', 'luks'", None, false),
        option(
            "encrypt.key-secret",
            Text,
            "ID of secret providing qcow AES key or LUKS passphrase",
            None,
            false,
        ),
        option("encrypt.cipher-alg", Text, "Name of encryption cipher algorithm", None, false),
        option("encrypt.cipher-mode", Text, "Name of encryption cipher mode", None, false),
        option("encrypt.ivgen-alg", Text, "Name of IV generator algorithm", None, false),
        option("encrypt.ivgen-hash-alg", Text, "Name of IV generator hash algorithm", None, false),
        option("encrypt.hash-alg", Text, "Name of encryption hash algorithm", None, false),
        option("encrypt.iter-time", Number, "Time to spend in PBKDF in milliseconds", None, false),
        option("cluster_size", Size, "qcow2 cluster size", Some("65536"), false),
        option("extended_l2", Switch, "Extended L2 tables", Some("off"), false),
        option(
            "preallocation",
            Text,
            "Preallocation mode (allowed values: off, metadata, falloc, full)",
            None,
            false,
        ),
        option(
            "compression_type",
            Text,
            "Compression method used for image cluster compression",
            Some("zlib"),
            false,
        ),
        option("size", Size, "Virtual disk size", None, true),
        option("compat", Text, "Compatibility level (v2 [0.10] or v3 [1.1])", None, true),
        option("backing_file", Text, "File name of a base image", None, true),
        option("backing_fmt", Text, "Image format of the base image", None, true),
        option("data_file", Text, "File name of an external data file", None, true),
        option("data_file_raw", Switch, "The external data file must stay valid as a raw image", None, true),
        option("lazy_refcounts", Switch, "Postpone refcount updates", Some("off"), true),
        option("refcount_bits", Number, "Width of a reference count entry in bits", Some("16"), true),
    ]
};

/// The options of an encrypted image's passwords that can be changed.
pub(crate) const AMEND_ENCRYPTION: &[OptionSpec] = {
    use OptionKind::{Number, Text};
    &[
        option("encrypt.iter-time", Number, "Time to spend in PBKDF in milliseconds", None, true),
        option("encrypt.keyslot", Number, "Select a single keyslot to modify explicitly", None, true),
        option(
            "encrypt.new-secret",
            Text,
            "New secret to set in the matching keyslots. Empty string to erase",
            None,
            true,
        ),
        option("encrypt.old-secret", Text, "Select all keyslots that match this password", None, true),
        option("encrypt.state", Text, "Select new state of affected keyslots (active/inactive)", None, true),
    ]
};

/// What a new image is to be. [`CreateSpec::take`] makes one whose parts go together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateSpec {
    /// The virtual disk's size in bytes: whole sectors.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// Base-2 logarithm of a cluster's size.
    pub cluster_bits: u32,
    /// Base-2 logarithm of a refcount's bits.
    pub refcount_order: u32,
    /// Whether refcounts may be written late.
    pub lazy_refcounts: bool,
    /// Whether clusters have subclusters.
    pub extended_l2: bool,
    /// How compressed clusters will be compressed.
    pub compression: Compression,
    /// What is allocated beforehand.
    pub preallocation: Preallocation,
    /// The backing file's name.
    pub backing_file: Option<String>,
    /// The backing file's format.
    pub backing_format: Option<String>,
    /// The data file's name.
    pub data_file: Option<String>,
    /// Whether the data file is a raw image by itself.
    pub data_file_raw: bool,
}

impl Default for CreateSpec {
    fn default() -> Self {
        Self {
            size: 0,
            version: 3,
            cluster_bits: DEFAULT_CLUSTER_BITS,
            refcount_order: DEFAULT_REFCOUNT_BITS.trailing_zeros(),
            lazy_refcounts: false,
            extended_l2: false,
            compression: Compression::Zlib,
            preallocation: Preallocation::Off,
            backing_file: None,
            backing_format: None,
            data_file: None,
            data_file_raw: false,
        }
    }
}

impl CreateSpec {
    /// Takes [`CREATE_OPTIONS`] out of `options`, all but those of the encryption.
    ///
    /// # Errors
    /// The first option that makes no sense, or does not go with another one.
    pub fn take(options: &mut Options) -> Result<Self> {
        // Values of the wrong kind come first.
        let size = options.take_size("size")?.unwrap_or(0);
        let cluster_size = options.take_size("cluster_size")?.unwrap_or(1 << DEFAULT_CLUSTER_BITS);
        let extended_l2 = options.take_switch("extended_l2")?.unwrap_or(false);
        let lazy_refcounts = options.take_switch("lazy_refcounts")?.unwrap_or(false);
        let data_file_raw = options.take_switch("data_file_raw")?.unwrap_or(false);
        let refcount_bits = options.take_number("refcount_bits")?.unwrap_or(DEFAULT_REFCOUNT_BITS);
        let version = take_named(options, "compat", "version", &VERSIONS)?.unwrap_or(3);
        let preallocation = take_named(options, "preallocation", "preallocation", &Preallocation::NAMES)?;
        let compression = take_named(options, "compression_type", "compression-type", &COMPRESSIONS)?;
        let spec = Self {
            size: size
                .checked_next_multiple_of(512)
                .filter(|size| *size <= i64::MAX as u64)
                .ok_or_else(too_large)?,
            version,
            cluster_bits: cluster_size.trailing_zeros(),
            refcount_order: refcount_bits.trailing_zeros(),
            lazy_refcounts,
            extended_l2,
            compression: compression.unwrap_or_default(),
            preallocation: preallocation.unwrap_or_default(),
            backing_file: options.take_text("backing_file"),
            backing_format: options.take_text("backing_fmt"),
            data_file: options.take_text("data_file"),
            data_file_raw,
        };
        spec.check(cluster_size, refcount_bits)?;
        Ok(spec)
    }

    /// Checks which options go together, in the order in which complaints are expected.
    fn check(&self, cluster_size: u64, refcount_bits: u64) -> Result<()> {
        let needs_v3 = |what: &str| {
            Err(Error::invalid(format!(
                "{what} only supported with compatibility level 1.1 and above (use version=v3 or greater)"
            )))
        };
        let is_v2 = self.version < 3;
        if self.extended_l2 && is_v2 {
            return needs_v3("Extended L2 entries are");
        }
        check_cluster_size(cluster_size, self.extended_l2)?;
        if self.backing_file.is_some() && self.preallocation != Preallocation::Off && !self.extended_l2 {
            return Err(Error::invalid(
                "Backing file and preallocation can only be used at the same time if extended_l2 is on",
            ));
        }
        if self.backing_format.is_some() && self.backing_file.is_none() {
            return Err(Error::invalid("Backing format cannot be used without backing file"));
        }
        if self.lazy_refcounts && is_v2 {
            return needs_v3("Lazy refcounts");
        }
        check_refcount_bits(refcount_bits, self.version, "version=v3")?;
        if self.data_file_raw && self.data_file.is_none() {
            return Err(Error::invalid("data-file-raw requires data-file"));
        }
        if self.data_file_raw && self.backing_file.is_some() {
            return Err(Error::invalid("Backing file and data-file-raw cannot be used at the same time"));
        }
        if self.data_file.is_some() && is_v2 {
            return needs_v3("External data files are");
        }
        if self.compression != Compression::Zlib && is_v2 {
            return needs_v3("Non-zlib compression type is");
        }
        Ok(())
    }

    /// The sizes of the image's structures.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            extended_l2: self.extended_l2,
            data_file: self.data_file.is_some(),
        }
    }

    /// What is allocated beforehand: a raw data file must be mapped as a whole, whatever was asked for, since its bytes
    /// count even where the tables say nothing.
    pub fn effective_preallocation(&self) -> Preallocation {
        match self.preallocation {
            Preallocation::Off if self.data_file_raw => Preallocation::Metadata,
            asked => asked,
        }
    }
}

const VERSIONS: [(&str, u32); 4] = [("0.10", 2), ("v2", 2), ("1.1", 3), ("v3", 3)];
const COMPRESSIONS: [(&str, Compression); 2] = [("zlib", Compression::Zlib), ("zstd", Compression::Zstd)];

fn too_large() -> Error {
    Error::invalid("Image size must be between 0 and 9223372036854775807")
}

pub(super) fn not_accepted(parameter: &str, value: &str) -> Error {
    Error::invalid(format!("Parameter '{parameter}' does not accept value '{value}'"))
}

/// Takes an option that has one of several names as its value; `shown` is what the error calls the option.
fn take_named<T: Copy>(
    options: &mut Options,
    name: &str,
    shown: &str,
    names: &[(&str, T)],
) -> Result<Option<T>> {
    let Some(value) = options.take_text(name) else { return Ok(None) };
    let found = names.iter().find(|(known, _)| *known == value);
    found.map(|(_, meaning)| Some(*meaning)).ok_or_else(|| not_accepted(shown, &value))
}

/// Checks a cluster's size in bytes.
pub(crate) fn check_cluster_size(size: u64, extended_l2: bool) -> Result<()> {
    if !size.is_power_of_two() || !(1 << MIN_CLUSTER_BITS..=1 << MAX_CLUSTER_BITS).contains(&size) {
        return Err(Error::invalid("Cluster size must be a power of two between 512 and 2048k"));
    }
    if extended_l2 && size < MIN_EXTENDED_CLUSTER {
        return Err(Error::invalid(format!(
            "Extended L2 entries are only supported with cluster sizes of at least {MIN_EXTENDED_CLUSTER} bytes"
        )));
    }
    Ok(())
}

/// Checks a refcount's bits; `how` is the option that gives the version that most widths need.
pub(crate) fn check_refcount_bits(bits: u64, version: u32, how: &str) -> Result<()> {
    if !bits.is_power_of_two() || bits > 64 {
        return Err(Error::invalid("Refcount width must be a power of two and may not exceed 64 bits"));
    }
    if version < 3 && bits != DEFAULT_REFCOUNT_BITS {
        return Err(Error::invalid(format!(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use {how} or greater)"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(text: &str) -> Result<CreateSpec> {
        let mut options = Options::new();
        for (name, value) in text.split(',').filter_map(|pair| pair.split_once('=')) {
            options.set(name, value);
        }
        let spec = CreateSpec::take(&mut options)?;
        assert!(options.is_empty(), "{options:?} is left");
        Ok(spec)
    }

    #[test]
    fn options_that_do_not_go_together_are_refused_in_qemu_imgs_words() {
        let cases = [
            ("cluster_size=256", "Cluster size must be a power of two between 512 and 2048k"),
            ("cluster_size=3000", "Cluster size must be a power of two between 512 and 2048k"),
            ("cluster_size=4M", "Cluster size must be a power of two between 512 and 2048k"),
            ("compat=0.5", "Parameter 'version' does not accept value '0.5'"),
            ("refcount_bits=3", "Refcount width must be a power of two and may not exceed 64 bits"),
            ("refcount_bits=0", "Refcount width must be a power of two and may not exceed 64 bits"),
            (
                "compat=0.10,refcount_bits=8",
                "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or \
                 greater)",
            ),
            (
                "compat=v2,lazy_refcounts=on",
                "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            ),
            (
                "compat=v2,compression_type=zstd",
                "Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 \
                 or greater)",
            ),
            ("compression_type=lzo", "Parameter 'compression-type' does not accept value 'lzo'"),
            (
                "extended_l2=on,cluster_size=8k",
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            ),
            ("preallocation=foo", "Parameter 'preallocation' does not accept value 'foo'"),
            (
                "preallocation=metadata,backing_file=b",
                "Backing file and preallocation can only be used at the same time if extended_l2 is on",
            ),
            ("backing_fmt=raw", "Backing format cannot be used without backing file"),
            ("data_file_raw=on", "data-file-raw requires data-file"),
            (
                "data_file=d,data_file_raw=on,backing_file=b",
                "Backing file and data-file-raw cannot be used at the same time",
            ),
            ("lazy_refcounts=maybe", "Parameter 'lazy_refcounts' expects 'on' or 'off'"),
        ];
        for (options, text) in cases {
            assert_eq!(take(options).unwrap_err().to_string(), text, "{options}");
        }
    }

    #[test]
    fn what_is_not_given_is_qemus_default() {
        assert_eq!(take("").unwrap(), CreateSpec::default());
        assert_eq!(take("size=1000").unwrap().size, 1024);
        let spec = take("size=1G,cluster_size=2M,refcount_bits=1,extended_l2=on,backing_file=b").unwrap();
        assert_eq!((spec.size, spec.cluster_bits, spec.refcount_order), (1 << 30, 21, 0));
        let raw = take("data_file=d,data_file_raw=on").unwrap();
        assert_eq!(raw.effective_preallocation(), Preallocation::Metadata);
    }
}
