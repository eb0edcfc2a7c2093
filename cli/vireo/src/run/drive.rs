//! `--drive KEY=VALUE,…`

use super::words::{split, switch};
use machine::DriveSpec;

/// What `--drive` takes.
const ACCEPTED: &str =
    "file=PATH, format=raw, if=virtio, readonly=on|off, snapshot=on|off, serial=TEXT, queues=N";

/// Reads a drive's options. A comma in a value is written twice.
pub(crate) fn parse(text: &str) -> Result<DriveSpec, String> {
    let mut drive = DriveSpec::default();
    let mut file = None;
    for word in split(text) {
        let Some((key, value)) = word.split_once('=') else {
            return Err(format!("{word:?} is no option of a drive; accepted are {ACCEPTED}"));
        };
        let wrong = |accepted: &str| Err(format!("{key}={value} is not possible; accepted is {accepted}"));
        match key {
            "file" => file = Some(value.to_owned()),
            "format" if value == "raw" => {}
            "format" => return wrong("format=raw"),
            "if" if value == "virtio" => {}
            "if" => return wrong("if=virtio"),
            "readonly" | "read-only" => drive.read_only = switch(key, value)?,
            "snapshot" => drive.snapshot = switch(key, value)?,
            "serial" if value.len() <= 20 && value.is_ascii() => drive.serial = Some(value.to_owned()),
            "serial" => return wrong("at most 20 ASCII characters"),
            "queues" => match value.parse() {
                Ok(queues @ 1..=64) => drive.queues = Some(queues),
                _ => return wrong("a number from 1 to 64"),
            },
            // Names within the VM, which nothing refers to yet.
            "id" | "index" => {}
            _ => return Err(format!("{key:?} is no option of a drive; accepted are {ACCEPTED}")),
        }
    }
    match file {
        Some(file) if !file.is_empty() => {
            drive.file = file.into();
            Ok(drive)
        }
        _ => Err(format!("a drive needs file=PATH; accepted are {ACCEPTED}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drives_people_write() {
        let drive = parse("file=a,,b.raw,format=raw,if=virtio,readonly=on,serial=X1,queues=4").unwrap();
        let expected = DriveSpec {
            file: "a,b.raw".into(),
            read_only: true,
            snapshot: false,
            serial: Some("X1".into()),
            queues: Some(4),
        };
        assert_eq!(drive, expected);
        assert!(parse("file=a,snapshot=on").unwrap().snapshot);
        for text in ["", "x", "file=", "format=raw", "file=a,format=qcow9", "file=a,queues=0", "file=a,b=c"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
