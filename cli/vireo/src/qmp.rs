//! `vireo qmp`: commands for a running VM.

use anyhow::{Result, bail};
use clap::Args;
use control::Address;
use control::client::{Client, ClientError};
use serde_json::{Map, Value};
use std::io::{self, Write};
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  vireo run debian --qmp unix:/tmp/vm.sock
  vireo qmp /tmp/vm.sock query-status
  vireo qmp /tmp/vm.sock query-block --pretty
  vireo qmp /tmp/vm.sock blockdev-snapshot-sync device=virtio0 snapshot-file=now.qcow2
  vireo qmp /tmp/vm.sock block_resize '{\"device\": \"virtio0\", \"size\": 1073741824}'
  vireo qmp /tmp/vm.sock --events";

/// Options of `vireo qmp`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Options {
    /// The VM's control socket, as in its --qmp: a path, unix:PATH or tcp:HOST:PORT.
    socket: Address,
    /// The command; `query-commands` lists all.
    #[arg(required_unless_present = "events")]
    command: Option<String>,
    /// Its arguments: a JSON object, or NAME=VALUE each. A value that is JSON counts as that, any other as text.
    arguments: Vec<String>,
    /// Print events, one a line, until the VM ends; after the command, if there is one.
    #[arg(long)]
    events: bool,
    /// Print answers over several lines.
    #[arg(long)]
    pretty: bool,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let arguments = arguments(&options.arguments)?;
    let mut client = Client::connect(&options.socket)?;
    if let Some(command) = &options.command {
        print(&client.execute(command, arguments)?, options.pretty)?;
    }
    if !options.events {
        return Ok(ExitCode::SUCCESS);
    }
    loop {
        match client.event() {
            Ok(event) => print(&event, options.pretty)?,
            Err(ClientError::Ended) => return Ok(ExitCode::SUCCESS),
            Err(error) => return Err(error.into()),
        }
    }
}

fn print(value: &Value, pretty: bool) -> Result<()> {
    let text = if pretty { format!("{value:#}") } else { value.to_string() };
    let mut output = io::stdout().lock();
    match writeln!(output, "{text}").and_then(|()| output.flush()) {
        // Whoever read it has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => Ok(result?),
    }
}

/// A command's arguments, of words.
fn arguments(words: &[String]) -> Result<Map<String, Value>> {
    let mut all = Map::new();
    for word in words {
        if word.trim_start().starts_with('{') {
            match serde_json::from_str(word) {
                Ok(Value::Object(object)) => all.extend(object),
                Ok(_) => bail!("{word:?} is no JSON object"),
                Err(error) => bail!("{word:?} is no JSON object: {error}"),
            }
            continue;
        }
        let Some((name, value)) = word.split_once('=').filter(|(name, _)| !name.is_empty()) else {
            bail!("{word:?} is no argument; accepted are a JSON object, and NAME=VALUE");
        };
        let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
        all.insert(name.to_owned(), value);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn arguments_people_write() {
        let read = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
            arguments(&words).map(Value::Object)
        };
        assert_eq!(
            read(&["device=virtio0", "size=1048576", "force=true", "note=a=b", "list=[1]"]).unwrap(),
            json!({"device": "virtio0", "size": 1_048_576, "force": true, "note": "a=b", "list": [1]})
        );
        assert_eq!(read(&["{\"a\": {\"b\": 1}}"]).unwrap(), json!({"a": {"b": 1}}));
        for word in ["x", "=1", "{", "{1}"] {
            assert!(read(&[word]).is_err(), "{word}");
        }
    }
}
