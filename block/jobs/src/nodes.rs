//! Nodes by name: `blockdev-add`, `-del`, `-reopen`, and what jobs do with nodes.

use crate::blockers::Op;
use crate::inner::Inner;
use crate::parameters::{ChangeBackingFile, NewImageMode, NewTarget};
use crate::storage::Storage;
use block_graph::{
    Edge, Errno, Error, NodeRef, OpenFlags, Options, Preallocation, Result, Role, Truncate, Value,
    is_node_name, protocol_prefix,
};
use blockdev::create::NewImage;
use std::sync::Arc;

/// A name that means the same from everywhere: the path of a file is absolute.
pub(crate) fn absolute(name: &str) -> String {
    if protocol_prefix(name).is_some() {
        return name.to_owned();
    }
    let path = std::path::absolute(name).ok().and_then(|path| path.to_str().map(str::to_owned));
    path.unwrap_or_else(|| name.to_owned())
}

/// The image that filters let through: `raw` is an image.
pub(crate) fn image_of(node: &NodeRef) -> NodeRef {
    let mut node = node.clone();
    while node.driver().is_filter()
        && node.driver().format_name() != "raw"
        && let Some(below) = node.child(Role::Filtered).or_else(|| node.child(Role::File))
    {
        node = below;
    }
    node
}

/// The name by which an image records `node` as its backing file.
pub(crate) fn recorded_name(node: &NodeRef) -> String {
    absolute(&blockdev::filename::of(node))
}

/// What a node is opened for that is added by name.
fn flags_of_added(options: &mut Options) -> Result<OpenFlags> {
    // What is found read-only stays so; the rest of the flags are options, which opening takes out.
    let read_only = options.take_switch("read-only")?.unwrap_or(false);
    options.set("read-only", read_only);
    options.set_default("discard", "ignore");
    Ok(if read_only { OpenFlags::READ } else { OpenFlags::WRITE })
}

impl Inner {
    /// Whether a node or device may be named so.
    pub(crate) fn check_name(&self, name: &str) -> Result<()> {
        if !is_node_name(name) {
            return Err(Error::invalid(format!("Invalid node-name: '{name}'")));
        }
        if self.is_device(name) {
            return Err(Error::invalid(format!("node-name={name} is conflicting with a device id")));
        }
        if self.context.node(name).is_some() {
            return Err(Error::invalid(format!("Duplicate nodes with node-name='{name}'")));
        }
        Ok(())
    }

    async fn blockdev_add(&self, mut options: Options) -> Result<()> {
        if !options.has("driver") {
            return Err(Error::invalid("Parameter 'driver' is missing"));
        }
        let name = options.get("node-name").map(ToString::to_string);
        let missing = || Error::invalid("'node-name' must be specified for the root node");
        let name = name.ok_or_else(missing)?;
        self.check_name(&name)?;
        let flags = flags_of_added(&mut options)?;
        let node = self.context.open(options, flags).await?;
        self.named.borrow_mut().insert(name, Edge::new(Role::Hold, node));
        Ok(())
    }

    async fn blockdev_del(&self, name: &str) -> Result<()> {
        let missing = || Error::new(Errno::NOT_FOUND, format!("Failed to find node with node-name='{name}'"));
        let node = self.context.node(name).ok_or_else(missing)?;
        let users = self.context.users(&node);
        if users.iter().any(|(owner, edge)| owner.is_none() && edge.role() == Role::Root) {
            return Err(Error::new(Errno::BUSY, format!("Node {name} is in use")));
        }
        self.check_op(&node, Op::Delete)?;
        if !self.named.borrow().contains_key(name) {
            return Err(Error::invalid(format!("Node {name} is not owned by the monitor")));
        }
        if let Some(owner) = users.iter().find_map(|(owner, _)| owner.as_ref()) {
            let message = format!("Node '{name}' is busy: node is used as a child of '{}'", owner.name());
            return Err(Error::new(Errno::BUSY, message));
        }
        self.named.borrow_mut().remove(name);
        let below: Vec<NodeRef> = node.driver().edges().iter().map(|edge| edge.node()).collect();
        let closed = node.close().await;
        drop((node, users));
        self.release(&below).await;
        closed
    }

    /// Has a node, and the files below it, take writes, or no more. Nothing is in flight at it meanwhile.
    pub(crate) async fn set_writable(&self, node: &NodeRef, writable: bool) -> Result<()> {
        if node.read_only() != writable {
            return Ok(());
        }
        let _quiesced = self.context.quiesce(std::slice::from_ref(node)).await;
        blockdev::chain::set_writable(node, writable).await
    }

    async fn reopen_one(&self, mut options: Options) -> Result<()> {
        let name = options.take_text("node-name");
        let name = name.ok_or_else(|| Error::invalid("node-name not specified"))?;
        let node = self.context.node(&name);
        let node = node.ok_or_else(|| {
            Error::new(Errno::NOT_FOUND, format!("Failed to find node with node-name='{name}'"))
        })?;
        self.check_op(&node, Op::Reopen)?;
        let driver = options.take_text("driver");
        let driver = driver.ok_or_else(|| Error::invalid("Parameter 'driver' is missing"))?;
        if driver != node.driver().format_name() {
            return Err(Error::invalid("Cannot change the option 'driver'"));
        }
        self.check_children(&node, &mut options)?;
        let backing = match options.take("backing") {
            None => None,
            Some(Value::Null) => Some(None),
            Some(name) => Some(Some(self.find_node(&name.to_string())?)),
        };
        let read_only = options.take_switch("read-only")?.unwrap_or(false);
        let mut flags = OpenFlags { writable: !read_only, resize: !read_only, ..node.flags() };
        options.take_switch("auto-read-only")?;
        flags.direct = options.take_switch("cache.direct")?.unwrap_or(false);
        flags.no_flush = options.take_switch("cache.no-flush")?.unwrap_or(false);
        flags.force_share = options.take_switch("force-share")?.unwrap_or(false);
        flags.unmap = match options.take_text("discard").as_deref() {
            None | Some("ignore" | "off") => false,
            Some("unmap" | "on") => true,
            Some(other) => return Err(Error::invalid(format!("Invalid discard option: {other}"))),
        };
        if let Some(Some(backing)) = &backing
            && block_graph::OpenContext::stands_on(backing, &node)
        {
            let message =
                format!("Making '{}' a backing child of '{name}' would create a cycle", backing.name());
            return Err(Error::invalid(message));
        }
        if flags.writable {
            self.set_writable(&node, true).await?;
        }
        let _quiesced = self.context.quiesce(std::slice::from_ref(&node)).await;
        let mut rest = options.clone();
        if flags != node.flags() || !options.is_empty() {
            node.driver().reopen(&mut rest, flags).await?;
            node.set_flags(flags);
        }
        if let Some(unknown) = rest.first_name() {
            return Err(Error::invalid(format!("Cannot change the option '{unknown}'")));
        }
        let old = node.backing();
        if let Some(backing) = backing {
            self.check_op(&node, Op::ChangeBacking)?;
            let image = node.driver().image();
            let image = image.ok_or_else(|| {
                Error::unsupported(format!(
                    "Driver '{driver}' of node '{name}' does not support backing files"
                ))
            })?;
            image.set_backing_node(backing)?;
        }
        drop(_quiesced);
        self.release(&old.into_iter().collect::<Vec<_>>()).await;
        Ok(())
    }

    /// The nodes below stay: naming them, or what they were opened with, is right.
    fn check_children(&self, node: &NodeRef, options: &mut Options) -> Result<()> {
        for edge in node.driver().edges() {
            let child = blockdev::filename::child_name(edge.role());
            if edge.role() == Role::Backing {
                continue;
            }
            let given = options.take(&child).map(|value| value.to_string());
            let below = options.take_child(&child);
            if given.is_some_and(|given| given != edge.node().name()) {
                return Err(Error::unsupported(format!("Cannot change the option '{child}'")));
            }
            let filename = below.get("filename").map(ToString::to_string);
            if filename.is_some() && filename != edge.node().filename() {
                return Err(Error::unsupported(format!("Cannot change the option '{child}.filename'")));
            }
        }
        Ok(())
    }

    async fn block_resize(&self, name: &str, size: u64) -> Result<()> {
        let node = self.find(name)?;
        self.check_op(&node, Op::Resize)?;
        // Nobody has a request beyond the new end.
        let quiesced = self.context.quiesce(std::slice::from_ref(&node)).await;
        let how = Truncate { exact: false, preallocation: Preallocation::Off, zero: true };
        let resized = node.truncate_within(size, how).await;
        drop(quiesced);
        resized?;
        for backend in self.backends_above(&node) {
            backend.resized();
        }
        Ok(())
    }

    async fn change_backing_file(&self, change: &ChangeBackingFile) -> Result<()> {
        let top = self.find(&change.device)?;
        let node = self.context.node(&change.image_node_name);
        let missing = || Error::new(Errno::NOT_FOUND, "image file not found");
        let node = node.ok_or_else(missing)?;
        if !block_graph::OpenContext::stands_on(&top, &node) {
            return Err(Error::invalid("The image is not part of the device's chain"));
        }
        self.check_op(&node, Op::ChangeBacking)?;
        let backing = node.backing();
        let backing = backing.ok_or_else(|| {
            Error::invalid("not allowing backing file change on an image without a backing file")
        })?;
        let format = image_of(&backing).driver().format_name();
        self.record_backing(&node, Some(&change.backing_file), Some(format)).await
    }

    /// Has an image record another backing file, though it is not open for writing.
    pub(crate) async fn record_backing(
        &self,
        node: &NodeRef,
        name: Option<&str>,
        format: Option<&str>,
    ) -> Result<()> {
        let was_read_only = node.read_only();
        self.set_writable(node, true).await?;
        let image = image_of(node);
        let changed = match image.driver().image() {
            Some(image) => image.change_backing(name.filter(|name| !name.is_empty()), format).await,
            None => Err(Error::unsupported("This image format has no backing files")),
        };
        if was_read_only && let Err(error) = self.set_writable(node, false).await {
            tracing::warn!("node '{}' stays writable: {error}", node.name());
        }
        changed
    }

    /// Makes an image as long as `source`.
    pub(crate) async fn create_target(
        &self,
        source: &NodeRef,
        backing: Option<&NodeRef>,
        target: &NewTarget,
    ) -> Result<()> {
        let format =
            target.format.clone().unwrap_or_else(|| image_of(source).driver().format_name().to_owned());
        self.create_image(&target.target, &format, source.len(), backing).await
    }

    pub(crate) async fn create_image(
        &self,
        filename: &str,
        format: &str,
        size: u64,
        backing: Option<&NodeRef>,
    ) -> Result<()> {
        let named = backing.map(recorded_name);
        let backing_format = backing.map(|node| image_of(node).driver().format_name());
        let new = NewImage {
            filename,
            format,
            size: Some(size),
            backing: named.as_deref(),
            backing_format,
            unsafe_backing: true,
            ..NewImage::default()
        };
        blockdev::create::create(&self.context, &new, |_| {}).await
    }

    /// Opens a target that was made, or was there, to be written to. Its backing file is `backing`, or not opened.
    pub(crate) async fn open_target(
        &self,
        source: &NodeRef,
        target: &NewTarget,
        backing: Option<NodeRef>,
    ) -> Result<NodeRef> {
        if let Some(name) = &target.node_name {
            self.check_name(name)?;
        }
        let mut options = Options::new();
        let made = (target.mode == NewImageMode::AbsolutePaths)
            .then(|| image_of(source).driver().format_name().to_owned());
        if let Some(format) = target.format.clone().or(made) {
            options.set("driver", format);
        }
        if let Some(name) = &target.node_name {
            options.set("node-name", name.as_str());
        }
        let mut flags = OpenFlags { no_backing: backing.is_none(), ..self.write_flags(source) };
        flags.probed = false;
        if let Some(backing) = backing {
            options.set("backing", backing);
        }
        self.context.open_filename(&target.target, options, flags).await
    }

    /// What a node is opened for that takes the place of `node`.
    pub(crate) fn write_flags(&self, node: &NodeRef) -> OpenFlags {
        let flags = node.flags();
        OpenFlags {
            writable: true,
            resize: true,
            unmap: true,
            no_backing: false,
            check: false,
            probed: false,
            ..flags
        }
    }

    /// The users whose disk is as long as `node`: those on it, or on filters above it.
    fn backends_above(&self, node: &NodeRef) -> Vec<Arc<block_graph::Backend>> {
        let mut found = self.backends_on(node);
        for (owner, _) in self.context.users(node) {
            if let Some(owner) = owner.filter(|owner| owner.driver().is_filter()) {
                found.extend(self.backends_above(&owner));
            }
        }
        found
    }
}

impl Storage {
    /// `blockdev-add`: opens a node by its options, which name its driver and itself, and keeps it open.
    ///
    /// # Errors
    /// What is wrong with the options, or the driver's.
    pub fn blockdev_add(&self, options: Options) -> Result<()> {
        self.call(move |inner| Box::pin(async move { inner.blockdev_add(options).await }))
    }

    /// `blockdev-del`: closes a node that was added by name.
    ///
    /// # Errors
    /// There is none, it is in use, or something could not be written to it; it is closed then all the same.
    pub fn blockdev_del(&self, node_name: &str) -> Result<()> {
        let name = node_name.to_owned();
        self.call(move |inner| Box::pin(async move { inner.blockdev_del(&name).await }))
    }

    /// `blockdev-reopen`: changes what nodes were opened with, one after the other. What is not said is as it would be
    /// for a new node.
    ///
    /// # Errors
    /// What cannot be changed; the nodes before it in the list are changed then.
    pub fn blockdev_reopen(&self, nodes: Vec<Options>) -> Result<()> {
        self.call(move |inner| {
            Box::pin(async move {
                for options in nodes {
                    inner.reopen_one(options).await?;
                }
                Ok(())
            })
        })
    }

    /// `block_resize`: changes the length of a device's node, or of a node. What is new is zero.
    ///
    /// # Errors
    /// There is none, a job uses it, or the driver's.
    pub fn block_resize(&self, name: &str, size: u64) -> Result<()> {
        let name = name.to_owned();
        self.call(move |inner| Box::pin(async move { inner.block_resize(&name, size).await }))
    }

    /// `change-backing-file`: records another name for an image's backing file; what is open stays as it is.
    ///
    /// # Errors
    /// There is no such image, or the driver's.
    pub fn change_backing_file(&self, change: ChangeBackingFile) -> Result<()> {
        self.call(move |inner| Box::pin(async move { inner.change_backing_file(&change).await }))
    }
}
