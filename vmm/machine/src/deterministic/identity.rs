//! What a machine is, in words: a recording goes with the machine that it was made of.

use crate::{BootSpec, DeterministicSpec, DeviceSpec, MachineError, MachineKind, MachineSpec};
use accel::Accelerator;
use guest_memory::MemorySource;
use recording::RecordingError;
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// Names of what a recording says of time and random numbers.
const SHIFT: &str = "shift";
const SEED: &str = "seed";
const EPOCH: &str = "rtc";

/// Why there is no recording, or no replay.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// It cannot be opened.
    #[error("{0}")]
    Read(io::Error),
    /// It cannot be written.
    #[error("it cannot be written: {0}")]
    Write(io::Error),
    /// It is none.
    #[error(transparent)]
    Format(#[from] RecordingError),
    /// It was made of another machine.
    #[error("it was made of another machine: {0}")]
    Other(Difference),
    /// A drive would not be at the replay what it is now.
    #[error(
        "the drive {path} may change: a recording needs readonly=on or snapshot=on, so that each replay finds what it found",
        path = .0.display()
    )]
    Drive(PathBuf),
    /// Guest memory may begin with something in it.
    #[error("guest memory in the file {path} may begin with something in it; leave the file out", path = .0.display())]
    Memory(PathBuf),
}

/// What of a machine is not what was recorded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} was {recorded:?} and is {now:?}")]
pub struct Difference {
    /// Its name.
    pub what: String,
    /// What was recorded; empty if there was none.
    pub recorded: String,
    /// What it is.
    pub now: String,
}

type Word = (String, String);
type Words = Vec<Word>;

/// Whether a machine can be recorded.
pub(super) fn check(spec: &MachineSpec) -> Result<(), TraceError> {
    if let Some(drive) = spec.drives.iter().find(|drive| !drive.read_only && !drive.snapshot) {
        return Err(TraceError::Drive((&drive.file).into()));
    }
    match &spec.host.memory.source {
        MemorySource::File(path) => Err(TraceError::Memory(path.clone())),
        _ => Ok(()),
    }
}

/// What of a machine a guest can see. How it is executed and where its ports lead is not part of that.
pub(super) fn of(spec: &MachineSpec, accelerator: &dyn Accelerator) -> Result<Words, MachineError> {
    let mut words = Words::new();
    let mut add = |name: &str, value: String| words.push((name.to_owned(), value));
    let kind = MachineKind::NAMES.iter().find(|(_, kind)| *kind == spec.kind);
    add("machine", kind.map_or("", |(name, _)| name).to_owned());
    add("memory", spec.memory.to_string());
    add("cpu", spec.cpu.to_string());
    add("cpuid", cpuid(spec, accelerator)?);
    if !spec.numa.nodes.is_empty() {
        add("numa", format!("{:?}", spec.numa));
    }
    match &spec.boot {
        BootSpec::Firmware(image) => add("bios", file("firmware image", image)?),
        BootSpec::Kernel(kernel) => {
            add("kernel", file("kernel", &kernel.kernel)?);
            if let Some(initrd) = &kernel.initrd {
                add("initrd", file("initrd", initrd)?);
            }
            add("append", kernel.append.clone());
            add("unpack", kernel.unpack.to_string());
        }
    }
    for (number, drive) in spec.drives.iter().enumerate() {
        let failed = |source| MachineError::File { what: "drive", path: (&drive.file).into(), source };
        let len =
            File::open(&drive.file).and_then(|mut file| io::Seek::seek(&mut file, io::SeekFrom::End(0)));
        let access = if drive.read_only { "read-only" } else { "snapshot" };
        let queues = drive.queues.unwrap_or(1);
        let serial = drive.serial.clone().unwrap_or_default();
        let text = format!("{} bytes, {access}, {queues} queues, serial {serial:?}", len.map_err(failed)?);
        add(&format!("drive {number}"), text);
    }
    add("serial ports", spec.serials.len().to_string());
    add("console", spec.console.is_some().to_string());
    add("entropy source", spec.rng.to_string());
    add("balloon", spec.balloon.to_string());
    add("devices", devices(spec));
    add("no-reboot", spec.no_reboot.to_string());
    Ok(words)
}

/// What instructions take, where random numbers begin, and when the clock was.
pub(super) fn of_time(spec: &DeterministicSpec) -> Words {
    let DeterministicSpec { shift, seed, epoch, sleep: _, trace: _ } = spec;
    [(SHIFT, shift.to_string()), (SEED, seed.to_string()), (EPOCH, epoch.to_string())]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
}

/// Whether a recording's header is of the machine that `now` describes. Takes over to `spec` what it says of time.
pub(super) fn compare(
    recorded: &[Word],
    now: &[Word],
    spec: &mut DeterministicSpec,
) -> Result<(), TraceError> {
    let find = |words: &[Word], name: &str| {
        words.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone())
    };
    let number = |name: &str| {
        let text = find(recorded, name).unwrap_or_default();
        let bad = Difference { what: name.to_owned(), recorded: text.clone(), now: "a number".to_owned() };
        Ok::<_, TraceError>((text, TraceError::Other(bad)))
    };
    let (text, bad) = number(SHIFT)?;
    spec.shift = text.parse().ok().filter(|shift| *shift <= clock::MAX_SHIFT).ok_or(bad)?;
    let (text, bad) = number(SEED)?;
    spec.seed = text.parse().map_err(|_| bad)?;
    let (text, bad) = number(EPOCH)?;
    spec.epoch = text.parse().map_err(|_| bad)?;
    let of_time = of_time(spec);
    let mine = now.iter().chain(&of_time);
    let names = recorded.iter().chain(mine.clone()).map(|(name, _)| name);
    let all: Words = mine.cloned().collect();
    for name in names {
        let (then, now) = (find(recorded, name).unwrap_or_default(), find(&all, name).unwrap_or_default());
        if then != now {
            return Err(TraceError::Other(Difference { what: name.clone(), recorded: then, now }));
        }
    }
    Ok(())
}

/// A digest of all that CPUID says.
fn cpuid(spec: &MachineSpec, accelerator: &dyn Accelerator) -> Result<String, MachineError> {
    let mut cpu = spec.cpu.clone();
    // Not the host's, which is another whenever it is measured.
    cpu.tsc_hertz = cpu.tsc_hertz.or(Some(clock::NANOS_PER_SECOND));
    let mut digest = Sha256::new();
    for leaf in accelerator.cpuid(&cpu)? {
        for word in [leaf.leaf, leaf.sub].iter().chain(&leaf.registers) {
            digest.update(word.to_le_bytes());
        }
    }
    Ok(hex(&digest.finalize()))
}

/// A file's length and digest.
fn file(what: &'static str, path: &Path) -> Result<String, MachineError> {
    let failed = |source| MachineError::File { what, path: path.to_owned(), source };
    let mut file = File::open(path).map_err(failed)?;
    let mut digest = Sha256::new();
    let mut piece = vec![0; 1 << 16];
    let mut len = 0u64;
    loop {
        match io::Read::read(&mut file, &mut piece) {
            Ok(0) => break,
            Ok(count) => {
                digest.update(&piece[..count]);
                len += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(format!("{len} bytes, {}", hex(&digest.finalize())))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn devices(spec: &MachineSpec) -> String {
    let mut list: Vec<String> = Vec::new();
    for device in &spec.devices {
        let place = match device {
            DeviceSpec::DebugExit { port, count } => format!(" at {port:#x}, {count} ports"),
            DeviceSpec::DebugConsole { port, .. } => format!(" at {port:#x}"),
            DeviceSpec::PcTestdev => String::new(),
        };
        list.push(format!("{}{place}", device.name()));
    }
    list.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_named() {
        let words = |list: &[(&str, &str)]| -> Words {
            list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        let time = [("shift", "3"), ("seed", "9"), ("rtc", "-5")];
        let recorded = words(&[&[("memory", "1"), ("initrd", "a")][..], &time].concat());
        let compare = |recorded: &Words, now: &[(&str, &str)]| {
            let mut spec = DeterministicSpec::default();
            compare(recorded, &words(now), &mut spec).map(|()| spec).map_err(|error| error.to_string())
        };
        let spec = compare(&recorded, &[("memory", "1"), ("initrd", "a")]).unwrap();
        assert_eq!((spec.shift, spec.seed, spec.epoch), (3, 9, -5));
        let other = "it was made of another machine: ";
        assert_eq!(
            compare(&recorded, &[("memory", "2"), ("initrd", "a")]).unwrap_err(),
            format!("{other}memory was \"1\" and is \"2\"")
        );
        assert_eq!(
            compare(&recorded, &[("memory", "1")]).unwrap_err(),
            format!("{other}initrd was \"a\" and is \"\"")
        );
        assert_eq!(
            compare(&recorded, &[("memory", "1"), ("initrd", "a"), ("numa", "x")]).unwrap_err(),
            format!("{other}numa was \"\" and is \"x\"")
        );
        for shift in ["", "11", "x"] {
            let bad = words(&[("shift", shift), ("seed", "9"), ("rtc", "-5")]);
            assert!(compare(&bad, &[]).unwrap_err().contains("shift was"), "{shift}");
        }
    }
}
