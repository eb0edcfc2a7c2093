//! The disk tools, which read their own command lines: as subcommands, or under the names of the programs that they
//! stand in for.

use std::path::Path;
use std::process::ExitCode;

/// A tool: takes the name that it was called by, and its arguments.
type Tool = fn(&str, Vec<String>) -> ExitCode;

/// Runs a tool, if the command line calls one.
pub(crate) fn run() -> Option<ExitCode> {
    let mut arguments = std::env::args_os();
    let program = arguments.next().unwrap_or_default();
    let name = Path::new(&program).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let program = program.to_string_lossy().into_owned();
    let (program, tool): (&str, Tool) = match name.as_str() {
        "qemu-img" => (&program, img::run),
        "qemu-io" => (&program, qemu_io::run),
        "qemu-nbd" => (&program, nbd_tool::run),
        _ => match arguments.next()?.to_str()? {
            "img" => ("vireo img", img::run),
            "io" => ("vireo io", qemu_io::run),
            "nbd" => ("vireo nbd", nbd_tool::run),
            _ => return None,
        },
    };
    let mut words = Vec::new();
    for argument in arguments {
        match argument.into_string() {
            Ok(word) => words.push(word),
            Err(argument) => {
                eprintln!("{program}: '{}' is not UTF-8", argument.display());
                return Some(ExitCode::FAILURE);
            }
        }
    }
    Some(tool(program, words))
}
