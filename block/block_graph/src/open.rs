//! How nodes are opened.

use crate::cache_mode::CacheMode;
use crate::detect_zeroes::DetectZeroes;
use crate::filename::protocol_prefix;
use crate::{Driver, Errno, Error, MeasureReport, Node, NodeRef, Options, Result, Role, Value};
use async_trait::async_trait;
use io_loop::IoBuffer;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

/// How many nodes may stand on one another: more is a loop.
const DEEPEST: usize = 200;
/// Bytes that a format is recognised by.
const PROBED: usize = 2048;

/// What a node is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenFlags {
    /// Writes are possible.
    pub writable: bool,
    /// The backing file is not opened.
    pub no_backing: bool,
    /// Only metadata are looked at: what the data need (a key, a data file) may be missing.
    pub no_io: bool,
    /// The image is going to be checked: what is wrong with it does not keep it from being opened.
    pub check: bool,
    /// Writes end when they are on stable storage (set above a node by whoever uses it: `cache.writeback=off`).
    pub write_through: bool,
    /// Past the host's page cache (`cache.direct`).
    pub direct: bool,
    /// Flushes do not reach stable storage (`cache.no-flush`).
    pub no_flush: bool,
    /// Others may write at the same time (`force-share`); only for read-only nodes.
    pub force_share: bool,
    /// Discards are passed on (`discard=unmap`).
    pub unmap: bool,
    /// What writes of zeroes to this node become; those below it have a mode of their own.
    pub detect_zeroes: DetectZeroes,
    /// The node may be made longer or shorter by writes or truncation: its user said so.
    pub resize: bool,
    /// The format was found out, not given: whoever writes could make it look like another the next time.
    pub probed: bool,
}

impl OpenFlags {
    /// To be read.
    pub const READ: Self = Self {
        writable: false,
        no_backing: false,
        no_io: false,
        check: false,
        write_through: false,
        direct: false,
        no_flush: false,
        force_share: false,
        unmap: false,
        detect_zeroes: DetectZeroes::Off,
        resize: false,
        probed: false,
    };

    /// To be read and written, with discards passed on.
    pub const WRITE: Self = Self { writable: true, unmap: true, resize: true, ..Self::READ };

    /// The same with this cache mode.
    #[must_use]
    pub fn with_cache(self, mode: CacheMode) -> Self {
        let (write_through, direct, no_flush) = match mode {
            CacheMode::None => (false, true, false),
            CacheMode::DirectSync => (true, true, false),
            CacheMode::WriteBack => (false, false, false),
            CacheMode::WriteThrough => (true, false, false),
            CacheMode::Unsafe => (false, false, true),
        };
        Self { write_through, direct, no_flush, ..self }
    }

    /// What a backing file is opened for by a node that is opened for this.
    #[must_use]
    pub fn for_backing(self) -> Self {
        Self {
            writable: false,
            resize: false,
            no_backing: false,
            unmap: false,
            detect_zeroes: DetectZeroes::Off,
            check: false,
            probed: false,
            ..self
        }
    }

    /// What the file below a format's node is opened for.
    #[must_use]
    pub fn for_file(self) -> Self {
        Self {
            resize: self.writable,
            no_backing: false,
            no_io: false,
            check: false,
            probed: false,
            unmap: true,
            detect_zeroes: DetectZeroes::Off,
            ..self
        }
    }
}

/// Who names a file, and what for.
#[derive(Debug, Clone, Copy)]
pub struct Reference<'a> {
    /// The image that names it.
    pub by: &'a str,
    /// What it is for the image.
    pub role: Role,
    /// The name, as the image has it.
    pub name: &'a str,
}

/// Whether a file that an image names may be opened: an image that comes from somebody else must not have the host's
/// files read.
pub trait OpenRule: Send + Sync {
    /// Whether `reference` may be opened with `options`, which say the driver and file name.
    ///
    /// # Errors
    /// That it may not, and why.
    fn check(&self, reference: Reference<'_>, options: &Options) -> Result<()>;
}

/// Lets images name any file: for people's own images.
#[derive(Debug, Clone, Copy, Default)]
pub struct AllowAll;

impl OpenRule for AllowAll {
    fn check(&self, _: Reference<'_>, _: &Options) -> Result<()> {
        Ok(())
    }
}

/// Lets images name no file.
#[derive(Debug, Clone, Copy, Default)]
pub struct RefuseAll;

impl OpenRule for RefuseAll {
    fn check(&self, reference: Reference<'_>, _: &Options) -> Result<()> {
        let Reference { by, role, name } = reference;
        let message = format!("'{by}' names '{name}' as its {role:?} file, and images may name none here");
        Err(Error::new(Errno::NOT_PERMITTED, message))
    }
}

/// What an option of [`DriverKind::create`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionKind {
    /// Text.
    Text,
    /// A number.
    Number,
    /// A number of bytes.
    Size,
    /// On or off.
    Switch,
}

/// An option of [`DriverKind::create`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionSpec {
    /// The name.
    pub name: &'static str,
    /// What it is.
    pub kind: OptionKind,
    /// What it does, in a line.
    pub help: &'static str,
    /// What it is where it is not given, if that can be said.
    pub default: Option<&'static str>,
    /// It can be changed later ([`crate::Image::amend`]).
    pub amendable: bool,
}

/// A format, protocol or filter: how its nodes come into being.
#[async_trait(?Send)]
pub trait DriverKind: Send + Sync {
    /// The name in options, such as "qcow2".
    fn name(&self) -> &'static str;

    /// Whether a path without a prefix leads to something that is this protocol's rather than a file.
    fn takes_path(&self, _path: &str) -> bool {
        false
    }

    /// What stands before a colon in file names that are of this protocol, such as "nbd".
    fn protocol_prefixes(&self) -> &'static [&'static str] {
        &[]
    }

    /// Whether it is a protocol: it stands on no other node, and is opened by a file name.
    fn is_protocol(&self) -> bool {
        false
    }

    /// How sure it is that a file with this name and these first bytes is of this format: 0 (not) to 100.
    fn probe(&self, _head: &[u8], _filename: &str) -> u8 {
        0
    }

    /// Takes a protocol's file name apart, with its prefix.
    ///
    /// # Errors
    /// If it is none.
    fn parse_filename(&self, filename: &str) -> Result<Options> {
        Ok(Options::with("filename", filename))
    }

    /// Opens a node. Takes out of `options` what it knows; what is left is an error of the caller's.
    ///
    /// # Errors
    /// The host's, or what is wrong with options or image.
    async fn open(
        &self,
        context: &OpenContext,
        options: &mut Options,
        flags: OpenFlags,
    ) -> Result<Box<dyn Driver>>;

    /// What [`crate::Image::amend`] takes.
    fn amend_options(&self) -> Vec<OptionSpec> {
        self.create_options().iter().filter(|spec| spec.amendable).copied().collect()
    }

    /// The options of [`DriverKind::create`]; none if it can create nothing.
    fn create_options(&self) -> &'static [OptionSpec] {
        &[]
    }

    /// Makes an image or file of this name. Takes out of `options` what it knows.
    ///
    /// # Errors
    /// The host's, or what is wrong with the options.
    async fn create(&self, _context: &OpenContext, _filename: &str, _options: &mut Options) -> Result<()> {
        Err(Error::unsupported(format!("Format driver '{}' does not support image creation", self.name())))
    }

    /// How large an image with these options would be, with `source`'s data if it is given.
    ///
    /// # Errors
    /// What is wrong with the options, or `NOT_SUPPORTED`.
    async fn measure(&self, _options: &mut Options, _source: Option<&NodeRef>) -> Result<MeasureReport> {
        Err(Error::unsupported(format!("Block driver '{}' does not support size measurement", self.name())))
    }

    /// Removes a file of this name.
    ///
    /// # Errors
    /// The host's, or `NOT_SUPPORTED`.
    async fn delete(&self, filename: &str) -> Result<()> {
        Err(Error::unsupported(format!(
            "Driver '{}' does not support image deletion: {filename}",
            self.name()
        )))
    }
}

/// The drivers that there are.
#[derive(Default)]
pub struct Registry {
    kinds: Vec<Box<dyn DriverKind>>,
}

impl Registry {
    /// No drivers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a driver.
    pub fn add(&mut self, kind: impl DriverKind + 'static) {
        self.kinds.push(Box::new(kind));
    }

    /// The driver of this name.
    pub fn find(&self, name: &str) -> Option<&dyn DriverKind> {
        self.kinds.iter().find(|kind| kind.name() == name).map(|kind| &**kind)
    }

    /// All drivers, in the order in which they were added.
    pub fn kinds(&self) -> impl Iterator<Item = &dyn DriverKind> {
        self.kinds.iter().map(|kind| &**kind)
    }

    /// The driver of this name.
    ///
    /// # Errors
    /// If there is none.
    pub fn get(&self, name: &str) -> Result<&dyn DriverKind> {
        self.find(name).ok_or_else(|| Error::invalid(format!("Unknown driver '{name}'")))
    }

    /// The protocol of a file name: that of its prefix, else `file`.
    ///
    /// # Errors
    /// If the prefix is nobody's.
    pub fn protocol_of(&self, filename: &str) -> Result<&dyn DriverKind> {
        let Some(prefix) = protocol_prefix(filename) else {
            let special = self.kinds().find(|kind| kind.takes_path(filename));
            return special.map_or_else(|| self.get("file"), Ok);
        };
        let found = self.kinds().find(|kind| kind.protocol_prefixes().contains(&prefix));
        found.ok_or_else(|| Error::new(Errno::NOT_FOUND, format!("Unknown protocol '{prefix}'")))
    }

    /// The format of a file with these first bytes: that which is surest. `raw` is sure of anything, a little.
    pub fn probe(&self, head: &[u8], filename: &str) -> Option<&dyn DriverKind> {
        // Of those that are as sure as each other the first counts.
        let (mut best, mut score) = (None, 0);
        for kind in self.kinds() {
            let sure = kind.probe(head, filename);
            if sure > score {
                (best, score) = (Some(kind), sure);
            }
        }
        best
    }
}

/// Whether a node may have this name: a letter, and letters, digits, `-`, `.` and `_`, 31 at most.
pub fn is_node_name(name: &str) -> bool {
    let mut letters = name.bytes();
    name.len() < 32
        && letters.next().is_some_and(|first| first.is_ascii_alphabetic())
        && letters.all(|letter| letter.is_ascii_alphanumeric() || b"-._".contains(&letter))
}

/// Things that must not stand in options: passwords and keys, by name.
#[derive(Default)]
pub struct Secrets {
    entries: HashMap<String, Vec<u8>>,
}

impl Secrets {
    /// Adds a secret.
    pub fn add(&mut self, id: impl Into<String>, bytes: Vec<u8>) {
        self.entries.insert(id.into(), bytes);
    }

    /// The secret of this name.
    ///
    /// # Errors
    /// If there is none.
    pub fn get(&self, id: &str) -> Result<&[u8]> {
        let found = self.entries.get(id).map(Vec::as_slice);
        found.ok_or_else(|| Error::invalid(format!("No secret with id '{id}'")))
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.entries.keys()).finish()
    }
}

/// What nodes are opened in: the drivers, the secrets, the rule for files that images name, and the nodes by name.
#[derive(Clone)]
pub struct OpenContext {
    /// The drivers.
    pub registry: Arc<Registry>,
    /// Passwords and keys.
    pub secrets: Arc<Secrets>,
    /// Whether an image's files may be opened.
    pub rule: Arc<dyn OpenRule>,
    nodes: Arc<Nodes>,
    depth: usize,
}

/// Nodes by name.
#[derive(Default)]
struct Nodes {
    named: Mutex<HashMap<String, Weak<Node>>>,
    next: AtomicU64,
    /// Held while the graph is changed.
    changing: Arc<futures_util::lock::Mutex<()>>,
}

impl OpenContext {
    /// A context of these drivers, with no node.
    pub fn new(registry: Arc<Registry>, secrets: Arc<Secrets>, rule: Arc<dyn OpenRule>) -> Self {
        Self { registry, secrets, rule, nodes: Arc::default(), depth: 0 }
    }

    /// The same context, with another rule for files that images name.
    #[must_use]
    pub fn with_rule(&self, rule: Arc<dyn OpenRule>) -> Self {
        Self { rule, ..self.clone() }
    }

    /// The node of this name.
    pub fn node(&self, name: &str) -> Option<NodeRef> {
        self.nodes.named.lock().get(name)?.upgrade().filter(|node| !node.is_closed())
    }

    pub(crate) fn changing(&self) -> Arc<futures_util::lock::Mutex<()>> {
        self.nodes.changing.clone()
    }

    /// All nodes that are in use, by name.
    pub fn nodes(&self) -> Vec<NodeRef> {
        let mut nodes: Vec<NodeRef> = self.nodes.named.lock().values().filter_map(Weak::upgrade).collect();
        nodes.retain(|node| !node.is_closed());
        nodes.sort_by(|a, b| a.name().cmp(b.name()));
        nodes
    }

    /// The context for what a node that is being opened stands on.
    ///
    /// # Errors
    /// If nodes stand on one another without end.
    fn below(&self) -> Result<Self> {
        if self.depth >= DEEPEST {
            return Err(Error::new(
                Errno::INVALID,
                format!("More than {DEEPEST} images stand on one another: a loop"),
            ));
        }
        Ok(Self { depth: self.depth + 1, ..self.clone() })
    }

    /// Opens a file by name: of the format that `options` name as `driver`, else of that which its first bytes say.
    /// `json:` names are options themselves.
    ///
    /// # Errors
    /// The host's, or what is wrong with options or image.
    pub async fn open_filename(
        &self,
        filename: &str,
        mut options: Options,
        flags: OpenFlags,
    ) -> Result<NodeRef> {
        if let Some(json) = filename.strip_prefix("json:") {
            options.merge_defaults(Options::from_json(json)?);
        } else {
            options.set_default("filename", filename);
        }
        self.open(options, flags).await
    }

    /// Opens a node by its options. Without `driver`, the format is found out.
    ///
    /// # Errors
    /// The host's, or what is wrong with options or image.
    pub async fn open(&self, mut options: Options, flags: OpenFlags) -> Result<NodeRef> {
        let mut flags = self.take_flags(&mut options, flags)?;
        let name = options.take_text("node-name");
        let driver = options.take_text("driver");
        let kind = match &driver {
            Some(driver) => {
                let kind = self.registry.get(driver)?;
                self.name_below(kind, &mut options)?;
                kind
            }
            None => {
                flags.probed = true;
                self.find_out(&mut options, flags).await?
            }
        };
        if kind.is_protocol()
            && let Some(Value::Text(filename)) = options.get("filename")
            && protocol_prefix(filename).is_some()
            && driver.is_none()
        {
            let parsed = kind.parse_filename(filename)?;
            options.take("filename");
            options.merge_defaults(parsed);
        }
        let context = self.below()?;
        let opened = Box::pin(kind.open(&context, &mut options, flags)).await?;
        if let Some(unknown) = options.first_name() {
            let message = format!("Block format '{}' does not support the option '{unknown}'", kind.name());
            return Err(Error::invalid(message));
        }
        // A driver may find that the image must not be written.
        flags.writable = flags.writable && opened.writable();
        self.add(name, opened, flags)
    }

    /// Opens a protocol's node by file name, with no format on it.
    ///
    /// # Errors
    /// The host's, or what is wrong with the name.
    pub async fn open_protocol(
        &self,
        filename: &str,
        mut options: Options,
        flags: OpenFlags,
    ) -> Result<NodeRef> {
        if let Some(json) = filename.strip_prefix("json:") {
            options.merge_defaults(Options::from_json(json)?);
        } else {
            let kind = self.registry.protocol_of(filename)?;
            options.merge_defaults(kind.parse_filename(filename)?);
            options.set_default("driver", kind.name());
        }
        Box::pin(self.open(options, flags)).await
    }

    /// Makes a file of a protocol, by its name.
    ///
    /// # Errors
    /// The host's, or what is wrong with the options.
    pub async fn create_protocol(&self, filename: &str, options: &mut Options) -> Result<()> {
        self.registry.protocol_of(filename)?.create(self, filename, options).await
    }

    /// Makes `driver` a node of this context.
    ///
    /// # Errors
    /// If there is a node of this name, or it is none.
    pub fn add(&self, name: Option<String>, driver: Box<dyn Driver>, flags: OpenFlags) -> Result<NodeRef> {
        if let Some(name) = name.as_deref().filter(|name| !is_node_name(name)) {
            return Err(Error::invalid(format!("Invalid node-name: '{name}'")));
        }
        let mut named = self.nodes.named.lock();
        let name =
            name.unwrap_or_else(|| format!("#block{:03}", self.nodes.next.fetch_add(1, Ordering::Relaxed)));
        let open = |node: &Weak<Node>| node.upgrade().is_some_and(|node| !node.is_closed());
        if named.get(&name).is_some_and(open) {
            return Err(Error::invalid(format!("Duplicate nodes with node-name='{name}'")));
        }
        named.retain(|_, node| node.strong_count() > 0);
        let node = Node::new(name.clone(), driver, flags);
        named.insert(name, Arc::downgrade(&node));
        Ok(node)
    }

    /// The node that `options` name as the child `name` (a node's name, or options that begin with "name."), opened if
    /// need be; `None` if they say nothing of it, or that there is none.
    ///
    /// # Errors
    /// The host's, or what is wrong with options or image.
    pub async fn open_child(
        &self,
        options: &mut Options,
        name: &str,
        flags: OpenFlags,
    ) -> Result<Option<NodeRef>> {
        let child = options.take_child(name);
        match options.take(name) {
            Some(Value::Node(node)) => return Ok(Some(node)),
            Some(Value::Null) => return Ok(None),
            Some(node) => {
                let node = node.to_string();
                if node.is_empty() {
                    return Ok(None);
                }
                let found = self.node(&node);
                let missing = || Error::invalid(format!("Cannot find device='' nor node-name='{node}'"));
                return found.ok_or_else(missing).map(Some);
            }
            None => {}
        }
        if child.is_empty() { Ok(None) } else { Ok(Some(Box::pin(self.open(child, flags)).await?)) }
    }

    /// The node that a format stands on: the child `file`, else the file that `filename` names.
    ///
    /// # Errors
    /// As those of [`OpenContext::open_child`], and if there is none.
    pub async fn open_file(&self, options: &mut Options, flags: OpenFlags) -> Result<NodeRef> {
        if let Some(filename) = options.take_text("filename")
            && !options.has("file")
        {
            options.set_default("file.filename", filename);
        }
        if !options.has("file") && options.has_child("file") && !options.has("file.driver") {
            let filename = options.get("file.filename").map(ToString::to_string).unwrap_or_default();
            let kind = self.registry.protocol_of(&filename)?;
            options.set("file.driver", kind.name());
            if protocol_prefix(&filename).is_some() {
                options.take("file.filename");
                let mut parsed = Options::new();
                parsed.set_child("file", kind.parse_filename(&filename)?);
                options.merge_defaults(parsed);
            }
        }
        let file = self.open_child(options, "file", flags.for_file()).await?;
        file.ok_or_else(|| Error::invalid("A block device must be specified for \"file\""))
    }

    /// Takes what every node has out of `options`.
    fn take_flags(&self, options: &mut Options, mut flags: OpenFlags) -> Result<OpenFlags> {
        if let Some(read_only) = options.take_switch("read-only")? {
            flags.writable = flags.writable && !read_only;
        }
        // Nothing is written to a node that is opened read-only, and nothing is tried in between.
        options.take_switch("auto-read-only")?;
        if let Some(direct) = options.take_switch("cache.direct")? {
            flags.direct = direct;
        }
        if let Some(no_flush) = options.take_switch("cache.no-flush")? {
            flags.no_flush = no_flush;
        }
        if let Some(writeback) = options.take_switch("cache.writeback")? {
            flags.write_through = !writeback;
        }
        if let Some(share) = options.take_switch("force-share")? {
            if share && flags.writable {
                return Err(Error::invalid("force-share=on can only be used with read-only images"));
            }
            flags.force_share = flags.force_share || share;
        }
        match options.take_text("discard").as_deref() {
            None => {}
            Some("unmap" | "on") => flags.unmap = true,
            Some("ignore" | "off") => flags.unmap = false,
            Some(other) => return Err(Error::invalid(format!("Invalid discard option: {other}"))),
        }
        if let Some(mode) = options.take_text("detect-zeroes") {
            let known = DetectZeroes::from_name(&mode);
            flags.detect_zeroes =
                known.ok_or_else(|| Error::invalid(format!("invalid parameter value: {mode}")))?;
        }
        if flags.detect_zeroes == DetectZeroes::Unmap && !flags.unmap {
            let message =
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap";
            return Err(Error::invalid(message));
        }
        Ok(flags)
    }

    /// Moves a file name to where a driver that is no protocol looks for it.
    fn name_below(&self, kind: &dyn DriverKind, options: &mut Options) -> Result<()> {
        if kind.is_protocol() {
            return Ok(());
        }
        if let Some(filename) = options.take_text("filename") {
            if let Some(json) = filename.strip_prefix("json:") {
                let mut below = Options::new();
                below.set_child("file", Options::from_json(json)?);
                options.merge_defaults(below);
            } else {
                options.set_default("file.filename", filename);
            }
        }
        Ok(())
    }

    /// Opens the file, and finds out of what format it is.
    async fn find_out(&self, options: &mut Options, flags: OpenFlags) -> Result<&dyn DriverKind> {
        let filename = options.get("filename").map(ToString::to_string);
        if !options.has_child("file") && filename.is_none() {
            return Err(Error::invalid("Must specify either driver or file"));
        }
        let context = self.below()?;
        let file = Box::pin(context.open_file(options, flags)).await?;
        let mut head = IoBuffer::zeroed(PROBED.min(usize::try_from(file.len()).unwrap_or(PROBED)));
        let len = head.len();
        let io = head.io_range(0..len);
        file.read(0, &io)
            .await
            .map_err(|error| error.context("Could not read image for determining its format"))?;
        drop(io);
        let name = filename.or_else(|| file.filename()).unwrap_or_default();
        let kind = self.registry.probe(head.bytes(), &name);
        let kind = kind
            .ok_or_else(|| Error::invalid("Could not determine image format: No compatible driver found"))?;
        options.set("file", file);
        Ok(kind)
    }
}
