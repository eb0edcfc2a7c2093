//! The files that a kernel is loaded from.

use super::version::FileVersion;
use crate::MachineError;
use boot::KernelFile;
use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// By how much a buffer grows when a file has more than it says.
const PIECE: usize = 1 << 20;

/// A file that stays open, or what came out of a pipe, with no more bytes than guest memory has.
#[derive(Debug)]
pub(super) struct Input {
    what: &'static str,
    source: Source,
    memory: u64,
}

#[derive(Debug)]
enum Source {
    /// Read whenever it's needed, so that it takes no memory meanwhile.
    File(File),
    /// Can be read only once.
    Bytes(Vec<u8>),
}

impl Input {
    /// Opens `path`, which may have at most `memory` bytes.
    pub(super) fn open(what: &'static str, path: &Path, memory: u64) -> Result<Self, MachineError> {
        let failed = |source| MachineError::File { what, path: path.into(), source };
        let mut file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if metadata.is_dir() {
            return Err(failed(io::ErrorKind::IsADirectory.into()));
        }
        let mut input = Self { what, source: Source::Bytes(Vec::new()), memory };
        input.check_len(path, metadata.len())?;
        // Files without a length, such as those of /proc, are read like a pipe.
        input.source = if metadata.is_file() && metadata.len() > 0 {
            Source::File(file)
        } else {
            let mut bytes = Vec::new();
            file.by_ref().take(memory.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
            input.check_len(path, bytes.len() as u64)?;
            Source::Bytes(bytes)
        };
        Ok(input)
    }

    fn check_len(&self, path: &Path, len: u64) -> Result<(), MachineError> {
        let (what, memory) = (self.what, self.memory);
        if len > memory {
            return Err(MachineError::FileTooLarge { what, path: path.into(), len, memory });
        }
        Ok(())
    }

    /// A kernel, of which only what is needed is read; `path` is for messages.
    pub(super) fn as_kernel(&self, path: &Path) -> Result<KernelFile<'_>, MachineError> {
        let failed = |source| MachineError::File { what: self.what, path: path.into(), source };
        match &self.source {
            Source::Bytes(bytes) => Ok(bytes.into()),
            Source::File(file) => {
                let len = file.metadata().map_err(failed)?.len();
                self.check_len(path, len)?;
                KernelFile::in_file(file, len).map_err(failed)
            }
        }
    }

    /// Which file it is, and in what state. `None` for what came out of a pipe.
    pub(super) fn version(&self) -> Option<FileVersion> {
        match &self.source {
            Source::File(file) => file.metadata().ok().map(|metadata| FileVersion::of(&metadata)),
            Source::Bytes(_) => None,
        }
    }

    /// Everything in it; `path` is for messages.
    pub(super) fn read(&self, path: &Path) -> Result<Cow<'_, [u8]>, MachineError> {
        let failed = |source| MachineError::File { what: self.what, path: path.into(), source };
        let file = match &self.source {
            Source::Bytes(bytes) => return Ok(bytes.into()),
            Source::File(file) => file,
        };
        let stated = file.metadata().map_err(failed)?.len();
        self.check_len(path, stated)?;
        // One byte more, so that the end is seen without growing.
        let mut bytes = vec![0; stated as usize + 1];
        let mut filled = 0;
        loop {
            // Files that state no length, such as those of /proc, and files that grow.
            if filled == bytes.len() {
                self.check_len(path, filled as u64)?;
                bytes.resize(filled + PIECE, 0);
            }
            match file.read_at(&mut bytes[filled..], filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
        }
        bytes.truncate(filled);
        self.check_len(path, filled as u64)?;
        Ok(bytes.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn files_are_read_again_and_bounded() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 100]).unwrap();
        let input = Input::open("kernel", file.path(), 200).unwrap();
        assert_eq!(*input.read(file.path()).unwrap(), [7; 100]);
        file.write_all(&[8; 100]).unwrap();
        assert_eq!(input.read(file.path()).unwrap().len(), 200);
        file.write_all(&[9]).unwrap();
        assert!(matches!(input.read(file.path()), Err(MachineError::FileTooLarge { len: 201, .. })));
        assert!(matches!(
            Input::open("kernel", file.path(), 200),
            Err(MachineError::FileTooLarge { len: 201, memory: 200, .. })
        ));
        // No length stated, and no end.
        let zero = Path::new("/dev/zero");
        assert!(matches!(Input::open("initrd", zero, 200), Err(MachineError::FileTooLarge { .. })));
        let proc = Path::new("/proc/self/stat");
        assert!(!Input::open("initrd", proc, 1 << 20).unwrap().read(proc).unwrap().is_empty());
    }
}
