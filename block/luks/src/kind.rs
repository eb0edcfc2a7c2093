//! The driver `luks`: how encrypted disks come into being.

use crate::driver::LuksDisk;
use crate::header::has_luks_magic;
use crate::place::{HeaderPlace, failed, not_accepted};
use crate::volume::{CipherSpec, NewVolume, new_volume_header_bytes};
use crate::{CipherAlgorithm, CipherMode, HashAlgorithm, IvAlgorithm};
use block_graph::{
    Driver, DriverKind, Errno, Error, MAX_LEN, MeasureReport, NodeRef, OpenContext, OpenFlags, OptionKind,
    OptionSpec, Options, Preallocation, Result, Truncate, async_trait,
};
use io_loop::offload;
use std::time::Duration;
use zeroize::Zeroizing;

/// The driver `luks`.
#[derive(Debug, Clone, Copy, Default)]
pub struct LuksKind;

const fn option(name: &'static str, kind: OptionKind, help: &'static str) -> OptionSpec {
    OptionSpec { name, kind, help, default: None, amendable: false }
}

const OPTIONS: &[OptionSpec] = &[
    option("cipher-alg", OptionKind::Text, "Name of encryption cipher algorithm"),
    option("cipher-mode", OptionKind::Text, "Name of encryption cipher mode"),
    option("detached-header", OptionKind::Switch, "Create a detached LUKS header"),
    option("hash-alg", OptionKind::Text, "Name of encryption hash algorithm"),
    option("iter-time", OptionKind::Number, "Time to spend in PBKDF in milliseconds"),
    option("ivgen-alg", OptionKind::Text, "Name of IV generator algorithm"),
    option("ivgen-hash-alg", OptionKind::Text, "Name of IV generator hash algorithm"),
    option("key-secret", OptionKind::Text, "ID of the secret that provides the keyslot passphrase"),
    option("size", OptionKind::Size, "Virtual disk size"),
];

/// Takes what a new volume is to be out of `options`, with the names of `qemu-img create`: `cipher-alg`,
/// `cipher-mode`, `ivgen-alg`, `ivgen-hash-alg`, `hash-alg`, `iter-time`.
///
/// # Errors
/// An option has a value that it cannot have.
pub fn take_new_volume(options: &mut Options) -> Result<NewVolume> {
    fn named<T>(options: &mut Options, name: &str, known: fn(&str) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = options.take_text(name) else { return Ok(None) };
        known(&value).map(Some).ok_or_else(|| not_accepted(name, &value))
    }
    let mut new = NewVolume::default();
    let usual = CipherSpec::default();
    new.spec = CipherSpec {
        algorithm: named(options, "cipher-alg", CipherAlgorithm::from_name)?.unwrap_or(usual.algorithm),
        mode: named(options, "cipher-mode", CipherMode::from_name)?.unwrap_or(usual.mode),
        iv: named(options, "ivgen-alg", IvAlgorithm::from_name)?.unwrap_or(usual.iv),
        iv_hash: named(options, "ivgen-hash-alg", HashAlgorithm::from_name)?,
        hash: named(options, "hash-alg", HashAlgorithm::from_name)?.unwrap_or(usual.hash),
    };
    if let Some(milliseconds) = options.take_number("iter-time")? {
        new.iter_time = Duration::from_millis(milliseconds);
    }
    Ok(new)
}

fn too_large() -> Error {
    Error::new(Errno::TOO_LARGE, "The requested file size is too large")
}

/// What a new image is to be.
struct NewImage {
    volume: NewVolume,
    /// The length of its disk in bytes.
    size: u64,
    preallocation: Preallocation,
    key_secret: Option<String>,
}

impl NewImage {
    fn take(options: &mut Options) -> Result<Self> {
        let size = options.take_size("size")?.unwrap_or(0);
        let preallocation = options.take_text("preallocation").unwrap_or_else(|| "off".into());
        let preallocation = Preallocation::from_name(&preallocation)
            .ok_or_else(|| Error::invalid(format!("invalid parameter value: {preallocation}")))?;
        let detached = options.take_switch("detached-header")?.unwrap_or(false);
        let key_secret = options.take_text("key-secret");
        let mut volume = take_new_volume(options)?;
        volume.detached = detached;
        Ok(Self { volume, size, preallocation, key_secret })
    }

    fn secret<'a>(&self, context: &'a OpenContext) -> Result<&'a [u8]> {
        let missing = || Error::invalid("Parameter 'key-secret' is required for cipher");
        context.secrets.get(self.key_secret.as_ref().ok_or_else(missing)?)
    }

    /// The length of the file, in bytes; of a header alone, if it is detached.
    fn file_len(&self) -> Result<u64> {
        let disk = if self.volume.detached { 0 } else { self.size };
        let len = new_volume_header_bytes(&self.volume.spec).checked_add(disk).filter(|len| *len <= MAX_LEN);
        len.ok_or_else(too_large)
    }

    /// Makes the image in a file that is there.
    async fn format(&self, context: &OpenContext, file: NodeRef) -> Result<()> {
        let password = Zeroizing::new(self.secret(context)?.to_vec());
        let volume = self.volume.clone();
        let created = offload(move || volume.create(&password)).await;
        let (_, _, writes) = created.map_err(failed)?;
        // There are no tables of a format to be allocated alone.
        let preallocation = match self.preallocation {
            Preallocation::Metadata => Preallocation::Off,
            other => other,
        };
        let how = Truncate { preallocation, ..Truncate::default() };
        file.truncate(self.file_len()?, how).await.map_err(|error| match error.errno() {
            Errno::TOO_LARGE => too_large(),
            _ => error,
        })?;
        HeaderPlace { node: file, offset: 0 }.write(&writes).await
    }
}

#[async_trait(?Send)]
impl DriverKind for LuksKind {
    fn name(&self) -> &'static str {
        "luks"
    }

    fn probe(&self, head: &[u8], _filename: &str) -> u8 {
        if has_luks_magic(head) { 100 } else { 0 }
    }

    async fn open(
        &self,
        context: &OpenContext,
        options: &mut Options,
        flags: OpenFlags,
    ) -> Result<Box<dyn Driver>> {
        let file = context.open_file(options, flags).await?;
        let header = context.open_child(options, "header", flags.for_file()).await?;
        let key_secret = options.take_text("key-secret");
        Ok(Box::new(LuksDisk::open(file, header, key_secret, context.secrets.clone(), flags).await?))
    }

    fn create_options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn amend_options(&self) -> Vec<OptionSpec> {
        [
            option("iter-time", OptionKind::Number, "Time to spend in PBKDF in milliseconds"),
            option("keyslot", OptionKind::Number, "Select a single keyslot to modify explicitly"),
            option(
                "new-secret",
                OptionKind::Text,
                "New secret to set in the matching keyslots. Empty string to erase",
            ),
            option("old-secret", OptionKind::Text, "Select all keyslots that match this password"),
            option("state", OptionKind::Text, "Select new state of affected keyslots (active/inactive)"),
        ]
        .to_vec()
    }

    async fn create(&self, context: &OpenContext, filename: &str, options: &mut Options) -> Result<()> {
        let new = NewImage::take(options)?;
        new.secret(context)?;
        new.file_len()?;
        context.create_protocol(filename, options).await?;
        let made = async {
            let file = context.open_protocol(filename, Options::new(), OpenFlags::WRITE).await?;
            let formatted = new.format(context, file.clone()).await;
            formatted.and(file.close().await)
        };
        let made = made.await;
        if made.is_err() {
            // What was there is gone in any case.
            let _ = context.registry.protocol_of(filename)?.delete(filename).await;
        }
        made
    }

    async fn measure(&self, options: &mut Options, source: Option<&NodeRef>) -> Result<MeasureReport> {
        let mut new = NewImage::take(options)?;
        if new.key_secret.is_none() {
            return Err(Error::invalid("Parameter 'key-secret' is required for cipher"));
        }
        if let Some(source) = source {
            new.size = source.len();
        }
        let required = new.file_len()?;
        // Encrypted zeroes are no holes.
        Ok(MeasureReport { required, fully_allocated: required, bitmaps: None })
    }
}
