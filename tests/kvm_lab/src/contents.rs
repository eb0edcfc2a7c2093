//! What is copied into the lab: files, the libraries of programs, images, and the lab's init.

use crate::{IMAGES, INSIDE_VARIABLE, Lab, LabError};
use image_store::cpio::Archive;
use image_store::{Progress, Store};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

/// The lab's init, which the kernel starts by this name.
pub(crate) const INIT: &str = "/lab/init";
/// The most that a file may have: what an archive's field for it holds.
const FILE_LIMIT: u64 = u32::MAX as u64;
/// Folders and links that the image's initramfs has: making them again would replace a link.
const EXISTING: &[&str] = &[
    "bin", "dev", "etc", "lib", "mnt", "proc", "root", "run", "sbin", "sys", "tmp", "usr", "usr/bin",
    "usr/lib", "usr/sbin", "var",
];

/// Makes the archive that is appended to the image's initramfs.
pub(crate) fn archive(lab: &Lab, store: &Store, progress: &dyn Progress) -> Result<Vec<u8>, LabError> {
    let mut contents = Contents::new();
    for (host, place) in &lab.files {
        contents.copy(host, place)?;
    }
    for name in &lab.images {
        let image = store.debian(*name, None, progress)?;
        let folder = image.kernel.parent().unwrap_or(Path::new("/"));
        for file in ["vmlinuz", "initrd.img", "image.json"] {
            let place = Path::new(IMAGES).join(folder.file_name().unwrap_or_default()).join(file);
            contents.copy(&folder.join(file), &place)?;
        }
    }
    contents.add(Path::new(INIT), 0o755, include_bytes!("init"))?;
    contents.add(Path::new("/lab/command"), 0o755, command(lab).as_bytes())?;
    Ok(contents.archive.finish())
}

/// The script that runs the lab's command.
fn command(lab: &Lab) -> String {
    let mut script = format!("export {INSIDE_VARIABLE}=1\nexport VIREO_IMAGES={IMAGES}\n");
    for (name, value) in &lab.environment {
        script += &format!("export {name}={}\n", quoted(value));
    }
    let words: Vec<String> = lab.command.iter().map(|word| quoted(word)).collect();
    script + "exec " + &words.join(" ") + "\n"
}

/// A word as a shell reads it unchanged.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// An archive being filled.
struct Contents {
    archive: Archive,
    there: BTreeSet<PathBuf>,
}

impl Contents {
    fn new() -> Self {
        Self { archive: Archive::new(), there: EXISTING.iter().map(PathBuf::from).collect() }
    }

    /// Adds a file with the folders above it.
    fn add(&mut self, place: &Path, mode: u32, bytes: &[u8]) -> Result<(), LabError> {
        let place = self.make_parents(place)?;
        if self.there.insert(place.clone()) {
            self.archive.file(&place.to_string_lossy(), mode, bytes);
        }
        Ok(())
    }

    /// Adds the folders above `place`; returns it as the archive has it.
    fn make_parents(&mut self, place: &Path) -> Result<PathBuf, LabError> {
        let relative = place.strip_prefix("/").map_err(|_| LabError::NotAbsolute(place.to_owned()))?;
        if relative.components().any(|part| !matches!(part, Component::Normal(_))) {
            return Err(LabError::NotAbsolute(place.to_owned()));
        }
        let mut parents: Vec<_> =
            relative.ancestors().skip(1).filter(|path| *path != Path::new("")).collect();
        parents.reverse();
        for parent in parents {
            if self.there.insert(parent.to_owned()) {
                self.archive.folder(&parent.to_string_lossy(), 0o755);
            }
        }
        Ok(relative.to_owned())
    }

    /// Copies a file, with its libraries if it is a program, or a folder with all that is in it. Links are
    /// followed.
    fn copy(&mut self, host: &Path, place: &Path) -> Result<(), LabError> {
        let metadata = fs::metadata(host).map_err(LabError::file("reading", host))?;
        if metadata.is_dir() {
            let mut entries = fs::read_dir(host)
                .and_then(|entries| entries.collect::<Result<Vec<_>, _>>())
                .map_err(LabError::file("reading", host))?;
            entries.sort_by_key(fs::DirEntry::file_name);
            self.make_parents(&place.join("any"))?;
            for entry in entries {
                self.copy(&entry.path(), &place.join(entry.file_name()))?;
            }
            return Ok(());
        }
        if metadata.len() > FILE_LIMIT {
            return Err(LabError::TooLarge { path: host.to_owned(), bytes: metadata.len() });
        }
        let bytes = fs::read(host).map_err(LabError::file("reading", host))?;
        self.add(place, metadata.permissions().mode() & 0o777, &bytes)?;
        let is_program = bytes.starts_with(b"\x7fELF") && metadata.permissions().mode() & 0o111 != 0;
        if is_program {
            for library in libraries(host)? {
                let bytes = fs::read(&library).map_err(LabError::file("reading", &library))?;
                self.add(&library, 0o755, &bytes)?;
            }
        }
        Ok(())
    }
}

/// The shared libraries of a program, its loader included, at the paths where it looks for them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>, LabError> {
    let output =
        Command::new("ldd").arg(program).output().map_err(LabError::file("running ldd for", program))?;
    // It fails for a program that is linked statically.
    let text = String::from_utf8_lossy(&output.stdout);
    let missing: Vec<_> = text.lines().filter(|line| line.contains("not found")).map(str::trim).collect();
    if !missing.is_empty() {
        return Err(LabError::Libraries { path: program.to_owned(), missing: missing.join(", ") });
    }
    Ok(text
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(|word| word.trim_end_matches(':').into())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        let lab = Lab::new(["printf", "%s|", "a b", "it's", "$HOME", ""]).env("X", "1 '2'");
        let script = command(&lab) + "echo never\n";
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "a b|it's|$HOME||");
        assert!(script.contains(r"export X='1 '\''2'\'''"));
    }

    #[test]
    fn programs_bring_their_libraries() {
        let found = libraries(&std::env::current_exe().unwrap()).unwrap();
        assert!(found.iter().any(|path| path.to_string_lossy().contains("libc.so")), "{found:?}");
        assert!(found.iter().any(|path| path.to_string_lossy().contains("ld-linux")), "{found:?}");
    }

    #[test]
    fn paths_in_the_lab_are_absolute() {
        let mut contents = Contents::new();
        assert!(contents.add(Path::new("relative"), 0o644, b"").is_err());
        assert!(contents.add(Path::new("/a/../b"), 0o644, b"").is_err());
        contents.add(Path::new("/a/b/c"), 0o644, b"x").unwrap();
        assert!(contents.there.contains(Path::new("a/b")));
        let nothing = contents.copy(Path::new("/nonexistent/file"), Path::new("/x")).unwrap_err();
        assert!(nothing.to_string().contains("/nonexistent/file"), "{nothing}");
    }
}
