//! The snapshot table (section "Snapshots").

use super::bytes::{u16_at, u32_at, u64_at};
use super::{MAX_SNAPSHOT_EXTRA_DATA, MAX_SNAPSHOT_TABLE_BYTES, Qcow2Error};

/// Bytes of an entry before its variable parts.
pub const ENTRY_BYTES: usize = 40;
/// Bytes of extra data that are known: 64-bit VM state size, disk size, instruction count.
const KNOWN_EXTRA: usize = 24;

/// An internal snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Where its L1 table is.
    pub l1_offset: u64,
    /// Entries of its L1 table.
    pub l1_entries: u32,
    /// The unique ID: a decimal number by convention.
    pub id: Vec<u8>,
    /// Its name.
    pub name: Vec<u8>,
    /// When it was taken, in seconds since 1970.
    pub seconds: u32,
    /// The nanoseconds of that second.
    pub nanoseconds: u32,
    /// How long the guest had run, in nanoseconds.
    pub vm_clock: u64,
    /// Bytes of VM state, behind the disk's end; 0 for none.
    pub vm_state_size: u64,
    /// The virtual disk's size then, in bytes; `None` if the entry does not say (version 2): the disk's size now.
    pub disk_size: Option<u64>,
    /// Instructions that the guest had executed, if the entry says it.
    pub icount: Option<u64>,
    /// Extra data behind what is known: preserved.
    pub unknown_extra: Vec<u8>,
    /// Bytes of extra data that the entry has in the file.
    pub extra_length: u32,
}

impl Snapshot {
    /// Bytes that the entry takes when it is written, padding included.
    pub fn encoded_length(&self) -> usize {
        (ENTRY_BYTES + self.extra().len() + self.id.len() + self.name.len()).next_multiple_of(8)
    }

    /// The extra data: at least through the disk's size, as version 3 wants.
    fn extra(&self) -> Vec<u8> {
        let mut extra = Vec::new();
        extra.extend(self.vm_state_size.to_be_bytes());
        extra.extend(self.disk_size.unwrap_or(0).to_be_bytes());
        if self.icount.is_some() || !self.unknown_extra.is_empty() {
            extra.extend(self.icount.unwrap_or(u64::MAX).to_be_bytes());
            extra.extend(&self.unknown_extra);
        }
        extra
    }
}

/// Reads a snapshot table from bytes step by step, since its length is known only when it has been read.
#[derive(Debug)]
pub struct TableReader {
    entries: u32,
    at: usize,
    /// The entries that have been read.
    pub snapshots: Vec<Snapshot>,
}

impl TableReader {
    /// A reader of a table of `entries` entries.
    pub fn new(entries: u32) -> Self {
        Self { entries, at: 0, snapshots: Vec::new() }
    }

    /// Bytes of the table that the entries read so far take, padding included.
    pub fn length(&self) -> usize {
        self.at
    }

    /// Reads on in `bytes`, the table's beginning. Returns `None` if all entries have been read, and otherwise how many
    /// bytes from the table's beginning are needed at least to get on.
    ///
    /// # Errors
    /// [`Qcow2Error::SnapshotTableTooLarge`], [`Qcow2Error::SnapshotExtraData`].
    pub fn read(&mut self, bytes: &[u8]) -> Result<Option<usize>, Qcow2Error> {
        while self.snapshots.len() < self.entries as usize {
            let rest = bytes.get(self.at..).unwrap_or_default();
            if rest.len() < ENTRY_BYTES {
                return Ok(Some(self.at + ENTRY_BYTES));
            }
            let extra_length = u32_at(rest, 36);
            if extra_length > MAX_SNAPSHOT_EXTRA_DATA {
                return Err(Qcow2Error::SnapshotExtraData(self.snapshots.len() as u32));
            }
            let (id, name) = (usize::from(u16_at(rest, 12)), usize::from(u16_at(rest, 14)));
            let length = ENTRY_BYTES + extra_length as usize + id + name;
            let end = self.at + length.next_multiple_of(8);
            if end as u64 > MAX_SNAPSHOT_TABLE_BYTES {
                return Err(Qcow2Error::SnapshotTableTooLarge);
            }
            if rest.len() < length {
                return Ok(Some(self.at + length));
            }
            self.snapshots.push(entry(rest, extra_length as usize, id, name));
            self.at = end;
        }
        Ok(None)
    }
}

fn entry(bytes: &[u8], extra_length: usize, id: usize, name: usize) -> Snapshot {
    let extra = &bytes[ENTRY_BYTES..ENTRY_BYTES + extra_length];
    let texts = &bytes[ENTRY_BYTES + extra_length..];
    let field = |at: usize| (extra.len() >= at + 8).then(|| u64_at(extra, at));
    Snapshot {
        l1_offset: u64_at(bytes, 0),
        l1_entries: u32_at(bytes, 8),
        id: texts[..id].to_vec(),
        name: texts[id..id + name].to_vec(),
        seconds: u32_at(bytes, 16),
        nanoseconds: u32_at(bytes, 20),
        vm_clock: u64_at(bytes, 24),
        vm_state_size: field(0).unwrap_or(u32_at(bytes, 32).into()),
        disk_size: field(8),
        icount: field(16),
        unknown_extra: extra.get(KNOWN_EXTRA..).unwrap_or_default().to_vec(),
        extra_length: extra_length as u32,
    }
}

/// Reads a snapshot table of which all bytes are at hand.
///
/// # Errors
/// As [`TableReader::read`], and [`Qcow2Error::SnapshotTableCut`] if the bytes end within it.
pub fn parse_table(bytes: &[u8], entries: u32) -> Result<Vec<Snapshot>, Qcow2Error> {
    let mut reader = TableReader::new(entries);
    match reader.read(bytes)? {
        None => Ok(reader.snapshots),
        Some(_) => Err(Qcow2Error::SnapshotTableCut(reader.snapshots.len() as u32)),
    }
}

/// The bytes of a snapshot table.
///
/// # Errors
/// [`Qcow2Error::SnapshotTableTooLarge`] if it, an ID or a name is longer than the format allows.
pub fn encode_table(snapshots: &[Snapshot]) -> Result<Vec<u8>, Qcow2Error> {
    let mut bytes = Vec::new();
    for snapshot in snapshots {
        let length = |text: &[u8]| u16::try_from(text.len()).map_err(|_| Qcow2Error::SnapshotTableTooLarge);
        let extra = snapshot.extra();
        bytes.extend(snapshot.l1_offset.to_be_bytes());
        bytes.extend(snapshot.l1_entries.to_be_bytes());
        bytes.extend(length(&snapshot.id)?.to_be_bytes());
        bytes.extend(length(&snapshot.name)?.to_be_bytes());
        bytes.extend(snapshot.seconds.to_be_bytes());
        bytes.extend(snapshot.nanoseconds.to_be_bytes());
        bytes.extend(snapshot.vm_clock.to_be_bytes());
        // A size that 32 bits cannot hold is only in the extra data.
        bytes.extend(u32::try_from(snapshot.vm_state_size).unwrap_or(0).to_be_bytes());
        bytes.extend((extra.len() as u32).to_be_bytes());
        bytes.extend(extra);
        bytes.extend(&snapshot.id);
        bytes.extend(&snapshot.name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        if bytes.len() as u64 > MAX_SNAPSHOT_TABLE_BYTES {
            return Err(Qcow2Error::SnapshotTableTooLarge);
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn snapshot() -> impl Strategy<Value = Snapshot> {
        let bytes = |most| proptest::collection::vec(any::<u8>(), 0..most);
        let numbers = (any::<u64>(), any::<u32>(), any::<u32>(), any::<u32>(), any::<u64>(), any::<u64>());
        (numbers, bytes(10), bytes(30), any::<u64>(), proptest::option::of(any::<u64>()), bytes(20)).prop_map(
            |(numbers, id, name, disk_size, icount, unknown)| {
                let unknown_extra = if icount.is_some() { unknown } else { Vec::new() };
                Snapshot {
                    l1_offset: numbers.0,
                    l1_entries: numbers.1,
                    id,
                    name,
                    seconds: numbers.2,
                    nanoseconds: numbers.3,
                    vm_clock: numbers.4,
                    vm_state_size: numbers.5,
                    disk_size: Some(disk_size),
                    icount,
                    extra_length: 16 + if icount.is_some() { 8 + unknown_extra.len() as u32 } else { 0 },
                    unknown_extra,
                }
            },
        )
    }

    proptest! {
        #[test]
        fn tables_survive_a_round_trip(snapshots in proptest::collection::vec(snapshot(), 0..6)) {
            let bytes = encode_table(&snapshots).unwrap();
            prop_assert_eq!(bytes.len(), snapshots.iter().map(Snapshot::encoded_length).sum::<usize>());
            prop_assert_eq!(&parse_table(&bytes, snapshots.len() as u32).unwrap(), &snapshots);
            // In small pieces it comes to the same.
            let mut reader = TableReader::new(snapshots.len() as u32);
            let mut have = 0;
            while let Some(need) = reader.read(&bytes[..have]).unwrap() {
                prop_assert!(need > have && need <= bytes.len());
                have = need;
            }
            prop_assert_eq!(reader.length(), bytes.len());
            prop_assert_eq!(reader.snapshots, snapshots);
        }

        #[test]
        fn any_bytes_parse_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300), entries: u32) {
            let _ = parse_table(&bytes, entries);
        }
    }

    #[test]
    fn a_table_of_version_2_has_only_the_old_size() {
        let mut bytes = vec![0; 40];
        bytes[35] = 7;
        let snapshots = parse_table(&bytes, 1).unwrap();
        assert_eq!((snapshots[0].vm_state_size, snapshots[0].disk_size), (7, None));
        bytes[38] = 5; // more than 1024 bytes of extra data
        assert_eq!(parse_table(&bytes, 1), Err(Qcow2Error::SnapshotExtraData(0)));
        assert_eq!(parse_table(&[0; 41], 2), Err(Qcow2Error::SnapshotTableCut(1)));
    }
}
