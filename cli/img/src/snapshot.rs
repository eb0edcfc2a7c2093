//! `snapshot`.

use crate::commands::flags;
use crate::shared_options::SharedOptions;
use crate::tool::{Failure, Outcome, Tool, one_file, parse};
use block_graph::{Error, Image, OpenFlags, SnapshotInfo};
use blockdev::syntax::size::human;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

enum Action {
    List,
    Apply(String),
    Create(String),
    Delete(String),
}

/// Lists, makes, applies or deletes internal snapshots.
pub(crate) async fn run(tool: &Tool, words: Vec<String>) -> Outcome {
    let mut shared = SharedOptions::default();
    let mut action = None;
    let operands = parse(flags("snapshot"), words, |key, value| {
        let Some(value) = shared.take(key, value)? else { return Ok(()) };
        let new = match key {
            "l" => Action::List,
            "a" => Action::Apply(value),
            "c" => Action::Create(value),
            _ => Action::Delete(value),
        };
        match action.replace(new) {
            Some(_) => Err(Failure::Usage("Cannot mix '-l', '-a', '-c', '-d'".to_owned())),
            None => Ok(()),
        }
    })?;
    let filename = one_file(operands)?;
    let context = shared.context();
    let flags = match action {
        Some(Action::List) => OpenFlags::READ,
        _ => OpenFlags { resize: false, unmap: false, ..OpenFlags::WRITE },
    };
    let node = shared.named(&filename).open(tool, &context, flags).await?;
    let done = match (action, node.driver().image()) {
        (None, _) => Ok(()),
        (Some(Action::List), image) => {
            list(&image.map(Image::snapshots).unwrap_or_default());
            Ok(())
        }
        (Some(action), image) => change(image, action).await,
    };
    let closed = node.close().await;
    done?;
    closed?;
    Ok(ExitCode::SUCCESS)
}

async fn change(image: Option<&dyn Image>, action: Action) -> Result<(), Failure> {
    let unsupported = || Error::errno_only(block_graph::Errno::NOT_SUPPORTED);
    let failed = |what: &str, name: &str, error: &Error| {
        Failure::of(&format!("Could not {what} snapshot '{name}': "), error)
    };
    match action {
        Action::List => Ok(()),
        Action::Create(name) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let snapshot = SnapshotInfo {
                // Names have room for so many bytes.
                name: cut(&name, 255).to_owned(),
                date_seconds: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
                date_nanoseconds: now.subsec_micros() * 1000,
                ..SnapshotInfo::default()
            };
            let created = match image {
                Some(image) => image.snapshot_create(snapshot).await,
                None => Err(unsupported()),
            };
            created.map_err(|error| {
                Failure::new(format!("Could not create snapshot '{name}': {}", error.errno()))
            })
        }
        Action::Apply(name) => {
            let applied = match image {
                Some(image) => image.snapshot_apply(&name).await,
                None => Err(Error::unsupported("Block driver does not support internal snapshots")),
            };
            applied.map_err(|error| failed("apply", &name, &error))
        }
        Action::Delete(name) => {
            let snapshots = image.map(Image::snapshots).unwrap_or_default();
            if !snapshots.iter().any(|snapshot| snapshot.id == name || snapshot.name == name) {
                return Err(Failure::new(format!("Could not delete snapshot '{name}': snapshot not found")));
            }
            let deleted = match image {
                Some(image) => image.snapshot_delete(&name).await,
                None => Err(unsupported()),
            };
            deleted.map_err(|error| failed("delete", &name, &error))
        }
    }
}

/// As much of a text as has at most `most` bytes.
fn cut(text: &str, most: usize) -> &str {
    let end = (0..=most.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or_default()]
}

fn list(snapshots: &[SnapshotInfo]) {
    if snapshots.is_empty() {
        return;
    }
    println!("Snapshot list:");
    table(snapshots).iter().for_each(|line| println!("{line}"));
}

/// A table of snapshots, with its head.
pub(crate) fn table(snapshots: &[SnapshotInfo]) -> Vec<String> {
    let head = row("ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT");
    let rows = snapshots.iter().map(|snapshot| {
        let milliseconds = snapshot.vm_clock_ns / 1_000_000;
        let seconds = milliseconds / 1000;
        let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
        let clock = format!("{hours:04}:{minutes:02}:{:02}.{:03}", seconds % 60, milliseconds % 1000);
        let icount = snapshot.icount.map_or_else(|| "--".to_owned(), |icount| icount.to_string());
        let size = human(snapshot.vm_state_size);
        row(&snapshot.id, &snapshot.name, &size, &local_time(snapshot.date_seconds), &clock, &icount)
    });
    std::iter::once(head).chain(rows).collect()
}

fn row(id: &str, tag: &str, size: &str, date: &str, clock: &str, icount: &str) -> String {
    format!("{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}")
}

/// A time of this host: `2026-01-31 23:59:59`.
fn local_time(seconds: u32) -> String {
    match jiff::Timestamp::from_second(i64::from(seconds)) {
        Ok(time) => time.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string(),
        Err(_) => seconds.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::{SnapshotInfo, cut, table};

    #[test]
    fn a_table() {
        let snapshot = SnapshotInfo {
            id: "1".into(),
            name: "first".into(),
            vm_state_size: 3 << 20,
            vm_clock_ns: 3_723_004_000_000,
            ..SnapshotInfo::default()
        };
        let lines = table(&[snapshot]);
        assert_eq!(
            lines[0],
            "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT"
        );
        assert!(lines[1].starts_with("1       first               3 MiB 19"), "{}", lines[1]);
        assert!(lines[1].ends_with("  0001:02:03.004         --"), "{}", lines[1]);
    }

    #[test]
    fn names_are_cut_between_letters() {
        assert_eq!(cut("aä", 2), "a");
        assert_eq!(cut("abc", 5), "abc");
    }
}
