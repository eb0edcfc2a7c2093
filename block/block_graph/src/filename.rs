//! File names: protocols before them, and names that images give.

use crate::error::{Error, Result};
use crate::{NodeRef, Role};

/// What stands before the first colon of a file name, if that is a protocol and not part of a path.
pub fn protocol_prefix(filename: &str) -> Option<&str> {
    let end = filename.find([':', '/'])?;
    filename[end..].starts_with(':').then(|| &filename[..end])
}

/// Whether a name says by itself where its file is.
fn is_full(name: &str) -> bool {
    name.is_empty() || name.starts_with('/') || protocol_prefix(name).is_some()
}

/// The name by which a file is opened that the image `image` names as `name`: relative names are relative to the image's
/// folder.
///
/// # Errors
/// The image has no file name that another could be relative to.
pub fn full_filename(image: &str, name: &str) -> Result<String> {
    if is_full(name) {
        return Ok(name.to_owned());
    }
    if image.starts_with("json:") || image.is_empty() {
        return Err(Error::invalid(format!("Cannot use relative backing file names for '{image}'")));
    }
    Ok(format!("{}{name}", folder(image)))
}

/// The same for the image in `node`, whatever it stands on there.
///
/// # Errors
/// There is no file that another could be beside.
pub fn full_filename_beside(node: &NodeRef, name: &str) -> Result<String> {
    if is_full(name) {
        return Ok(name.to_owned());
    }
    let mut bottom = node.clone();
    while let Some(below) = bottom.child(Role::File).or_else(|| bottom.child(Role::Filtered)) {
        bottom = below;
    }
    let driver = bottom.driver();
    let nowhere =
        || Error::invalid(format!("Cannot generate a base directory for {} nodes", driver.format_name()));
    Ok(format!("{}{name}", folder(&driver.filename().ok_or_else(nowhere)?)))
}

/// What stands before a file's own name: its folder with a slash, or nothing.
fn folder(image: &str) -> &str {
    // The prefix of a protocol stays; `file:` names are paths too.
    let start = protocol_prefix(image).map_or(0, |prefix| prefix.len() + 1);
    let end = image[start..].rfind('/').map_or(start, |slash| start + slash + 1);
    let folder = &image[..end];
    folder.strip_prefix("file:").unwrap_or(folder)
}

#[cfg(test)]
mod tests {
    use super::full_filename;

    #[test]
    fn names_are_full_filename_the_image() {
        for (image, name, full) in [
            ("a/b.qcow2", "c.raw", "a/c.raw"),
            ("b.qcow2", "c.raw", "c.raw"),
            ("/a/b.qcow2", "../c.raw", "/a/../c.raw"),
            ("/a/b.qcow2", "/c.raw", "/c.raw"),
            ("/a/b.qcow2", "nbd:x", "nbd:x"),
            ("/a/b.qcow2", "json:{}", "json:{}"),
            ("file:a/b", "c", "a/c"),
            ("b.qcow2", "./c:d", "./c:d"),
            ("d/b.qcow2", "nbd:localhost:10809", "nbd:localhost:10809"),
        ] {
            assert_eq!(full_filename(image, name).unwrap(), full);
        }
        assert!(full_filename("json:{}", "a").is_err());
    }
}
