//! Names of images: of those that others name, and for people.

use crate::syntax::json;
use block_graph::{Error, NodeRef, Result, Role, Value};
use serde_json::{Map, Value as Json};

/// The name by which a file that `image` names as `name` is opened: relative names are relative to the image's folder.
///
/// # Errors
///
/// The image has no file name that another could be relative to.
pub fn relative_to(image: &str, name: &str) -> Result<String> {
    if name.is_empty() || name.starts_with('/') || block_graph::protocol_prefix(name).is_some() {
        return Ok(name.to_owned());
    }
    if image.starts_with("json:") || image.is_empty() {
        return Err(Error::invalid(format!("Cannot use relative backing file names for '{image}'")));
    }
    // The prefix of a protocol stays; `file:` names are paths too.
    let start = block_graph::protocol_prefix(image).map_or(0, |prefix| prefix.len() + 1);
    let folder = image[start..].rfind('/').map_or(start, |slash| start + slash + 1);
    let folder = &image[..folder];
    Ok(format!("{}{name}", folder.strip_prefix("file:").unwrap_or(folder)))
}

/// A node's name for people: its file's, or all its options as a `json:` name where no file name says as much.
pub fn of(node: &NodeRef) -> String {
    node.filename().unwrap_or_else(|| format!("json:{}", json::compact(&Json::Object(options_of(node)))))
}

/// The options that open a node again.
fn options_of(node: &NodeRef) -> Map<String, Json> {
    let driver = node.driver();
    let mut options = Map::new();
    options.insert("driver".into(), driver.format_name().into());
    for (name, value) in driver.open_options().iter() {
        let value = match value {
            Value::Text(text) => Json::from(text.as_str()),
            Value::Number(number) => Json::from(*number),
            Value::Switch(on) => Json::from(*on),
            Value::Null => Json::Null,
            Value::Node(node) => Json::Object(options_of(node)),
        };
        nest(&mut options, name, value);
    }
    let edges = driver.edges();
    if edges.is_empty()
        && let Some(filename) = driver.filename()
        && driver.open_options().is_empty()
    {
        options.insert("filename".into(), filename.into());
    }
    for edge in edges {
        if edge.role() != Role::Backing {
            options.insert(child_name(edge.role()), Json::Object(options_of(&edge.node())));
        }
    }
    options
}

/// Puts a value at a dotted name.
fn nest(options: &mut Map<String, Json>, name: &str, value: Json) {
    match name.split_once('.') {
        None => {
            options.insert(name.to_owned(), value);
        }
        Some((first, rest)) => {
            if let Json::Object(inner) = options.entry(first).or_insert_with(|| Json::Object(Map::new())) {
                nest(inner, rest, value);
            }
        }
    }
}

/// What a child in that role is called.
pub fn child_name(role: Role) -> String {
    match role {
        Role::File | Role::Filtered | Role::Root => "file".to_owned(),
        Role::Data => "data-file".to_owned(),
        Role::Backing => "backing".to_owned(),
        Role::Member(index) => format!("children.{index}"),
    }
}

#[cfg(test)]
mod tests {
    use super::relative_to;

    #[test]
    fn names_are_relative_to_the_image() {
        for (image, name, full) in [
            ("a/b.qcow2", "c.raw", "a/c.raw"),
            ("b.qcow2", "c.raw", "c.raw"),
            ("/a/b.qcow2", "../c.raw", "/a/../c.raw"),
            ("/a/b.qcow2", "/c.raw", "/c.raw"),
            ("/a/b.qcow2", "nbd:x", "nbd:x"),
            ("/a/b.qcow2", "json:{}", "json:{}"),
            ("file:a/b", "c", "a/c"),
            ("b.qcow2", "./c:d", "./c:d"),
        ] {
            assert_eq!(relative_to(image, name).unwrap(), full);
        }
        assert!(relative_to("json:{}", "a").is_err());
    }
}
