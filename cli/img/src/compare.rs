//! `compare`.

use crate::commands::flags;
use crate::progress::Shown;
use crate::shared_options::{SharedOptions, close, with_cache};
use crate::tool::{Failure, Outcome, Tool, parse};
use block_graph::{NodeRef, OpenFlags};
use blockdev::compare::{CompareError, Difference, compare, find_data};
use std::process::ExitCode;

/// The images differ.
const DIFFERENT: u8 = 1;
/// An image cannot be opened.
const NOT_OPENED: u8 = 2;
/// What a part of an image is cannot be known.
const NO_STATUS: u8 = 3;
/// An image cannot be read.
const NOT_READ: u8 = 4;

/// Compares two images.
pub(crate) async fn run(tool: &Tool, words: Vec<String>) -> Outcome {
    let mut shared = SharedOptions::default();
    let (mut second_format, mut strict) = (None, false);
    let operands = parse(flags("compare"), words, |key, value| {
        let taken = shared.take(key, value).map_err(|failure| failure.with_code(NOT_OPENED));
        match (key, taken?) {
            (_, None) => {}
            ("F", Some(value)) => second_format = Some(value),
            _ => strict = true,
        }
        Ok(())
    })?;
    let Ok([first, second]) = <[String; 2]>::try_from(operands) else {
        return Err(Failure::Usage("Expecting two image file names".to_owned()));
    };
    let flags = with_cache(OpenFlags::READ, shared.source_cache.as_deref(), "source ")
        .map_err(|failure| failure.with_code(NOT_OPENED))?;
    let context = shared.context();
    let shown = Shown::new(tool, shared.shows_progress(), 2.0, shared.quiet);
    let mut names = [shared.named(&first), shared.named(&second)];
    names[1].format = second_format.as_deref();
    let mut nodes = Vec::new();
    for name in &names {
        let opened = name.open(tool, &context, flags).await;
        nodes.push(opened.map_err(|failure| failure.with_code(NOT_OPENED))?);
    }
    let say = |text: String| {
        if !shared.quiet {
            tool.say(&text);
        }
    };
    let files = [first.as_str(), second.as_str()];
    let result = look([&nodes[0], &nodes[1]], strict, &shown, say).await;
    close(&nodes).await?;
    match result {
        Ok(same) => Ok(if same { ExitCode::SUCCESS } else { ExitCode::from(DIFFERENT) }),
        Err(CompareError::Status(number, _)) => {
            let message = format!("Sector allocation test failed for {}", files[number]);
            Err(Failure::new(message).with_code(NO_STATUS))
        }
        Err(CompareError::Read(number, offset, error)) => {
            let message =
                format!("Error while reading offset {offset} of {}: {}", files[number], error.errno());
            Err(Failure::new(message).with_code(NOT_READ))
        }
    }
}

async fn look(
    images: [&NodeRef; 2],
    strict: bool,
    shown: &Shown<'_>,
    say: impl Fn(String),
) -> Result<bool, CompareError> {
    let [first, second] = images.map(|image| image.len());
    if strict && first != second {
        say("Strict mode: Image size mismatch!".to_owned());
        return Ok(false);
    }
    let (end, all) = (first.min(second), first.max(second));
    let progress = |done: u64| shown.set(100.0 * done as f64 / all.max(1) as f64);
    match compare(images, strict, end, progress).await? {
        Some(Difference::Content(offset)) => {
            say(format!("Content mismatch at offset {offset}!"));
            return Ok(false);
        }
        Some(Difference::Status(offset)) => {
            say(format!("Strict mode: Offset {offset} block status mismatch!"));
            return Ok(false);
        }
        None => {}
    }
    if first != second {
        say("Warning: Image size mismatch!".to_owned());
        let number = usize::from(second > first);
        if let Some(offset) = find_data(images[number], number, end, all, progress).await? {
            say(format!("Content mismatch at offset {offset}!"));
            return Ok(false);
        }
    }
    say("Images are identical.".to_owned());
    Ok(true)
}
