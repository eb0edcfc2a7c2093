//! The user's image store and the Debian kernels and initramfs it fetches.
//!
//! [`Store::debian`] returns a bootable Debian: the distribution's own kernel and an initramfs with its
//! static busybox. What isn't in the store is fetched from the mirror that the host is configured with,
//! and nothing is used before the release's signature and each file's SHA-256 have been checked.

mod apt_sources;
pub mod cpio;
mod deb;
mod debian;
mod error;
mod fetch;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod initramfs;
mod kernel_modules;
mod name;
mod packages;
mod progress;
mod release;
mod signature;
mod version;

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use apt_sources::host_mirror;
pub use error::{SignatureError, StoreError};
pub use name::{DebianImageName, Flavour, Release};
pub use progress::{NoProgress, Progress};
pub use signature::{KeyringVerifier, SignatureVerifier};

/// The environment variable that moves the store.
pub const STORE_VARIABLE: &str = "VIREO_IMAGES";

/// The number of the recipe by which images are made. An image made by another one is made anew.
const RECIPE: u32 = 2;
const KERNEL_FILE: &str = "vmlinuz";
const INITRD_FILE: &str = "initrd.img";
const HYPERVISOR_FILE: &str = "hypervisor-modules.img";
const DESCRIPTION_FILE: &str = "image.json";

/// A Debian kernel and initramfs in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DebianImage {
    /// The kernel, a bzImage.
    pub kernel: PathBuf,
    /// The initramfs, an uncompressed cpio archive. Another archive may be appended to it.
    pub initrd: PathBuf,
    /// The command line for a console on the first serial port.
    pub cmdline: String,
    /// The version of the kernel package.
    pub version: String,
    /// The kernel's release, as `uname -r` prints it.
    pub kernel_release: String,
}

/// What the store notes of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Description {
    recipe: u32,
    kernel_package: String,
    version: String,
    kernel_release: String,
    busybox_version: String,
    cmdline: String,
}

/// A folder of images.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// Where the user's store is: `$VIREO_IMAGES`, or `vireo/images` in the XDG data folder.
    ///
    /// # Errors
    /// The environment names no home.
    pub fn default_path() -> Result<PathBuf, StoreError> {
        let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        if let Some(path) = env::var_os(STORE_VARIABLE).filter(|path| !path.is_empty()) {
            return Ok(PathBuf::from(path));
        }
        absolute("XDG_DATA_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".local/share")))
            .map(|data| data.join("vireo/images"))
            .ok_or(StoreError::NoHome)
    }

    /// Opens the store at `path`, making the folder if it isn't there.
    ///
    /// # Errors
    /// The folder can't be made.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let root = path.into();
        fs::create_dir_all(&root).map_err(file_error("making the image store", &root))?;
        Ok(Self { root })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// The image, if it's in the store and was made by this version's recipe.
    pub fn cached(&self, name: DebianImageName) -> Option<DebianImage> {
        let folder = self.root.join(name.folder());
        let text = fs::read(folder.join(DESCRIPTION_FILE)).ok()?;
        let description: Description = serde_json::from_slice(&text).ok()?;
        let image = DebianImage {
            kernel: folder.join(KERNEL_FILE),
            initrd: folder.join(INITRD_FILE),
            cmdline: description.cmdline,
            version: description.version,
            kernel_release: description.kernel_release,
        };
        (description.recipe == RECIPE && image.kernel.is_file() && image.initrd.is_file()).then_some(image)
    }

    /// The image; fetched from `mirror`, or the mirror that the host is configured with, if it isn't in
    /// the store. The signature is checked with the host's keyring of Debian's archive.
    ///
    /// # Errors
    /// There's no mirror, a transfer fails, a signature or checksum is wrong, a package isn't as
    /// expected, or the store can't be written. The store is then as before.
    pub fn debian(
        &self,
        name: DebianImageName,
        mirror: Option<&str>,
        progress: &dyn Progress,
    ) -> Result<DebianImage, StoreError> {
        if let Some(image) = self.cached(name) {
            return Ok(image);
        }
        self.fetch_debian(name, mirror, &KeyringVerifier::from_host(), progress)
    }

    /// An archive to append to the initramfs of the image, with the kernel's modules of a host for VMs: KVM,
    /// TUN and vhost. Without them in the store (an earlier version made the image) the image is made anew.
    ///
    /// # Errors
    /// As [`Self::debian`].
    pub fn hypervisor_modules(
        &self,
        name: DebianImageName,
        mirror: Option<&str>,
        progress: &dyn Progress,
    ) -> Result<PathBuf, StoreError> {
        let path = self.root.join(name.folder()).join(HYPERVISOR_FILE);
        if self.cached(name).is_none() || !path.is_file() {
            self.fetch_debian(name, mirror, &KeyringVerifier::from_host(), progress)?;
        }
        Ok(path)
    }

    /// Fetches the image whether it's in the store or not, and replaces the one that's there.
    ///
    /// # Errors
    /// As [`Self::debian`].
    pub fn fetch_debian(
        &self,
        name: DebianImageName,
        mirror: Option<&str>,
        verifier: &dyn SignatureVerifier,
        progress: &dyn Progress,
    ) -> Result<DebianImage, StoreError> {
        let mirror = match mirror {
            Some(url) => url.to_owned(),
            None => host_mirror(Path::new("/"), name.release)?,
        };
        // One process fetches, others wait and then find the image.
        let lock_path = self.root.join(".lock");
        let lock = File::create(&lock_path).map_err(file_error("making", &lock_path))?;
        let waited = match lock.try_lock() {
            Ok(()) => false,
            Err(_) => {
                progress.begin("Waiting for another fetch into the store", None);
                lock.lock().map_err(file_error("locking", &lock_path))?;
                progress.end();
                true
            }
        };
        if let Some(image) = self.cached(name).filter(|_| waited) {
            return Ok(image);
        }
        self.remove_leftovers();
        let made = debian::make(name, &mirror, verifier, progress)?;
        self.put(name, &made)?;
        self.cached(name).ok_or_else(|| StoreError::File {
            action: "reading back the image in",
            path: self.root.join(name.folder()),
            source: std::io::ErrorKind::InvalidData.into(),
        })
    }

    /// Stores an image: all files are written beside it, then the folder gets its name.
    fn put(&self, name: DebianImageName, made: &debian::Made) -> Result<(), StoreError> {
        let folder = self.root.join(name.folder());
        let temporary = tempfile::Builder::new()
            .prefix(LEFTOVER_PREFIX)
            .tempdir_in(&self.root)
            .map_err(file_error("making a folder in", &self.root))?;
        let description = serde_json::to_vec_pretty(&made.description).map_err(|error| StoreError::File {
            action: "describing the image in",
            path: folder.clone(),
            source: error.into(),
        })?;
        let files: [(&str, &[u8]); 4] = [
            (KERNEL_FILE, &made.kernel),
            (INITRD_FILE, &made.initrd),
            (HYPERVISOR_FILE, &made.hypervisor),
            (DESCRIPTION_FILE, &description),
        ];
        for (file, bytes) in files {
            let path = temporary.path().join(file);
            write_synced(&path, bytes).map_err(file_error("writing", &path))?;
        }
        let old = temporary.path().join("old");
        match fs::rename(&folder, &old) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(file_error("replacing", &folder)(error)),
        }
        let fresh = temporary.path().join("new");
        fs::create_dir(&fresh).map_err(file_error("making", &fresh))?;
        for (file, _) in files {
            fs::rename(temporary.path().join(file), fresh.join(file))
                .map_err(file_error("moving", &fresh))?;
        }
        fs::rename(&fresh, &folder).map_err(file_error("making", &folder))
    }

    /// Removes what an interrupted fetch has left.
    fn remove_leftovers(&self) {
        let Ok(entries) = fs::read_dir(&self.root) else { return };
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with(LEFTOVER_PREFIX) {
                // One that can't be removed does no harm but the room that it takes.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

const LEFTOVER_PREFIX: &str = ".unfinished-";

fn write_synced(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::File { action, path, source }
}

#[cfg(test)]
mod tests;
