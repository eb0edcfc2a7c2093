//! Kernel modules: what they say of themselves, which of them are needed, and the index files by which
//! `modprobe` finds them. Debian's packages have no `modules.dep`: it's made on installation.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use crate::deb::decompress;

/// The most that one module may have decompressed.
pub(crate) const MODULE_LIMIT: u64 = 64 << 20;

/// A module as the package has it.
#[derive(Debug, Clone)]
pub(crate) struct PackedModule {
    /// Path within `/lib/modules/VERSION`, without the ending of its compression.
    pub(crate) path: String,
    /// The ending of its compression, with the dot.
    pub(crate) compression: String,
    pub(crate) bytes: Vec<u8>,
}

impl PackedModule {
    /// The module with this path (within `/lib/modules/VERSION`), if it's a module's.
    pub(crate) fn new(path: &str, bytes: Vec<u8>) -> Option<Self> {
        let end = path.rfind(".ko")? + 3;
        let (path, compression) = path.split_at(end);
        let known = matches!(compression, "" | ".xz" | ".gz" | ".zst");
        known.then(|| Self { path: path.to_owned(), compression: compression.to_owned(), bytes })
    }

    fn name(&self) -> String {
        let file = self.path.rsplit('/').next().unwrap_or(&self.path);
        normalized(file.trim_end_matches(".ko"))
    }
}

/// Dashes and underscores mean the same in modules' names.
fn normalized(name: &str) -> String {
    name.replace('-', "_")
}

/// A module ready for use.
#[derive(Debug, Clone)]
pub(crate) struct Module {
    pub(crate) path: String,
    pub(crate) bytes: Vec<u8>,
    name: String,
    depends: Vec<String>,
    aliases: Vec<String>,
}

/// The modules among `packed` that `roots` names, with all that they depend on. A root that isn't there
/// is left out: it's built into the kernel, or this kernel doesn't have it.
pub(crate) fn select(packed: &[PackedModule], roots: &[&str]) -> io::Result<Vec<Module>> {
    let by_name: BTreeMap<String, &PackedModule> =
        packed.iter().map(|module| (module.name(), module)).collect();
    let mut wanted: Vec<String> = roots.iter().map(|root| normalized(root)).collect();
    let mut chosen: BTreeMap<String, Module> = BTreeMap::new();
    while let Some(name) = wanted.pop() {
        if chosen.contains_key(&name) {
            continue;
        }
        let Some(packed) = by_name.get(&name) else { continue };
        let in_module = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", packed.path));
        let bytes = decompress(&packed.compression, &packed.bytes, MODULE_LIMIT).map_err(in_module)?;
        let info = ModuleInfo::read(&bytes).ok_or_else(|| {
            in_module(io::Error::new(io::ErrorKind::InvalidData, "it isn't a kernel module"))
        })?;
        if let Some(missing) = info.depends.iter().find(|other| !by_name.contains_key(*other)) {
            return Err(in_module(io::Error::new(
                io::ErrorKind::NotFound,
                format!("it depends on {missing}, which isn't there"),
            )));
        }
        wanted.extend(info.depends.iter().chain(&info.before).cloned());
        let module =
            Module { path: packed.path.clone(), bytes, name, depends: info.depends, aliases: info.aliases };
        chosen.insert(module.name.clone(), module);
    }
    Ok(chosen.into_values().collect())
}

/// `modules.dep`: each module with everything that must be loaded before it, the first to load last.
pub(crate) fn dependency_file(modules: &[Module]) -> String {
    let by_name: BTreeMap<&str, &Module> =
        modules.iter().map(|module| (module.name.as_str(), module)).collect();
    let mut text = String::new();
    for module in modules {
        let mut order = Vec::new();
        let mut seen = BTreeSet::from([module.name.as_str()]);
        load_order(module, &by_name, &mut seen, &mut order);
        text.push_str(&module.path);
        text.push(':');
        for other in order.iter().rev() {
            text.push(' ');
            text.push_str(&other.path);
        }
        text.push('\n');
    }
    text
}

/// Appends what `module` needs, each after its own needs.
fn load_order<'a>(
    module: &'a Module,
    by_name: &BTreeMap<&str, &'a Module>,
    seen: &mut BTreeSet<&'a str>,
    order: &mut Vec<&'a Module>,
) {
    for name in &module.depends {
        let Some(other) = by_name.get(name.as_str()) else { continue };
        if seen.insert(&other.name) {
            load_order(other, by_name, seen, order);
            order.push(other);
        }
    }
}

/// `modules.alias`: which module serves which device.
pub(crate) fn alias_file(modules: &[Module]) -> String {
    let lines = modules
        .iter()
        .flat_map(|module| module.aliases.iter().map(|alias| format!("alias {alias} {}\n", module.name)));
    lines.collect()
}

/// The strings of a module's `.modinfo` section.
#[derive(Debug, Default, PartialEq, Eq)]
struct ModuleInfo {
    depends: Vec<String>,
    /// Modules that should be loaded first if they're there ("softdep pre").
    before: Vec<String>,
    aliases: Vec<String>,
}

impl ModuleInfo {
    /// Reads an ELF64 object; `None` if it isn't one with such a section.
    fn read(object: &[u8]) -> Option<Self> {
        let section = modinfo_section(object)?;
        let mut info = Self::default();
        for item in section.split(|byte| *byte == 0) {
            let Ok(item) = std::str::from_utf8(item) else { continue };
            let Some((key, value)) = item.split_once('=') else { continue };
            match key {
                "depends" => {
                    info.depends = value.split(',').filter(|name| !name.is_empty()).map(normalized).collect();
                }
                "softdep" => {
                    let mut words = value.split_whitespace().skip_while(|word| *word != "pre:").skip(1);
                    info.before
                        .extend(words.by_ref().take_while(|word| !word.ends_with(':')).map(normalized));
                }
                // Anything else would end the line of the index that it's written to.
                "alias" if !value.contains(char::is_whitespace) => info.aliases.push(value.to_owned()),
                _ => {}
            }
        }
        Some(info)
    }
}

/// The contents of the section `.modinfo`.
fn modinfo_section(object: &[u8]) -> Option<&[u8]> {
    const SECTION_HEADER: usize = 64;
    if !object.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let number = |at: usize, size: usize| -> Option<usize> {
        let bytes = object.get(at..at.checked_add(size)?)?;
        let value = bytes.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        usize::try_from(value).ok()
    };
    let table = number(0x28, 8)?;
    let (size, count, names) = (number(0x3a, 2)?, number(0x3c, 2)?, number(0x3e, 2)?);
    if size != SECTION_HEADER {
        return None;
    }
    let header = |index: usize| table.checked_add(index.checked_mul(SECTION_HEADER)?);
    let contents = |index: usize| {
        let at = header(index)?;
        let (offset, length) = (number(at.checked_add(24)?, 8)?, number(at.checked_add(32)?, 8)?);
        object.get(offset..offset.checked_add(length)?)
    };
    let name_table = contents(names)?;
    (0..count).find_map(|index| {
        let name = name_table.get(number(header(index)?, 4)?..)?;
        name.starts_with(b".modinfo\0").then(|| contents(index)).flatten()
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An ELF64 object with this `.modinfo`.
    pub(crate) fn object(info: &str) -> Vec<u8> {
        let names = b"\0.modinfo\0";
        let mut bytes = vec![0; 64];
        bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        let names_at = bytes.len() as u64;
        bytes.extend_from_slice(names);
        let info_at = bytes.len() as u64;
        bytes.extend(info.replace('\n', "\0").bytes());
        let table = bytes.len() as u64;
        bytes[0x28..0x30].copy_from_slice(&table.to_le_bytes());
        bytes[0x3a..0x40].copy_from_slice(&[64, 0, 3, 0, 1, 0]);
        for (name, offset, length) in
            [(0u32, 0, 0), (0, names_at, names.len() as u64), (1, info_at, info.len() as u64)]
        {
            let mut header = [0u8; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[24..32].copy_from_slice(&offset.to_le_bytes());
            header[32..40].copy_from_slice(&length.to_le_bytes());
            bytes.extend_from_slice(&header);
        }
        bytes
    }

    fn packed(name: &str, info: &str) -> PackedModule {
        PackedModule::new(&format!("kernel/{name}.ko"), object(info)).unwrap()
    }

    #[test]
    fn dependencies_are_followed_and_listed_deepest_last() {
        let all = [
            packed("virtio-blk", "depends=virtio,virtio-ring\nalias=virtio:d00000002v*\n"),
            packed("virtio", "depends=virtio_ring\n"),
            packed("virtio_ring", "depends=\nsoftdep=pre: extra post: later\n"),
            packed("extra", "license=GPL\n"),
            packed("later", ""),
            packed("other", ""),
        ];
        let chosen = select(&all, &["virtio_blk", "absent"]).unwrap();
        let names: Vec<_> = chosen.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["extra", "virtio", "virtio_blk", "virtio_ring"]);
        assert_eq!(
            dependency_file(&chosen),
            "kernel/extra.ko:\nkernel/virtio.ko: kernel/virtio_ring.ko\n\
             kernel/virtio-blk.ko: kernel/virtio.ko kernel/virtio_ring.ko\nkernel/virtio_ring.ko:\n"
        );
        assert_eq!(alias_file(&chosen), "alias virtio:d00000002v* virtio_blk\n");
    }

    #[test]
    fn a_missing_dependency_or_a_circle_is_survived() {
        let error = select(&[packed("a", "depends=b\n")], &["a"]).unwrap_err().to_string();
        assert!(error.contains("kernel/a.ko") && error.contains("depends on b"), "{error}");
        let circle = [packed("a", "depends=b\n"), packed("b", "depends=a\n")];
        let chosen = select(&circle, &["a"]).unwrap();
        assert_eq!(dependency_file(&chosen), "kernel/a.ko: kernel/b.ko\nkernel/b.ko: kernel/a.ko\n");
        let garbage = PackedModule::new("kernel/g.ko", b"garbage".to_vec()).unwrap();
        assert!(select(&[garbage], &["g"]).unwrap_err().to_string().contains("isn't a kernel module"));
        assert!(PackedModule::new("modules.order", vec![]).is_none());
        assert_eq!(PackedModule::new("a/b.ko.xz", vec![]).unwrap().compression, ".xz");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn damaged_objects_never_panic(changes in proptest::collection::vec((0usize..300, any::<u8>()), 1..10)) {
            let mut bytes = object("depends=a,b\nalias=x\n");
            for (at, byte) in changes {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            if let Some(info) = ModuleInfo::read(&bytes) {
                prop_assert!(info.aliases.iter().all(|alias| !alias.contains('\n')));
            }
        }
    }
}
