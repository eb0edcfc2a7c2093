//! Kernels that were unpacked before, in the user's cache folder.
//!
//! A file is named after the bzImage's own file and the time of its last change, so that a changed kernel never
//! finds an old one, and a known one need not be read. Files are
//! written under another name first and then renamed; what is read back is checked, and what is wrong is
//! unpacked anew. The folder is the user's own: whoever can write to it could change the user's kernels too.

use super::version::FileVersion;
use boot::Vmlinux;
use std::env;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Behind the unpacked bytes: this, their number, their CRC-32.
const MAGIC: &[u8; 8] = b"VIREOKR1";
const TRAILER: usize = 8 + 8 + 4;
/// How many kernels are kept: those used last.
const KEPT: usize = 4;
const ENDING: &str = "vmlinux";

/// The folder.
#[derive(Debug, Clone)]
pub(super) struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// The user's: `vireo/kernels` in the XDG cache folder. `None` without a home.
    pub(super) fn of_user() -> Option<Self> {
        let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let base = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")))?;
        Some(Self { folder: base.join("vireo/kernels") })
    }

    fn path(&self, kernel: &FileVersion) -> PathBuf {
        self.folder.join(kernel.to_string()).with_extension(ENDING)
    }

    /// What `kernel` was unpacked to, if it was, to at most `limit` bytes.
    pub(super) fn get(&self, kernel: &FileVersion, limit: u64) -> Option<Vmlinux> {
        if !self.folder.is_dir() {
            return None;
        }
        let path = self.path(kernel);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::info!("{} cannot be read: {error}", path.display());
                return None;
            }
        };
        match read(&file, limit) {
            Ok(bytes) => {
                // For the order in which files are dropped; not worth a message.
                let _ = file.set_modified(SystemTime::now());
                Some(Vmlinux::from_bytes(bytes))
            }
            Err(error) => {
                tracing::info!("{} is of no use: {error}", path.display());
                None
            }
        }
    }

    /// Keeps what `kernel` was unpacked to, as far as the host allows.
    pub(super) fn put(&self, kernel: &FileVersion, vmlinux: &Vmlinux) {
        let path = self.path(kernel);
        if let Err(error) = self.write(&path, vmlinux.bytes()) {
            tracing::info!("{} cannot be written: {error}", path.display());
        }
        self.drop_oldest();
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        let mut file = tempfile::Builder::new().prefix(".unfinished-").tempfile_in(&self.folder)?;
        file.write_all(bytes)?;
        let mut trailer = MAGIC.to_vec();
        trailer.extend((bytes.len() as u64).to_le_bytes());
        trailer.extend(crc32fast::hash(bytes).to_le_bytes());
        file.write_all(&trailer)?;
        // Not synced: what a crash of the host leaves half written is found out by its checksum.
        file.persist(path)?;
        Ok(())
    }

    fn drop_oldest(&self) {
        /// What an interrupted program has left is removed after this.
        const STALE: u64 = 3600;
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        let now = SystemTime::now();
        let mut kept = Vec::new();
        for entry in entries.flatten() {
            let path = entry.path();
            let Some(modified) = entry.metadata().ok().and_then(|metadata| metadata.modified().ok()) else {
                continue;
            };
            let old = now.duration_since(modified).is_ok_and(|age| age.as_secs() > STALE);
            if path.extension().is_some_and(|ending| ending == ENDING) {
                kept.push((modified, path));
            } else if old && entry.file_name().to_string_lossy().starts_with(".unfinished-") {
                let _ = fs::remove_file(path);
            }
        }
        kept.sort();
        for (_, path) in kept.iter().rev().skip(KEPT) {
            let _ = fs::remove_file(path);
        }
    }
}

/// The checked bytes of a file of the cache.
fn read(mut file: &File, limit: u64) -> io::Result<Vec<u8>> {
    let wrong = |reason: &str| io::Error::new(io::ErrorKind::InvalidData, reason.to_owned());
    let metadata = file.metadata()?;
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(wrong("it belongs to somebody else"));
    }
    let len = metadata.len();
    if !metadata.is_file() || len < TRAILER as u64 || len - TRAILER as u64 > limit {
        return Err(wrong("its length is not possible"));
    }
    let mut bytes = vec![0; len as usize];
    file.read_exact(&mut bytes)?;
    let trailer = bytes.split_off(len as usize - TRAILER);
    let mut expected = MAGIC.to_vec();
    expected.extend((bytes.len() as u64).to_le_bytes());
    expected.extend(crc32fast::hash(&bytes).to_le_bytes());
    if trailer == expected { Ok(bytes) } else { Err(wrong("it is damaged")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// That of a file of its own.
    fn version() -> FileVersion {
        FileVersion::of(&tempfile::tempfile().unwrap().metadata().unwrap())
    }

    #[test]
    fn kernels_are_kept_checked_and_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache { folder: folder.path().join("kernels") };
        let a = version();
        assert_eq!(cache.get(&a, 100), None);
        let vmlinux = Vmlinux::from_bytes(vec![5; 100]);
        cache.put(&a, &vmlinux);
        assert_eq!(cache.get(&a, 100), Some(vmlinux.clone()));
        assert_eq!(cache.get(&a, 99), None);
        assert_eq!(cache.get(&version(), 100), None);
        let path = cache.path(&a);
        let whole = fs::read(&path).unwrap();
        for index in [0, 50, 100, 110, 119] {
            let mut damaged = whole.clone();
            damaged[index] ^= 1;
            fs::write(&path, &damaged).unwrap();
            assert_eq!(cache.get(&a, 100), None, "{index}");
        }
        for len in [0, 10, 119] {
            fs::write(&path, &whole[..len]).unwrap();
            assert_eq!(cache.get(&a, 100), None, "{len}");
        }
        cache.put(&a, &vmlinux);
        assert!(cache.get(&a, 100).is_some());
        let old = SystemTime::now() - Duration::from_secs(7200);
        File::open(&path).unwrap().set_modified(old).unwrap();
        let leftover = cache.folder.join(".unfinished-x");
        File::create(&leftover).unwrap().set_modified(old).unwrap();
        for _ in 0..4 {
            cache.put(&version(), &vmlinux);
        }
        assert!(!path.exists() && !leftover.exists());
        assert_eq!(fs::read_dir(&cache.folder).unwrap().count(), KEPT);
    }

    #[test]
    fn a_folder_that_cannot_be_had_does_no_harm() {
        let cache = Cache { folder: "/proc/nothing/kernels".into() };
        let a = version();
        cache.put(&a, &Vmlinux::from_bytes(vec![1]));
        assert_eq!(cache.get(&a, 100), None);
    }
}
