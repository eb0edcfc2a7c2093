//! What is open, and the requests that have been begun.

use block_graph::{CacheMode, NodeRef, OpenContext, OpenFlags, Options, Value};
use blockdev::list_options::open_options;
use io_loop::Task;
use std::cell::RefCell;

/// How an image is to be opened.
#[derive(Debug, Clone)]
pub(crate) struct Opening {
    /// Its file's name, or with `image_opts` options; none if the options name it.
    pub(crate) name: Option<String>,
    /// Options.
    pub(crate) options: Options,
    /// What for.
    pub(crate) flags: OpenFlags,
    /// Others may write to it.
    pub(crate) force_share: bool,
    /// Writes go to a temporary file.
    pub(crate) snapshot: bool,
    /// What is read of a backing file is copied.
    pub(crate) copy_on_read: bool,
    /// The kind of AIO, if it is said.
    pub(crate) aio: Option<String>,
}

impl Opening {
    /// For reading and writing; writes end when they are on stable storage, as this tool has it.
    pub(crate) fn new() -> Self {
        Self {
            name: None,
            options: Options::new(),
            flags: OpenFlags { write_through: true, ..OpenFlags::WRITE },
            force_share: false,
            snapshot: false,
            copy_on_read: false,
            aio: None,
        }
    }

    /// Takes an option that the program and the command `open` both have; false if it is none of those.
    pub(crate) fn take(&mut self, key: &str, value: &str) -> Result<bool, String> {
        match key {
            "r" => {
                self.flags = OpenFlags { writable: false, resize: false, ..self.flags };
            }
            "s" => self.snapshot = true,
            "C" => self.copy_on_read = true,
            "n" => (self.flags.direct, self.flags.write_through) = (true, false),
            "U" => self.force_share = true,
            "k" => self.aio = Some("native".to_owned()),
            "i" if ["threads", "native", "io_uring"].contains(&value) => self.aio = Some(value.to_owned()),
            "i" => return Err(format!("Invalid aio option: {value}")),
            "t" => {
                let mode = CacheMode::from_name(value);
                let mode = mode.ok_or_else(|| format!("Invalid cache option: {value}"))?;
                self.flags = self.flags.with_cache(mode);
            }
            "d" => {
                self.flags.unmap = match value {
                    "unmap" | "on" => true,
                    "ignore" | "off" => false,
                    _ => return Err(format!("Invalid discard option: {value}")),
                };
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// The tool's state between commands.
pub(crate) struct Session {
    /// The program's name.
    pub(crate) program: String,
    /// Where images are opened.
    pub(crate) context: OpenContext,
    /// Names of images are lists of options.
    pub(crate) image_opts: bool,
    /// Buffers are not aligned.
    pub(crate) misaligned: bool,
    node: Option<NodeRef>,
    /// Requests that were begun and not waited for.
    requests: RefCell<Vec<Task<()>>>,
    /// The temporary file of `-s`.
    overlay: Option<tempfile::TempPath>,
}

impl Session {
    /// Nothing is open.
    pub(crate) fn new(program: &str, context: OpenContext) -> Self {
        Self {
            program: program.to_owned(),
            context,
            image_opts: false,
            misaligned: false,
            node: None,
            requests: RefCell::default(),
            overlay: None,
        }
    }

    /// The open image.
    pub(crate) fn node(&self) -> Option<&NodeRef> {
        self.node.as_ref()
    }

    /// Says what went wrong.
    pub(crate) fn error(&self, message: impl std::fmt::Display) {
        crate::output::flush();
        eprintln!("{}: {message}", self.program);
    }

    /// Opens an image; what goes wrong is said.
    pub(crate) async fn open(&mut self, opening: Opening) -> Result<(), ()> {
        if self.node.is_some() {
            self.error("file open already, try 'help close'");
            return Err(());
        }
        if opening.copy_on_read && !opening.flags.writable {
            let device = opening.name.map_or_else(String::new, |name| format!(" device {name}"));
            self.error(format_args!("can't open{device}: Can't use copy-on-read on read-only device"));
            return Err(());
        }
        let Opening { name, mut options, mut flags, force_share, .. } = opening;
        if force_share {
            if options.get("force-share").is_some_and(|value| value.to_string() != "on") {
                self.error("-U conflicts with image options");
                return Err(());
            }
            options.set("force-share", Value::Switch(true));
        }
        if let Some(aio) = opening.aio
            && name.as_ref().is_some_and(|name| !name.contains(':'))
            && aio != "threads"
        {
            options.set_default("file.aio", aio);
        }
        let writable = flags.writable;
        flags.writable &= !opening.snapshot;
        let probed = !options.has("driver");
        let opened = match &name {
            Some(name) => self.context.open_filename(name, options, flags).await,
            None => self.context.open(options, flags).await,
        };
        let mut node = match opened {
            Ok(node) => node,
            Err(error) => {
                let device = name.map_or_else(String::new, |name| format!(" device {name}"));
                self.error(format_args!("can't open{device}: {error}"));
                error.hints().iter().for_each(|hint| eprintln!("{hint}"));
                return Err(());
            }
        };
        if opening.snapshot {
            node = self.overlay(node, OpenFlags { writable, ..flags }).await?;
        } else if opening.copy_on_read {
            node = self.filter(node, "copy-on-read", flags).await?;
        }
        if probed && !node.read_only() && node.driver().format_name() == "raw" {
            blockdev::warn_of_probed_raw(&blockdev::filename::of(&node));
        }
        self.node = Some(node);
        Ok(())
    }

    /// Puts a filter on a node.
    async fn filter(&self, node: NodeRef, kind: &str, flags: OpenFlags) -> Result<NodeRef, ()> {
        let mut options = Options::with("driver", kind);
        options.set("file", Value::Node(node));
        self.context
            .open(options, flags)
            .await
            .map_err(|error| self.error(format_args!("can't open: {error}")))
    }

    /// Puts an empty image on a node, which takes the writes and goes with the session.
    async fn overlay(&mut self, node: NodeRef, flags: OpenFlags) -> Result<NodeRef, ()> {
        let fail = |session: &Self, error: String| session.error(format_args!("can't open: {error}"));
        let file = tempfile::Builder::new().prefix("vl.").tempfile();
        let path = match file.map(tempfile::NamedTempFile::into_temp_path) {
            Ok(path) => path,
            Err(error) => {
                fail(self, format!("Could not get temporary filename: {error}"));
                return Err(());
            }
        };
        let name = path.to_string_lossy().into_owned();
        let new = blockdev::create::NewImage {
            filename: &name,
            format: "qcow2",
            size: Some(node.len()),
            ..blockdev::create::NewImage::default()
        };
        let mut options = Options::with("driver", "qcow2");
        options.set("file.filename", name.as_str());
        options.set("backing", Value::Node(node));
        let made = async {
            blockdev::create::create(&self.context, &new, |_| ()).await?;
            self.context.open(options, OpenFlags { writable: true, resize: true, ..flags }).await
        };
        match made.await {
            Ok(overlay) => {
                self.overlay = Some(path);
                Ok(overlay)
            }
            Err(error) => {
                fail(self, error.to_string());
                Err(())
            }
        }
    }

    /// Closes the image, after the requests.
    pub(crate) async fn close(&mut self) -> Result<(), block_graph::Error> {
        self.wait_for_requests().await;
        let closed = match self.node.take() {
            Some(node) => node.close().await,
            None => Ok(()),
        };
        self.overlay = None;
        closed
    }

    /// Lets a request go on beside the commands.
    pub(crate) fn begin(&self, request: impl Future<Output = ()> + 'static) {
        self.requests.borrow_mut().push(io_loop::spawn(request));
    }

    /// Waits until no request is in flight.
    pub(crate) async fn wait_for_requests(&self) {
        loop {
            let requests = std::mem::take(&mut *self.requests.borrow_mut());
            if requests.is_empty() {
                return;
            }
            for request in requests {
                request.await;
            }
        }
    }

    /// The options of a list that names an image.
    pub(crate) fn listed(&self, list: &str) -> Options {
        for item in blockdev::syntax::list::split(list, None) {
            if let Some(switch) = item.switch {
                self.error(format_args!("warning: short-form boolean option '{switch}' deprecated"));
                eprintln!("Please use {}={} instead", item.key, item.value);
            }
        }
        open_options(list, None)
    }
}
