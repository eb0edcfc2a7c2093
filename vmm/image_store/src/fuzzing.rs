//! What fuzzers feed: the readers of everything that comes from a mirror or from the host's configuration.
//!
//! None of these may panic, and none may take more memory or time than its limits allow.

use crate::initramfs::Parts;
use crate::kernel_modules::{MODULE_LIMIT, PackedModule, alias_file, dependency_file, select};
use crate::release::ReleaseIndex;
use crate::{DebianImageName, Release, apt_sources, deb, initramfs, packages, signature, version};
use std::cmp::Ordering;

/// A cleartext-signed `InRelease` file, and the index in it or, if it is none, in all of `text`.
pub fn release(text: &str) {
    let signed = signature::split_cleartext(text);
    let index = signed.as_ref().map_or(text, |(text, _)| text);
    let parsed = ReleaseIndex::parse(index, "url".into(), "dists/trixie".into(), Release::Trixie);
    if let Err(error) = parsed {
        assert!(!error.to_string().is_empty());
    }
}

/// A list of packages, and what is made of each stanza.
///
/// # Panics
/// If a package is found that was not asked for, or twice.
pub fn packages(list: &[u8]) {
    let Ok(found) = packages::read(list, |name| name.starts_with("linux-image")) else { return };
    for (index, package) in found.iter().enumerate() {
        assert!(package.name.starts_with("linux-image"));
        assert!(found[..index].iter().all(|other| other.name != package.name));
        if let Some(expected) = package.expected() {
            assert_eq!(expected.sha256.len(), 64);
            assert!(package.filename.starts_with("pool/") && !package.filename.contains("/../"));
        }
        let _ = package.kernel_dependency();
    }
}

/// A package. Returns how many files were taken out of it.
///
/// # Panics
/// If a file is not as its limit says.
pub fn package(deb: &[u8]) -> usize {
    const LIMIT: u64 = 1 << 16;
    let mut count = 0;
    let _ = deb::unpack(
        deb,
        |path| path.starts_with('a').then_some(LIMIT),
        |path, bytes| {
            assert!(path.starts_with('a') && bytes.len() as u64 <= LIMIT);
            count += 1;
            Ok(())
        },
    );
    count
}

/// Kernel modules, the index files for `modprobe` and the initramfs with them in it.
///
/// # Panics
/// If the index has more or fewer lines than there are modules.
pub fn kernel_modules(objects: &[&[u8]]) {
    let name = |index: usize| format!("kernel/m{index}.ko");
    let packed: Vec<_> = objects
        .iter()
        .enumerate()
        .filter_map(|(index, object)| PackedModule::new(&name(index), object.to_vec()))
        .collect();
    assert!(packed.iter().all(|module| module.bytes.len() as u64 <= MODULE_LIMIT));
    let Ok(modules) = select(&packed, &["m0", "m1"]) else { return };
    assert_eq!(dependency_file(&modules).lines().count(), modules.len());
    assert!(alias_file(&modules).lines().all(|line| line.starts_with("alias ")));
    let busybox = b"\x7fELF\0[\0[[\0cttyhack\0init\0modprobe\0mount\0sh\0\0";
    let parts = Parts { busybox, modules: &modules, kernel_release: "6.1", system: "Debian" };
    assert!(initramfs::build(&parts).is_some_and(|archive| archive.len() % 512 == 0));
}

/// A program that is taken for busybox.
pub fn busybox(program: &[u8]) {
    let parts = Parts { busybox: program, modules: &[], kernel_release: "6.1", system: "Debian" };
    let _ = initramfs::build(&parts);
}

/// apt's sources, and the name of an image.
pub fn sources(text: &str) {
    let _ = apt_sources::one_line(text);
    let _ = apt_sources::deb822(text);
    if let Ok(name) = text.parse::<DebianImageName>() {
        assert!(!name.to_string().is_empty());
    }
}

/// Three versions, whose order must be one.
///
/// # Panics
/// If it is not.
pub fn versions([a, b, c]: [&str; 3]) {
    let order = version::compare(a, b);
    assert_eq!(version::compare(a, a), Ordering::Equal);
    assert_eq!(version::compare(b, a), order.reverse());
    if order != Ordering::Greater && version::compare(b, c) != Ordering::Greater {
        assert_ne!(version::compare(a, c), Ordering::Greater, "{a:?} {b:?} {c:?}");
    }
}
