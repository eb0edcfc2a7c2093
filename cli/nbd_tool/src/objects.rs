//! What `--object` defines: secrets, and TLS credentials.

use crate::Failure;
use crate::arguments::Arguments;
use block_graph::Secrets;
use blockdev::syntax::list::split;
use nbd::{ClientCredentials, ServerCredentials};
use std::path::PathBuf;

/// TLS credentials as they were defined; their files are read when they are used.
#[derive(Debug)]
struct TlsCredentials {
    id: String,
    directory: PathBuf,
    is_server: bool,
    verify_peer: bool,
}

/// All that was defined.
#[derive(Debug, Default)]
pub(crate) struct Objects {
    pub(crate) secrets: Secrets,
    credentials: Vec<TlsCredentials>,
    /// Names of objects that are no credentials.
    others: Vec<String>,
}

impl Objects {
    /// What the command line defines.
    pub(crate) fn new(arguments: &Arguments) -> Result<Self, Failure> {
        let mut objects = Self::default();
        for object in &arguments.objects {
            let kind = object.split(',').next().unwrap_or_default();
            match kind.strip_prefix("qom-type=").unwrap_or(kind) {
                "tls-creds-x509" => objects.add_credentials(object)?,
                kind @ ("tls-creds-psk" | "tls-creds-anon") => {
                    return Err(format!("{kind} is not supported: only tls-creds-x509 is").into());
                }
                _ => {
                    blockdev::secret::add_object(&mut objects.secrets, object)?;
                    let id = split(object, Some("qom-type")).into_iter().find(|item| item.key == "id");
                    objects.others.extend(id.map(|item| item.value));
                }
            }
        }
        Ok(objects)
    }

    fn add_credentials(&mut self, object: &str) -> Result<(), Failure> {
        let (mut id, mut directory, mut is_server, mut verify_peer) = (None, None, false, true);
        for item in split(object, Some("qom-type")) {
            match (item.key.as_str(), item.value.as_str()) {
                ("qom-type", _) => {}
                ("id", value) => id = Some(value.to_owned()),
                ("dir", value) => directory = Some(PathBuf::from(value)),
                ("endpoint", "server") => is_server = true,
                ("endpoint", "client") => is_server = false,
                ("verify-peer", "on" | "yes" | "true" | "y") => verify_peer = true,
                ("verify-peer", "off" | "no" | "false" | "n") => verify_peer = false,
                ("endpoint" | "verify-peer", value) => {
                    return Err(format!("Parameter '{}' does not accept value '{value}'", item.key).into());
                }
                ("sanity-check" | "priority", _) => {}
                (other, _) => return Err(format!("Parameter '{other}' is unexpected").into()),
            }
        }
        let id = id.ok_or("Parameter 'id' is missing")?;
        let directory = directory.ok_or("Missing 'dir' property value")?;
        self.credentials.push(TlsCredentials { id, directory, is_server, verify_peer });
        Ok(())
    }

    fn find(&self, id: &str) -> Result<&TlsCredentials, Failure> {
        if self.others.iter().any(|other| other == id) {
            return Err(
                format!("Failed to get TLS creds: Object with id '{id}' is not TLS credentials").into()
            );
        }
        let found = self.credentials.iter().find(|credentials| credentials.id == id);
        found.ok_or_else(|| format!("Failed to get TLS creds: No TLS credentials with id '{id}'").into())
    }

    /// The credentials for a server.
    pub(crate) fn server(&self, id: &str) -> Result<ServerCredentials, Failure> {
        let found = self.find(id)?;
        if !found.is_server {
            return Err("Failed to get TLS creds: Expected TLS credentials for a server endpoint".into());
        }
        ServerCredentials::from_directory(&found.directory, found.verify_peer)
            .map_err(|error| error.to_string().into())
    }

    /// The credentials for a client.
    pub(crate) fn client(&self, id: &str) -> Result<ClientCredentials, Failure> {
        let found = self.find(id)?;
        if found.is_server {
            return Err("Failed to get TLS creds: Expected TLS credentials for a client endpoint".into());
        }
        ClientCredentials::from_directory(&found.directory, found.verify_peer)
            .map_err(|error| error.to_string().into())
    }
}
