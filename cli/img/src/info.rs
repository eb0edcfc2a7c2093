//! `info`.

use crate::commands::flags;
use crate::shared_options::SharedOptions;
use crate::tool::{Failure, Outcome, Output, Tool, one_file, parse};
use block_graph::OpenFlags;
use blockdev::info::{NodeInfo, collect, to_json};
use blockdev::syntax::size::human;
use serde_json::Value;
use std::collections::HashSet;
use std::process::ExitCode;

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
