//! `measure`.

use crate::commands::flags;
use crate::shared_options::{SharedOptions, SnapshotName};
use crate::tool::{Failure, Outcome, Output, Tool, accumulate, number, parse};
use block_graph::OpenFlags;
use std::process::ExitCode;

/// Says how large a new image's file will be.
pub(crate) async fn run(tool: &Tool, words: Vec<String>) -> Outcome {
    let mut shared = SharedOptions::default();
    let (mut format, mut options, mut size, mut snapshot) =
        ("raw".to_owned(), None, None, SnapshotName::None);
    let operands = parse(flags("measure"), words, |key, value| {
        let Some(value) = shared.take(key, value)? else { return Ok(()) };
        match key {
            "O" => format = value,
            "o" => accumulate(&mut options, &value)?,
            "l" => snapshot = SnapshotName::parse(&value)?,
            _ => size = Some(number("image size", &value)?),
        }
        Ok(())
    })?;
    let output = shared.output()?;
    let mut operands = operands.into_iter();
    let filename = operands.next();
    if operands.next().is_some() {
        return Err(Failure::new("At most one filename argument is allowed."));
    }
    let has_source_options =
        shared.image_opts || shared.format.is_some() || !matches!(snapshot, SnapshotName::None);
    match (&filename, size) {
        (None, _) if has_source_options => {
            return Err(Failure::new("--image-opts, -f, and -l require a filename argument."));
        }
        (Some(_), Some(_)) => {
            return Err(Failure::new("--size N cannot be used together with a filename."));
        }
        (None, None) => {
            return Err(Failure::new("Either --size N or one filename must be specified."));
        }
        _ => {}
    }
    let context = shared.context();
    let source = match &filename {
        Some(filename) => {
            let node = shared.named(filename).open(tool, &context, OpenFlags::READ).await?;
            snapshot.load(&node).await?;
            Some(node)
        }
        None => None,
    };
    let (kind, mut known) = blockdev::create::format_options(&context, &format, Some("x"))?;
    if let Some(list) = options {
        known.parse(&list).map_err(|error| {
            let lines =
                vec![crate::tool::with_hints(&error), format!("Invalid options for file format '{format}'")];
            Failure::Messages(lines, 1)
        })?;
    }
    if let Some(size) = size {
        known.set("size", &size.to_string())?;
    }
    let report = kind.measure(&mut known.options(), source.as_ref()).await?;
    if let Some(node) = source {
        node.close().await?;
    }
    match output {
        Output::Human => {
            println!("required size: {}", report.required);
            println!("fully allocated size: {}", report.fully_allocated);
            if let Some(bitmaps) = report.bitmaps {
                println!("bitmaps size: {bitmaps}");
            }
        }
        Output::Json => {
            let mut value =
                serde_json::json!({"required": report.required, "fully-allocated": report.fully_allocated});
            if let (Some(bitmaps), Some(object)) = (report.bitmaps, value.as_object_mut()) {
                object.insert("bitmaps".into(), bitmaps.into());
            }
            println!("{}", blockdev::syntax::json::pretty(&value));
        }
    }
    Ok(ExitCode::SUCCESS)
}
