//! `amend`.

use crate::commands::flags;
use crate::progress::Shown;
use crate::shared_options::{SharedOptions, with_cache};
use crate::tool::{Failure, Outcome, Tool, accumulate, parse};
use block_graph::{Error, NodeRef, OpenContext, OpenFlags, OptionSpec};
use blockdev::convert::Watcher;
use blockdev::list_options::FormatOptions;
use std::process::ExitCode;

/// Changes an image's format options.
pub(crate) async fn run(tool: &Tool, words: Vec<String>) -> Outcome {
    let mut shared = SharedOptions::default();
    let (mut options, mut force) = (None, false);
    let operands = parse(flags("amend"), words, |key, value| {
        match (key, shared.take(key, value)?) {
            (_, None) => {}
            ("o", Some(value)) => accumulate(&mut options, &value)?,
            _ => force = true,
        }
        Ok(())
    })?;
    let options = options.ok_or_else(|| Failure::Usage("Must specify options (-o)".to_owned()))?;
    let asks_for_help = blockdev::syntax::list::asks_for_help(&options);
    let context = shared.context();
    if let (true, Some(format)) = (asks_for_help, &shared.format) {
        return print_help(&context, format);
    }
    let Ok([filename]) = <[String; 1]>::try_from(operands) else {
        return Err(Failure::new("Expecting one image file name"));
    };
    let flags = OpenFlags { unmap: false, resize: false, ..OpenFlags::WRITE };
    let flags = with_cache(flags, shared.cache.as_deref(), "")?;
    let node = shared.named(&filename).open(tool, &context, flags).await?;
    let format = node.driver().format_name();
    if asks_for_help {
        node.close().await?;
        return print_help(&context, format);
    }
    let shown = Shown::new(tool, shared.shows_progress(), 1.0, shared.quiet);
    let amended = amend(&context, &node, format, &options, force, &shown).await;
    if amended.is_ok() {
        shown.end();
    }
    let closed = node.close().await;
    amended?;
    closed?;
    Ok(ExitCode::SUCCESS)
}

async fn amend(
    context: &OpenContext,
    node: &NodeRef,
    format: &str,
    list: &str,
    force: bool,
    shown: &Shown<'_>,
) -> Result<(), Failure> {
    let specs = amendable(context, format)?;
    let mut known = FormatOptions::new(specs);
    if let Err(error) = known.parse(list) {
        let all = context.registry.get(format)?.create_options().iter().copied();
        let for_creation = FormatOptions::new(all).parse(list).is_ok();
        let hint = "This option is only supported for image creation";
        return Err(if for_creation { error.hint(hint) } else { error }.into());
    }
    let image = node.driver().image().ok_or_else(|| unsupported(format))?;
    let progress = |done, total| shown.progress(done, total);
    Ok(image.amend(&mut known.options(), &progress, force).await?)
}

fn amendable(context: &OpenContext, format: &str) -> Result<Vec<OptionSpec>, Failure> {
    let kind = context.registry.find(format);
    let kind = kind.ok_or_else(|| Failure::new(format!("Unknown file format '{format}'")))?;
    let specs = kind.amend_options();
    if specs.is_empty() { Err(unsupported(format).into()) } else { Ok(specs) }
}

fn unsupported(format: &str) -> Error {
    Error::unsupported(format!("Format driver '{format}' does not support option amendment"))
}

fn print_help(context: &OpenContext, format: &str) -> Outcome {
    let specs = amendable(context, format)?;
    println!("Amend options for '{format}':");
    for line in blockdev::list_options::help(specs) {
        println!("{line}");
    }
    Ok(ExitCode::SUCCESS)
}
