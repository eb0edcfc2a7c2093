//! `commit`.

use crate::commands::flags;
use crate::progress::Shown;
use crate::shared_options::{SharedOptions, closing_failed, with_cache};
use crate::tool::{Failure, Outcome, Tool, number, one_file, parse};
use block_graph::{Errno, NodeRef, OpenContext, OpenFlags, skip_filters};
use std::process::ExitCode;

/// Writes what an image has to an image below it.
pub(crate) async fn run(tool: &Tool, words: Vec<String>) -> Outcome {
    let mut shared = SharedOptions::default();
    let (mut base, mut keeps, mut rate) = (None, false, None);
    let operands = parse(flags("commit"), words, |key, value| {
        let Some(value) = shared.take(key, value)? else { return Ok(()) };
        match key {
            "b" => {
                // What is between would be wrong afterwards, so emptying the image would not help.
                keeps = true;
                base = Some(value);
            }
            "d" => keeps = true,
            _ => rate = Some(number("rate limit", &value)?),
        }
        Ok(())
    })?;
    let filename = one_file(operands)?;
    let flags = with_cache(OpenFlags::WRITE, shared.cache.as_deref(), "")?;
    let context = shared.context();
    let node = shared.named(&filename).open(tool, &context, flags).await?;
    let shown = Shown::new(tool, shared.shows_progress(), 1.0, shared.quiet);
    let committed = commit(&context, &node, &filename, base.as_deref(), keeps, rate, &shown).await;
    drop(shown);
    let closed = node.close().await;
    committed?;
    if let Err(error) = closed {
        let mut lines = closing_failed(&error);
        // What was lost is said of the image and of the disk.
        lines.extend_from_within(..lines.len() - 1);
        lines.sort_by_key(|line| line.starts_with("Error while"));
        return Err(Failure::Messages(lines, 1));
    }
    if !shared.quiet {
        println!("Image committed.");
    }
    Ok(ExitCode::SUCCESS)
}

async fn commit(
    _context: &OpenContext,
    node: &NodeRef,
    filename: &str,
    base: Option<&str>,
    keeps: bool,
    rate: Option<u64>,
    shown: &Shown<'_>,
) -> Result<(), Failure> {
    let below = match base {
        Some(base) => blockdev::chain::find_backing(node, base).ok_or_else(|| {
            Failure::new(format!("Did not find '{base}' in the backing chain of '{filename}'"))
        })?,
        None => {
            skip_filters(node).backing().ok_or_else(|| Failure::new("Image does not have a backing file"))?
        }
    };
    blockdev::chain::commit(node, &below, rate, shown).await?;
    shown.end();
    if !keeps && let Some(image) = skip_filters(node).driver().image() {
        match image.make_empty().await {
            Err(error) if error.errno() != Errno::NOT_SUPPORTED => {
                let name = blockdev::filename::of(node);
                return Err(Failure::new(format!("Failed to empty {name}: {}", error.errno())));
            }
            _ => {}
        }
    }
    Ok(())
}
