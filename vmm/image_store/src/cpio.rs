//! Archives in the "newc" format, of which an initramfs is made (Linux's
//! Documentation/driver-api/early-userspace/buffer-format.rst).

const TRAILER: &str = "TRAILER!!!";
const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive being written. Everything belongs to root and is as old as time, so that the same contents
/// give the same bytes.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a folder; its parents must have been added before it.
    pub fn folder(&mut self, path: &str, mode: u32) {
        self.entry(path, FOLDER | mode, (0, 0), &[]);
    }

    /// Adds a file with permissions `mode`.
    pub fn file(&mut self, path: &str, mode: u32, contents: &[u8]) {
        self.entry(path, FILE | mode, (0, 0), contents);
    }

    /// Adds a symbolic link to `target`.
    pub fn link(&mut self, path: &str, target: &str) {
        self.entry(path, LINK | 0o777, (0, 0), target.as_bytes());
    }

    /// Adds a character device.
    pub fn character_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.entry(path, CHARACTER_DEVICE | mode, (major, minor), &[]);
    }

    /// Ends the archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.entry(TRAILER, 0, (0, 0), &[]);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), contents: &[u8]) {
        self.inode += 1;
        // The format has 32 bits for the length; nothing that belongs into an initramfs is as large.
        let length = u32::try_from(contents.len()).expect("an initramfs file is smaller than 4 GiB");
        let fields = [
            self.inode,
            mode,
            0, // uid
            0, // gid
            1, // links
            0, // time
            length,
            0,
            0, // device that the archive was made on
            device.0,
            device.1,
            path.len() as u32 + 1,
            0, // checksum, which this format doesn't have
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Path, mode and contents of all entries.
    pub(crate) fn entries(archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut found = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(&archive[at..at + 6], b"070701");
            let field = |index: usize| {
                let start = at + 6 + index * 8;
                u32::from_str_radix(std::str::from_utf8(&archive[start..start + 8]).unwrap(), 16).unwrap()
            };
            let (mode, length, name_length) = (field(1), field(6) as usize, field(11) as usize);
            let name_start = at + 110;
            let name = &archive[name_start..name_start + name_length - 1];
            assert_eq!(archive[name_start + name_length - 1], 0);
            let data = (name_start + name_length).next_multiple_of(4);
            let name = String::from_utf8(name.to_vec()).unwrap();
            if name == TRAILER {
                return found;
            }
            found.push((name, mode, archive[data..data + length].to_vec()));
            at = (data + length).next_multiple_of(4);
        }
    }

    #[test]
    fn entries_read_back() {
        let mut archive = Archive::new();
        archive.folder("dev", 0o755);
        archive.character_device("dev/console", 0o600, 5, 1);
        archive.file("init", 0o755, b"#!/bin/sh\n");
        archive.link("bin", "usr/bin");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 512, 0);
        let found = entries(&bytes);
        assert_eq!(found[0], ("dev".into(), 0o040_755, vec![]));
        assert_eq!(found[1].1, 0o020_600);
        assert_eq!(found[2], ("init".into(), 0o100_755, b"#!/bin/sh\n".to_vec()));
        assert_eq!(found[3], ("bin".into(), 0o120_777, b"usr/bin".to_vec()));
    }
}
