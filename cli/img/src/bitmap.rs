//! `bitmap`.

use crate::commands::flags;
use crate::shared_options::{Named, SharedOptions, close};
use crate::tool::{Failure, Outcome, Tool, number, parse};
use block_graph::{Errno, Error, Image, NodeRef, OpenFlags, Options};
use std::process::ExitCode;

enum Action {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    Merge(String),
}

impl Action {
    fn name(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => "merge",
        }
    }
}

/// Changes an image's bitmaps.
pub(crate) async fn run(tool: &Tool, words: Vec<String>) -> Outcome {
    let mut shared = SharedOptions::default();
    let mut actions = Vec::new();
    let (mut granularity, mut source, mut source_format) = (None, None, None);
    let operands = parse(flags("bitmap"), words, |key, value| {
        let Some(value) = shared.take(key, value)? else { return Ok(()) };
        match key {
            "add" => actions.push(Action::Add),
            "remove" => actions.push(Action::Remove),
            "clear" => actions.push(Action::Clear),
            "enable" => actions.push(Action::Enable),
            "disable" => actions.push(Action::Disable),
            "merge" => actions.push(Action::Merge(value)),
            "g" => granularity = Some(number("granularity", &value)?).filter(|bytes| *bytes > 0),
            "b" => source = Some(value),
            _ => source_format = Some(value),
        }
        Ok(())
    })?;
    let adds = actions.iter().any(|action| matches!(action, Action::Add));
    let merges = actions.iter().any(|action| matches!(action, Action::Merge(_)));
    if actions.is_empty() {
        let message = "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge";
        return Err(Failure::new(message));
    }
    if granularity.is_some() && !adds {
        return Err(Failure::new("granularity only supported with --add"));
    }
    if source_format.is_some() && source.is_none() {
        return Err(Failure::new("-F only supported with -b"));
    }
    if source.is_some() && !merges {
        return Err(Failure::new("Merge bitmap source file only supported with --merge"));
    }
    let Ok([filename, bitmap]) = <[String; 2]>::try_from(operands) else {
        return Err(Failure::new("Expecting filename and bitmap name"));
    };
    let context = shared.context();
    // Only the bitmaps are looked at, so the backing files may be missing.
    let flags = OpenFlags { no_backing: true, unmap: false, resize: false, ..OpenFlags::WRITE };
    let mut nodes = vec![shared.named(&filename).open(tool, &context, flags).await?];
    if let Some(source) = &source {
        let format = source_format.as_deref();
        let named =
            Named { name: source, format, image_opts: false, force_share: false, options: Options::new() };
        let flags = OpenFlags { no_backing: true, ..OpenFlags::READ };
        nodes.push(named.open(tool, &context, flags).await?);
    }
    let mut done = Ok(());
    for action in &actions {
        let (target, source) = (&nodes[0], nodes.last().unwrap_or(&nodes[0]));
        let result = act(target, source, &bitmap, action, granularity).await;
        if let Err(error) = result {
            let prefix = format!("Operation {} on bitmap {bitmap} failed: ", action.name());
            done = Err(Failure::of(&prefix, &error));
            break;
        }
    }
    let closed = close(&nodes).await;
    done?;
    closed?;
    Ok(ExitCode::SUCCESS)
}

async fn act(
    target: &NodeRef,
    source: &NodeRef,
    name: &str,
    action: &Action,
    granularity: Option<u64>,
) -> Result<(), Error> {
    let image = bitmaps_of(target, name)?;
    let exists = image.bitmaps().iter().any(|bitmap| bitmap.name == name);
    if !exists && !matches!(action, Action::Add) {
        return Err(Error::new(Errno::NOT_FOUND, format!("Dirty bitmap '{name}' not found")));
    }
    match action {
        Action::Add => image.bitmap_add(name, granularity, true).await,
        Action::Remove => image.bitmap_remove(name).await,
        Action::Clear => {
            image.bitmap(name).await?.clear();
            Ok(())
        }
        Action::Enable => image.bitmap_set_enabled(name, true).await,
        Action::Disable => image.bitmap_set_enabled(name, false).await,
        Action::Merge(from) => {
            let other = bitmaps_of(source, from)?;
            if !other.bitmaps().iter().any(|bitmap| bitmap.name == *from) {
                return Err(Error::new(Errno::NOT_FOUND, format!("Dirty bitmap '{from}' not found")));
            }
            let (from, to) = (other.bitmap(from).await?, image.bitmap(name).await?);
            if from.len() != to.len() {
                let sizes = format!("destination size is {} and source size is {}", to.len(), from.len());
                return Err(Error::invalid(format!(
                    "Bitmaps are of different sizes ({sizes}) and can't be merged"
                )));
            }
            to.merge(&from);
            Ok(())
        }
    }
}

fn bitmaps_of<'a>(node: &'a NodeRef, name: &str) -> Result<&'a dyn Image, Error> {
    let format = node.driver().format_name();
    let image = node.driver().image().filter(|_| format == "qcow2");
    image.ok_or_else(|| {
        Error::unsupported(format!("Cannot store dirty bitmap '{name}': driver '{format}' has no bitmaps"))
    })
}
