//! `convert`.

use crate::commands::flags;
use crate::progress::Shown;
use crate::shared_options::{Named, SharedOptions, SnapshotName, close, with_cache};
use crate::tool::{Failure, Outcome, Tool, accumulate, number, number_in, parse};
use block_graph::{Error, Image, NodeRef, OpenContext, OpenFlags, Options, skip_filters};
use blockdev::convert::{LARGEST_CHUNK, Settings, convert};
use blockdev::create::{create_with, format_options, set_backing};
use std::process::ExitCode;

/// The most chunks under way at once.
const MOST_REQUESTS: u64 = 16;
/// Requests that are under way if nothing is said.
const REQUESTS: usize = 8;

/// What the command line says.
#[derive(Default)]
struct Arguments {
    shared: SharedOptions,
    output_format: Option<String>,
    options: Option<String>,
    backing: Option<String>,
    backing_format: Option<String>,
    snapshot: SnapshotName,
    least_zeroes: Option<u64>,
    requests: Option<usize>,
    rate: Option<u64>,
    compressed: bool,
    copy_range: bool,
    no_create: bool,
    out_of_order: bool,
    salvage: bool,
    bitmaps: bool,
    skip_broken: bool,
    target_image_opts: bool,
    target_is_zero: bool,
}

impl Arguments {
    fn parse(words: Vec<String>) -> Result<(Self, Vec<String>), Failure> {
        let mut arguments = Self::default();
        let operands = parse(flags("convert"), words, |key, value| arguments.take(key, value))?;
        Ok((arguments, operands))
    }

    fn take(&mut self, key: &str, value: String) -> Result<(), Failure> {
        let Some(value) = self.shared.take(key, value)? else { return Ok(()) };
        match key {
            "O" => self.output_format = Some(value),
            "B" => self.backing = Some(value),
            "F" => self.backing_format = Some(value),
            "o" => accumulate(&mut self.options, &value)?,
            "l" => self.snapshot = SnapshotName::parse(&value)?,
            "S" => self.least_zeroes = Some(least_zeroes(&value)?),
            "m" => {
                let requests = number_in("number of coroutines", &value, 1..=MOST_REQUESTS)?;
                self.requests = usize::try_from(requests).ok();
            }
            "r" => self.rate = Some(number("rate limit", &value)?),
            "C" => self.copy_range = true,
            "c" => self.compressed = true,
            "n" => self.no_create = true,
            "W" => self.out_of_order = true,
            "salvage" => self.salvage = true,
            "bitmaps" => self.bitmaps = true,
            "skip-broken-bitmaps" => self.skip_broken = true,
            "target-image-opts" => self.target_image_opts = true,
            _ => self.target_is_zero = true,
        }
        Ok(())
    }

    /// Refuses what cannot be together.
    fn check(&self) -> Result<(), Failure> {
        let wrong = [
            (self.skip_broken && !self.bitmaps, "Use of --skip-broken-bitmaps requires --bitmaps"),
            (self.compressed && self.copy_range, "Cannot enable copy offloading when -c is used"),
            (self.least_zeroes.is_some() && self.copy_range, "Cannot enable copy offloading when -S is used"),
            (self.copy_range && self.salvage, "Cannot use copy offloading in salvaging mode"),
            (self.target_image_opts && !self.no_create, "--target-image-opts requires use of -n flag"),
            (self.no_create && self.options.is_some(), "-o has no effect when skipping image creation"),
            (self.target_is_zero && !self.no_create, "--target-is-zero requires use of -n flag"),
        ];
        match wrong.into_iter().find(|(is_so, _)| *is_so) {
            Some((_, message)) => Err(Failure::new(message)),
            None => Ok(()),
        }
    }
}

fn least_zeroes(text: &str) -> Result<u64, Failure> {
    let bytes = number("buffer size for sparse output", text)?;
    if bytes % 512 == 0 && bytes <= LARGEST_CHUNK {
        return Ok(bytes);
    }
    Err(Failure::new(format!(
        "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to {LARGEST_CHUNK}. \
         Select 0 to disable sparse detection (fully allocates output)."
    )))
}

/// Copies images to one of another format.
pub(crate) async fn run(tool: &Tool, words: Vec<String>) -> Outcome {
    let (mut arguments, mut operands) = Arguments::parse(words)?;
    arguments.check()?;
    let context = arguments.shared.context();
    let format = match arguments.output_format.clone() {
        None if arguments.target_image_opts => None,
        None => Some("raw".to_owned()),
        format => format,
    };
    let target = if operands.len() >= 2 { operands.pop() } else { None };
    if arguments.options.as_deref().is_some_and(blockdev::syntax::list::asks_for_help) {
        let format = format.ok_or_else(|| Failure::new("Option help requires a format be specified"))?;
        return crate::create::print_option_help(&context, &format, target.as_deref());
    }
    let target = target.ok_or_else(|| Failure::new("Must specify image file name"))?;
    let shared = &arguments.shared;
    let flags = with_cache(OpenFlags::READ, shared.source_cache.as_deref(), "source ")?;
    let shown = Shown::new(tool, shared.shows_progress(), 1.0, shared.quiet);
    let mut sources = Vec::new();
    for name in &operands {
        sources.push(shared.named(name).open(tool, &context, flags).await?);
    }
    if matches!(arguments.snapshot, SnapshotName::Either(_)) && sources.len() > 1 {
        return Err(Failure::new("No support for concatenating multiple snapshot"));
    }
    arguments.snapshot.load(&sources[0]).await?;
    let job =
        Job { tool, context: &context, arguments: &arguments, format: format.as_deref(), target: &target };
    let (node, backing) = job.target(&sources).await?;
    let copied = job.copy(&sources, &node, backing, &shown).await;
    let closed = close(std::iter::once(&node).chain(&sources)).await;
    copied?;
    shown.end();
    closed?;
    Ok(ExitCode::SUCCESS)
}

struct Job<'a> {
    tool: &'a Tool,
    context: &'a OpenContext,
    arguments: &'a Arguments,
    format: Option<&'a str>,
    target: &'a str,
}

impl Job<'_> {
    /// Makes the target, if it is to be made, and opens it; and says whether it has a backing file.
    async fn target(&self, sources: &[NodeRef]) -> Result<(NodeRef, bool), Failure> {
        let arguments = self.arguments;
        let total: u64 = sources.iter().map(|source| source.len().next_multiple_of(512)).sum();
        let mut secrets = Options::new();
        let mut backing = arguments.backing.clone();
        if !arguments.no_create {
            let format = self.format.unwrap_or("raw");
            let (kind, mut options) = format_options(self.context, format, Some(self.target))?;
            if let Some(list) = &arguments.options {
                options.parse(list)?;
            }
            options.set("size", &total.to_string())?;
            set_backing(&mut options, format, backing.as_deref(), arguments.backing_format.as_deref())?;
            let named = options.get("backing_file").map(str::to_owned);
            self.check_backing(sources, named.as_ref().or(backing.as_ref()))?;
            if named.is_some() && !options.is_set("backing_fmt") {
                return Err(Failure::new("Use of backing file requires explicit backing format"));
            }
            backing = named.or(backing);
            if arguments.compressed {
                let not_both =
                    |what| Failure::new(format!("Compression and {what} not supported at the same time"));
                if !can_compress(format) {
                    return Err(Failure::new("Compression not supported for this file format"));
                }
                if options.is_on("encryption") || options.get("encrypt.format").is_some() {
                    return Err(not_both("encryption"));
                }
                if options.get("preallocation").is_some_and(|mode| mode != "off") {
                    return Err(not_both("preallocation"));
                }
            }
            self.check_bitmaps(sources)?;
            for (name, value) in options.options().iter().filter(|(name, _)| name.ends_with("key-secret")) {
                secrets.set(name, value.clone());
            }
            let created = create_with(self.context, kind, self.target, &options).await;
            created.map_err(|error| {
                Failure::of(&format!("{}: error while converting {format}: ", self.target), &error)
            })?;
        } else {
            self.check_backing(sources, backing.as_ref())?;
            self.check_bitmaps(sources)?;
        }
        let node = self.open(secrets).await?;
        if arguments.no_create && node.len() < total {
            return Err(Failure::new("output file is smaller than input file"));
        }
        Ok((node, backing.is_some()))
    }

    async fn open(&self, options: Options) -> Result<NodeRef, Failure> {
        let arguments = self.arguments;
        let unmap = arguments.least_zeroes != Some(0);
        let flags = OpenFlags { unmap, ..OpenFlags::WRITE };
        let cache = arguments.shared.cache.as_deref().unwrap_or("unsafe");
        let flags = with_cache(flags, Some(cache), "")?;
        let named = Named {
            name: self.target,
            format: self.format,
            image_opts: arguments.target_image_opts,
            force_share: false,
            options,
        };
        let node = named.open(self.tool, self.context, flags).await?;
        let format = node.driver().format_name();
        if arguments.bitmaps && format != "qcow2" {
            return Err(Failure::new(format!("Format driver '{format}' does not support bitmaps")));
        }
        if arguments.compressed && !can_compress(format) {
            return Err(Failure::new("Compression not supported for this file format"));
        }
        Ok(node)
    }

    fn check_backing(&self, sources: &[NodeRef], backing: Option<&String>) -> Result<(), Failure> {
        if backing.is_none() {
            return Ok(());
        }
        if self.arguments.target_is_zero {
            let message = "Cannot use --target-is-zero when the destination image has a backing file";
            return Err(Failure::new(message));
        }
        if sources.len() > 1 {
            return Err(Failure::new(
                "Having a backing file for the target makes no sense when concatenating multiple input images",
            ));
        }
        Ok(())
    }

    fn check_bitmaps(&self, sources: &[NodeRef]) -> Result<(), Failure> {
        if !self.arguments.bitmaps {
            return Ok(());
        }
        if sources.len() > 1 {
            return Err(Failure::new("Copying bitmaps only possible with single source"));
        }
        let image = skip_filters(&sources[0]);
        if image.driver().format_name() != "qcow2" {
            return Err(Failure::new("Source lacks bitmap support"));
        }
        let bitmaps = image.driver().image().map(Image::bitmaps).unwrap_or_default();
        match bitmaps.iter().find(|bitmap| bitmap.in_use) {
            Some(bitmap) if !self.arguments.skip_broken => {
                self.tool.error(format_args!("Cannot copy inconsistent bitmap '{}'", bitmap.name));
                eprintln!(
                    "Try --skip-broken-bitmaps, or use '{} bitmap --remove' to delete it",
                    self.tool.name()
                );
                Err(Failure::Said(1))
            }
            _ => Ok(()),
        }
    }

    async fn copy(
        &self,
        sources: &[NodeRef],
        target: &NodeRef,
        has_backing: bool,
        shown: &Shown<'_>,
    ) -> Result<(), Failure> {
        let arguments = self.arguments;
        let is_new = !arguments.no_create;
        let backing = skip_filters(target).backing();
        let settings = Settings {
            least_zeroes: arguments.least_zeroes.unwrap_or(4096),
            compressed: arguments.compressed,
            in_order: !arguments.out_of_order,
            requests: arguments.requests.unwrap_or(REQUESTS),
            salvage: arguments.salvage,
            target_is_zero: arguments.target_is_zero,
            target_has_backing: has_backing,
            target_backing_len: backing.filter(|_| has_backing && is_new).map(|backing| backing.len()),
            rate: arguments.rate,
            ..Settings::default()
        };
        let copied = convert(sources, target, &settings, shown, is_new).await;
        copied.map_err(|error| Failure::new(error.to_string()))?;
        if arguments.bitmaps {
            self.copy_bitmaps(&skip_filters(&sources[0]), target).await?;
        }
        Ok(())
    }

    async fn copy_bitmaps(&self, source: &NodeRef, target: &NodeRef) -> Result<(), Failure> {
        let (Some(from), Some(to)) = (source.driver().image(), target.driver().image()) else {
            return Ok(());
        };
        for bitmap in from.bitmaps() {
            let name = &bitmap.name;
            if bitmap.in_use {
                self.tool.warn(format_args!("Skipping inconsistent bitmap '{name}'"));
                continue;
            }
            let added = to.bitmap_add(name, Some(bitmap.granularity), bitmap.auto).await;
            added.map_err(|error| Failure::of(&format!("Failed to create bitmap {name}: "), &error))?;
            let merged = async {
                let (old, new) = (from.bitmap(name).await?, to.bitmap(name).await?);
                new.merge(&old);
                Ok::<_, Error>(())
            };
            merged
                .await
                .map_err(|error| Failure::of(&format!("Failed to populate bitmap {name}: "), &error))?;
        }
        Ok(())
    }
}

/// Whether images of a format can be written compressed.
fn can_compress(format: &str) -> bool {
    ["qcow2", "compress", "copy-on-read", "throttle"].contains(&format)
}
