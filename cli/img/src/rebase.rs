//! `rebase`.

use crate::commands::flags;
use crate::progress::Shown;
use crate::shared_options::{SharedOptions, with_cache};
use crate::tool::{Failure, Outcome, Tool, one_file, parse};
use block_graph::{NodeRef, OpenContext, OpenFlags, Options, Value, skip_filters};
use blockdev::chain::{Rebase, change_backing, find_backing, rebase};
use std::process::ExitCode;
use std::sync::Arc;

struct Arguments {
    shared: SharedOptions,
    backing: Option<String>,
    backing_format: Option<String>,
    name_only: bool,
    compressed: bool,
}

/// Changes an image's backing file.
pub(crate) async fn run(tool: &Tool, words: Vec<String>) -> Outcome {
    let mut arguments = Arguments {
        shared: SharedOptions::default(),
        backing: None,
        backing_format: None,
        name_only: false,
        compressed: false,
    };
    let operands = parse(flags("rebase"), words, |key, value| {
        let Some(value) = arguments.shared.take(key, value)? else { return Ok(()) };
        match key {
            "b" => arguments.backing = Some(value),
            "F" => arguments.backing_format = Some(value),
            "c" => arguments.compressed = true,
            _ => arguments.name_only = true,
        }
        Ok(())
    })?;
    let filename = one_file(operands)?;
    if !arguments.name_only && arguments.backing.is_none() {
        return Err(Failure::Usage("Must specify backing file (-b) or use unsafe mode (-u)".to_owned()));
    }
    let shared = &mut arguments.shared;
    let context = shared.context();
    let shown = Shown::new(tool, shared.shows_progress(), 2.0, shared.quiet);
    let flags =
        OpenFlags { no_backing: arguments.name_only, unmap: false, resize: false, ..OpenFlags::WRITE };
    let flags = with_cache(flags, shared.cache.as_deref(), "")?;
    let source_flags = with_cache(OpenFlags::READ, shared.source_cache.as_deref(), "source ")?;
    let mut named = shared.named(&filename);
    named.force_share = false;
    let node = named.open(tool, &context, flags).await?;
    let mut opened = None;
    let done = run_on(&context, &node, &arguments, source_flags, &shown, &mut opened).await;
    let closed = node.close().await;
    if let Some(new) = opened {
        new.close().await?;
    }
    done?;
    closed?;
    shown.end();
    Ok(ExitCode::SUCCESS)
}

async fn run_on(
    context: &OpenContext,
    node: &NodeRef,
    arguments: &Arguments,
    source_flags: OpenFlags,
    shown: &Shown<'_>,
    opened: &mut Option<NodeRef>,
) -> Result<(), Failure> {
    let image = skip_filters(node);
    let info = image.driver().image().map(|image| image.info()).unwrap_or_default();
    if arguments.compressed && image.driver().format_name() != "qcow2" {
        return Err(Failure::new("Compression not supported for this file format"));
    }
    if let Some(format) = &arguments.backing_format
        && context.registry.find(format).is_none()
    {
        return Err(Failure::new(format!("Invalid format name: '{format}'")));
    }
    if !arguments.name_only {
        let new = new_backing(context, node, arguments, source_flags).await?;
        let shortens = matches!(&new, Some((_, true)));
        if let Some((new, false)) = &new {
            *opened = Some(new.clone());
        }
        let cluster = info.cluster_size.unwrap_or(1).max(1);
        // With extended L2 entries a cluster has 32 parts of its own.
        let has_parts = |(_, data): &(&str, serde_json::Map<String, serde_json::Value>)| {
            data.get("extended-l2") == Some(&serde_json::Value::Bool(true))
        };
        let parts =
            if !arguments.compressed && info.specific.as_ref().is_some_and(has_parts) { 32 } else { 1 };
        let work = Rebase {
            image: node,
            old: image.backing(),
            new: new.map(|(new, _)| new),
            shortens,
            compressed: arguments.compressed,
            alignment: (cluster / parts).max(1),
        };
        rebase(&work, |done, total| shown.set(100.0 * done as f64 / total.max(1) as f64)).await?;
    }
    Ok(change_backing(node, arguments.backing.as_deref(), arguments.backing_format.as_deref()).await?)
}

/// The new backing file's node, and whether it stands in the chain that the image has.
async fn new_backing(
    context: &OpenContext,
    node: &NodeRef,
    arguments: &Arguments,
    flags: OpenFlags,
) -> Result<Option<(NodeRef, bool)>, Failure> {
    let Some(name) = arguments.backing.as_deref().filter(|name| !name.is_empty()) else { return Ok(None) };
    let full = block_graph::full_filename(&blockdev::filename::of(node), name)
        .map_err(|error| Failure::of("Could not resolve backing filename: ", &error))?;
    if let Some(found) = find_backing(node, &full) {
        debug_assert!(!Arc::ptr_eq(&found, node));
        return Ok(Some((found, true)));
    }
    let mut options = Options::new();
    if let Some(format) = &arguments.backing_format {
        options.set("driver", format.as_str());
    }
    if arguments.shared.force_share {
        options.set("force-share", Value::Switch(true));
    }
    let opened = context.open_filename(&full, options, flags).await;
    let failed = |error| Failure::of(&format!("Could not open new backing file '{name}': "), &error);
    Ok(Some((opened.map_err(failed)?, false)))
}
