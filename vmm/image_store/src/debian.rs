//! From a mirror to a kernel and an initramfs.

use std::io::{self, BufReader};

use crate::fetch::Mirror;
use crate::initramfs::{HYPERVISOR_MODULES, MODULES, Parts};
use crate::kernel_modules::{MODULE_LIMIT, PackedModule, select};
use crate::packages::{self, Package};
use crate::release::ReleaseIndex;
use crate::{
    DebianImageName, Description, Progress, RECIPE, Release, SignatureVerifier, StoreError, deb, initramfs,
};

const PACKAGE_LIMIT: u64 = 1 << 30;
const KERNEL_LIMIT: u64 = 256 << 20;
const BUSYBOX_LIMIT: u64 = 32 << 20;
const ALL_MODULES_LIMIT: u64 = 2 << 30;
const BUSYBOX_PACKAGE: &str = "busybox-static";
/// A kernel that finds no hypervisor it knows checks that timer interrupts come while it counts cycles, and panics if
/// the host had no processor time for it in just those milliseconds; so it is told that they do.
const CMDLINE: &str = "console=ttyS0 no_timer_check";
/// Folders of modules that no initramfs here takes anything from; most of a kernel's bulk is in them.
const UNUSED_MODULES: &[&str] = &[
    "kernel/drivers/gpu/",
    "kernel/drivers/infiniband/",
    "kernel/drivers/media/",
    "kernel/drivers/net/wireless/",
    "kernel/drivers/staging/",
    "kernel/drivers/usb/",
    "kernel/drivers/iio/",
    "kernel/drivers/hwmon/",
    "kernel/sound/",
];

/// An image that's not in the store yet.
pub(crate) struct Made {
    pub(crate) kernel: Vec<u8>,
    pub(crate) initrd: Vec<u8>,
    pub(crate) hypervisor: Vec<u8>,
    pub(crate) description: Description,
}

/// Fetches and verifies everything and puts it together.
pub(crate) fn make(
    name: DebianImageName,
    mirror: &str,
    verifier: &dyn SignatureVerifier,
    progress: &dyn Progress,
) -> Result<Made, StoreError> {
    let mirror = Mirror::new(mirror, progress)?;
    let index = ReleaseIndex::fetch(&mirror, name.release, verifier)?;
    let list = list_packages(&index, &mirror, name.release, progress)?;
    let (kernel, busybox) = choose(&list, name)?;
    let busybox_deb = fetch_package(&mirror, busybox)?;
    let kernel_deb = fetch_package(&mirror, kernel)?;

    progress.begin("Making the initramfs", None);
    let made = assemble(name.release, kernel, &kernel_deb, busybox, &busybox_deb);
    progress.end();
    made
}

fn list_packages(
    index: &ReleaseIndex,
    mirror: &Mirror<'_>,
    release: Release,
    progress: &dyn Progress,
) -> Result<Vec<Package>, StoreError> {
    let (bytes, ending) = index.fetch_packages(mirror)?;
    progress.begin("Reading the list of packages", None);
    let wanted = |name: &str| name.starts_with("linux-image-") || name == BUSYBOX_PACKAGE;
    let list = deb::decompressor(ending, &bytes)
        .and_then(|reader| packages::read(BufReader::with_capacity(1 << 16, reader), wanted))
        .map_err(|error| package_error(&format!("list of {release}"), &error));
    progress.end();
    list
}

/// The kernel and busybox packages.
fn choose(list: &[Package], name: DebianImageName) -> Result<(&Package, &Package), StoreError> {
    let find = |package: &str| {
        list.iter().find(|candidate| candidate.name == package).ok_or_else(|| StoreError::NoPackage {
            release: name.release.to_string(),
            package: package.to_owned(),
        })
    };
    let meta = find(name.flavour.metapackage())?;
    let (kernel_name, version) = meta.kernel_dependency().ok_or_else(|| StoreError::Package {
        package: meta.name.clone(),
        reason: "it depends on no kernel".to_owned(),
    })?;
    let kernel = find(&kernel_name)?;
    if version.as_ref().is_some_and(|version| *version != kernel.version) {
        return Err(StoreError::Package {
            package: kernel_name,
            reason: format!("its version is {}, {} needs another", kernel.version, meta.name),
        });
    }
    Ok((kernel, find(BUSYBOX_PACKAGE)?))
}

fn fetch_package(mirror: &Mirror<'_>, package: &Package) -> Result<Vec<u8>, StoreError> {
    let expected = package.expected().ok_or_else(|| StoreError::Package {
        package: package.name.clone(),
        reason: "the list of packages lacks its file, size or SHA-256".to_owned(),
    })?;
    let what = format!("Fetching {} {}", package.name, package.version);
    mirror.get_checked(&package.filename, &what, &expected, PACKAGE_LIMIT)
}

fn package_error(package: &str, error: &io::Error) -> StoreError {
    StoreError::Package { package: package.to_owned(), reason: error.to_string() }
}

fn assemble(
    release: Release,
    kernel: &Package,
    kernel_deb: &[u8],
    busybox: &Package,
    busybox_deb: &[u8],
) -> Result<Made, StoreError> {
    let contents = KernelContents::unpack(kernel_deb).map_err(|error| package_error(&kernel.name, &error))?;
    let modules = select(&contents.modules, MODULES).map_err(|error| package_error(&kernel.name, &error))?;
    let program = unpack_busybox(busybox_deb).map_err(|error| package_error(&busybox.name, &error))?;
    let system = format!("Debian {}", release.number());
    let parts =
        Parts { busybox: &program, modules: &modules, kernel_release: &contents.release, system: &system };
    let initrd = initramfs::build(&parts).ok_or_else(|| StoreError::Package {
        package: busybox.name.clone(),
        reason: "its program lacks the table of applets, or some that are needed".to_owned(),
    })?;
    let all: Vec<&str> = MODULES.iter().chain(HYPERVISOR_MODULES).copied().collect();
    let all = select(&contents.modules, &all).map_err(|error| package_error(&kernel.name, &error))?;
    let hypervisor = initramfs::build_more_modules(&Parts { modules: &all, ..parts }, &modules);
    let description = Description {
        recipe: RECIPE,
        kernel_package: kernel.name.clone(),
        version: kernel.version.clone(),
        kernel_release: contents.release,
        busybox_version: busybox.version.clone(),
        cmdline: CMDLINE.to_owned(),
    };
    Ok(Made { kernel: contents.kernel, initrd, hypervisor, description })
}

/// A path as it was before Debian moved everything below `/usr`.
fn without_usr(path: &str) -> &str {
    path.strip_prefix("usr/").unwrap_or(path)
}

/// What a kernel package has.
struct KernelContents {
    kernel: Vec<u8>,
    release: String,
    modules: Vec<PackedModule>,
}

impl KernelContents {
    fn unpack(package: &[u8]) -> io::Result<Self> {
        const KERNEL: &str = "boot/vmlinuz-";
        const MODULES: &str = "lib/modules/";
        let within = |path: &str| -> Option<String> {
            let (_, rest) = without_usr(path).strip_prefix(MODULES)?.split_once('/')?;
            Some(rest.to_owned())
        };
        let wanted = |path: &str| {
            if path.starts_with(KERNEL) {
                return Some(KERNEL_LIMIT);
            }
            let module = within(path)?;
            let used = PackedModule::new(&module, Vec::new()).is_some()
                && !UNUSED_MODULES.iter().any(|folder| module.starts_with(folder));
            used.then_some(MODULE_LIMIT)
        };
        let mut kernel = None;
        let mut modules = Vec::new();
        let mut total = 0u64;
        deb::unpack(package, wanted, |path, bytes| {
            if let Some(release) = path.strip_prefix(KERNEL) {
                kernel = Some((release.to_owned(), bytes));
                return Ok(());
            }
            total += bytes.len() as u64;
            if total > ALL_MODULES_LIMIT {
                return Err(io::Error::other("its modules are too large"));
            }
            modules.extend(within(&path).and_then(|path| PackedModule::new(&path, bytes)));
            Ok(())
        })?;
        let (release, kernel) =
            kernel.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "it has no /boot/vmlinuz-…"))?;
        if release.is_empty() || release.contains('/') {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "its kernel has no release in its name"));
        }
        Ok(Self { kernel, release, modules })
    }
}

fn unpack_busybox(package: &[u8]) -> io::Result<Vec<u8>> {
    let mut program = None;
    let wanted = |path: &str| (without_usr(path) == "bin/busybox").then_some(BUSYBOX_LIMIT);
    deb::unpack(package, wanted, |_, bytes| {
        program = Some(bytes);
        Ok(())
    })?;
    program.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "it has no /bin/busybox"))
}
