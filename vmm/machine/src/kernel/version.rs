//! Telling files, and what they had at different times, apart without reading them.

use std::fmt;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime};

/// A file as it was at some time. The time of its last change of any sort is set by the host alone, whatever
/// its owner does to the other times.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FileVersion {
    device: u64,
    inode: u64,
    len: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    /// Seconds and nanoseconds.
    changed: (i64, i64),
}

impl FileVersion {
    /// The file's present one.
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            len: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Whether a change from now on would show. Right after a change it might not: the times are those of the
    /// host's clock ticks, and of some file systems full seconds.
    pub(super) fn is_settled(&self) -> bool {
        const COARSEST: Duration = Duration::from_secs(3);
        let (Ok(seconds), Ok(nanos)) = (u64::try_from(self.changed.0), u32::try_from(self.changed.1)) else {
            return false;
        };
        let changed = SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos);
        SystemTime::now().duration_since(changed).is_ok_and(|age| age > COARSEST)
    }
}

impl fmt::Display for FileVersion {
    /// As a file's name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, inode, len, modified, changed } = self;
        write!(f, "{device:x}-{inode:x}-{len:x}-{}-{}-{}-{}", modified.0, modified.1, changed.0, changed.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn changes_show() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let now = |file: &tempfile::NamedTempFile| FileVersion::of(&file.as_file().metadata().unwrap());
        let first = now(&file);
        assert_eq!(now(&file), first);
        assert!(!first.is_settled());
        // The owner sets the time of the last write back, but not that of the last change.
        std::thread::sleep(Duration::from_millis(50));
        let written = file.as_file().metadata().unwrap().modified().unwrap();
        file.as_file().set_modified(written).unwrap();
        assert_ne!(now(&file), first);
        file.write_all(b"x").unwrap();
        assert_ne!(now(&file).to_string(), first.to_string());
        let old = FileVersion { changed: (1_000_000_000, 0), ..first };
        assert!(old.is_settled());
        assert!(!FileVersion { changed: (i64::MAX, 0), ..old.clone() }.is_settled());
        assert!(!FileVersion { changed: (-1, 0), ..old }.is_settled());
    }
}
