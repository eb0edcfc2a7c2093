//! What the options of most subcommands are, and how images are opened by them.

use crate::tool::{Failure, Output, Tool};
use block_graph::{AllowAll, CacheMode, Error, NodeRef, OpenContext, OpenFlags, Options, Secrets, Value};
use std::sync::Arc;

/// Options that most subcommands have.
#[derive(Debug, Default)]
pub(crate) struct SharedOptions {
    pub(crate) format: Option<String>,
    pub(crate) image_opts: bool,
    pub(crate) force_share: bool,
    pub(crate) quiet: bool,
    pub(crate) progress: bool,
    pub(crate) cache: Option<String>,
    pub(crate) source_cache: Option<String>,
    output: Option<String>,
    secrets: Secrets,
}

impl SharedOptions {
    /// Takes an option, if it is one of these; else gives its value back.
    pub(crate) fn take(&mut self, key: &str, value: String) -> Result<Option<String>, Failure> {
        match key {
            "f" => self.format = Some(value),
            "image-opts" => self.image_opts = true,
            "U" => self.force_share = true,
            "q" => self.quiet = true,
            "p" => self.progress = true,
            "t" => self.cache = Some(value),
            "T" => self.source_cache = Some(value),
            "output" => self.output = Some(value),
            "object" => blockdev::secret::add_object(&mut self.secrets, &value)?,
            _ => return Ok(Some(value)),
        }
        Ok(None)
    }

    /// How to print.
    pub(crate) fn output(&self) -> Result<Output, Failure> {
        Output::parse(self.output.as_deref())
    }

    /// Whether progress is shown: not if nothing is to be printed.
    pub(crate) fn shows_progress(&self) -> bool {
        self.progress && !self.quiet
    }

    /// Where images are opened: with all drivers, and the secrets that were defined. People's own images may name any
    /// file.
    pub(crate) fn context(&mut self) -> OpenContext {
        let secrets = std::mem::take(&mut self.secrets);
        OpenContext::new(Arc::new(blockdev::registry()), Arc::new(secrets), Arc::new(AllowAll))
    }

    /// The image that is meant by `name` with these options.
    pub(crate) fn named<'a>(&'a self, name: &'a str) -> Named<'a> {
        Named {
            name,
            format: self.format.as_deref(),
            image_opts: self.image_opts,
            force_share: self.force_share,
            options: Options::new(),
        }
    }
}

/// `flags` with a cache mode; `what` says whose it is in the message about one that is none.
pub(crate) fn with_cache(flags: OpenFlags, mode: Option<&str>, what: &str) -> Result<OpenFlags, Failure> {
    let Some(name) = mode else { return Ok(flags) };
    let mode = CacheMode::from_name(name);
    let mode = mode.ok_or_else(|| Failure::new(format!("Invalid {what}cache option: {name}")))?;
    Ok(flags.with_cache(mode))
}

/// An image as the command line names it.
#[derive(Debug)]
pub(crate) struct Named<'a> {
    /// Its file's name, or a list of options.
    pub(crate) name: &'a str,
    /// Its format, if it is said.
    pub(crate) format: Option<&'a str>,
    /// The name is a list of options.
    pub(crate) image_opts: bool,
    /// Others may write to it.
    pub(crate) force_share: bool,
    /// More options.
    pub(crate) options: Options,
}

impl Named<'_> {
    /// Opens it.
    pub(crate) async fn open(
        &self,
        tool: &Tool,
        context: &OpenContext,
        flags: OpenFlags,
    ) -> Result<NodeRef, Failure> {
        let name = self.name;
        let mut options = self.options.clone();
        if self.image_opts {
            if self.format.is_some() {
                return Err(Failure::new("--image-opts and --format are mutually exclusive"));
            }
            options.merge_defaults(source_options(tool, name));
        } else if let Some(format) = self.format {
            options.set("driver", format);
        }
        if self.force_share {
            if options.get("force-share").is_some_and(|value| value.to_string() != "on") {
                return Err(Failure::new("--force-share/-U conflicts with image options"));
            }
            options.set("force-share", Value::Switch(true));
        }
        let probed = !options.has("driver");
        let opened = match self.image_opts {
            true => context.open(options, flags).await,
            false => context.open_filename(name, options, flags).await,
        };
        let node = opened.map_err(|error| Failure::of(&format!("Could not open '{name}': "), &error))?;
        if probed && !node.read_only() && node.driver().format_name() == "raw" {
            blockdev::warn_of_probed_raw(&blockdev::filename::of(&node));
        }
        Ok(node)
    }
}

/// The options that a list means; switches without a value are deprecated in them.
fn source_options(tool: &Tool, list: &str) -> Options {
    for item in blockdev::syntax::list::split(list, Some("file")) {
        if let Some(switch) = item.switch {
            tool.warn(format_args!("short-form boolean option '{switch}' deprecated"));
            eprintln!("Please use {}={} instead", item.key, item.value);
        }
    }
    blockdev::list_options::open_options(list, Some("file"))
}

/// What is said when an image could not be closed: what was lost, if anything is known to be, and that.
pub(crate) fn closing_failed(error: &Error) -> Vec<String> {
    let (all, errno) = (error.to_string(), error.errno());
    let lost = (all != errno.to_string()).then_some(all);
    lost.into_iter().chain([format!("Error while closing the image: {errno}")]).collect()
}

/// Closes images, and says what went wrong at that.
pub(crate) async fn close(nodes: impl IntoIterator<Item = &NodeRef>) -> Result<(), Failure> {
    let mut result = Ok(());
    for node in nodes {
        if let Err(error) = node.close().await {
            let mut lines = closing_failed(&error);
            // What was lost is said again at the end.
            lines.extend((lines.len() > 1).then(|| lines[0].clone()));
            result = result.and(Err(Failure::Messages(lines, 1)));
        }
    }
    result
}

/// Names a snapshot: by id and name, or by either.
#[derive(Debug, Clone, Default)]
pub(crate) enum SnapshotName {
    /// None.
    #[default]
    None,
    /// Whichever it is.
    Either(String),
    /// Exactly so.
    Exact {
        /// Its id.
        id: Option<String>,
        /// Its name.
        name: Option<String>,
    },
}

impl SnapshotName {
    /// What `-l` says: `snapshot.id=ID,snapshot.name=NAME`, or either.
    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        if !text.starts_with("snapshot.") {
            return Ok(Self::Either(text.to_owned()));
        }
        let (mut id, mut name) = (None, None);
        for item in blockdev::syntax::list::split(text, None) {
            match item.key.as_str() {
                "snapshot.id" => id = Some(item.value),
                "snapshot.name" => name = Some(item.value),
                other => {
                    let lines = vec![
                        format!("Invalid parameter '{other}'"),
                        format!("Failed in parsing snapshot param '{text}'"),
                    ];
                    return Err(Failure::Messages(lines, 1));
                }
            }
        }
        Ok(Self::Exact { id, name })
    }

    /// Has `node` show that snapshot.
    pub(crate) async fn load(&self, node: &NodeRef) -> Result<(), Failure> {
        let (id, name) = match self {
            Self::None => return Ok(()),
            Self::Either(text) => {
                // An id counts before a name.
                let snapshots = node.driver().image().map(block_graph::Image::snapshots).unwrap_or_default();
                let is_id = snapshots.iter().any(|snapshot| snapshot.id == *text);
                if is_id { (Some(text.as_str()), None) } else { (None, Some(text.as_str())) }
            }
            Self::Exact { id, name } => (id.as_deref(), name.as_deref()),
        };
        let loaded = match node.driver().image() {
            Some(image) => image.snapshot_load(id, name).await,
            None => Err(Error::unsupported(format!(
                "Block format '{}' used by device '' does not support feature 'temporarily load internal snapshot'",
                node.driver().format_name()
            ))),
        };
        loaded.map_err(|error| Failure::of("Failed to load snapshot: ", &error))
    }
}
