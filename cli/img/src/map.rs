//! `map`.

use crate::commands::flags;
use crate::shared_options::SharedOptions;
use crate::tool::{Failure, Outcome, Output, Tool, number, one_file, parse};
use block_graph::{Error, OpenFlags};
use blockdev::status::{Extent, extents};
use std::process::ExitCode;

/// Lists where an image's data are.
pub(crate) async fn run(tool: &Tool, words: Vec<String>) -> Outcome {
    let mut shared = SharedOptions::default();
    let (mut start, mut most) = (0, None);
    let operands = parse(flags("map"), words, |key, value| {
        let Some(value) = shared.take(key, value)? else { return Ok(()) };
        match key {
            "s" => start = number("start offset", &value)?,
            _ => most = Some(number("max length", &value)?),
        }
        Ok(())
    })?;
    let filename = one_file(operands)?;
    let output = shared.output()?;
    let context = shared.context();
    let node = shared.named(&filename).open(tool, &context, OpenFlags::READ).await?;
    let end = most.map_or(node.len(), |most| start.saturating_add(most).min(node.len()));
    let listed = match output {
        Output::Json => {
            print!("[");
            let mut first = true;
            let listed = extents(&node, start, end, |extent| {
                print!("{}{}", if first { "" } else { ",\n" }, to_json(&extent));
                first = false;
                Ok::<_, Listing>(())
            })
            .await;
            if listed.is_ok() {
                println!("]");
            }
            listed
        }
        Output::Human => {
            println!("{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to");
            let mut lines = Lines::default();
            let listed = extents(&node, start, end, |extent| lines.add(extent)).await;
            match listed {
                Ok(()) => lines.end(),
                failed => failed,
            }
        }
    };
    let closed = node.close().await;
    match listed {
        Ok(()) => Ok(closed.map(|()| ExitCode::SUCCESS)?),
        Err(Listing::Status(error)) => {
            Err(Failure::new(format!("Could not read file metadata: {}", error.errno())))
        }
        Err(Listing::NoPlace) => {
            Err(Failure::new("File contains external, encrypted or compressed clusters."))
        }
    }
}

/// Why not all is listed.
enum Listing {
    Status(Error),
    /// Some data are nowhere in a file as they are.
    NoPlace,
}

impl From<Error> for Listing {
    fn from(error: Error) -> Self {
        Self::Status(error)
    }
}

fn to_json(extent: &Extent) -> String {
    let Extent { start, len, depth, present, zero, data, compressed, offset, .. } = extent;
    let offset = offset.map_or_else(String::new, |offset| format!(", \"offset\": {offset}"));
    format!(
        "{{ \"start\": {start}, \"length\": {len}, \"depth\": {depth}, \"present\": {present}, \"zero\": {zero}, \
         \"data\": {data}, \"compressed\": {compressed}{offset}}}"
    )
}

/// Prints the extents that have data.
#[derive(Default)]
struct Lines {
    last: Option<Extent>,
}

impl Lines {
    fn add(&mut self, extent: Extent) -> Result<(), Listing> {
        if let Some(last) = self.last.replace(extent) {
            print_line(&last)?;
        }
        Ok(())
    }

    fn end(self) -> Result<(), Listing> {
        self.last.map_or(Ok(()), |last| print_line(&last))
    }
}

fn print_line(extent: &Extent) -> Result<(), Listing> {
    if extent.zero || !extent.data {
        return Ok(());
    }
    let offset = extent.offset.ok_or(Listing::NoPlace)?;
    let hexadecimal = |number: u64| if number == 0 { "0".to_owned() } else { format!("{number:#x}") };
    println!(
        "{:<16}{:<16}{:<16}{}",
        hexadecimal(extent.start),
        hexadecimal(extent.len),
        hexadecimal(offset),
        extent.filename.as_deref().unwrap_or_default()
    );
    Ok(())
}
