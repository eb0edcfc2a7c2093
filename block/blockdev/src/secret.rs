//! Secrets from the command line: `secret,id=NAME,data=TEXT` or `secret,id=NAME,file=FILE`.

use crate::syntax::list::split;
use base64::Engine;
use block_graph::{Error, Result, Secrets};

/// The largest file that is taken for a secret, in bytes.
const LARGEST_FILE: u64 = 1 << 20;

/// Adds what the value of an option `--object` defines.
///
/// # Errors
///
/// It defines something else, or what it defines cannot be had.
pub fn add_object(secrets: &mut Secrets, object: &str) -> Result<()> {
    let (mut kind, mut id, mut data, mut file, mut format) = (None, None, None, None, None);
    for item in split(object, Some("qom-type")) {
        let place = match item.key.as_str() {
            "qom-type" => &mut kind,
            "id" => &mut id,
            "data" => &mut data,
            "file" => &mut file,
            "format" => &mut format,
            other => return Err(Error::invalid(format!("Parameter '{other}' is unexpected"))),
        };
        *place = Some(item.value);
    }
    let kind = kind.ok_or_else(|| Error::invalid("Parameter 'qom-type' is missing"))?;
    if kind != "secret" {
        return Err(Error::invalid("Parameter 'qom-type' does not accept value '".to_owned() + &kind + "'"));
    }
    let id = id.ok_or_else(|| Error::invalid("Parameter 'id' is missing"))?;
    let bytes = match (data, file) {
        (Some(data), None) => data.into_bytes(),
        (None, Some(file)) => read(&file)?,
        (Some(_), Some(_)) => {
            return Err(Error::invalid("'file' and 'data' are mutually exclusive"));
        }
        (None, None) => return Err(Error::invalid("Must provide 'file' or 'data'")),
    };
    let bytes = match format.as_deref() {
        None | Some("raw") => bytes,
        Some("base64") => decode(&bytes)?,
        Some(other) => {
            return Err(Error::invalid(format!("Parameter 'format' does not accept value '{other}'")));
        }
    };
    secrets.add(id, bytes);
    Ok(())
}

fn read(file: &str) -> Result<Vec<u8>> {
    let failed = |error: std::io::Error| {
        let errno = Error::from(error).errno();
        Error::new(errno, format!("Unable to read {file}: {errno}"))
    };
    if std::fs::metadata(file).map_err(failed)?.len() > LARGEST_FILE {
        return Err(Error::invalid(format!("Unable to read {file}: too large for a secret")));
    }
    std::fs::read(file).map_err(failed)
}

fn decode(text: &[u8]) -> Result<Vec<u8>> {
    let text: Vec<u8> = text.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let decoded = base64::engine::general_purpose::STANDARD.decode(text);
    decoded.map_err(|error| Error::invalid(format!("Base64 data is not valid: {error}")))
}

#[cfg(test)]
mod tests {
    use super::add_object;
    use block_graph::Secrets;

    #[test]
    fn secrets_are_defined() {
        let mut secrets = Secrets::default();
        add_object(&mut secrets, "secret,id=a,data=x,,y").unwrap();
        add_object(&mut secrets, "secret,id=b,format=base64,data=aGk=").unwrap();
        assert_eq!(secrets.get("a").unwrap(), b"x,y");
        assert_eq!(secrets.get("b").unwrap(), b"hi");
        for wrong in ["secret,id=a", "secret,data=x", "iothread,id=a", "secret,id=a,data=x,file=y", "id=a"] {
            assert!(add_object(&mut secrets, wrong).is_err(), "{wrong}");
        }
    }
}
