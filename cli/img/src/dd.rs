//! `dd`.

use crate::commands::flags;
use crate::shared_options::{Named, SharedOptions, close};
use crate::tool::{Failure, Outcome, Tool, number, number_in, parse};
use block_graph::{NodeRef, OpenFlags, Options, WriteFlags};
use blockdev::create::{create_with, format_options};
use io_loop::IoBuffer;
use std::process::ExitCode;

/// The largest block.
const LARGEST_BLOCK: u64 = i32::MAX as u64;
/// The most bytes that are copied at once, where blocks are smaller.
const CHUNK: u64 = 1 << 20;

/// Which blocks go where.
struct Operands {
    block: u64,
    count: Option<u64>,
    skip: u64,
    input: Option<String>,
    output: Option<String>,
}

impl Operands {
    fn parse(words: Vec<String>) -> Result<Self, Failure> {
        let mut operands = Self { block: 512, count: None, skip: 0, input: None, output: None };
        for word in words {
            let unknown = || Failure::new(format!("unrecognized operand {word}"));
            let (name, value) = word.split_once('=').ok_or_else(unknown)?;
            match name {
                "bs" => operands.block = number_in(name, value, 1..=LARGEST_BLOCK)?,
                "count" => operands.count = Some(number(name, value)?),
                "skip" => operands.skip = number(name, value)?,
                "if" => operands.input = Some(value.to_owned()),
                "of" => operands.output = Some(value.to_owned()),
                _ => return Err(Failure::new(format!("unrecognized operand {name}"))),
            }
        }
        Ok(operands)
    }
}

/// Copies blocks of an image to a new one.
pub(crate) async fn run(tool: &Tool, words: Vec<String>) -> Outcome {
    let mut shared = SharedOptions::default();
    let mut format = "raw".to_owned();
    let operands = parse(flags("dd"), words, |key, value| {
        if let Some(value) = shared.take(key, value)? {
            format = value;
        }
        Ok(())
    })?;
    let operands = Operands::parse(operands)?;
    let (Some(input), Some(output)) = (&operands.input, &operands.output) else {
        return Err(Failure::new("Must specify both input and output files"));
    };
    let context = shared.context();
    let source = shared.named(input).open(tool, &context, OpenFlags::READ).await?;
    if context.registry.find(&format).is_none() {
        return Err(Failure::new("Unknown file format"));
    }
    let (kind, mut options) = format_options(&context, &format, Some(output))?;
    let end = match operands.count {
        Some(count) => count.saturating_mul(operands.block).min(source.len()),
        None => source.len(),
    };
    let start = operands.skip.checked_mul(operands.block).filter(|start| *start <= end);
    options.set("size", &start.map_or(0, |start| end - start).to_string())?;
    let created = create_with(&context, kind, output, &options).await;
    created
        .map_err(|error| Failure::of(&format!("{output}: error while creating output image: "), &error))?;
    let target = Named {
        name: output,
        format: Some(&format),
        image_opts: false,
        force_share: false,
        options: Options::new(),
    };
    let flags = OpenFlags { unmap: false, resize: false, ..OpenFlags::WRITE };
    let target = target.open(tool, &context, flags).await?;
    let copied = match start {
        Some(start) => copy(&source, &target, operands.block, start, end).await,
        None => {
            tool.error(format_args!("{input}: cannot skip to specified offset"));
            Ok(())
        }
    };
    close([&target, &source]).await?;
    copied?;
    Ok(ExitCode::SUCCESS)
}

async fn copy(source: &NodeRef, target: &NodeRef, block: u64, start: u64, end: u64) -> Result<(), Failure> {
    let chunk = if block < CHUNK { CHUNK - CHUNK % block } else { block };
    let chunk = chunk.min(end - start);
    let mut buffer = IoBuffer::zeroed(usize::try_from(chunk).unwrap_or(usize::MAX));
    let mut at = start;
    while at < end {
        let len = usize::try_from(chunk.min(end - at)).unwrap_or(usize::MAX);
        let io = buffer.io_range(0..len);
        let read = source.read(at, &io).await;
        read.map_err(|error| {
            Failure::new(format!("error while reading from input image file: {}", error.errno()))
        })?;
        let written = target.write(at - start, &io, WriteFlags::empty()).await;
        written.map_err(|error| {
            Failure::new(format!("error while writing to output image file: {}", error.errno()))
        })?;
        at += len as u64;
    }
    Ok(())
}
