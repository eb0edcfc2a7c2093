//! The encryption of a new image.

use super::Encryption;
use block_graph::{Errno, Error, OpenContext, Options, Result, Secrets};
use luks::NewVolume;

/// The encryption that options ask for.
#[derive(Clone, Debug)]
pub(crate) struct EncryptionOptions {
    format: Format,
    /// The name of the secret that is the password.
    key_secret: Option<String>,
}

#[derive(Clone, Debug)]
enum Format {
    Aes,
    Luks(NewVolume),
}

impl EncryptionOptions {
    /// Takes the options of the encryption out of `options`; `None` if they ask for none.
    ///
    /// # Errors
    /// If they contradict each other, or name something unknown.
    pub(crate) fn take(options: &mut Options) -> Result<Option<Self>> {
        let legacy = options.take_switch("encryption")?.unwrap_or(false);
        let mut own = options.take_child("encrypt");
        let format = own.take_text("format");
        if legacy && format.is_some() {
            return Err(Error::invalid(
                "'encrypt.format' and its alias 'encryption' can't be used at the same time",
            ));
        }
        let luks = match format.as_deref() {
            Some("luks") => true,
            Some("aes" | "qcow") => false,
            None if legacy => false,
            None if own.is_empty() => return Ok(None),
            None => return Err(Error::invalid("Parameter 'encrypt.format' is missing")),
            Some(other) => return Err(super::options::not_accepted("format", other)),
        };
        let key_secret = own.take_text("key-secret");
        let format = if luks { Format::Luks(luks::take_new_volume(&mut own)?) } else { Format::Aes };
        if let Some(unknown) = own.first_name() {
            return Err(Error::invalid(format!("Parameter '{unknown}' is unexpected")));
        }
        Ok(Some(Self { format, key_secret }))
    }

    /// Bytes of the header in the image.
    ///
    /// # Errors
    /// If there is no secret: the size does not depend on it, but nothing could be made without.
    pub(crate) fn header_bytes(&self) -> Result<u64> {
        match &self.format {
            Format::Aes => Ok(0),
            Format::Luks(_) if self.key_secret.is_none() => Err(no_secret()),
            Format::Luks(volume) => Ok(luks::new_volume_header_bytes(&volume.spec)),
        }
    }

    /// Makes the header that the image will have. Takes seconds of processor time, on another thread.
    ///
    /// # Errors
    /// If there is no such secret, or the ciphers do not go together.
    pub(crate) async fn prepare(self, context: &OpenContext) -> Result<Encryption> {
        let secret = self.password(&context.secrets)?;
        match self.format {
            Format::Aes => Ok(Encryption::Aes),
            Format::Luks(volume) => {
                let header = io_loop::offload(move || luks_header(&volume, &secret)).await;
                header.map(Encryption::Luks).map_err(|error| Error::of(Errno::INVALID, error))
            }
        }
    }

    fn password(&self, secrets: &Secrets) -> Result<Vec<u8>> {
        let name = self.key_secret.as_deref().ok_or_else(no_secret)?;
        Ok(secrets.get(name)?.to_vec())
    }
}

fn no_secret() -> Error {
    Error::invalid("Parameter 'encrypt.key-secret' is required for cipher")
}

/// The bytes of a new LUKS header with its key material.
fn luks_header(volume: &NewVolume, password: &[u8]) -> luks::Result<Vec<u8>> {
    let length = luks::new_volume_header_bytes(&volume.spec) as usize;
    let mut bytes = vec![0; length];
    let (_, _, writes) = volume.create(password)?;
    for write in writes {
        let content = write.bytes()?;
        let start = write.offset as usize;
        bytes[start..start + content.len()].copy_from_slice(&content);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(pairs: &[(&str, &str)]) -> Result<Option<EncryptionOptions>> {
        let mut options = Options::new();
        pairs.iter().for_each(|(name, value)| options.set(*name, *value));
        EncryptionOptions::take(&mut options)
    }

    #[test]
    fn encryption_has_a_format() {
        assert!(take(&[]).unwrap().is_none());
        assert!(take(&[("encryption", "off")]).unwrap().is_none());
        assert!(matches!(take(&[("encryption", "on")]).unwrap().unwrap().format, Format::Aes));
        assert!(matches!(take(&[("encrypt.format", "luks")]).unwrap().unwrap().format, Format::Luks(_)));
        let text = |pairs| take(pairs).unwrap_err().to_string();
        assert_eq!(text(&[("encrypt.key-secret", "x")]), "Parameter 'encrypt.format' is missing");
        assert_eq!(text(&[("encrypt.format", "foo")]), "Parameter 'format' does not accept value 'foo'");
        assert_eq!(
            text(&[("encrypt.format", "luks"), ("encrypt.cipher-alg", "foo")]),
            "Parameter 'cipher-alg' does not accept value 'foo'"
        );
        assert_eq!(
            text(&[("encryption", "on"), ("encrypt.format", "luks")]),
            "'encrypt.format' and its alias 'encryption' can't be used at the same time"
        );
    }

    #[test]
    fn a_header_is_as_long_as_is_said_and_opens() {
        let luks = [("encrypt.format", "luks"), ("encrypt.key-secret", "s"), ("encrypt.iter-time", "1")];
        let options = take(&luks).unwrap().unwrap();
        let Format::Luks(volume) = &options.format else { unreachable!("it asks for LUKS") };
        let header = luks_header(volume, b"secret").unwrap();
        assert_eq!(header.len() as u64, options.header_bytes().unwrap());
        assert!(luks::Volume::open(&header[..luks::HEADER_BYTES], false).is_ok());
        let without = take(&luks[..1]).unwrap().unwrap().header_bytes();
        assert_eq!(without.unwrap_err().to_string(), "Parameter 'encrypt.key-secret' is required for cipher");
    }
}
