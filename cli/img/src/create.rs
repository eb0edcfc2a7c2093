//! `create`.

use crate::commands::flags;
use crate::shared_options::SharedOptions;
use crate::tool::{Failure, Outcome, Tool, accumulate, number, parse};
use blockdev::create::{NewImage, create, format_options};
use std::process::ExitCode;

/// Makes an image.
pub(crate) async fn run(_tool: &Tool, words: Vec<String>) -> Outcome {
    let mut shared = SharedOptions::default();
    let (mut backing, mut backing_format, mut options, mut unsafe_backing) = (None, None, None, false);
    let operands = parse(flags("create"), words, |key, value| {
        let Some(value) = shared.take(key, value)? else { return Ok(()) };
        match key {
            "b" => backing = Some(value),
            "F" => backing_format = Some(value),
            "o" => accumulate(&mut options, &value)?,
            _ => unsafe_backing = true,
        }
        Ok(())
    })?;
    let format = shared.format.clone().unwrap_or_else(|| "raw".to_owned());
    let context = shared.context();
    let mut operands = operands.into_iter();
    let filename = operands.next();
    if options.as_deref().is_some_and(blockdev::syntax::list::asks_for_help) {
        return print_option_help(&context, &format, filename.as_deref());
    }
    let filename = filename.ok_or_else(|| Failure::Usage("Expecting image file name".to_owned()))?;
    let size = operands.next().map(|size| number("image size", &size)).transpose()?;
    if let Some(more) = operands.next() {
        return Err(Failure::Usage(format!("Unexpected argument: {more}")));
    }
    let new = NewImage {
        filename: &filename,
        format: &format,
        options: options.as_deref(),
        size,
        backing: backing.as_deref(),
        backing_format: backing_format.as_deref(),
        unsafe_backing,
    };
    let announce = |line: String| {
        if !shared.quiet {
            println!("{line}");
        }
    };
    let created = create(&context, &new, announce).await;
    created.map_err(|error| Failure::of(&format!("{filename}: "), &error))?;
    Ok(ExitCode::SUCCESS)
}

/// Lists the options of a format, and of the protocol of a file.
pub(crate) fn print_option_help(
    context: &block_graph::OpenContext,
    format: &str,
    filename: Option<&str>,
) -> Outcome {
    format_options(context, format, filename)?;
    let mut specs = context.registry.get(format)?.create_options().to_vec();
    match filename {
        Some(filename) => {
            println!("Supported options:");
            specs.extend_from_slice(context.registry.protocol_of(filename)?.create_options());
        }
        None => println!("Supported {format} options:"),
    }
    for line in blockdev::list_options::help(specs) {
        println!("{line}");
    }
    if filename.is_none() {
        println!("\nThe protocol level may support further options.");
        println!("Specify the target filename to include those options.");
    }
    Ok(ExitCode::SUCCESS)
}
