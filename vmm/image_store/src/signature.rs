//! Cleartext-signed files (RFC 9580, 7) and who checks the signatures.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::SignatureError;

/// The environment variable that names another keyring.
const KEYRING_VARIABLE: &str = "VIREO_DEBIAN_KEYRING";
/// Where Debian's package debian-archive-keyring puts it.
const KEYRINGS: [&str; 2] =
    ["/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp"];

/// Checks detached OpenPGP signatures.
pub trait SignatureVerifier {
    /// Succeeds if `signature` (ASCII-armoured) over `data` was made by a trusted key.
    ///
    /// # Errors
    /// It wasn't, or that can't be found out.
    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), SignatureError>;
}

/// Checks with `gpgv`, or `sqv` where that's what apt uses, against a file of keys.
#[derive(Debug, Clone)]
pub struct KeyringVerifier {
    keyrings: Vec<PathBuf>,
}

impl KeyringVerifier {
    /// Trusts the keys in `keyring`.
    pub fn new(keyring: impl Into<PathBuf>) -> Self {
        Self { keyrings: vec![keyring.into()] }
    }

    /// Trusts the host's keyring of Debian's archive, or the file that `VIREO_DEBIAN_KEYRING` names.
    pub fn from_host() -> Self {
        match env::var_os(KEYRING_VARIABLE).filter(|path| !path.is_empty()) {
            Some(path) => Self::new(path),
            None => Self { keyrings: KEYRINGS.iter().map(PathBuf::from).collect() },
        }
    }

    fn keyring(&self) -> Result<PathBuf, SignatureError> {
        let found = self.keyrings.iter().find(|path| path.is_file());
        // gpgv takes a name without a slash for one in its home folder.
        found.and_then(|path| path.canonicalize().ok()).ok_or_else(|| SignatureError::NoKeyring {
            tried: self
                .keyrings
                .iter()
                .map(|path| path.display().to_string())
                .collect::<Vec<_>>()
                .join(" or "),
        })
    }
}

impl SignatureVerifier for KeyringVerifier {
    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), SignatureError> {
        let keyring = self.keyring()?;
        let failed = |source| SignatureError::Verifier { program: "gpgv".to_owned(), source };
        let folder = tempfile::tempdir().map_err(failed)?;
        let (data_path, signature_path) = (folder.path().join("data"), folder.path().join("signature"));
        fs::write(&data_path, data).map_err(failed)?;
        fs::write(&signature_path, signature).map_err(failed)?;
        let files = [signature_path.as_path(), data_path.as_path()];
        match run("gpgv", &["--status-fd", "1", "--homedir"], folder.path(), &keyring, &files)? {
            Some(output) => judge_gpgv(&output),
            None => match run("sqv", &[], folder.path(), &keyring, &files)? {
                Some(output) if output.status.success() => Ok(()),
                Some(output) => Err(SignatureError::Bad(last_line(&output.stderr))),
                None => Err(SignatureError::NoVerifier),
            },
        }
    }
}

/// Runs a verifier; `None` if it isn't installed.
fn run(
    program: &str,
    options: &[&str],
    home: &Path,
    keyring: &Path,
    files: &[&Path],
) -> Result<Option<Output>, SignatureError> {
    let mut command = Command::new(program);
    command.args(options);
    if !options.is_empty() {
        command.arg(home);
    }
    command.arg("--keyring").arg(keyring).args(files).stdin(Stdio::null()).env("LC_ALL", "C");
    match command.output() {
        Ok(output) => Ok(Some(output)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SignatureError::Verifier { program: program.to_owned(), source }),
    }
}

/// The archive signs with several keys, of which the keyring may lack the newest: one good signature is
/// enough, a bad one never is. The exit status alone doesn't tell these apart.
fn judge_gpgv(output: &Output) -> Result<(), SignatureError> {
    let status = String::from_utf8_lossy(&output.stdout);
    let said = |word: &str| {
        status
            .lines()
            .any(|line| line.strip_prefix("[GNUPG:] ").and_then(|rest| rest.split(' ').next()) == Some(word))
    };
    if said("GOODSIG") && said("VALIDSIG") && !said("BADSIG") {
        Ok(())
    } else if said("BADSIG") {
        Err(SignatureError::Bad("the text was changed after it was signed".to_owned()))
    } else if said("NO_PUBKEY") {
        Err(SignatureError::Bad("it was made by none of the keys in the keyring".to_owned()))
    } else {
        Err(SignatureError::Bad(last_line(&output.stderr)))
    }
}

fn last_line(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("without a reason given").to_owned()
}

/// Splits a cleartext-signed file into the text that was signed, as far as it matters (without the dash
/// escapes and the last line end), and the armoured signature. Nothing may stand around them: only the
/// text returned is signed.
pub(crate) fn split_cleartext(file: &str) -> Result<(String, String), SignatureError> {
    const BEGIN_SIGNATURE: &str = "-----BEGIN PGP SIGNATURE-----";
    const END_SIGNATURE: &str = "-----END PGP SIGNATURE-----";
    let malformed = SignatureError::Malformed;
    let mut lines = file.lines();
    if lines.next() != Some("-----BEGIN PGP SIGNED MESSAGE-----") {
        return Err(malformed("it doesn't begin as a signed message"));
    }
    for line in lines.by_ref() {
        if line.is_empty() {
            break;
        }
        if !line.starts_with("Hash: ") {
            return Err(malformed("an unknown header before the text"));
        }
    }
    let mut text: Vec<&str> = Vec::new();
    loop {
        let line = lines.next().ok_or(malformed("the text doesn't end in a signature"))?;
        if line == BEGIN_SIGNATURE {
            break;
        }
        let plain = line.strip_prefix("- ").unwrap_or(line);
        if plain == line && line.starts_with('-') {
            return Err(malformed("a dash that isn't escaped"));
        }
        text.push(plain.trim_end_matches([' ', '\t', '\r']));
    }
    let mut signature = vec![BEGIN_SIGNATURE];
    loop {
        let line = lines.next().ok_or(malformed("the signature doesn't end"))?;
        signature.push(line);
        if line == END_SIGNATURE {
            break;
        }
    }
    if lines.any(|line| !line.trim().is_empty()) {
        return Err(malformed("text after the signature"));
    }
    Ok((text.join("\n"), signature.join("\n") + "\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_signed_text_is_taken() {
        let file = "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\nOrigin: x  \n- --dash\n\n\
                    -----BEGIN PGP SIGNATURE-----\n\nabc\n-----END PGP SIGNATURE-----\n";
        let (text, signature) = split_cleartext(file).unwrap();
        assert_eq!(text, "Origin: x\n--dash\n");
        assert!(signature.starts_with("-----BEGIN") && signature.ends_with("END PGP SIGNATURE-----\n"));
        for bad in [
            format!("Origin: evil\n{file}"),
            format!("{file}Origin: evil\n"),
            file.replace("- --dash", "--dash"),
            file.replace("Hash: SHA256", "Origin: evil"),
            file.replace("-----END PGP SIGNATURE-----", ""),
            file.replace("-----BEGIN PGP SIGNATURE-----", ""),
            String::new(),
        ] {
            assert!(matches!(split_cleartext(&bad), Err(SignatureError::Malformed(_))), "{bad}");
        }
    }

    #[test]
    fn a_missing_keyring_is_said() {
        let error = KeyringVerifier::new("/nonexistent/keys").verify(b"", b"").unwrap_err().to_string();
        assert!(error.contains("/nonexistent/keys") && error.contains("debian-archive-keyring"), "{error}");
    }
}
