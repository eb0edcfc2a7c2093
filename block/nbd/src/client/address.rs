//! Where a server is, and the names that people write for it.

use crate::proto::DEFAULT_PORT;
use block_graph::{Error, Options, Result};
use io_loop::Stream;
use std::fmt;
use std::net::ToSocketAddrs;
use std::path::PathBuf;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A host's name or address, and a port's number or name.
    Tcp {
        /// The host.
        host: String,
        /// The port.
        port: String,
    },
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

impl Address {
    /// Connects.
    ///
    /// # Errors
    /// The host's, with the address.
    pub async fn connect(&self) -> Result<Stream> {
        let failed =
            |error: std::io::Error| Error::from(error).context(format_args!("Failed to connect to '{self}'"));
        match self {
            Self::Unix(path) => Stream::connect_unix(path).await.map_err(failed),
            Self::Tcp { host, port } => {
                let (host, number) = (host.clone(), port_number(port)?);
                let resolved = io_loop::blocking(move || {
                    let host = host.trim_start_matches('[').trim_end_matches(']');
                    (host, number).to_socket_addrs().map(Vec::from_iter)
                });
                let mut last = None;
                for address in resolved.await.map_err(failed)? {
                    match Stream::connect_tcp(address).await {
                        Ok(stream) => return Ok(stream),
                        Err(error) => last = Some(error),
                    }
                }
                Err(failed(last.unwrap_or_else(|| std::io::ErrorKind::AddrNotAvailable.into())))
            }
        }
    }

    /// Takes the address out of options: `server.*`, or `path`, `host` and `port`.
    ///
    /// # Errors
    /// If there is none, or they contradict each other.
    pub fn take(options: &mut Options) -> Result<Self> {
        let mut server = options.take_child("server");
        let (path, host, port) =
            (options.take_text("path"), options.take_text("host"), options.take_text("port"));
        if path.is_some() || host.is_some() || port.is_some() {
            if !server.is_empty() {
                return Err(Error::invalid("Cannot use 'server' and path/host/port at the same time"));
            }
            return match (path, host, port) {
                (Some(_), Some(_), _) => {
                    Err(Error::invalid("path and host may not be used at the same time"))
                }
                (Some(_), None, Some(_)) => Err(Error::invalid("port may not be used without host")),
                (Some(path), None, None) => Ok(Self::Unix(path.into())),
                (None, Some(host), port) => {
                    Ok(Self::Tcp { host, port: port.unwrap_or_else(|| DEFAULT_PORT.to_string()) })
                }
                (None, None, _) => Err(Error::invalid("NBD server address missing")),
            };
        }
        if server.is_empty() {
            return Err(Error::invalid("NBD server address missing"));
        }
        let missing = |name: &str| Error::invalid(format!("Parameter 'server.{name}' is missing"));
        let kind = server.take_text("type").ok_or_else(|| missing("type"))?;
        let address = match kind.as_str() {
            "unix" => Self::Unix(server.take_text("path").ok_or_else(|| missing("path"))?.into()),
            "inet" => {
                let host = server.take_text("host").ok_or_else(|| missing("host"))?;
                Self::Tcp { host, port: server.take_text("port").ok_or_else(|| missing("port"))? }
            }
            other => {
                let message = format!("Parameter 'server.type' does not accept value '{other}'");
                return Err(Error::invalid(message));
            }
        };
        match server.first_name() {
            Some(name) => Err(Error::invalid(format!("Parameter 'server.{name}' is unexpected"))),
            None => Ok(address),
        }
    }

    /// The options that [`Address::take`] takes.
    pub(super) fn options(&self) -> Options {
        let mut options = Options::new();
        match self {
            Self::Unix(path) => {
                options.set("server.type", "unix");
                options.set("server.path", path.to_string_lossy().into_owned());
            }
            Self::Tcp { host, port } => {
                options.set("server.type", "inet");
                options.set("server.host", host.clone());
                options.set("server.port", port.clone());
            }
        }
        options
    }

    /// The file name of an export there.
    pub(super) fn filename(&self, export: &str) -> String {
        let export = escape(export, b"/");
        match self {
            Self::Unix(path) => {
                let path = escape(&path.to_string_lossy(), b"/");
                let slash = if export.is_empty() { "" } else { "/" };
                format!("nbd+unix://{slash}{export}?socket={path}")
            }
            Self::Tcp { host, port } if export.is_empty() => format!("nbd://{host}:{port}"),
            Self::Tcp { host, port } => format!("nbd://{host}:{port}/{export}"),
        }
    }
}

fn port_number(port: &str) -> Result<u16> {
    port.parse().map_err(|_| Error::invalid(format!("'{port}' is not a port number")))
}

fn escape(text: &str, also: &[u8]) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || also.contains(&byte) {
            out.push(byte.into());
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

fn unescape(text: &str) -> Result<String> {
    let bad = || Error::invalid("No valid URL specified");
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((byte, tail)) = rest.split_first() {
        rest = tail;
        if *byte != b'%' {
            out.push(*byte);
            continue;
        }
        let digits = rest.get(..2).and_then(|digits| std::str::from_utf8(digits).ok()).ok_or_else(bad)?;
        out.push(u8::from_str_radix(digits, 16).map_err(|_| bad())?);
        rest = &rest[2..];
    }
    String::from_utf8(out).map_err(|_| bad())
}

/// The options that a file name stands for: `nbd://host:port/export`, `nbd+unix:///export?socket=path`, the same with
/// `nbds` for TLS, `nbd:host:port:exportname=name` and `nbd:unix:path:exportname=name`.
///
/// # Errors
/// If the name is none of these.
pub(super) fn parse_filename(filename: &str) -> Result<Options> {
    if filename.contains("://") {
        return parse_url(filename);
    }
    let mut options = Options::new();
    let (place, export) = match filename.split_once(":exportname=") {
        Some((_, "")) => return Ok(options),
        Some((place, export)) => (place, Some(export)),
        None => (filename, None),
    };
    if let Some(export) = export {
        options.set("export", export);
    }
    let Some(place) = place.strip_prefix("nbd:") else {
        return Err(Error::invalid("File name string for NBD must start with 'nbd:'"));
    };
    if place.is_empty() {
        return Ok(options);
    }
    let address = if let Some(path) = place.strip_prefix("unix:") {
        Address::Unix(path.into())
    } else {
        let bad = || Error::invalid(format!("error parsing address '{place}'"));
        let (host, port) = place.rsplit_once(':').ok_or_else(bad)?;
        if host.contains(':') && !(host.starts_with('[') && host.ends_with(']')) {
            return Err(bad());
        }
        let host = if host.is_empty() { "localhost" } else { host };
        Address::Tcp { host: host.trim_matches(['[', ']']).to_owned(), port: port.to_owned() }
    };
    options.merge_defaults(address.options());
    Ok(options)
}

fn parse_url(url: &str) -> Result<Options> {
    let bad = || Error::invalid("No valid URL specified");
    let (scheme, rest) = url.split_once("://").ok_or_else(bad)?;
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let (place, export) = rest.split_once('/').map_or((rest, ""), |(place, export)| (place, export));
    let mut options = Options::new();
    if !export.is_empty() {
        options.set("export", unescape(export)?);
    }
    // `nbds` is how libnbd writes that TLS is wanted; the credentials come as an option.
    let address = match scheme {
        "nbd" | "nbd+tcp" | "nbds" | "nbds+tcp" => {
            if query.is_some() {
                return Err(bad());
            }
            let (host, port) = match place.strip_prefix('[') {
                Some(literal) => {
                    let (host, port) = literal.split_once(']').ok_or_else(bad)?;
                    let port =
                        if port.is_empty() { None } else { Some(port.strip_prefix(':').ok_or_else(bad)?) };
                    (host, port)
                }
                None => place.split_once(':').map_or((place, None), |(host, port)| (host, Some(port))),
            };
            if host.is_empty() {
                return Err(bad());
            }
            let port = match port {
                Some(port) => port.parse::<u16>().map_err(|_| bad())?,
                None => DEFAULT_PORT,
            };
            Address::Tcp { host: unescape(host)?, port: port.to_string() }
        }
        "nbd+unix" | "nbds+unix" => {
            let path =
                query.and_then(|query| query.strip_prefix("socket=")).filter(|path| !path.contains('&'));
            if !place.is_empty() {
                return Err(bad());
            }
            Address::Unix(unescape(path.ok_or_else(bad)?)?.into())
        }
        _ => return Err(bad()),
    };
    options.merge_defaults(address.options());
    if scheme.starts_with("nbds") {
        options.set("tls", true);
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(name: &str) -> Option<(Address, Option<String>)> {
        let mut options = parse_filename(name).ok()?;
        let export = options.take_text("export");
        Some((Address::take(&mut options).ok()?, export))
    }

    #[test]
    fn names_are_taken_apart() {
        let tcp = |host: &str, port: &str| Address::Tcp { host: host.to_owned(), port: port.to_owned() };
        let unix = |path: &str| Address::Unix(path.into());
        for (name, address, export) in [
            ("nbd://h", tcp("h", "10809"), None),
            ("nbd://h:7/a%20b/c", tcp("h", "7"), Some("a b/c")),
            ("nbd://[::1]:7/", tcp("::1", "7"), None),
            ("nbds://h/x", tcp("h", "10809"), Some("x")),
            ("nbd+unix:///x?socket=/tmp/a%20b", unix("/tmp/a b"), Some("x")),
            ("nbd+unix://?socket=s", unix("s"), None),
            ("nbd:h:7", tcp("h", "7"), None),
            ("nbd:[::1]:7:exportname=x:y", tcp("::1", "7"), Some("x:y")),
            ("nbd:unix:/s:exportname=x", unix("/s"), Some("x")),
            ("nbd:unix:/s", unix("/s"), None),
        ] {
            assert_eq!(parsed(name), Some((address, export.map(str::to_owned))), "{name}");
        }
        for name in [
            "nbd://",
            "nbd:///x",
            "nbd://h:port",
            "nbd://h?socket=s",
            "nbd+unix://h/x?socket=s",
            "nbd+unix:///x",
            "nbd:h",
            "nbd:a:b:c",
            "nbd://h/%zz",
            "nbd://[::1/x",
            "http://h",
        ] {
            assert_eq!(parsed(name), None, "{name}");
        }
    }

    #[test]
    fn names_that_are_made_are_understood() {
        for (address, export) in [
            (Address::Unix("/a b/c&d".into()), "x/y z"),
            (Address::Unix("/s".into()), ""),
            (Address::Tcp { host: "h".to_owned(), port: "7".to_owned() }, "ü?"),
            (Address::Tcp { host: "h".to_owned(), port: "7".to_owned() }, ""),
        ] {
            let again = parsed(&address.filename(export));
            assert_eq!(again, Some((address, (!export.is_empty()).then(|| export.to_owned()))));
        }
    }
}
