//! `info`.

use crate::commands::flags;
use crate::shared_options::SharedOptions;
use crate::tool::{Failure, Outcome, Output, Tool, one_file, parse};
use block_graph::{ImageInfo, NodeRef, OpenFlags, Role, SnapshotInfo};
use blockdev::filename::{child_name, of as name_of};
use blockdev::syntax::size::human;
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::process::ExitCode;

/// What is to be known of a node and of those below it.
struct NodeInfo {
    filename: String,
    format: &'static str,
    virtual_size: u64,
    actual_size: Option<u64>,
    image: ImageInfo,
    /// Whether it says if it is dirty.
    has_dirty_flag: bool,
    snapshots: Vec<SnapshotInfo>,
    children: Vec<(String, NodeInfo)>,
    /// The backing file as it is opened: its name is relative to the image's, if that has one.
    full_backing_filename: Option<String>,
}

/// Says what images are.
pub(crate) async fn run(tool: &Tool, words: Vec<String>) -> Outcome {
    let mut shared = SharedOptions::default();
    let mut chain = false;
    let operands = parse(flags("info"), words, |key, value| {
        chain |= shared.take(key, value)?.is_some();
        Ok(())
    })?;
    let filename = one_file(operands)?;
    let output = shared.output()?;
    let context = shared.context();
    let mut infos = Vec::new();
    let mut seen = HashSet::new();
    let mut next = Some((filename, shared.format.clone()));
    while let Some((filename, format)) = next.take() {
        if !seen.insert(filename.clone()) {
            return Err(Failure::new(format!("Backing file '{filename}' creates an infinite loop.")));
        }
        let mut named = shared.named(&filename);
        named.format = format.as_deref();
        named.image_opts &= infos.is_empty();
        let flags = OpenFlags { no_backing: true, no_io: true, ..OpenFlags::READ };
        let node = named.open(tool, &context, flags).await?;
        let info = collect(&node);
        node.close().await?;
        if chain {
            next = match (&info.full_backing_filename, &info.image.backing_filename) {
                (Some(full), _) => Some((full.clone(), info.image.backing_format.clone())),
                (None, Some(name)) => {
                    let message = "Could not determine absolute backing filename, but backing filename";
                    return Err(Failure::new(format!("{message} '{name}' present")));
                }
                (None, None) => None,
            };
        }
        infos.push(info);
    }
    match output {
        Output::Json => {
            let mut values: Vec<Value> = infos.iter().map(to_json).collect();
            let value = if chain { Value::Array(values) } else { values.swap_remove(0) };
            println!("{}", blockdev::syntax::json::pretty(&value));
        }
        Output::Human => {
            for (index, info) in infos.iter().enumerate() {
                if index > 0 {
                    println!();
                }
                print(info, 0, "/");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn collect(node: &NodeRef) -> NodeInfo {
    let driver = node.driver();
    let mut edges = driver.edges();
    edges.retain(|edge| edge.role() != Role::Backing);
    edges.reverse();
    let mut image = driver.image().map(|image| image.info()).unwrap_or_default();
    if driver.is_filter()
        && let Some(edge) = edges.first()
    {
        // A filter has the clusters of what is below it.
        image.cluster_size = edge.node().driver().image().and_then(|image| image.info().cluster_size);
    }
    if edges.is_empty() && image.specific.is_none() && ["file", "host_device"].contains(&driver.format_name())
    {
        image.specific = Some((driver.format_name(), Map::new()));
    }
    let full = |backing: &str| block_graph::full_filename(&name_of(node), backing).ok();
    NodeInfo {
        filename: name_of(node),
        format: driver.format_name(),
        virtual_size: node.len(),
        actual_size: allocated_size(node),
        has_dirty_flag: !driver.format_name().starts_with("null-"),
        snapshots: driver.image().map(block_graph::Image::snapshots).unwrap_or_default(),
        full_backing_filename: image.backing_filename.as_deref().and_then(full),
        children: edges.iter().map(|edge| (child_name(edge.role()), collect(&edge.node()))).collect(),
        image,
    }
}

/// The bytes that a node takes on the host: its own, or those of the files that it stands on.
fn allocated_size(node: &NodeRef) -> Option<u64> {
    let driver = node.driver();
    driver.allocated_size().or_else(|| {
        let files = driver.edges().into_iter().filter(|edge| edge.role() != Role::Backing);
        let sizes: Vec<u64> = files.map(|edge| allocated_size(&edge.node())).collect::<Option<_>>()?;
        (!sizes.is_empty()).then(|| sizes.iter().sum())
    })
}

fn to_json(info: &NodeInfo) -> Value {
    let children = info.children.iter().map(|(name, child)| json!({"name": name, "info": to_json(child)}));
    let mut object = Map::new();
    object.insert("children".into(), children.collect());
    object.insert("filename".into(), info.filename.as_str().into());
    object.insert("format".into(), info.format.into());
    object.insert("virtual-size".into(), info.virtual_size.into());
    if info.has_dirty_flag {
        object.insert("dirty-flag".into(), info.image.dirty.into());
    }
    let image = &info.image;
    let optional = [
        ("actual-size", info.actual_size.map(Value::from)),
        ("cluster-size", image.cluster_size.filter(|size| *size > 0).map(Value::from)),
        ("encrypted", image.encrypted.then(|| true.into())),
        ("backing-filename", image.backing_filename.as_deref().map(Value::from)),
        ("full-backing-filename", info.full_backing_filename.as_deref().map(Value::from)),
        ("backing-filename-format", image.backing_format.as_deref().map(Value::from)),
        ("format-specific", image.specific.as_ref().map(|(kind, data)| json!({"type": kind, "data": data}))),
        (
            "snapshots",
            (!info.snapshots.is_empty()).then(|| info.snapshots.iter().map(snapshot_to_json).collect()),
        ),
    ];
    for (name, value) in optional {
        if let Some(value) = value {
            object.insert(name.into(), value);
        }
    }
    Value::Object(object)
}

fn snapshot_to_json(snapshot: &SnapshotInfo) -> Value {
    let mut object = json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_seconds,
        "date-nsec": snapshot.date_nanoseconds,
        "vm-clock-sec": snapshot.vm_clock_ns / 1_000_000_000,
        "vm-clock-nsec": snapshot.vm_clock_ns % 1_000_000_000,
    });
    if let (Some(icount), Some(object)) = (snapshot.icount, object.as_object_mut()) {
        object.insert("icount".into(), icount.into());
    }
    object
}

fn print(info: &NodeInfo, level: usize, path: &str) {
    let indent = "    ".repeat(level);
    // What only holds another image's bytes is no disk.
    let is_file = level > 0 && info.children.is_empty();
    let (name, kind, size) = match is_file {
        true => ("filename", "protocol type", "file length"),
        false => ("image", "file format", "virtual size"),
    };
    println!("{indent}{name}: {}", info.filename);
    println!("{indent}{kind}: {}", info.format);
    println!("{indent}{size}: {} ({} bytes)", human(info.virtual_size), info.virtual_size);
    println!("{indent}disk size: {}", info.actual_size.map_or_else(|| "unavailable".to_owned(), human));
    let image = &info.image;
    if image.encrypted {
        println!("{indent}encrypted: yes");
    }
    if let Some(size @ 1..) = image.cluster_size {
        println!("{indent}cluster_size: {size}");
    }
    if image.dirty {
        println!("{indent}cleanly shut down: no");
    }
    if let Some(backing) = &image.backing_filename {
        let actual = match &info.full_backing_filename {
            None => " (cannot determine actual path)".to_owned(),
            Some(full) if full != backing => format!(" (actual path: {full})"),
            Some(_) => String::new(),
        };
        println!("{indent}backing file: {backing}{actual}");
        if let Some(format) = &image.backing_format {
            println!("{indent}backing file format: {format}");
        }
    }
    if !info.snapshots.is_empty() {
        println!("{indent}Snapshot list:");
        for line in crate::snapshot::table(&info.snapshots) {
            println!("{indent}{line}");
        }
    }
    if let Some((_, data)) = &image.specific
        && !data.is_empty()
    {
        println!("{indent}Format specific information:");
        blockdev::syntax::json::outline(data, level + 1).iter().for_each(|line| println!("{line}"));
    }
    for (name, child) in &info.children {
        println!("{indent}Child node '{path}{name}':");
        print(child, level + 1, &format!("{path}{name}/"));
    }
}
