//! The command line.

use crate::Failure;
use block_graph::{CacheMode, DetectZeroes};
use getopt::{Flag, Getopt, Word};
use std::time::Duration;

/// The options, as getopt_long reads them.
pub(crate) const FLAGS: &[Flag] = &[
    Flag::switch('h', "help", "Show this help").or("help"),
    Flag::switch('V', "version", "Show the version").or("version"),
    Flag::valued('p', "port", "PORT", "TCP port to listen on (10809)").or("port"),
    Flag::valued('b', "bind", "IFACE", "Address to listen at (0.0.0.0)").or("bind"),
    Flag::valued('k', "socket", "PATH", "Unix socket to listen on instead").or("socket"),
    Flag::valued('e', "shared", "NUM", "Clients at a time (1); 0 is any number").or("shared"),
    Flag::switch('t', "persistent", "Go on after the last client").or("persistent"),
    Flag::switch('v', "verbose", "Say why clients' connections end").or("verbose"),
    Flag::valued('x', "export-name", "NAME", "Name of the export (empty)").or("export-name"),
    Flag::valued('D', "description", "TEXT", "Description of the export").or("description"),
    Flag::long_valued("handshake-limit", "N", "Seconds that a handshake may take (10); 0 is for ever"),
    Flag::valued('o', "offset", "OFFSET", "Where the export begins in the image").or("offset"),
    Flag::switch('A', "allocation-depth", "Offer the allocation depth").or("allocation-depth"),
    Flag::valued('B', "bitmap", "NAME", "Offer a dirty bitmap").or("bitmap"),
    Flag::switch('L', "list", "List the exports of another server").or("list"),
    Flag::long_valued("object", "TYPE,id=ID,...", "Define a secret or TLS credentials"),
    Flag::long_valued("tls-creds", "ID", "TLS with these credentials, or nothing"),
    Flag::long_valued("tls-authz", "ID", "Who may come in (not supported)"),
    Flag::long_valued("tls-hostname", "NAME", "Name in the server's certificate, with -L"),
    Flag::valued('T', "trace", "PATTERN", "Ignored: there is no tracing").or("trace"),
    Flag::long_switch("fork", "Go on in the background once the server runs"),
    Flag::long_valued("pid-file", "PATH", "Write the process's number to a file"),
    Flag::long_valued("selinux-label", "LABEL", "Label of the socket (not supported)"),
    Flag::valued('c', "connect", "DEV", "Connect a /dev/nbdN (not supported)").or("connect"),
    Flag::switch('d', "disconnect", "Disconnect a /dev/nbdN (not supported)").or("disconnect"),
    Flag::valued('f', "format", "FORMAT", "Format of the image").or("format"),
    Flag::switch('r', "read-only", "Let nobody write").or("read-only"),
    Flag::switch('s', "snapshot", "Write to a temporary file above the image").or("snapshot"),
    Flag::valued(
        'l',
        "load-snapshot",
        "SNAPSHOT",
        "Serve an internal snapshot: an id or name, or \
        snapshot.id=ID,snapshot.name=NAME",
    )
    .or("load-snapshot"),
    Flag::switch('n', "nocache", "As --cache=none").or("nocache"),
    Flag::long_valued("cache", "MODE", "none, writeback, writethrough, directsync or unsafe"),
    Flag::long_valued("aio", "MODE", "threads, native or io_uring"),
    Flag::long_valued("discard", "MODE", "ignore or unmap"),
    Flag::long_valued("detect-zeroes", "MODE", "off, on or unmap"),
    Flag::long_switch("image-opts", "FILE is options that open the image"),
];

/// A snapshot to serve.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Snapshot {
    IdOrName(String),
    Both { id: Option<String>, name: Option<String> },
}

/// What is to be done.
#[derive(Debug)]
pub(crate) struct Arguments {
    pub(crate) file: Option<String>,
    pub(crate) port: Option<String>,
    pub(crate) bind: Option<String>,
    pub(crate) socket: Option<String>,
    /// 0 is any number.
    pub(crate) shared: usize,
    pub(crate) persistent: bool,
    pub(crate) verbose: bool,
    pub(crate) export_name: Option<String>,
    pub(crate) description: Option<String>,
    pub(crate) handshake_limit: Duration,
    pub(crate) offset: u64,
    pub(crate) allocation_depth: bool,
    pub(crate) bitmaps: Vec<String>,
    pub(crate) list: bool,
    pub(crate) objects: Vec<String>,
    pub(crate) tls_creds: Option<String>,
    pub(crate) tls_hostname: Option<String>,
    pub(crate) fork: bool,
    pub(crate) pid_file: Option<String>,
    pub(crate) format: Option<String>,
    pub(crate) read_only: bool,
    pub(crate) temporary: bool,
    pub(crate) snapshot: Option<Snapshot>,
    pub(crate) cache: Option<String>,
    pub(crate) aio: Option<String>,
    pub(crate) discard: Option<String>,
    pub(crate) detect_zeroes: DetectZeroes,
    pub(crate) image_opts: bool,
}

/// What a command line asks for.
pub(crate) enum Parsed {
    Help,
    Version,
    Run(Box<Arguments>),
}

/// What the command line asks for that is refused, and how often things stood there.
#[derive(Default)]
struct Asked {
    device: bool,
    authorization: bool,
    label: bool,
}

impl Default for Arguments {
    fn default() -> Self {
        Self {
            file: None,
            port: None,
            bind: None,
            socket: None,
            shared: 1,
            persistent: false,
            verbose: false,
            export_name: None,
            description: None,
            handshake_limit: Duration::from_secs(10),
            offset: 0,
            allocation_depth: false,
            bitmaps: Vec::new(),
            list: false,
            objects: Vec::new(),
            tls_creds: None,
            tls_hostname: None,
            fork: false,
            pid_file: None,
            format: None,
            read_only: false,
            temporary: false,
            snapshot: None,
            cache: None,
            aio: None,
            discard: None,
            detect_zeroes: DetectZeroes::Off,
            image_opts: false,
        }
    }
}

/// A number as C's `strtoull` with base 0 reads it: decimal, `0x` hexadecimal, `0` octal.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None if text.len() > 1 && text.starts_with('0') => u64::from_str_radix(&text[1..], 8).ok(),
        None => text.parse().ok(),
    }
}

fn bounded(text: String, what: &str) -> Result<String, Failure> {
    if text.len() > nbd::proto::MAX_STRING {
        Err(format!("export {what} '{text}' too long").into())
    } else {
        Ok(text)
    }
}

fn snapshot(text: String) -> Result<Snapshot, Failure> {
    if !text.starts_with("snapshot.") {
        return Ok(Snapshot::IdOrName(text));
    }
    let (mut id, mut name) = (None, None);
    for item in text.split(',') {
        match item.split_once('=') {
            Some(("snapshot.id", value)) => id = Some(value.to_owned()),
            Some(("snapshot.name", value)) => name = Some(value.to_owned()),
            _ => return Err(format!("Failed in parsing snapshot param `{text}'").into()),
        }
    }
    Ok(Snapshot::Both { id, name })
}

/// Reads the command line of the program called `name`.
pub(crate) fn parse(name: &str, words: Vec<String>) -> Result<Parsed, Failure> {
    let try_help = || format!("Try `{name} --help' for more information.");
    let mut arguments = Arguments::default();
    let mut asked = Asked::default();
    let mut files = Vec::new();
    for word in Getopt::new(FLAGS, words) {
        match word {
            Word::Option("help", _) => return Ok(Parsed::Help),
            Word::Option("version", _) => return Ok(Parsed::Version),
            Word::Option(key, value) => arguments.option(key, value, &mut asked)?,
            Word::Operand(file) => files.push(file),
            Word::MissingValue(word) => {
                let says = format!("option requires an argument -- '{}'", word.trim_start_matches('-'));
                return Err(Failure(vec![says, format!("{name}: {}", try_help())]));
            }
            Word::Unknown(_, says) => return Err(Failure(vec![says, format!("{name}: {}", try_help())])),
        }
    }
    arguments.check(&asked, &files)?;
    if !arguments.list {
        if files.len() != 1 {
            return Err(Failure(vec!["Invalid number of arguments".to_owned(), try_help()]));
        }
        arguments.file = files.pop();
    }
    Ok(Parsed::Run(Box::new(arguments)))
}

impl Arguments {
    fn option(&mut self, key: &str, value: String, asked: &mut Asked) -> Result<(), Failure> {
        match key {
            "port" => self.port = Some(value),
            "bind" => self.bind = Some(value),
            "socket" => {
                if !value.starts_with('/') {
                    return Err("socket path must be absolute".into());
                }
                self.socket = Some(value);
            }
            "shared" => {
                let shared = number(&value).filter(|shared| i32::try_from(*shared).is_ok());
                let bad = || format!("Invalid shared device number '{value}'");
                self.shared = shared.ok_or_else(bad)? as usize;
            }
            "persistent" => self.persistent = true,
            "verbose" => self.verbose = true,
            "export-name" => self.export_name = Some(bounded(value, "name")?),
            "description" => self.description = Some(bounded(value, "description")?),
            "handshake-limit" => {
                let limit = number(&value).and_then(|limit| u32::try_from(limit).ok());
                let bad = || format!("Invalid handshake limit '{value}'");
                self.handshake_limit = Duration::from_secs(limit.ok_or_else(bad)?.into());
            }
            "offset" => self.offset = number(&value).ok_or_else(|| format!("Invalid offset '{value}'"))?,
            "allocation-depth" => self.allocation_depth = true,
            "bitmap" => self.bitmaps.push(value),
            "list" => self.list = true,
            "object" => self.objects.push(value),
            "tls-creds" => self.tls_creds = Some(value),
            "tls-hostname" => self.tls_hostname = Some(value),
            "tls-authz" => asked.authorization = true,
            "fork" => self.fork = true,
            "pid-file" => self.pid_file = Some(value),
            "selinux-label" => asked.label = true,
            "connect" | "disconnect" => asked.device = true,
            "format" => self.format = Some(value),
            "read-only" => self.read_only = true,
            "snapshot" => self.temporary = true,
            "load-snapshot" => {
                self.snapshot = Some(snapshot(value)?);
                self.read_only = true;
            }
            "nocache" => once(&mut self.cache, "none".to_owned(), "-n and --cache")?,
            "cache" => once(&mut self.cache, value, "-n and --cache")?,
            "aio" => once(&mut self.aio, value, "--aio")?,
            "discard" => once(&mut self.discard, value, "--discard")?,
            "detect-zeroes" => {
                let known = DetectZeroes::from_name(&value);
                self.detect_zeroes = known.ok_or_else(|| {
                    format!("Failed to parse detect_zeroes mode: invalid parameter value: {value}")
                })?;
            }
            "image-opts" => self.image_opts = true,
            // There is nothing to trace.
            _ => {}
        }
        self.check_modes()
    }

    /// Modes are refused where they stand.
    fn check_modes(&self) -> Result<(), Failure> {
        if let Some(mode) = self.cache.as_deref().filter(|mode| CacheMode::from_name(mode).is_none()) {
            return Err(format!("Invalid cache mode `{mode}'").into());
        }
        if let Some(mode) =
            self.aio.as_deref().filter(|mode| !["threads", "native", "io_uring"].contains(mode))
        {
            return Err(format!("Invalid aio mode '{mode}'").into());
        }
        let modes = ["ignore", "off", "unmap", "on"];
        if let Some(mode) = self.discard.as_deref().filter(|mode| !modes.contains(mode)) {
            return Err(format!("Invalid discard mode `{mode}'").into());
        }
        if self.detect_zeroes == DetectZeroes::Unmap && !self.unmaps() {
            let message =
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap";
            return Err(message.into());
        }
        Ok(())
    }

    /// Whether clients' discards are passed on.
    pub(crate) fn unmaps(&self) -> bool {
        matches!(self.discard.as_deref(), Some("unmap" | "on"))
    }

    /// What cannot go together, or at all.
    fn check(&self, asked: &Asked, files: &[String]) -> Result<(), Failure> {
        if self.list {
            if !files.is_empty() {
                return Err("List mode is incompatible with a file name".into());
            }
            let of_a_disk = self.export_name.is_some()
                || self.description.is_some()
                || self.offset != 0
                || asked.device
                || self.format.is_some()
                || self.snapshot.is_some()
                || !self.bitmaps.is_empty()
                || self.allocation_depth
                || self.aio.is_some()
                || self.discard.is_some()
                || self.cache.is_some();
            if of_a_disk {
                return Err("List mode is incompatible with per-device settings".into());
            }
            if self.fork {
                return Err("List mode is incompatible with forking".into());
            }
        }
        if asked.authorization {
            return Err(match self.tls_creds {
                Some(_) => "--tls-authz is not supported".into(),
                None => "--tls-authz is not permitted without --tls-creds".into(),
            });
        }
        if self.tls_hostname.is_some() {
            if self.tls_creds.is_none() {
                return Err("--tls-hostname is not permitted without --tls-creds".into());
            }
            if !self.list {
                return Err("TLS hostname is only supported with export list".into());
            }
        }
        if asked.label {
            return Err("SELinux support not enabled in this binary".into());
        }
        if asked.device {
            return Err("Kernel /dev/nbdN support not available".into());
        }
        if self.image_opts && self.format.is_some() {
            return Err("--image-opts and -f are mutually exclusive".into());
        }
        Ok(())
    }
}

fn once(place: &mut Option<String>, value: String, what: &str) -> Result<(), Failure> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(format!("{what} can only be specified once").into()),
    }
}

/// What there is to say of the program called `name`.
pub(crate) fn help(name: &str) -> String {
    let mut text = format!(
        "Serves a disk image over the network, as a network block device.\n\n\
         Usage: {name} [OPTIONS] FILE\n       {name} -L [OPTIONS]\n\nOptions:\n"
    );
    for flag in FLAGS {
        let short = flag.short.map_or_else(|| "    ".to_owned(), |short| format!("-{short}, "));
        let long = flag.long.map(|long| format!("--{long}")).unwrap_or_default();
        let value = flag.value.map(|value| format!("={value}")).unwrap_or_default();
        text.push_str(&format!("  {:<34} {}\n", format!("{short}{long}{value}"), flag.about));
    }
    text.push_str(&format!(
        "\nExamples:\n  {name} -k /run/user/1000/disk.sock -f qcow2 -t disk.qcow2\n  \
         {name} -r -p 10809 -x backup -B bitmap0 -f qcow2 disk.qcow2\n  {name} -L -b server.example\n"
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::{Parsed, Snapshot, parse};

    fn parsed(line: &str) -> Result<Box<super::Arguments>, Vec<String>> {
        match parse("qemu-nbd", line.split_whitespace().map(str::to_owned).collect()) {
            Ok(Parsed::Run(arguments)) => Ok(arguments),
            Ok(_) => panic!("help"),
            Err(failure) => Err(failure.0),
        }
    }

    #[test]
    fn options_are_understood() {
        let all = parsed(
            "disk -t -e 4 -k /s -x name -o 0x200 -B a -B b -A --cache=none --discard=unmap \
                          --detect-zeroes=unmap -fraw -l snapshot.id=1,snapshot.name=x --handshake-limit=0",
        )
        .unwrap();
        assert_eq!((all.shared, all.offset, all.bitmaps.len()), (4, 512, 2));
        assert_eq!(all.format.as_deref(), Some("raw"));
        assert!(all.persistent && all.read_only && all.unmaps() && all.handshake_limit.is_zero());
        let snapshot = Snapshot::Both { id: Some("1".into()), name: Some("x".into()) };
        assert_eq!(all.snapshot, Some(snapshot));
        assert_eq!(parsed("-l first disk").unwrap().snapshot, Some(Snapshot::IdOrName("first".into())));
    }

    #[test]
    fn what_is_wrong_is_said_in_qemu_nbds_words() {
        for (line, says) in [
            ("", "Invalid number of arguments"),
            ("a b", "Invalid number of arguments"),
            ("-L a", "List mode is incompatible with a file name"),
            ("-L -x a", "List mode is incompatible with per-device settings"),
            ("-L --fork", "List mode is incompatible with forking"),
            ("-e -3 x", "Invalid shared device number '-3'"),
            ("-o z x", "Invalid offset 'z'"),
            ("-k s x", "socket path must be absolute"),
            ("--cache=foo x", "Invalid cache mode `foo'"),
            ("-n --cache=none x", "-n and --cache can only be specified once"),
            ("--aio=x f", "Invalid aio mode 'x'"),
            ("--discard=x f", "Invalid discard mode `x'"),
            ("--detect-zeroes=x f", "Failed to parse detect_zeroes mode: invalid parameter value: x"),
            ("-l snapshot.x=1 f", "Failed in parsing snapshot param `snapshot.x=1'"),
            ("--image-opts -f raw x", "--image-opts and -f are mutually exclusive"),
            ("--tls-hostname=h x", "--tls-hostname is not permitted without --tls-creds"),
            ("-c /dev/nbd0 x", "Kernel /dev/nbdN support not available"),
            ("--frob x", "unrecognized option '--frob'"),
        ] {
            assert_eq!(parsed(line).unwrap_err()[0], says, "{line}");
        }
    }
}
