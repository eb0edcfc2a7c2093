//! `resize`.

use crate::commands::flags;
use crate::shared_options::SharedOptions;
use crate::tool::{Failure, Outcome, Tool, parse};
use block_graph::{NodeRef, OpenFlags, Preallocation, Truncate};
use std::process::ExitCode;

/// Makes an image longer or shorter.
pub(crate) async fn run(tool: &Tool, mut words: Vec<String>) -> Outcome {
    // The size may begin with a minus sign and is no option then.
    let expecting = || Failure::Usage("Expecting image file name and size".to_owned());
    let size = if words.len() > 1 { words.pop() } else { None };
    let mut shared = SharedOptions::default();
    let (mut preallocation, mut shrink) = (Preallocation::Off, false);
    let operands = parse(flags("resize"), words, |key, value| {
        let Some(value) = shared.take(key, value)? else { return Ok(()) };
        match key {
            "preallocation" => {
                let invalid = || Failure::new(format!("Invalid preallocation mode '{value}'"));
                preallocation = Preallocation::from_name(&value).ok_or_else(invalid)?;
            }
            _ => shrink = true,
        }
        Ok(())
    })?;
    let Ok([filename]) = <[String; 1]>::try_from(operands) else {
        return Err(expecting());
    };
    let size = size.ok_or_else(expecting)?;
    let (sign, amount) = match (size.strip_prefix('+'), size.strip_prefix('-')) {
        (Some(more), _) => (1, more),
        (_, Some(less)) => (-1, less),
        _ => (0, size.as_str()),
    };
    let amount = block_graph::size_option("size", amount)?;
    let context = shared.context();
    let flags = OpenFlags { unmap: false, ..OpenFlags::WRITE };
    let node = shared.named(&filename).open(tool, &context, flags).await?;
    let resized = resize(tool, &node, sign, amount, preallocation, shrink).await;
    let closed = node.close().await;
    resized?;
    closed?;
    if !shared.quiet {
        println!("Image resized.");
    }
    Ok(ExitCode::SUCCESS)
}

async fn resize(
    tool: &Tool,
    node: &NodeRef,
    sign: i8,
    amount: u64,
    preallocation: Preallocation,
    shrink: bool,
) -> Result<(), Failure> {
    let current = node.len();
    let total = match sign {
        1 => current.checked_add(amount),
        -1 => current.checked_sub(amount),
        _ => Some(amount),
    };
    let total = total.filter(|total| (1..=i64::MAX.unsigned_abs()).contains(total));
    let total = total.ok_or_else(|| Failure::new("New image size must be positive"))?;
    if total <= current && preallocation != Preallocation::Off {
        return Err(Failure::new("Preallocation can only be used for growing images"));
    }
    if total < current && !shrink {
        tool.error("Use the --shrink option to perform a shrink operation.");
        tool.warn(
            "Shrinking an image will delete all data beyond the shrunken image's end. Before performing such an \
             operation, make sure there is no important data there.",
        );
        return Err(Failure::Said(1));
    }
    // People expect the size that they said.
    Ok(node.truncate(total, Truncate { exact: true, preallocation, zero: false }).await?)
}
