//! `check`.

use crate::commands::flags;
use crate::shared_options::{SharedOptions, with_cache};
use crate::tool::{Failure, Outcome, Output, Tool, one_file, parse};
use block_graph::{CheckFix, CheckReport, Errno, NodeRef, OpenFlags};
use serde_json::{Map, Value};
use std::process::ExitCode;

/// The image has errors.
const CORRUPT: u8 = 2;
/// The image has leaked clusters only.
const LEAKS: u8 = 3;
/// The format cannot be checked.
const UNSUPPORTED: u8 = 63;

/// Checks an image, and repairs it if it is to.
pub(crate) async fn run(tool: &Tool, words: Vec<String>) -> Outcome {
    let mut shared = SharedOptions::default();
    let mut fix = CheckFix::Nothing;
    let operands = parse(flags("check"), words, |key, value| {
        let Some(value) = shared.take(key, value)? else { return Ok(()) };
        fix = match value.as_str() {
            "leaks" => CheckFix::Leaks,
            "all" => CheckFix::All,
            _ => {
                let message = format!("--repair (-r) expects 'leaks' or 'all' not '{value}'");
                return Err(Failure::Usage(message));
            }
        };
        Ok(())
    })?;
    let filename = one_file(operands)?;
    let output = shared.output()?;
    let writable = fix != CheckFix::Nothing;
    let flags = OpenFlags { check: true, writable, resize: writable, unmap: writable, ..OpenFlags::READ };
    let flags = with_cache(flags, shared.source_cache.as_deref(), "source ")?;
    let context = shared.context();
    let node = shared.named(&filename).open(tool, &context, flags).await?;
    let mut report = check(&node, fix).await?;
    let fixed = (report.corruptions_fixed, report.leaks_fixed);
    if fixed != (0, 0) {
        if output == Output::Human && !shared.quiet {
            println!("The following inconsistencies were found and repaired:\n");
            println!("    {} leaked clusters\n    {} corruptions\n", fixed.1, fixed.0);
            println!("Double checking the fixed image now...");
        }
        report = check(&node, CheckFix::Nothing).await?;
        (report.corruptions_fixed, report.leaks_fixed) = fixed;
    }
    if !shared.quiet {
        match output {
            Output::Human => print_human(&report),
            Output::Json => {
                let format = node.driver().format_name();
                println!("{}", blockdev::syntax::json::pretty(&to_json(&report, &filename, format)));
            }
        }
    }
    let closed = node.close().await;
    if report.check_errors > 0 {
        return Err(Failure::new("Check failed"));
    }
    closed?;
    Ok(match report {
        CheckReport { corruptions: 1.., .. } => ExitCode::from(CORRUPT),
        CheckReport { leaks: 1.., .. } => ExitCode::from(LEAKS),
        _ => ExitCode::SUCCESS,
    })
}

async fn check(node: &NodeRef, fix: CheckFix) -> Result<CheckReport, Failure> {
    let unsupported = || Failure::new("This image format does not support checks").with_code(UNSUPPORTED);
    let image = node.driver().image().ok_or_else(unsupported)?;
    // What a check says goes where messages about images go, also when its result is for programs.
    image.check(fix, &mut |line| eprintln!("{line}")).await.map_err(|error| match error.errno() {
        Errno::NOT_SUPPORTED => unsupported(),
        errno => Failure::new(format!("Check failed: {errno}")),
    })
}

fn print_human(report: &CheckReport) {
    if report.corruptions == 0 && report.leaks == 0 && report.check_errors == 0 {
        println!("No errors were found on the image.");
    }
    if report.corruptions > 0 {
        println!("\n{} errors were found on the image.", report.corruptions);
        println!("Data may be corrupted, or further writes to the image may corrupt it.");
    }
    if report.leaks > 0 {
        println!("\n{} leaked clusters were found on the image.", report.leaks);
        println!("This means waste of disk space, but no harm to data.");
    }
    if report.check_errors > 0 {
        println!("\n{} internal errors have occurred during the check.", report.check_errors);
    }
    if let (Some(total @ 1..), Some(allocated @ 1..)) = (report.total_clusters, report.allocated_clusters) {
        let percent = |part: Option<u64>, of: u64| part.unwrap_or_default() as f64 * 100.0 / of as f64;
        println!(
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            percent(Some(allocated), total),
            percent(report.fragmented_clusters, allocated),
            percent(report.compressed_clusters, allocated),
        );
    }
    if let Some(end @ 1..) = report.image_end_offset {
        println!("Image end offset: {end}");
    }
}

fn to_json(report: &CheckReport, filename: &str, format: &str) -> Value {
    let mut object = Map::new();
    object.insert("filename".into(), filename.into());
    object.insert("format".into(), format.into());
    object.insert("check-errors".into(), report.check_errors.into());
    // Those that are 0 are left out.
    for (name, number) in [
        ("corruptions", Some(report.corruptions)),
        ("leaks", Some(report.leaks)),
        ("corruptions-fixed", Some(report.corruptions_fixed)),
        ("leaks-fixed", Some(report.leaks_fixed)),
        ("image-end-offset", report.image_end_offset),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ] {
        if let Some(number @ 1..) = number {
            object.insert(name.into(), number.into());
        }
    }
    Value::Object(object)
}
