//! `--drive KEY=VALUE,…`

use super::words::{split, switch};
use machine::{CacheMode, DriveSpec, ErrorPolicy, References};

/// What `--drive` takes.
const ACCEPTED: &str = "file=PATH, id=NAME, node-name=NAME, format=FORMAT, if=virtio, readonly=on|off, snapshot=on|off, serial=TEXT, queues=N, \
                        cache=MODE, aio=io_uring|native|threads, discard=unmap|ignore, \
                        werror=report|ignore|stop|enospc, rerror=report|ignore|stop, \
                        references=files|any|none, and options of the image's driver";

/// The formats that a disk can have.
const FORMATS: &[&str] = &["raw", "qcow2", "luks"];

/// Options of drivers that have no dot in their names.
const OF_DRIVERS: &[&str] = &[
    "cache-clean-interval",
    "cache-size",
    "discard-no-unref",
    "l2-cache-entry-size",
    "l2-cache-size",
    "lazy-refcounts",
    "offset",
    "overlap-check",
    "refcount-cache-size",
    "size",
];

/// Reads a drive's options. A comma in a value is written twice.
pub(crate) fn parse(text: &str) -> Result<DriveSpec, String> {
    let mut drive = DriveSpec::default();
    for word in split(text) {
        let Some((key, value)) = word.split_once('=') else {
            return Err(format!("{word:?} is no option of a drive; accepted are {ACCEPTED}"));
        };
        set(&mut drive, key, value)?;
    }
    if drive.file.is_empty() {
        return Err(format!("a drive needs file=PATH; accepted are {ACCEPTED}"));
    }
    Ok(drive)
}

fn set(drive: &mut DriveSpec, key: &str, value: &str) -> Result<(), String> {
    let wrong = |accepted: &str| Err(format!("{key}={value} is not possible; accepted is {accepted}"));
    let mut option = |key: &str| drive.options.push((key.to_owned(), value.to_owned()));
    match key {
        "file" => value.clone_into(&mut drive.file),
        "format" if FORMATS.contains(&value) => drive.format = Some(value.to_owned()),
        "format" => return wrong(&format!("format={}", FORMATS.join(" or "))),
        "if" if value == "virtio" => {}
        "if" => return wrong("if=virtio"),
        "media" if value == "disk" => {}
        "media" => return wrong("media=disk"),
        "readonly" | "read-only" => drive.read_only = switch(key, value)?,
        "snapshot" => drive.snapshot = switch(key, value)?,
        "serial" if value.len() <= 20 && value.is_ascii() => drive.serial = Some(value.to_owned()),
        "serial" => return wrong("at most 20 ASCII characters"),
        "queues" => match value.parse() {
            Ok(queues @ 1..=64) => drive.queues = Some(queues),
            _ => return wrong("a number from 1 to 64"),
        },
        "cache" => match CacheMode::from_name(value) {
            Some(mode) => drive.cache = Some(mode),
            None => return wrong("none, directsync, writeback, writethrough or unsafe"),
        },
        "aio" if ["io_uring", "native", "threads"].contains(&value) => option("file.aio"),
        "aio" => return wrong("io_uring, native or threads"),
        "discard" if ["unmap", "on", "ignore", "off"].contains(&value) => option("discard"),
        "discard" => return wrong("unmap or ignore"),
        "werror" | "rerror" => {
            let found = ErrorPolicy::NAMES.iter().find(|(name, _)| *name == value).map(|(_, policy)| *policy);
            match found {
                Some(policy) if key == "werror" => drive.write_errors = Some(policy),
                Some(policy) if policy != ErrorPolicy::Enospc => drive.read_errors = Some(policy),
                _ => return wrong("report, ignore, stop, or for werror enospc"),
            }
        }
        "references" => {
            drive.references = match value {
                "files" => References::Files,
                "any" => References::Any,
                "none" => References::Nothing,
                _ => return wrong("files, any or none"),
            }
        }
        "id" if block_name(value) => drive.id = Some(value.to_owned()),
        "node-name" if block_name(value) => option(key),
        "id" | "node-name" => return wrong("a letter, and letters, digits, '-', '.' and '_', 31 at most"),
        // Disks have the order of the command line.
        "index" => {}
        _ if key.contains('.') || OF_DRIVERS.contains(&key) => option(key),
        _ => return Err(format!("{key:?} is no option of a drive; accepted are {ACCEPTED}")),
    }
    Ok(())
}

/// Whether a drive or its node may have this name.
fn block_name(name: &str) -> bool {
    let mut letters = name.bytes();
    name.len() < 32
        && letters.next().is_some_and(|first| first.is_ascii_alphabetic())
        && letters.all(|letter| letter.is_ascii_alphanumeric() || b"-._".contains(&letter))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drives_people_write() {
        let text = "file=a,,b.raw,format=raw,if=virtio,readonly=on,serial=X1,queues=4,cache=none,aio=threads,\
                    file.locking=off,l2-cache-size=1M,references=none,werror=stop";
        let option = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let expected = DriveSpec {
            id: None,
            file: "a,b.raw".into(),
            format: Some("raw".into()),
            read_only: true,
            snapshot: false,
            serial: Some("X1".into()),
            queues: Some(4),
            cache: Some(CacheMode::None),
            references: References::Nothing,
            read_errors: None,
            write_errors: Some(ErrorPolicy::Stop),
            options: vec![
                option("file.aio", "threads"),
                option("file.locking", "off"),
                option("l2-cache-size", "1M"),
            ],
        };
        assert_eq!(parse(text).unwrap(), expected);
        assert!(parse("file=a,snapshot=on").unwrap().snapshot);
        assert_eq!(parse("file=a,id=disk0,node-name=n").unwrap().id.as_deref(), Some("disk0"));
        for text in [
            "",
            "x",
            "file=",
            "format=raw",
            "file=a,cache=x",
            "file=a,queues=0",
            "file=a,b=c",
            "file=a,aio=z",
            "file=a,id=0",
            "file=a,rerror=enospc",
            "file=a,werror=x",
            "file=a,node-name=#x",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
