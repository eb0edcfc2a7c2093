//! Names of nodes for people.

use crate::syntax::json;
use block_graph::{NodeRef, Role, Value};
use serde_json::{Map, Value as Json};

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
        Role::File | Role::Filtered | Role::Root | Role::Hold => "file".to_owned(),
        Role::Data => "data-file".to_owned(),
        Role::Backing => "backing".to_owned(),
        Role::Member(index) => format!("children.{index}"),
    }
}
